//! API keys: who may use the server.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use subtle::ConstantTimeEq as _;

/// The keys that are accepted; none means that everybody is.
pub(crate) struct Keys {
    keys: Vec<Box<[u8]>>,
}

impl Keys {
    /// Accepts any of `keys`.
    pub(crate) fn new(keys: &[String]) -> Self {
        Self { keys: keys.iter().map(|key| key.as_bytes().into()).collect() }
    }

    /// Whether requests need a key.
    pub(crate) fn are_required(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether the request carries a key that is accepted, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        !self.are_required() || given(headers).is_some_and(|key| self.contains(key))
    }

    /// Compares with every key, in a time that depends on lengths only: what is learned from it is no key's content.
    fn contains(&self, given: &[u8]) -> bool {
        let matches = self.keys.iter().fold(subtle::Choice::from(0), |found, key| found | key.ct_eq(given));
        matches.into()
    }
}

fn given(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(value) = headers.get(AUTHORIZATION) {
        let (scheme, key) = value.as_bytes().split_at_checked(b"Bearer ".len())?;
        return scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii());
    }
    headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(name: &'static str, value: &'static str) -> bool {
        let keys = Keys::new(&["sk-one".to_owned(), "sk-two".to_owned()]);
        keys.allow(&HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]))
    }

    #[test]
    fn either_header_carries_a_key_and_nothing_but_a_whole_key_fits() {
        assert!(allow("authorization", "Bearer sk-one") && allow("authorization", "bearer sk-two"));
        assert!(allow("x-api-key", "sk-one"));
        for value in ["Bearer sk-on", "Bearer sk-onee", "Bearer ", "Basic sk-one", "sk-one", "Bearer", ""] {
            assert!(!allow("authorization", value), "{value}");
        }
        assert!(!allow("cookie", "sk-one"));
    }

    #[test]
    fn without_keys_everybody_is_served() {
        assert!(Keys::new(&[]).allow(&HeaderMap::new()));
    }
}
