//! Random schedules, with steps and copies that fail.

use proptest::prelude::*;

use super::checkpoints::{hybrid, recurrent, window};
use super::replay::{Fault, Replay};
use super::{Keep, Script, Terms, limits, pool};
use crate::backend::BackendLimits;
use crate::scheduler::{DraftLimits, Policy, Reservation};

prop_compose! {
    /// Requests behind two shared texts, some with several choices, some cancelled, some with more room than they use.
    fn script(n_seq_max: u32)(
        at_tick in 0_usize..40,
        text in 0_u64..2,
        n_shared in 0_i32..24,
        n_own in 0_i32..20,
        n in 1..=n_seq_max.min(3),
        n_generate in 1_u32..12,
        n_spare in 0_u32..6,
        reuse in prop::bool::weighted(0.8),
        client in 0_u64..3,
        (period, forces) in (prop::option::of(1_usize..5), any::<bool>()),
        priority in prop::sample::select(vec![0_i32, 0, 0, -1, 2]),
        (key, keep_ms) in (prop::option::of(0_u64..3), prop::option::of(1_u64..60)),
        cancelled_after in prop::option::weighted(0.3, 0_usize..12),
    ) -> Script {
        let cancelled_at = cancelled_after.map(|ticks| at_tick + ticks);
        let keep = Keep::new(key, keep_ms, at_tick as u64 * 1000);
        let terms = Terms { client, priority, namespace: client % 2, keep, ..Terms::default() };
        let script =
            Script { id: 0, at_tick, prompt: Vec::new(), n, n_generate, n_spare, reuse, period, guess: true,
            forces, terms, cancelled_at };
        // Own parts have tokens in common too, and at least one, so that no prompt is empty.
        script.text(text, 0..n_shared).text(2, n_own..n_own + 1 + n_own)
    }
}

prop_compose! {
    fn schedule()(n_seq_max in 1_u32..=5)(
        n_seq_max in Just(n_seq_max),
        scripts in prop::collection::vec(script(n_seq_max), 1..24),
    ) -> (u32, Vec<Script>) {
        let numbered = scripts.into_iter().zip(1000..).map(|(script, id)| Script { id, ..script });
        (n_seq_max, numbered.collect())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_schedule_keeps_the_books_and_ends(
        (n_seq_max, scripts) in schedule(),
        unified in any::<bool>(),
        // The largest request has 3 choices of 24 + 20 + 12 + 6 cells.
        n_pool in 186_u32..400,
        reservation in prop::sample::select(vec![Reservation::Full, Reservation::Expected]),
        n_batch in prop::sample::select(vec![1_u32, 3, 8, 32, 128]),
        faults in prop::collection::btree_map(0_usize..120, prop::sample::select(vec![Fault::CacheUnchanged, Fault::HalfWritten]), 0..4),
        cannot_cut in prop::bool::weighted(0.3),
        memory in 0_u32..5,
        cannot_copy in prop::bool::weighted(0.2),
        cannot_park in prop::bool::weighted(0.2),
        us_per_row in prop::sample::select(vec![0_u64, 100, 50_000]),
        // With the longest a few ticks of waiting are worth a priority.
        us_per_tick in prop::sample::select(vec![1000_u64, 1_000_000, 4_000_000]),
        draft in prop::option::of((0.0_f64..=1.0, prop::sample::select(vec![0_u64, 50, 5_000]), 0_u32..5, any::<bool>())),
        draft_fails_at in prop::option::weighted(0.2, 0_usize..60),
    ) {
        let base = if unified { pool(n_seq_max, n_pool) } else { limits(n_seq_max, n_batch) };
        let base = match memory {
            0 => base,
            1 => recurrent(base),
            2 => hybrid(base),
            3 => window(base, 9),
            _ => BackendLimits { n_copied_window_tokens: 9, ..base },
        };
        let limits = BackendLimits { n_batch, n_ubatch: n_batch, ..base };
        let policy = Policy {
            host_cache_bytes: 200,
            max_checkpoints: 4,
            reservation,
            guess: draft.is_none_or(|(.., looks_up)| looks_up),
            draft: draft.map(|(_, _, min_tokens, _)| DraftLimits { max_tokens: 8, min_tokens }),
            ..Policy::default()
        };
        let mut replay = Replay::with_policy(limits, policy);
        replay.draft_quality = draft.map(|(quality, ..)| quality);
        replay.us_per_draft = draft.map_or(0, |(_, us, ..)| us);
        replay.draft_fails_at = draft_fails_at;
        replay.cannot_cut = cannot_cut;
        replay.cannot_copy = cannot_copy;
        replay.cannot_park = cannot_park;
        replay.us_per_row = us_per_row;
        replay.us_per_tick = us_per_tick;
        replay.run(&scripts, &faults);
    }
}
