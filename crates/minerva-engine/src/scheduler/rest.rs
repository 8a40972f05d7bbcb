//! What failed is not tried again at once, and each time later: it may never work, or only not have worked then.

/// How long something that failed is left alone, on any clock that only goes forward.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rest {
    /// After the first failure; each time after it twice as long.
    first: u64,
    /// And never longer. After so long without a failure earlier ones are forgotten.
    longest: u64,
    n_failed: u32,
    until: u64,
}

impl Rest {
    pub(super) const fn new(first: u64, longest: u64) -> Self {
        Self { first, longest, n_failed: 0, until: 0 }
    }

    /// It failed. What fails together with it, or was begun before, is the same failure.
    pub(super) fn fail(&mut self, now: u64) {
        if !self.is_over(now) {
            return;
        }
        if now - self.until >= self.longest {
            self.n_failed = 0;
        }
        let doubled = self.first.saturating_mul(1_u64.checked_shl(self.n_failed).unwrap_or(u64::MAX));
        self.until = now.saturating_add(doubled.min(self.longest));
        self.n_failed = self.n_failed.saturating_add(1);
    }

    /// It worked.
    pub(super) fn forget(&mut self) {
        self.n_failed = 0;
    }

    pub(super) fn is_over(&self, now: u64) -> bool {
        now >= self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until_over(rest: &Rest, now: u64) -> u64 {
        (now..=now + 65_537).find(|&later| rest.is_over(later)).expect("it ends") - now
    }

    #[test]
    fn it_is_tried_more_and_more_rarely_and_forgotten_when_it_works() {
        let (mut rest, mut now) = (Rest::new(64, 65_536), 0);
        assert!(rest.is_over(now));
        for expected in [64, 128, 256] {
            (0..20).for_each(|_| rest.fail(now));
            assert_eq!(until_over(&rest, now), expected);
            now += expected;
        }
        now += 65_536;
        rest.fail(now);
        assert_eq!(until_over(&rest, now), 64);
        for _ in 0..100 {
            now += until_over(&rest, now);
            rest.fail(now);
            assert!(until_over(&rest, now) <= 65_536);
        }
        now += until_over(&rest, now);
        rest.forget();
        rest.fail(now);
        assert_eq!(until_over(&rest, now), 64);
    }
}
