//! Turns the bytes of generated tokens into text that may be shown, as early as possible.
//!
//! A token may end in the middle of a character or of a stop string. [`TextDecoder`] holds back an unfinished character and
//! the longest end of the output that may still become a stop string, and nothing else. Bytes that are not UTF-8 become
//! U+FFFD, just as [`String::from_utf8_lossy`] would have it for the whole output. It knows no tokens, only their bytes.
//! Start with [`TextDecoder::push`].
//!
//! # Invariants
//! - However the bytes are split into tokens, the released texts join to the same string and the same stop is hit.
//! - No byte of a stop string that was hit is released, and nothing behind it.
//! - At most the bytes of the longest stop string, or 3 where there is none, are held back between two calls.

use crate::sampler::InvalidParam;

/// The most stop strings a request may have; OpenAI allows 4.
pub const MAX_STOPS: usize = 64;

/// The longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// Checks the stop strings of a request.
///
/// # Errors
/// An empty stop string, one that is too long, or too many of them.
pub fn validate_stops(stops: &[String]) -> Result<(), InvalidParam> {
    if stops.len() > MAX_STOPS {
        let given = format!("{} strings", stops.len());
        return Err(InvalidParam::new("stop", given, format!("at most {MAX_STOPS} strings")));
    }
    match stops.iter().map(String::len).find(|n_bytes| !(1..=MAX_STOP_BYTES).contains(n_bytes)) {
        Some(n_bytes) => {
            let allowed = format!("made of strings of 1 to {MAX_STOP_BYTES} bytes");
            Err(InvalidParam::new("stop", format!("one of {n_bytes} bytes"), allowed))
        }
        None => Ok(()),
    }
}

/// A stop string that the output has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopHit {
    /// Which one: its index in the list given to [`TextDecoder::new`].
    pub stop: usize,
    /// Where it begins: how many bytes of the output come before it.
    pub offset: usize,
}

/// The decoder of one output.
///
/// Of several stop strings the one that ends first is hit, since the output stops there; of those that end together, the
/// longest. Stop strings are compared with the bytes of the output, so U+FFFD in one of them matches only a real U+FFFD.
#[derive(Debug, Clone)]
pub struct TextDecoder {
    matchers: Vec<Matcher>,
    /// Bytes whose text is not released yet.
    held: Vec<u8>,
    n_released_bytes: usize,
    hit: Option<StopHit>,
}

impl TextDecoder {
    /// A decoder that stops at the first of `stops`, which [`validate_stops`] has accepted; an empty one never matches.
    pub fn new(stops: &[String]) -> Self {
        Self {
            matchers: stops.iter().map(|stop| Matcher::new(stop.as_bytes())).collect(),
            held: Vec::new(),
            n_released_bytes: 0,
            hit: None,
        }
    }

    /// Takes the bytes of the next token and appends to `out` all text that can be released now.
    ///
    /// Returns the stop string that the output has reached, if any: from then on nothing is released any more, and further
    /// calls return the same hit.
    pub fn push(&mut self, token_bytes: &[u8], out: &mut String) -> Option<StopHit> {
        if self.hit.is_some() {
            return self.hit;
        }
        for &byte in token_bytes {
            self.held.push(byte);
            if let Some((stop, n_bytes)) = self.advance(byte) {
                let n_before = self.held.len() - n_bytes;
                self.held.truncate(n_before); // a hit's first byte is always held: it was a live prefix
                self.finish(out);
                self.hit = Some(StopHit { stop, offset: self.n_released_bytes });
                return self.hit;
            }
        }
        self.release_settled(out);
        None
    }

    /// [`push`](Self::push) for a token that cannot end the output: a stop string that it completes is text, but what it leaves can still
    /// be the beginning of one that a later token completes.
    pub fn push_as_text(&mut self, token_bytes: &[u8], out: &mut String) {
        if self.hit.is_some() {
            return;
        }
        for &byte in token_bytes {
            self.held.push(byte);
            for matcher in &mut self.matchers {
                if matcher.advance(byte) {
                    matcher.go_on();
                }
            }
        }
        self.release_settled(out);
    }

    /// Releases what can neither become a character nor a stop string.
    fn release_settled(&mut self, out: &mut String) {
        let n_live = self.matchers.iter().map(|matcher| matcher.n_matched).max().unwrap_or(0);
        let n_free = match self.held.len() - n_live {
            // A live prefix starts a character, so what comes before it is complete or will never be.
            n_before if n_live > 0 => n_before,
            n_all => n_all - n_unfinished_bytes(&self.held),
        };
        self.release(n_free, out);
    }

