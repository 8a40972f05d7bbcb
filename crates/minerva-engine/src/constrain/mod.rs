//! Constrained output: a JSON schema, a regular expression or a grammar that every finished answer follows.
//!
//! A [`Constraint`] is plain data on a [`Request`](crate::Request). It is compiled before the request is admitted, on
//! threads of its own ([`compilers`]), against the model's vocabulary ([`vocabulary`]); compiled ones are kept by their text
//! ([`cache`]). While the request runs, each choice has a [`matcher`]: it turns the grammar's state into the mask that the
//! sampler draws under, computed on another thread while the backend computes the step, or into the tokens that have to come
//! whatever the model says. The parsing itself is llguidance's.
//! Start with [`compile`].
//!
//! # Invariants
//! - It fails closed: what cannot be compiled is refused with the place where it fails, never ignored in part.
//! - Time and memory of a compilation are bounded, and the engine thread and other requests never wait for one.
//! - The engine thread waits for a mask only if it is not ready when the step is.
mod cache;
mod compile;
mod compilers;
mod expansion;
mod gbnf;
mod matcher;
mod meters;
mod schema;
mod vocabulary;

use serde::{Deserialize, Serialize};

pub(crate) use self::compilers::{Compilers, Waiting};
pub(crate) use self::matcher::{Allowed, MatchError, Matcher, Progress};
pub use self::meters::ConstraintStats;
pub(crate) use self::meters::Meters;

/// What an answer has to follow. An answer that ends by itself does; one that `max_tokens` or a stop text cuts is a
/// beginning of one that does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under this schema, with properties in the schema's order. Draft 2020-12 and before, without `not`,
    /// `if`, `contains`, `uniqueItems` and other keywords that look at a value twice.
    JsonSchema(serde_json::Value),
    /// A match of the whole answer, in the syntax of Rust's `regex` crate; `\d`, `\w` and `\s` are ASCII.
    Regex(String),
    /// A grammar in llguidance's variant of Lark; its rule `start` is the answer.
    Lark(String),
    /// A grammar in llama.cpp's GBNF; its rule `root` is the answer.
    Gbnf(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// A constraint that cannot be kept: nothing of its request was computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}{}", .location.as_ref().map_or_else(String::new, |location| format!(" (at `{location}`)")))]
pub struct ConstraintError {
    /// Where: a JSON pointer into the schema (empty for its root), or `line L, column C` of a grammar. `None` where only the
    /// whole is known to be at fault.
    pub location: Option<String>,
    /// What is wrong there, with limit and given value where it is a limit.
    pub problem: String,
}

impl ConstraintError {
    fn whole(problem: impl Into<String>) -> Self {
        Self { location: None, problem: problem.into() }
    }

    fn at(location: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { location: Some(location.into()), problem: problem.into() }
    }
}
