//! Prompts from a list of words: the same seed gives the same prompts, and no two requests share more than a word or two
//! by chance, so that a prompt cache helps only where a workload means it to.

/// Common words of one or two syllables, most of them one token.
const WORDS: &str = "time year people way day man thing woman life child world school state family student group country \
    problem hand part place case week company system program question work government number night point home water room \
    mother area money story fact month lot right study book eye job word business issue side kind head house service \
    friend father power hour game line end member law car city community name president team minute idea body information \
    back parent face others level office door health person art war history party result change morning reason research \
    girl guy moment air teacher force education foot boy age policy process music market sense nation plan college \
    interest death experience effect use class control field development role effort rate heart drug show leader light \
    voice wife police mind price report decision son view relationship town road arm difference value building action \
    season society tax director position player record paper space ground form event matter center couple site project \
    activity star table need court oil situation cost industry figure street image phone data picture practice piece \
    land product doctor wall patient worker news test movie north love river stone garden window summer winter bridge";

/// SplitMix64: small, and good enough to choose words.
#[derive(Debug, Clone)]
pub(super) struct Rng(u64);

impl Rng {
    /// A generator of its own for each place: `parts` say which workload, round and request it is for.
    pub(super) fn new(seed: u64, parts: &[u64]) -> Self {
        let mut rng = Self(seed);
        for part in parts {
            rng.0 = rng.next_u64() ^ part.wrapping_mul(0xD6E8_FEB8_6659_FD93);
        }
        rng
    }

    pub(super) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number in `0..end`; the bias of the remainder is far below what a benchmark sees.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end.max(1)
    }
}

/// `n_words` words at random, in sentences of eight.
pub(super) fn text(rng: &mut Rng, n_words: usize) -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut text = String::with_capacity(n_words * 7);
    for i in 0..n_words {
        if i > 0 {
            text.push_str(if i % 8 == 0 { ". " } else { " " });
        }
        text.push_str(words[rng.below(words.len() as u64) as usize]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_place_gives_the_same_text_and_another_place_another() {
        let at = |parts: &[u64]| text(&mut Rng::new(7, parts), 64);
        assert_eq!(at(&[1, 2, 3]), at(&[1, 2, 3]));
        assert_ne!(at(&[1, 2, 3]), at(&[1, 3, 2]));
        assert_ne!(at(&[1, 2, 3])[..20], at(&[1, 2, 4])[..20]);
        assert_eq!(at(&[0]).split_whitespace().count(), 64);
    }
}
