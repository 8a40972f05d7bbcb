//! Who guesses the next tokens: the text itself, by what it has said before, or a draft model.
//!
//! The scheduler decides for whom a guess is worth its time and how long it may be. The text is looked up at once; a draft model and
//! a model's own head for multi-token prediction are a [`Drafter`], which gets [`Wish`]es and gives the tokens. Neither decides what is said: each token is sampled from the scores of
//! the main model, and the first that differs ends the guess.

mod guess;
mod head;
mod lookup;
mod model;
mod settings;

pub use guess::{Draft, DraftError, Drafted, Drafter, Wish};
pub use head::{Followed, HeadDrafter, followed};
pub(crate) use lookup::said_before;
pub use model::ModelDrafter;
pub use settings::DraftSettings;
use settings::sure_token;
