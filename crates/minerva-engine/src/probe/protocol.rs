//! What the child says to its parent: one JSON object a line, before each step what it is about to do.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::report::{Failure, ProbedDevice, Step, Subject};

/// One line of the child's stdout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Line {
    /// If the process ends or hangs now, it is because of this.
    Begin { subject: Subject, step: Step },
    /// The step returned a failure.
    Failed { subject: Subject, step: Step, failure: Failure },
    /// The module was loaded and is the one to use.
    Loaded { module: PathBuf },
    /// A device was listed; [`Passed`](Self::Passed) follows when it works.
    Device(ProbedDevice),
    /// Everything that was asked of it worked.
    Passed { subject: Subject },
    /// Nothing more to try.
    End,
}

/// The argument before each subject that the child leaves alone, as JSON.
pub(super) const SKIP: &str = "--skip";
