//! Who guesses the next tokens: the text itself, by what it has said before, or a draft model.
//!
//! The scheduler decides for whom a guess is worth its time and how long it may be. The text is looked up at once; a draft model is a
//! [`Drafter`], which gets [`Wish`]es and gives the tokens. Neither decides what is said: each token is sampled from the scores of
//! the main model, and the first that differs ends the guess.

mod guess;
mod lookup;
mod model;

pub use guess::{Draft, DraftError, Drafted, Drafter, Wish};
pub(crate) use lookup::said_before;
pub use model::{DraftSettings, ModelDrafter};
