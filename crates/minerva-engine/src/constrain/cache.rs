//! Compiled grammars by the text of their constraint, the least recently used leaving first.

use std::collections::HashMap;

/// Bounded in entries and in bytes: a flood of schemas that are all different costs compilations, not memory.
#[derive(Debug)]
pub(super) struct Cache<V> {
    entries: HashMap<String, Entry<V>>,
    max_entries: usize,
    max_bytes: usize,
    n_bytes: usize,
    /// Counts uses, to order entries by their last one.
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    n_bytes: usize,
    last_use: u64,
}

impl<V: Clone> Cache<V> {
    pub(super) fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self { entries: HashMap::new(), max_entries, max_bytes, n_bytes: 0, clock: 0 }
    }

    pub(super) fn get(&mut self, key: &str) -> Option<V> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.clock;
        Some(entry.value.clone())
    }

    /// Keeps `value`, which takes `n_bytes` beside its key, and drops others where that is too much. One that is too large
    /// by itself is not kept.
    pub(super) fn insert(&mut self, key: String, value: V, n_bytes: usize) {
        let n_bytes = n_bytes + key.len();
        self.remove(&key);
        if n_bytes > self.max_bytes {
            return;
        }
        while self.entries.len() >= self.max_entries || self.n_bytes + n_bytes > self.max_bytes {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { return };
            self.remove(&oldest);
        }
        self.clock += 1;
        self.n_bytes += n_bytes;
        self.entries.insert(key, Entry { value, n_bytes, last_use: self.clock });
    }

    /// Entries, and the bytes that they take.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.n_bytes)
    }

    fn remove(&mut self, key: &str) {
        if let Some(entry) = self.entries.remove(key) {
            self.n_bytes -= entry.n_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_least_recently_used_entry_leaves_first() {
        let mut cache = Cache::new(2, 1000);
        cache.insert("a".into(), 1, 10);
        cache.insert("b".into(), 2, 10);
        assert_eq!(cache.get("a"), Some(1));
        cache.insert("c".into(), 3, 10);
        assert_eq!((cache.get("a"), cache.get("b"), cache.get("c")), (Some(1), None, Some(3)));
        cache.insert("large".into(), 4, 990);
        assert_eq!((cache.get("a"), cache.get("c"), cache.get("large")), (None, None, Some(4)));
        cache.insert("too large".into(), 5, 1000);
        assert_eq!((cache.get("too large"), cache.get("large")), (None, Some(4)));
    }

    proptest! {
        #[test]
        fn no_sequence_of_inserts_passes_the_bounds(inserts in prop::collection::vec((0..20_u8, 0..60_usize), 0..60)) {
            let mut cache = Cache::new(5, 100);
            for (key, n_bytes) in inserts {
                cache.insert(key.to_string(), key, n_bytes);
                prop_assert!(cache.entries.len() <= 5);
                prop_assert_eq!(cache.n_bytes, cache.entries.values().map(|entry| entry.n_bytes).sum::<usize>());
                prop_assert!(cache.n_bytes <= 100);
                prop_assert_eq!(cache.get(&key.to_string()), Some(key));
            }
        }
    }
}
