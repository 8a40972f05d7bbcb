//! A small HTTP/1.1 client: one connection per request, and dropping the reply closes it at once.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, RETRY_AFTER};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// The longest body that is read as a whole, in bytes.
const MAX_BODY_BYTES: usize = 8 << 20;

/// Where a server listens: `http://host:port`, with an optional path in front of `/v1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    authority: String,
    base: String,
}

impl FromStr for Url {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some(rest) = text.strip_prefix("http://") else { bail!("`{text}` does not begin with http://") };
        let (authority, base) = rest.split_once('/').unwrap_or((rest, ""));
        if authority.is_empty() {
            bail!("`{text}` names no host");
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let authority = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        // `/v1` is part of what people copy out of client settings; every path here brings its own.
        let base = base.trim_end_matches('/');
        let base = base.strip_suffix("v1").filter(|head| head.is_empty() || head.ends_with('/')).unwrap_or(base);
        let base = base.trim_end_matches('/');
        Ok(Self { authority, base: if base.is_empty() { String::new() } else { format!("/{base}") } })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.base)
    }
}

/// Sends requests to one server.
#[derive(Debug, Clone)]
pub(super) struct HttpClient {
    pub(super) url: Url,
    /// A request names one by its place; none asks without a key.
    pub(super) api_keys: Vec<String>,
}

impl HttpClient {
    /// The status and the whole body of a GET.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let mut reply = self.send(Method::GET, path, Bytes::new(), 0).await?;
        let body = reply.text().await?;
        Ok((reply.status, body))
    }

    /// Posts JSON with one of the keys; resolves when the head of the response is there.
    pub(super) async fn post(&self, path: &str, json: Bytes, key: usize) -> anyhow::Result<Reply> {
        self.send(Method::POST, path, json, key).await
    }

    async fn send(&self, method: Method, path: &str, body: Bytes, key: usize) -> anyhow::Result<Reply> {
        let stream = TcpStream::connect(&self.url.authority).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // An error of the connection also reaches the reply; here it would be told twice.
        let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url.base))
            .header(HOST, &self.url.authority)
            .header(CONNECTION, "close")
            .header(CONTENT_TYPE, "application/json");
        if let Some(key) = self.api_keys.get(key).or(self.api_keys.first()) {
            request = request.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        let response = sender.send_request(request.body(Full::new(body))?).await.context("no response")?;
        let (head, body) = response.into_parts();
        let retry_after = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok(Reply { status: head.status, retry_after_s: retry_after, body, _connection: connection })
    }
}

/// A response whose body is still coming.
pub(super) struct Reply {
    pub(super) status: StatusCode,
    retry_after_s: Option<u64>,
    body: Incoming,
    _connection: Connection,
}

impl Reply {
    /// How long to wait before asking again, of a server that has no room now.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        let pause = self.retry_after_s.map(Duration::from_secs);
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => Some(pause.unwrap_or(Duration::from_secs(1))),
            StatusCode::SERVICE_UNAVAILABLE => pause,
            _ => None,
        }
    }

    /// The next piece of the body; `None` after the last.
    pub(super) async fn chunk(&mut self) -> anyhow::Result<Option<Bytes>> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(data) = frame.context("the connection broke")?.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The whole body as text.
    pub(super) async fn text(&mut self) -> anyhow::Result<String> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_BODY_BYTES {
                bail!("the body is longer than {MAX_BODY_BYTES} bytes");
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// The task that moves the bytes of one connection; the socket closes when this is dropped.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_may_end_in_v1_and_lack_a_port() {
        let shown = |text: &str| text.parse::<Url>().map(|url| url.to_string()).map_err(|error| error.to_string());
        assert_eq!(shown("http://localhost:8080"), Ok("http://localhost:8080".to_owned()));
        assert_eq!(shown("http://localhost:8080/v1/"), Ok("http://localhost:8080".to_owned()));
        assert_eq!(shown("http://host/proxy/v1"), Ok("http://host:80/proxy".to_owned()));
        assert_eq!(shown("http://[::1]:9/xv1"), Ok("http://[::1]:9/xv1".to_owned()));
        assert_eq!(shown("https://host"), Err("`https://host` does not begin with http://".to_owned()));
        assert!(shown("http:///v1").is_err());
    }
}
