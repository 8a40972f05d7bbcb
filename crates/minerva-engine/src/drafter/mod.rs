//! Who guesses the next tokens: one trait for prompt lookup and for a draft model.
//!
//! The scheduler decides for whom a guess is worth its time and how long it may be ([`Wish`]); a [`Drafter`] gives the tokens. It
//! never decides what is said: each token is sampled from the scores of the main model, and the first that differs ends the guess.

mod guess;
mod lookup;
mod model;

pub use guess::{Draft, DraftError, Drafted, Drafter, Wish};
pub use lookup::Lookup;
pub(crate) use lookup::look_up;
pub use model::{DraftSettings, ModelDrafter};
