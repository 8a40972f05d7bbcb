//! Why the device that was asked for cannot be used. Every text ends in what to do about it.

use crate::choice::DeviceChoice;

/// Why a context could not be made, or its device no longer answers.
///
/// [`DeviceChoice::Auto`] and [`DeviceChoice::Cpu`] never fail to select: the CPU is always there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// The machine may have the device, but llama.cpp was built without its backend.
    #[error(
        "`--gpu={choice}` was asked for, but this build has no {backend} backend: rebuild with `--features {feature}`{needs}, or use `--gpu=auto`"
    )]
    NotInBuild {
        /// What was asked for.
        choice: DeviceChoice,
        /// The backend's name as people write it: `CUDA`.
        backend: &'static str,
        /// The cargo feature that adds it: `cuda`.
        feature: &'static str,
        /// What that build needs, as the rest of the sentence: ` (needs the CUDA toolkit, nvcc)`.
        needs: &'static str,
    },
    /// No device of the kind was found at all.
    #[error("`--gpu={choice}` was asked for, but {why}")]
    NotFound {
        /// What was asked for.
        choice: DeviceChoice,
        /// What was found instead and what to install.
        why: String,
    },
    /// There are devices of the kind, but not with this number.
    #[error("`--gpu={choice}` was asked for, but {available}")]
    NoSuchIndex {
        /// What was asked for.
        choice: DeviceChoice,
        /// The devices that there are.
        available: String,
    },
    /// The device is there and cannot be used.
    #[error("`--gpu={choice}` was asked for, but {device} cannot be used: {reason}")]
    Unusable {
        /// What was asked for.
        choice: DeviceChoice,
        /// Its label and name.
        device: String,
        /// The same text as in [`DeviceInfo::unusable`](crate::DeviceInfo::unusable).
        reason: String,
    },
    /// The device was there at start and its driver no longer answers for it.
    #[error("{device} no longer answers: {reason}")]
    DeviceLost {
        /// Its label and name.
        device: String,
        /// What the driver says.
        reason: String,
    },
}
