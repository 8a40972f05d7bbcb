//! What the scheduler knows of a backend.

#[path = "../../../crates/minerva-engine/src/backend/limits.rs"]
mod limits;

pub use limits::{BackendLimits, Row, SeqId, StepError};
