//! How guesses are made, and how sure of a token one has to be.

use crate::request::TokenId;
use crate::sampler::likeliest;

/// How guesses are made.
#[derive(Debug, Clone, PartialEq)]
pub struct DraftSettings {
    /// A token less likely than this ends a guess.
    pub min_probability: f32,
    /// A shorter guess is none.
    pub min_tokens: u32,
    /// Tokens of the main model's vocabulary: a draft model may have a few more.
    pub n_vocab: usize,
    /// Tokens that nothing follows.
    pub ends: Vec<TokenId>,
}

/// The likeliest token, if it is likely enough.
pub(super) fn sure_token(logits: &[f32], settings: &DraftSettings) -> Option<TokenId> {
    let n_vocab = settings.n_vocab.min(logits.len());
    let sure = likeliest(&logits[..n_vocab]).filter(|(_, p)| *p >= settings.min_probability);
    sure.map(|(token, _)| token)
}
