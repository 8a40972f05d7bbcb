//! What the models of this process hold of each device. A limit is for all of them together: a later plan gets what the earlier
//! ones leave.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    /// A device, by llama.cpp's index.
    Device(usize),
    Host,
}

static CLAIMED: Mutex<BTreeMap<Owner, u64>> = Mutex::new(BTreeMap::new());

/// What one model holds, until this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    parts: Vec<(Owner, u64)>,
}

/// What all models together hold now.
pub(super) fn claimed(owner: Owner) -> u64 {
    let claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    claimed.get(&owner).copied().unwrap_or(0)
}

impl Claim {
    /// Of what somebody else has claimed.
    pub(super) fn nothing() -> Self {
        Self { parts: Vec::new() }
    }

    /// Claims these parts unless `refuse` has a reason against it, which is given what the others hold of an owner. Nobody else
    /// claims in between.
    pub(super) fn unless<E>(
        parts: Vec<(Owner, u64)>,
        refuse: impl FnOnce(&dyn Fn(Owner) -> u64) -> Option<E>,
    ) -> Result<Self, E> {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = refuse(&|owner| claimed.get(&owner).copied().unwrap_or(0)) {
            return Err(reason);
        }
        for &(owner, bytes) in &parts {
            *claimed.entry(owner).or_default() += bytes;
        }
        Ok(Self { parts })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
        for (owner, bytes) in &self.parts {
            let left = claimed.get(owner).map_or(0, |all| all.saturating_sub(*bytes));
            claimed.insert(*owner, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No load of another test has such a device.
    const DEVICE: Owner = Owner::Device(usize::MAX);

    #[test]
    fn claims_add_up_and_end_with_their_model() {
        let nothing_against = |_: &dyn Fn(Owner) -> u64| None::<()>;
        let first = Claim::unless(vec![(DEVICE, 300)], nothing_against).unwrap();
        let second = Claim::unless(vec![(DEVICE, 30)], |claimed| (claimed(DEVICE) > 300).then_some(())).unwrap();
        assert_eq!(claimed(DEVICE), 330);
        let refused = Claim::unless(vec![(DEVICE, 3)], |claimed| Some(claimed(DEVICE)));
        assert_eq!((refused.unwrap_err(), claimed(DEVICE)), (330, 330));
        drop(first);
        assert_eq!(claimed(DEVICE), 30);
        drop(second);
        assert_eq!(claimed(DEVICE), 0);
    }
}
