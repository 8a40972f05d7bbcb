//! A small HTTP client that can also misbehave: requests are raw bytes.

use std::net::SocketAddr;

use serde_json::Value as Json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// A whole response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|problem| panic!("{problem}: {}", self.text()))
    }

    /// `(status, code, param)` of an error in OpenAI's shape.
    pub(crate) fn error(&self) -> (u16, String, Option<String>) {
        let json = self.json();
        let error = json["error"].as_object().unwrap_or_else(|| panic!("no error in {json}"));
        for key in ["message", "type", "param", "code"] {
            assert!(error.contains_key(key), "no {key} in {json}");
        }
        let text = |key: &str| error[key].as_str().map(ToOwned::to_owned);
        (self.status, text("code").unwrap(), text("param"))
    }

    /// The JSON of each `data:` event; `[DONE]` becomes a string.
    pub(crate) fn events(&self) -> Vec<Json> {
        events(&self.text())
    }
}

pub(crate) fn events(text: &str) -> Vec<Json> {
    let data = text.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    data.map(|data| if data == "[DONE]" { Json::from(data) } else { serde_json::from_str(data).expect(data) }).collect()
}

pub(crate) async fn connect(address: SocketAddr) -> BufReader<TcpStream> {
    BufReader::new(TcpStream::connect(address).await.unwrap())
}

/// Sends raw bytes on a new connection.
pub(crate) async fn send(address: SocketAddr, bytes: &[u8]) -> BufReader<TcpStream> {
    let mut stream = connect(address).await;
    stream.write_all(bytes).await.unwrap();
    stream
}

pub(crate) async fn get(address: SocketAddr, path: &str) -> Reply {
    let mut stream = send(address, head("GET", path, "").as_bytes()).await;
    read_reply(&mut stream).await.unwrap()
}

pub(crate) async fn post(address: SocketAddr, path: &str, body: &str) -> Reply {
    post_with(address, path, "", body.as_bytes()).await
}

/// A POST with more header lines, each ending in CRLF.
pub(crate) async fn post_with(address: SocketAddr, path: &str, headers: &str, body: &[u8]) -> Reply {
    let mut stream = send(address, &post_bytes(path, headers, body)).await;
    read_reply(&mut stream).await.unwrap()
}

pub(crate) fn post_bytes(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let content_type =
        if headers.to_ascii_lowercase().contains("content-type") { "" } else { "content-type: application/json\r\n" };
    let headers = format!("{headers}{content_type}content-length: {}\r\n", body.len());
    [head("POST", path, &headers).as_bytes(), body].concat()
}

pub(crate) fn head(method: &str, path: &str, headers: &str) -> String {
    let host = if headers.to_ascii_lowercase().contains("host:") { "" } else { "host: localhost\r\n" };
    format!("{method} {path} HTTP/1.1\r\n{host}{headers}\r\n")
}

/// Reads one response; `None` when the connection ends before its head does.
pub(crate) async fn read_reply(stream: &mut BufReader<TcpStream>) -> Option<Reply> {
    let (status, headers) = read_head(stream).await?;
    let mut reply = Reply { status, headers, body: Vec::new() };
    if reply.header("transfer-encoding") == Some("chunked") {
        while let Some(chunk) = read_chunk(stream).await {
            if chunk.is_empty() {
                break;
            }
            reply.body.extend(chunk);
        }
    } else {
        let length = reply.header("content-length").map_or(0, |length| length.parse().unwrap());
        reply.body.resize(length, 0);
        stream.read_exact(&mut reply.body).await.ok()?;
    }
    Some(reply)
}

pub(crate) async fn read_head(stream: &mut BufReader<TcpStream>) -> Option<(u16, Vec<(String, String)>)> {
    let status = read_line(stream).await?.split(' ').nth(1)?.parse().ok()?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(stream).await?;
        let Some((name, value)) = line.split_once(':') else { return Some((status, headers)) };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

/// The next chunk of a chunked body: empty at its end, `None` when the connection broke before that.
pub(crate) async fn read_chunk(stream: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let size = usize::from_str_radix(&read_line(stream).await?, 16).ok()?;
    let mut chunk = vec![0; size + 2];
    stream.read_exact(&mut chunk).await.ok()?;
    chunk.truncate(size);
    Some(chunk)
}

async fn read_line(stream: &mut BufReader<TcpStream>) -> Option<String> {
    let mut line = String::new();
    match stream.read_line(&mut line).await {
        Ok(n) if n > 0 => Some(line.trim_end().to_owned()),
        _ => None,
    }
}

/// Whether the server closes the connection without another byte of a response.
pub(crate) async fn is_closed(stream: &mut BufReader<TcpStream>) -> bool {
    matches!(stream.read(&mut [0; 16]).await, Ok(0) | Err(_))
}
