//! API keys: who may use the server.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};

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

    /// Whose request it is, by the key that it carries as `Authorization: Bearer KEY` or `X-Api-Key: KEY`: from 1, or 0 where no
    /// keys are needed. `None` without a key that is accepted.
    pub(crate) fn client(&self, headers: &HeaderMap) -> Option<u64> {
        if self.are_required() { given(headers).and_then(|key| self.find(key)) } else { Some(0) }
    }

    /// Compares with every key, in a time that depends on lengths only: what is learned from it is no key's content.
    fn find(&self, given: &[u8]) -> Option<u64> {
        let mut found = 0;
        for (number, key) in (1..).zip(&self.keys) {
            found = u64::conditional_select(&found, &number, key.ct_eq(given));
        }
        (found > 0).then_some(found)
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

    fn client(name: &'static str, value: &'static str) -> Option<u64> {
        let keys = Keys::new(&["sk-one".to_owned(), "sk-two".to_owned()]);
        keys.client(&HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]))
    }

    #[test]
    fn either_header_carries_a_key_and_nothing_but_a_whole_key_fits() {
        assert_eq!(client("authorization", "Bearer sk-one"), Some(1));
        assert_eq!(client("authorization", "bearer sk-two"), Some(2));
        assert_eq!(client("x-api-key", "sk-one"), Some(1));
        for value in ["Bearer sk-on", "Bearer sk-onee", "Bearer ", "Basic sk-one", "sk-one", "Bearer", ""] {
            assert_eq!(client("authorization", value), None, "{value}");
        }
        assert_eq!(client("cookie", "sk-one"), None);
    }

    #[test]
    fn without_keys_everybody_is_served() {
        assert_eq!(Keys::new(&[]).client(&HeaderMap::new()), Some(0));
    }
}
