//! What the scheduler knows of guesses.

#[path = "../../../crates/minerva-engine/src/drafter/guess.rs"]
mod guess;
#[path = "../../../crates/minerva-engine/src/drafter/lookup.rs"]
mod lookup;

pub use guess::{Draft, DraftError, Drafted, Drafter, Wish};
pub(crate) use lookup::said_before;
