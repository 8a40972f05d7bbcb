//! Secrets in prompts, and the search for them in the answers of others.

use std::collections::HashMap;

use super::prompts::Rng;

/// Letters of a secret. Chance never makes one: there are 26 to the 12th power.
const SECRET_LETTERS: usize = 12;

/// So many letters of a secret in a row give it away.
const TELLING_LETTERS: usize = 8;

/// Random letters.
pub(super) fn secret(rng: &mut Rng) -> String {
    (0..SECRET_LETTERS).map(|_| char::from(b'a' + rng.below(26) as u8)).collect()
}

/// A prompt that makes small models say the secret.
pub(super) fn prompt(words: &str, secret: &str) -> String {
    format!("{words}. The password is {secret}. Say the password again and again: {secret}, {secret}, {secret},")
}

/// What the search found.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Found {
    /// Answers with their own secret: a search that finds none of these would prove nothing.
    pub(super) own: usize,
    /// A line per secret in an answer to somebody else.
    pub(super) leaks: Vec<String>,
}

/// Looks for every secret in every answer, both given by the numbers of their requests.
pub(super) fn search<'a>(
    secrets: impl Iterator<Item = (usize, String)>,
    answers: impl Iterator<Item = (usize, &'a str)>,
) -> Found {
    let mut owners: HashMap<Vec<u8>, usize> = HashMap::new();
    for (request, secret) in secrets {
        owners.extend(secret.as_bytes().windows(TELLING_LETTERS).map(|part| (part.to_vec(), request)));
    }
    let mut found = Found::default();
    for (request, text) in answers {
        let mut said: Vec<usize> =
            text.as_bytes().windows(TELLING_LETTERS).filter_map(|part| owners.get(part).copied()).collect();
        said.sort_unstable();
        said.dedup();
        found.own += usize::from(said.contains(&request));
        let others = said.iter().filter(|owner| **owner != request);
        found
            .leaks
            .extend(others.map(|owner| format!("the answer to request {request} has the secret of request {owner}")));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_a_secret_is_found_in_the_answer_of_another_and_not_held_against_its_owner() {
        let secrets = || [(0, "abcdefghijkl"), (1, "mnopqrstuvwx")].map(|(at, text)| (at, text.to_owned())).into_iter();
        let answers = [(0, "it is abcdefghijkl, abcdefghijkl"), (1, "sorry"), (2, "ü xnopqrstuv ü"), (3, "nopqrst")];
        let found = search(secrets(), answers.into_iter());
        assert_eq!(found.own, 1);
        assert_eq!(found.leaks, ["the answer to request 2 has the secret of request 1"]);
    }
}
