//! Holds the simulator's steps until everything that a test wants to see together is there.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// No step ends while it is held. Clones are the same brake.
#[derive(Debug, Clone, Default)]
pub struct SimBrake(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    is_held: Mutex<bool>,
    released: Condvar,
}

impl SimBrake {
    /// Holds the next step, or the one that runs.
    pub fn hold(&self) {
        self.set(true);
    }

    /// Lets steps go on.
    pub fn release(&self) {
        self.set(false);
        self.0.released.notify_all();
    }

    fn set(&self, is_held: bool) {
        *self.0.is_held.lock().unwrap_or_else(PoisonError::into_inner) = is_held;
    }

    pub(super) fn wait(&self) {
        let is_held = self.0.is_held.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.0.released.wait_while(is_held, |is_held| *is_held));
    }
}

impl PartialEq for SimBrake {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
