//! A set of borrowed strings that only tells whether one is new: the vocabulary's 50,000 to 256,000 tokens in milliseconds.
//!
//! The standard set takes three times as long, most of it for hashing. This one hashes eight bytes at a time with random keys
//! of the process, so a file cannot be made to collide.

use std::hash::{BuildHasher, RandomState};

/// Strings seen so far.
pub(super) struct UniqueStrings<'a> {
    strings: Vec<&'a [u8]>,
    /// A power of two of slots, at least twice as many as strings: the upper half of the hash, then the index in `strings`
    /// plus one, so 0 is an empty slot.
    slots: Vec<u64>,
    keys: [u64; 2],
}

impl<'a> UniqueStrings<'a> {
    /// Room for `n` strings; [`insert`](Self::insert) takes no more.
    pub(super) fn with_capacity(n: usize) -> Self {
        let random = RandomState::new();
        Self {
            strings: Vec::with_capacity(n),
            slots: vec![0; (n.max(1) * 2).next_power_of_two()],
            keys: [random.hash_one(0), random.hash_one(1) | 1],
        }
    }

    /// Adds a string; false if it was there.
    ///
    /// # Panics
    /// When there are more than the capacity.
    pub(super) fn insert(&mut self, string: &'a [u8]) -> bool {
        assert!(self.strings.len() * 2 < self.slots.len(), "more strings than the capacity");
        match self.find(string) {
            Ok(_) => false,
            Err((slot, tag)) => {
                self.strings.push(string);
                self.slots[slot] = tag | self.strings.len() as u64;
                true
            }
        }
    }

    /// Whether the string was added.
    pub(super) fn contains(&self, string: &[u8]) -> bool {
        self.find(string).is_ok()
    }

    /// The string's index, or the slot where it belongs and the upper half of its entry.
    fn find(&self, string: &[u8]) -> Result<usize, (usize, u64)> {
        let hash = self.hash(string);
        let tag = hash & !u64::from(u32::MAX);
        let mask = self.slots.len() - 1;
        let mut slot = (hash >> 20) as usize & mask;
        loop {
            match self.slots[slot] {
                0 => return Err((slot, tag)),
                entry if entry & !u64::from(u32::MAX) == tag => {
                    let index = (entry & u64::from(u32::MAX)) as usize - 1;
                    if self.strings[index] == string {
                        return Ok(index);
                    }
                }
                _ => {}
            }
            slot = (slot + 1) & mask;
        }
    }

    /// Folded multiplication by secret keys, eight bytes at a time; the last eight may overlap those before.
    fn hash(&self, string: &[u8]) -> u64 {
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            product as u64 ^ (product >> 64) as u64
        };
        let half = |bytes: Option<&[u8; 4]>| bytes.map_or(0, |&bytes| u64::from(u32::from_le_bytes(bytes)));
        let mut hash = self.keys[0] ^ string.len() as u64;
        let last = if let Some(last) = string.last_chunk::<8>() {
            for word in string.as_chunks::<8>().0 {
                hash = fold(hash ^ u64::from_le_bytes(*word), self.keys[1]).wrapping_add(self.keys[0]);
            }
            u64::from_le_bytes(*last)
        } else if string.len() >= 4 {
            half(string.first_chunk()) | half(string.last_chunk()) << 32
        } else {
            string.iter().fold(0, |word, &byte| word << 8 | u64::from(byte))
        };
        fold(hash ^ last, self.keys[1]).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_the_standard_set(strings in proptest::collection::vec(proptest::collection::vec(0_u8..3, 0..20), 0..300)) {
            let mut unique = UniqueStrings::with_capacity(strings.len());
            let mut standard = HashSet::new();
            for string in &strings {
                prop_assert_eq!(unique.insert(string), standard.insert(string));
            }
            for string in &strings {
                prop_assert!(unique.contains(string));
            }
            prop_assert!(!unique.contains(b"absent"));
        }
    }
}
