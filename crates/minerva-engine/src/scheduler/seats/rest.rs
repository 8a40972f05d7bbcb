//! What failed is not tried again at once, and each time later: it may never work, or only not have worked then.

/// Steps after the first failure.
const FIRST_REST_STEPS: u64 = 64;

/// After so many failures it is tried no more rarely: once in 65,536 steps.
const MOST_DOUBLINGS: u32 = 10;

/// After so many steps in which it was not left alone, and did not fail, earlier failures are forgotten.
const MEMORY_STEPS: u64 = 65_536;

/// How long something that failed is left alone.
#[derive(Debug, Default)]
pub(super) struct Rest {
    failures: u32,
    steps_left: u64,
    steps_since: u64,
}

impl Rest {
    /// It failed. What fails together with it, or was begun before, is the same failure.
    pub(super) fn fail(&mut self) {
        if self.is_over() {
            self.steps_left = FIRST_REST_STEPS << self.failures.min(MOST_DOUBLINGS);
            self.failures = self.failures.saturating_add(1);
            self.steps_since = 0;
        }
    }

    pub(super) fn count_step(&mut self) {
        if !self.is_over() {
            self.steps_left -= 1;
            return;
        }
        self.steps_since += 1;
        if self.steps_since >= MEMORY_STEPS {
            (self.failures, self.steps_since) = (0, 0);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.steps_left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps_until_over(rest: &mut Rest) -> u64 {
        let mut n_steps = 0;
        while !rest.is_over() {
            rest.count_step();
            n_steps += 1;
        }
        n_steps
    }

    #[test]
    fn it_is_tried_more_and_more_rarely_and_forgotten_when_it_works() {
        let mut rest = Rest::default();
        assert!(rest.is_over());
        for n_steps in [64, 128, 256] {
            (0..20).for_each(|_| rest.fail());
            assert_eq!(steps_until_over(&mut rest), n_steps);
        }
        (0..MEMORY_STEPS).for_each(|_| rest.count_step());
        rest.fail();
        assert_eq!(steps_until_over(&mut rest), 64);
        for _ in 0..40 {
            rest.fail();
            assert!(steps_until_over(&mut rest) <= 65_536);
        }
    }
}
