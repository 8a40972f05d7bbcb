//! Tells those who wait, if they want to hear it, where they are in the queue; and everybody else when a place in it will be free.

use std::time::{Duration, Instant};

use crate::event::Event;

/// No request hears of its place more often.
const BETWEEN: Duration = Duration::from_secs(1);

/// Nobody's place is looked up more often, however many requests come.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// When the queue was looked at last.
#[derive(Debug, Default)]
pub(crate) struct QueueWatch {
    last: Option<Instant>,
    /// Somebody came since who wants to hear his place.
    has_new: bool,
}

impl QueueWatch {
    /// A request waits and wants to be told its place.
    pub(crate) fn came(&mut self) {
        self.has_new = true;
    }

    /// Whether to look at the queue now.
    pub(crate) fn is_due(&mut self, now: Instant) -> bool {
        let pause = if self.has_new { BETWEEN_LOOKS } else { BETWEEN };
        let is_due = self.last.is_none_or(|last| now.saturating_duration_since(last) >= pause);
        if is_due {
            self.last = Some(now);
            self.has_new = false;
        }
        is_due
    }
}

/// What one request has been told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    last: Option<(Instant, Event)>,
}

impl Told {
    /// The event for this place, if there is something new to say and it is time.
    pub(crate) fn tell(&mut self, position: u32, estimate_us: Option<u64>, now: Instant) -> Option<Event> {
        let event = Event::Queued { position, estimate_ms: estimate_us.map(|us| us.div_ceil(1000)) };
        let is_heard =
            self.last.as_ref().is_some_and(|(at, last)| *last == event || now.saturating_duration_since(*at) < BETWEEN);
        if is_heard {
            return None;
        }
        self.last = Some((now, event.clone()));
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_told_when_it_changes_and_at_most_once_a_second() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut told = Told::default();
        let queued = |position, estimate_ms| Some(Event::Queued { position, estimate_ms });
        assert_eq!(told.tell(3, None, at(0)), queued(3, None));
        assert_eq!(told.tell(2, None, at(500)), None, "too soon");
        assert_eq!(told.tell(2, Some(1_001), at(1_000)), queued(2, Some(2)));
        assert_eq!(told.tell(2, Some(1_001), at(5_000)), None, "nothing new");
        assert_eq!(told.tell(2, Some(9_000), at(6_000)), queued(2, Some(9)));
    }

    #[test]
    fn the_queue_is_looked_at_once_a_second_and_sooner_for_who_comes() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut watch = QueueWatch::default();
        assert!(watch.is_due(at(0)) && !watch.is_due(at(999)) && watch.is_due(at(1_000)));
        watch.came();
        assert!(!watch.is_due(at(1_050)) && watch.is_due(at(1_100)) && !watch.is_due(at(1_300)));
    }
}
