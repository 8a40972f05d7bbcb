//! Keeps web pages from using a server on their visitor's machine: the `Host` and `Origin` of every request are checked.
//!
//! A page on another site can send requests to 127.0.0.1 even where it cannot read the answers, and DNS rebinding lets it
//! read them too: its own name then resolves to 127.0.0.1, which shows in `Host`. So a server bound to loopback answers
//! to loopback names only, and any `Origin` that is neither the server itself nor allowed by name is refused.

use std::net::IpAddr;

use hyper::header::{HOST, ORIGIN};
use hyper::{HeaderMap, Uri};

/// Which hosts and origins are served.
pub(crate) struct Policy {
    /// `None` when any host is.
    hosts: Option<Vec<String>>,
    origins: Vec<String>,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// HTTP/1.1 without a `Host`, or with something that is none.
    BadHost,
    /// A name that is not ours.
    Host,
    /// A page of another site.
    Origin,
}

impl Policy {
    /// `hosts` are allowed besides loopback names, `origins` besides the server's own.
    pub(crate) fn new(is_loopback: bool, hosts: &[String], origins: &[String]) -> Self {
        let any = hosts.iter().any(|host| host == "*");
        let hosts = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Self { hosts: (is_loopback && !any).then_some(hosts), origins: origins.to_vec() }
    }

    /// Checks one request. On success, the origin that may read the answer, if the request has one.
    pub(crate) fn check(
        &self,
        version: hyper::Version,
        uri: &Uri,
        headers: &HeaderMap,
    ) -> Result<Option<String>, Refusal> {
        let host = match (headers.get(HOST), uri.authority()) {
            (Some(host), _) => Some(host.to_str().map_err(|_| Refusal::BadHost)?),
            (None, Some(authority)) => Some(authority.as_str()),
            (None, None) if version == hyper::Version::HTTP_10 => None,
            (None, None) => return Err(Refusal::BadHost),
        };
        if let (Some(host), Some(allowed)) = (host, &self.hosts) {
            let name = host_name(host).ok_or(Refusal::BadHost)?;
            if !is_loopback_name(&name) && !allowed.contains(&name) {
                return Err(Refusal::Host);
            }
        }
        let Some(origin) = headers.get(ORIGIN) else { return Ok(None) };
        let origin = origin.to_str().map_err(|_| Refusal::Origin)?;
        let is_ours = host.is_some_and(|host| {
            let page = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
            page.is_some_and(|page| page.eq_ignore_ascii_case(host))
        });
        let is_allowed = self.origins.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin));
        if is_ours || is_allowed { Ok(Some(origin.to_owned())) } else { Err(Refusal::Origin) }
    }
}

/// The host without its port, in lower case.
fn host_name(host: &str) -> Option<String> {
    let authority: hyper::http::uri::Authority = host.parse().ok()?;
    Some(authority.host().trim_end_matches('.').to_ascii_lowercase())
}

fn is_loopback_name(name: &str) -> bool {
    let ip = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || name.ends_with(".localhost") || ip.is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use hyper::Version;

    use super::*;

    fn check(policy: &Policy, headers: &[(&'static str, &'static str)]) -> Result<Option<String>, Refusal> {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        policy.check(Version::HTTP_11, &Uri::from_static("/"), &headers)
    }

    #[test]
    fn a_loopback_server_answers_to_loopback_names_only() {
        let policy = Policy::new(true, &["minerva.lan".to_owned()], &[]);
        for host in ["localhost:8080", "127.0.0.1", "127.8.9.1:1", "[::1]:8080", "LOCALHOST", "minerva.lan:80"] {
            assert_eq!(check(&policy, &[("host", host)]), Ok(None), "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "192.168.0.1"] {
            assert_eq!(check(&policy, &[("host", host)]), Err(Refusal::Host), "{host}");
        }
        assert_eq!(check(&policy, &[]), Err(Refusal::BadHost));
        assert_eq!(check(&Policy::new(false, &[], &[]), &[("host", "evil.example")]), Ok(None));
    }

    #[test]
    fn pages_of_other_sites_are_refused_unless_allowed() {
        let host = ("host", "localhost:8080");
        let closed = Policy::new(true, &[], &[]);
        assert_eq!(check(&closed, &[host, ("origin", "https://evil.example")]), Err(Refusal::Origin));
        assert_eq!(check(&closed, &[host, ("origin", "null")]), Err(Refusal::Origin));
        assert_eq!(check(&closed, &[host, ("origin", "http://localhost:3000")]), Err(Refusal::Origin));
        assert!(check(&closed, &[host, ("origin", "http://localhost:8080")]).is_ok());
        let open = Policy::new(true, &[], &["https://chat.example".to_owned()]);
        assert_eq!(
            check(&open, &[host, ("origin", "https://chat.example")]),
            Ok(Some("https://chat.example".to_owned()))
        );
        assert_eq!(check(&open, &[host, ("origin", "https://chat.example.evil")]), Err(Refusal::Origin));
    }
}