    /// Appends what is held back: the output has ended, so it is neither a stop string nor going to be a character.
    pub fn finish(&mut self, out: &mut String) {
        self.release(self.held.len(), out);
    }

    /// How many bytes of the output have had their text released. A token is out when this has reached its end.
    pub fn n_released_bytes(&self) -> usize {
        self.n_released_bytes
    }

    /// How many bytes are held back.
    pub fn n_held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Shows a byte to every matcher. Returns the longest stop string that it completes: its index and its bytes.
    fn advance(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut longest = None;
        for (stop, matcher) in self.matchers.iter_mut().enumerate() {
            if matcher.advance(byte) && longest.is_none_or(|(_, n_bytes)| matcher.stop.len() > n_bytes) {
                longest = Some((stop, matcher.stop.len()));
            }
        }
        longest
    }

    fn release(&mut self, n_bytes: usize, out: &mut String) {
        for chunk in self.held[..n_bytes].utf8_chunks() {
            out.push_str(chunk.valid());
            if !chunk.invalid().is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.held.drain(..n_bytes);
        self.n_released_bytes += n_bytes;
    }
}

/// How many bytes at the end of `bytes` begin a character that more bytes may complete: 0 to 3.
fn n_unfinished_bytes(bytes: &[u8]) -> usize {
    let last = &bytes[bytes.len().saturating_sub(3)..];
    let is_unfinished =
        |tail: &[u8]| std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none());
    (0..last.len()).map(|start| &last[start..]).find(|tail| is_unfinished(tail)).map_or(0, <[u8]>::len)
}

/// Looks for one stop string, byte by byte, in amortised constant time (Knuth, Morris and Pratt).
///
/// One per stop string costs more per byte than one automaton for all, but knows at once how much of each string is live,
/// and requests have few.
#[derive(Debug, Clone)]
struct Matcher {
    stop: Vec<u8>,
    /// `fallback[n]`: length of the longest proper prefix of `stop` that the first `n + 1` bytes end with.
    fallback: Vec<usize>,
    /// How many bytes of `stop` the output ends with at the moment.
    n_matched: usize,
}

impl Matcher {
    fn new(stop: &[u8]) -> Self {
        let mut fallback = vec![0; stop.len()];
        let mut n = 0;
        for i in 1..stop.len() {
            while n > 0 && stop[i] != stop[n] {
                n = fallback[n - 1];
            }
            n += usize::from(stop[i] == stop[n]);
            fallback[i] = n;
        }
        Self { stop: stop.to_vec(), fallback, n_matched: 0 }
    }

    /// Takes the next byte of the output: whether it completes the stop string. After that comes nothing but [`go_on`](Self::go_on).
    fn advance(&mut self, byte: u8) -> bool {
        while self.n_matched > 0 && self.stop[self.n_matched] != byte {
            self.n_matched = self.fallback[self.n_matched - 1];
        }
        self.n_matched += usize::from(self.stop.get(self.n_matched) == Some(&byte));
        !self.stop.is_empty() && self.n_matched == self.stop.len()
    }

    /// A completed stop string does not count: looks for the next one, which may begin within it.
    fn go_on(&mut self) {
        self.n_matched = self.fallback.last().copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strings(stops: &[&str]) -> Vec<String> {
        stops.iter().map(ToString::to_string).collect()
    }

    /// Decodes the pieces one by one: what each released, and the hit.
    fn deltas(stops: &[&str], pieces: &[&[u8]]) -> (Vec<String>, Option<StopHit>) {
        let mut decoder = TextDecoder::new(&strings(stops));
        let mut deltas = Vec::new();
        let mut hit = None;
        for piece in pieces {
            let mut out = String::new();
            hit = decoder.push(piece, &mut out);
            deltas.push(out);
        }
        let mut out = String::new();
        decoder.finish(&mut out);
        deltas.push(out);
        (deltas, hit)
    }

    /// What the whole output must become: for every end in turn, the longest stop string that ends there.
    fn reference(stops: &[String], bytes: &[u8]) -> (String, Option<StopHit>) {
        for end in 0..=bytes.len() {
            let ending = stops.iter().enumerate().filter(|(_, stop)| bytes[..end].ends_with(stop.as_bytes()));
            // `max_by_key` takes the last of equals, and duplicates are to report the first.
            if let Some((stop, text)) = ending.rev().max_by_key(|(_, text)| text.len()) {
                let offset = end - text.len();
                return (String::from_utf8_lossy(&bytes[..offset]).into_owned(), Some(StopHit { stop, offset }));
            }
        }
        (String::from_utf8_lossy(bytes).into_owned(), None)
    }

    /// The longest end of `bytes` that could still become part of a stop string or a character, looked up naively.
    fn longest_live(stops: &[String], bytes: &[u8]) -> usize {
        let is_live = |n: &usize| {
            let tail = &bytes[bytes.len() - n..];
            let is_prefix = stops.iter().any(|stop| stop.len() > *n && stop.as_bytes().starts_with(tail));
            let is_unfinished =
                std::str::from_utf8(tail).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none());
            is_prefix || is_unfinished
        };
        (1..=bytes.len()).rev().find(is_live).unwrap_or(0)
    }

