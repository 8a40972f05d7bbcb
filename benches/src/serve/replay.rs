//! Answers of a disturbed run against the same requests alone: what differs must be a coin toss of the model's.
//!
//! Both runs are greedy. A step computes a batch with other kernels than a single row, and sums round differently, so where
//! two tokens are nearly as likely the other one may win; from there on the texts have nothing in common. A cell of
//! somebody else, a missing or a misplaced one changes the scores by far more. So at the first difference the undisturbed
//! run tells, by its log-probabilities, how close the disturbed run's token was.

use minerva_engine::TokenInfo;
use serde::{Deserialize, Serialize};

/// Alternatives to ask for at each place, as many as OpenAI's API allows: where the next word is open, a dozen are near ties.
pub(super) const TOP_LOGPROBS: u32 = 20;

/// Natural logarithm: tokens whose probabilities differ by a smaller factor may change places by rounding.
const NEAR_TIE: f64 = 0.5;

/// A token of the undisturbed run, as OpenAI's `logprobs.content` has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Token {
    bytes: Vec<u8>,
    logprob: f64,
    #[serde(default)]
    top_logprobs: Vec<Alternative>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Alternative {
    bytes: Vec<u8>,
    logprob: f64,
}

impl Token {
    /// The engine's; `None` without its probability.
    pub(super) fn of_engine(info: TokenInfo) -> Option<Self> {
        let top = info.top.into_iter().map(|top| Alternative { bytes: top.bytes, logprob: f64::from(top.logprob) });
        Some(Self { bytes: info.bytes, logprob: f64::from(info.logprob?), top_logprobs: top.collect() })
    }
}

/// How an answer relates to the one that the same request gets alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// Every byte.
    Same,
    /// Up to a place where both tokens were nearly as likely: by how much they differ there.
    NearTie(f64),
    /// The model does not say this.
    Wrong(String),
}

/// Compares `text`, from the disturbed run, with what came alone.
pub(super) fn compare(text: &str, alone: &str, tokens: &[Token]) -> Verdict {
    let (disturbed, alone) = (text.as_bytes(), alone.as_bytes());
    if disturbed == alone {
        return Verdict::Same;
    }
    let first = disturbed.iter().zip(alone).take_while(|(a, b)| a == b).count();
    let excerpt = |bytes: &[u8]| {
        let from = first.saturating_sub(24);
        String::from_utf8_lossy(bytes.get(from..(first + 24).min(bytes.len())).unwrap_or_default()).into_owned()
    };
    let wrong = |why: &str| {
        Verdict::Wrong(format!("{why} at byte {first}: {:?}, alone {:?}", excerpt(disturbed), excerpt(alone)))
    };
    // Servers may cut a blank at the start of the answer, which the tokens still have.
    let n_bytes: usize = tokens.iter().map(|token| token.bytes.len()).sum();
    let cut = n_bytes.saturating_sub(alone.len());
    let mut end = 0;
    for token in tokens {
        let start = end;
        end += token.bytes.len();
        if end <= first + cut {
            continue;
        }
        let Some(rest) = start.checked_sub(cut).and_then(|start| disturbed.get(start..)) else { break };
        let best = token
            .top_logprobs
            .iter()
            .filter(|other| other.bytes != token.bytes && !other.bytes.is_empty() && rest.starts_with(&other.bytes))
            .map(|other| token.logprob - other.logprob)
            .reduce(f64::min);
        return match best {
            Some(gap) if gap <= NEAR_TIE => Verdict::NearTie(gap),
            Some(gap) => wrong(&format!("a token that is {gap:.2} less likely (ln)")),
            None => wrong("an unlikely token"),
        };
    }
    wrong("another length")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str, logprob: f64, others: &[(&str, f64)]) -> Token {
        let alternative =
            |(text, logprob): &(&str, f64)| Alternative { bytes: text.as_bytes().to_vec(), logprob: *logprob };
        let top_logprobs = [(text, logprob)].iter().chain(others).map(alternative).collect();
        Token { bytes: text.as_bytes().to_vec(), logprob, top_logprobs }
    }

    #[test]
    fn only_a_token_that_was_nearly_as_likely_excuses_a_difference() {
        let tokens = [
            token(" the", -0.1, &[]),
            token(" cat", -0.9, &[(" dog", -1.1), (" cow", -3.0)]),
            token(" sat", -0.2, &[]),
        ];
        let verdict = |text| compare(text, " the cat sat", &tokens);
        assert_eq!(verdict(" the cat sat"), Verdict::Same);
        assert!(matches!(verdict(" the dog ran"), Verdict::NearTie(gap) if (gap - 0.2).abs() < 1e-9));
        assert!(matches!(verdict(" the cow ran"), Verdict::Wrong(why) if why.contains("2.10")));
        assert!(matches!(verdict(" the zebra"), Verdict::Wrong(_)));
        assert!(matches!(verdict(" the cat"), Verdict::Wrong(_)), "an answer that ends early");
        assert!(matches!(verdict(""), Verdict::Wrong(_)));
    }

    #[test]
    fn a_blank_that_the_server_cuts_moves_no_place() {
        let tokens = [token(" the", -0.1, &[]), token(" cat", -0.9, &[(" cow", -1.0)])];
        assert!(matches!(compare("the cow", "the cat", &tokens), Verdict::NearTie(_)));
    }
}
