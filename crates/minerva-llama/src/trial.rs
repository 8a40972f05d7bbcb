//! Tries a device: a few kilobytes of its memory and one small matrix product, compared with the same in plain doubles.
//!
//! For a process that may crash or hang instead of one that must not: broken drivers, code for another GPU and instructions
//! that the CPU lacks show themselves here. Start with [`try_device`]; call [`prepare_trial_process`] before it.

use std::ptr::{self, NonNull};

use crate::error::{CallError, call};
use crate::{backend, log, sys};

/// What [`try_device`] is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrialStep {
    /// Initialise the device and take some of its memory.
    Allocate,
    /// Compute.
    Compute,
}

/// Why a device cannot be used, when it did not end the process.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TrialError {
    /// It refused a step.
    #[error(transparent)]
    Refused(#[from] CallError),
    /// It computed something else.
    #[error(
        "the product is wrong: its normalised distance to the right one is {distance:.1e}, the limit is {LIMIT:.0e}"
    )]
    Wrong {
        /// Mean squared distance over mean square; NaN when a value is one.
        distance: f64,
    },
}

/// Backends round the inputs of quantized products to 8 bits, which is a distance of about 1e-5 here; a wrong kernel's is
/// about 1.
const LIMIT: f64 = 1e-3;

/// Makes this process one that may crash without a trace: no core file, no life beyond its parent's, errors of llama.cpp on
/// stderr as they come.
pub fn prepare_trial_process() {
    log::echo_errors();
    #[cfg(target_os = "linux")]
    {
        use rustix::process;
        // Failures leave a core file or a stray process, nothing worse.
        let none = process::Rlimit { current: Some(0), maximum: Some(0) };
        let _ = process::setrlimit(process::Resource::Core, none);
        let _ = process::set_parent_process_death_signal(Some(process::Signal::KILL));
    }
}

/// Tries the device at `index`, with repacked weights if asked to. `before` hears of each step before it is taken. A device that
/// does not compute such products, such as a helper of the CPU, passes.
///
/// # Errors
/// [`TrialError`], when the process is still there to return it.
pub fn try_device(index: usize, repacked: bool, before: &mut dyn FnMut(TrialStep)) -> Result<(), TrialError> {
    if index >= backend::n_devices() {
        return Err(CallError::Argument(format!("there is no device {index}")).into());
    }
    let device = backend::raw_device(index);
    log::take_last_error(); // of an earlier call
    before(TrialStep::Allocate);
    let mut raw = ptr::null_mut();
    // SAFETY: a device of ggml's registry; `raw` receives the trial.
    call(|error| unsafe { sys::mnv_trial_new(device, repacked, &raw mut raw, error) })?;
    let Some(trial) = NonNull::new(raw).map(Trial) else { return Ok(()) };
    before(TrialStep::Compute);
    let mut distance = f64::NAN;
    // SAFETY: a live trial; `distance` receives the result.
    call(|error| unsafe { sys::mnv_trial_run(trial.0.as_ptr(), &raw mut distance, error) })?;
    if distance <= LIMIT { Ok(()) } else { Err(TrialError::Wrong { distance }) } // NaN is wrong too
}

struct Trial(NonNull<sys::mnv_trial>);

impl Drop for Trial {
    fn drop(&mut self) {
        // SAFETY: made by `mnv_trial_new`, freed only here.
        unsafe { sys::mnv_trial_free(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_here_computes_the_right_product_in_both_layouts() {
        for device in backend::devices() {
            for repacked in [false, true] {
                let mut steps = Vec::new();
                try_device(device.index, repacked, &mut |step| steps.push(step)).expect("a sound device");
                assert_eq!(steps[0], TrialStep::Allocate);
                assert!(repacked || steps.len() == 2, "{} computed nothing", device.name);
            }
        }
        assert!(matches!(try_device(9_999, false, &mut |_| ()), Err(TrialError::Refused(_))));
    }
}