    fn check(stops: &[String], bytes: &[u8], cuts: &[usize]) -> Result<(), TestCaseError> {
        let (text, hit) = reference(stops, bytes);
        let mut decoder = TextDecoder::new(stops);
        let mut out = String::new();
        let mut start = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let given = decoder.push(&bytes[start..end], &mut out);
            start = end;
            let is_past_hit = hit.is_some_and(|hit| end >= hit.offset + stops[hit.stop].len());
            prop_assert_eq!(given, hit.filter(|_| is_past_hit));
            if !is_past_hit {
                prop_assert_eq!(decoder.n_held_bytes(), longest_live(stops, &bytes[..end]));
                prop_assert_eq!(decoder.n_released_bytes() + decoder.n_held_bytes(), end);
            }
            let released = &bytes[..decoder.n_released_bytes()];
            prop_assert_eq!(&out, &String::from_utf8_lossy(released), "what is out is the text of the released bytes");
        }
        decoder.finish(&mut out);
        prop_assert_eq!(&out, &text);
        prop_assert_eq!(decoder.n_released_bytes(), hit.map_or(bytes.len(), |hit| hit.offset));
        prop_assert_eq!(decoder.n_held_bytes(), 0);
        Ok(())
    }

    /// Pieces that make stop strings, their prefixes, split characters and invalid bytes likely.
    fn any_output() -> impl Strategy<Value = Vec<u8>> {
        let text = prop::sample::select(vec![
            "a",
            "b",
            "ab",
            "aab",
            "STOP",
            "</s>",
            "\n\n",
            "é",
            "e\u{301}",
            "漢字",
            "🦀",
            "👩‍👩‍👧",
            "🇩🇪",
            "\u{FFFD}",
            "\0",
        ]);
        let invalid = prop::sample::select(vec![
            &b"\x80"[..],
            b"\xC3",
            b"\xE6\xBC",
            b"\xF0\x9F",
            b"\xF0\x9F\xA6",
            b"\xF0\x80",
            b"\xED\xA0\x80",
            b"\xFF",
            b"\xC0\xAF",
        ]);
        let piece = prop_oneof![6 => text.prop_map(|s| s.as_bytes().to_vec()), 1 => invalid.prop_map(<[u8]>::to_vec)];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    fn any_stops() -> impl Strategy<Value = Vec<String>> {
        let stop = prop_oneof![
            "[ab]{1,5}",
            prop::sample::select(strings(&[
                "STOP", "OPS", "</s>", "\n\n", "字🦀", "🦀🦀", "\u{301}", "\u{FFFD}", "é漢"
            ])),
        ];
        prop::collection::vec(stop, 0..4)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3_000))]

        #[test]
        fn any_split_gives_the_text_of_the_whole(
            stops in any_stops(),
            bytes in any_output(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        ) {
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            cuts.sort_unstable();
            check(&stops, &bytes, &cuts)?;
            let every_byte: Vec<usize> = (0..bytes.len()).collect();
            check(&stops, &bytes, &every_byte)?;
        }

        #[test]
        fn stops_that_repeat_themselves_are_found_wherever_they_begin(
            stops in prop::collection::vec("(a{1,3}b){1,3}a{0,4}b?", 1..3),
            text in "(a{1,5}b){0,8}",
        ) {
            let every_byte: Vec<usize> = (0..text.len()).collect();
            check(&stops, text.as_bytes(), &every_byte)?;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn a_stop_string_only_counts_where_it_ends_behind_what_is_text(
            stops in any_stops(),
            bytes in any_output(),
            text_to in any::<prop::sample::Index>(),
        ) {
            let n_text = text_to.index(bytes.len() + 1);
            let mut decoder = TextDecoder::new(&stops);
            let mut out = String::new();
            for byte in &bytes[..n_text] {
                decoder.push_as_text(std::slice::from_ref(byte), &mut out);
            }
            prop_assert_eq!(decoder.n_held_bytes(), longest_live(&stops, &bytes[..n_text]));
            let hit = decoder.push(&bytes[n_text..], &mut out);
            decoder.finish(&mut out);
            let ends = n_text + 1..=bytes.len();
            let hits = ends.filter_map(|end| {
                let ending = stops.iter().enumerate().filter(|(_, stop)| bytes[..end].ends_with(stop.as_bytes()));
                let (stop, text) = ending.rev().max_by_key(|(_, text)| text.len())?;
                Some(StopHit { stop, offset: end - text.len() })
            });
            let first = hits.take(1).last();
            prop_assert_eq!(hit, first);
            let n_bytes = first.map_or(bytes.len(), |hit| hit.offset);
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes[..n_bytes]));
        }
    }

    #[test]
    fn every_split_of_short_outputs_in_three_gives_the_same_text() {
        let stops = strings(&["aab", "ab", "🦀!", "</think>"]);
        for text in ["xaaab", "aaa", "漢字🦀🦀!", "e\u{301}👩‍👩‍👧</thin</think>y", "🦀</think"] {
            let bytes = text.as_bytes();
            for first in 0..=bytes.len() {
                for second in first..=bytes.len() {
                    check(&stops, bytes, &[first, second]).expect("same text");
                }
            }
        }
    }

    #[test]
    fn a_character_split_over_tokens_comes_out_whole() {
        let (deltas, _) = deltas(&[], &[b"a\xF0", b"\x9F\xA6", b"\x80b\xE6"]);
        assert_eq!(deltas, ["a", "", "🦀b", "\u{FFFD}"]);
    }

    #[test]
    fn only_a_live_prefix_is_held_back() {
        let (deltas, hit) = deltas(&["STOP"], &[b"one S", b"TO", b"E ST", b"ST", b"OP more"]);
        assert_eq!(deltas, ["one ", "", "STOE ", "ST", "", ""]);
        assert_eq!(hit, Some(StopHit { stop: 0, offset: 11 }));
    }

    #[test]
    fn the_stop_that_ends_first_wins_and_of_those_that_end_together_the_longest() {
        let hit = |stops: &[&str], text: &str| deltas(stops, &[text.as_bytes()]).1.map(|hit| (hit.stop, hit.offset));
        assert_eq!(hit(&["ab", "aab"], "xaab"), Some((1, 1)));
        assert_eq!(hit(&["abc", "ab"], "xabc"), Some((1, 1)));
        assert_eq!(hit(&["abcd", "bc"], "xabcd"), Some((1, 2)));
        assert_eq!(hit(&["ab", "ab"], "ab"), Some((0, 0)));
        assert_eq!(hit(&["aba"], "ababab"), Some((0, 0)));
        assert_eq!(hit(&["aab"], "aaaab"), Some((0, 2)));
        assert_eq!(hit(&[""], "aaa"), None);
    }

    #[test]
    fn after_a_hit_nothing_comes_out_any_more() {
        let mut decoder = TextDecoder::new(&strings(&["."]));
        let mut out = String::new();
        let hit = decoder.push(b"one. two", &mut out);
        assert_eq!(hit, Some(StopHit { stop: 0, offset: 3 }));
        assert_eq!(decoder.push(b" three", &mut out), hit);
        decoder.finish(&mut out);
        assert_eq!((out.as_str(), decoder.n_released_bytes()), ("one", 3));
    }

    #[test]
    fn stops_within_the_limits_are_valid_and_others_are_named() {
        let message = |stops: Vec<String>| validate_stops(&stops).expect_err("must be rejected").to_string();
        assert_eq!(validate_stops(&[]), Ok(()));
        assert_eq!(validate_stops(&vec!["x".repeat(MAX_STOP_BYTES); MAX_STOPS]), Ok(()));
        assert_eq!(
            message(strings(&["a", ""])),
            "`stop` must be made of strings of 1 to 1024 bytes, got one of 0 bytes"
        );
        let too_long = vec!["x".repeat(MAX_STOP_BYTES + 1)];
        assert_eq!(message(too_long), "`stop` must be made of strings of 1 to 1024 bytes, got one of 1025 bytes");
        assert_eq!(message(vec!["a".into(); 65]), "`stop` must be at most 64 strings, got 65 strings");
    }
}
