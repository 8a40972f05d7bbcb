//! Clients that are slow, greedy or gone.

use std::time::{Duration, Instant};

use minerva_engine::SimConfig;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::client::{self, connect, head, is_closed, post_bytes, post_with, read_head, read_reply, send};
use crate::server::{eventually, ms, sim, start, start_with, within};

const TEXT: &str = "/v1/completions";

/// A stream that would go on for a long time.
fn endless() -> Vec<u8> {
    let body = json!({"prompt": "hi", "max_tokens": 1_000_000, "stream": true, "logprobs": 5});
    post_bytes(TEXT, "", body.to_string().as_bytes())
}

#[tokio::test]
async fn an_honest_length_over_the_limit_is_refused_before_the_body() {
    let server = start().await;
    let promise = head("POST", TEXT, "content-type: application/json\r\ncontent-length: 104857600\r\n");
    let mut stream = send(server.address, promise.as_bytes()).await;
    let reply = within(2, read_reply(&mut stream)).await.unwrap();
    assert_eq!(reply.error(), (413, "body_too_large".to_owned(), None));
    server.assert_serves().await;
}

#[tokio::test]
async fn a_client_that_uploads_100_mb_regardless_reads_its_413() {
    let server = start().await;
    let promise = head("POST", TEXT, "content-type: application/json\r\ncontent-length: 104857600\r\n");
    let stream = send(server.address, promise.as_bytes()).await.into_inner();
    let (reader, mut writer) = stream.into_split();
    let upload = tokio::spawn(async move {
        let block = vec![b'a'; 1 << 20];
        for _ in 0..100 {
            if writer.write_all(&block).await.is_err() {
                return false;
            }
        }
        true
    });
    let uploaded = within(10, upload).await.unwrap();
    let mut text = Vec::new();
    let mut reader = tokio::io::BufReader::new(reader);
    let _ = within(5, reader.read_to_end(&mut text)).await;
    let text = String::from_utf8_lossy(&text);
    assert!(uploaded && text.starts_with("HTTP/1.1 413") && text.contains("body_too_large"), "{uploaded} {text}");
    server.assert_serves().await;
}

#[tokio::test]
async fn a_chunked_body_is_cut_off_at_the_limit() {
    let server = start_with(sim(), |config| config.server.max_body_bytes = 10_000).await;
    let start = head("POST", TEXT, "content-type: application/json\r\ntransfer-encoding: chunked\r\n");
    let mut stream = send(server.address, start.as_bytes()).await;
    let chunk = format!("1000\r\n{}\r\n", "a".repeat(0x1000));
    for _ in 0..3 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    assert_eq!(within(5, read_reply(&mut stream)).await.unwrap().error().0, 413);
    // A chunked body within the limit is read like any other, and so is one of exactly the limit.
    let mut stream = send(server.address, start.as_bytes()).await;
    stream.write_all(b"13\r\n{\"prompt\":\"hi\",\"max\r\nE\r\n_tokens\": 1 } \r\n0\r\n\r\n").await.unwrap();
    assert_eq!(within(5, read_reply(&mut stream)).await.unwrap().status, 200);
    let body = format!("{:10000}", json!({"prompt": "hi", "max_tokens": 1}).to_string());
    assert_eq!(post_with(server.address, TEXT, "", body.as_bytes()).await.status, 200);
    assert_eq!(post_with(server.address, TEXT, "", format!("{body} ").as_bytes()).await.status, 413);
}

#[tokio::test]
async fn a_length_that_lies_is_a_timeout_or_a_bad_next_request() {
    let server = start_with(sim(), |config| config.server.body_timeout_seconds = ms(200)).await;
    let body = r#"{"prompt":"hi","max_tokens":1}"#;
    let lying = |length: usize| {
        head("POST", TEXT, &format!("content-type: application/json\r\ncontent-length: {length}\r\n")) + body
    };
    // More promised than sent: the rest never comes.
    let mut stream = send(server.address, lying(body.len() + 10).as_bytes()).await;
    let reply = within(5, read_reply(&mut stream)).await.unwrap();
    assert_eq!(reply.error(), (408, "body_timeout".to_owned(), None));
    // Less promised than sent: the JSON is cut, and what follows is no request.
    let mut stream = send(server.address, lying(body.len() - 10).as_bytes()).await;
    assert_eq!(within(5, read_reply(&mut stream)).await.unwrap().error().1, "invalid_json");
    let rest = within(5, read_reply(&mut stream)).await;
    assert!(rest.is_none_or(|reply| reply.status == 400));
    // Two lengths, or a length and chunks, are how requests are smuggled.
    for headers in ["content-length: 5\r\ncontent-length: 6\r\n", "content-length: abc\r\n", "content-length: -1\r\n"] {
        let mut stream = send(server.address, head("POST", TEXT, headers).as_bytes()).await;
        let reply = within(5, read_reply(&mut stream)).await;
        assert!(reply.is_none_or(|reply| reply.status == 400), "{headers}");
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn a_body_that_trickles_is_a_408() {
    let server = start_with(sim(), |config| config.server.body_timeout_seconds = ms(300)).await;
    let mut stream = send(
        server.address,
        head("POST", TEXT, "content-type: application/json\r\ncontent-length: 1000\r\n").as_bytes(),
    )
    .await;
    let started = Instant::now();
    let reply = loop {
        let _ = stream.write_all(b" ").await;
        if let Ok(reply) = tokio::time::timeout(Duration::from_millis(20), read_reply(&mut stream)).await {
            break reply;
        }
        assert!(started.elapsed() < Duration::from_secs(5));
    };
    assert_eq!(reply.unwrap().error().0, 408);
}

/// hyper's own header timeout does nothing without a timer; ours runs from the first byte.
#[tokio::test]
async fn headers_that_trickle_or_stop_end_the_connection() {
    let server = start_with(sim(), |config| config.server.header_timeout_seconds = ms(200)).await;
    let mut stopped = send(server.address, b"GET /health HTTP/1.1\r\nhost: local").await;
    assert!(within(3, is_closed(&mut stopped)).await);
    let mut trickling = connect(server.address).await;
    let started = Instant::now();
    while trickling.write_all(b"G").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(started.elapsed() < Duration::from_secs(3), "still open");
    }
    // The same on a connection that has served a request.
    let mut second = send(server.address, head("GET", "/health", "").as_bytes()).await;
    assert_eq!(read_reply(&mut second).await.unwrap().status, 200);
    second.write_all(b"GET /he").await.unwrap();
    assert!(within(3, is_closed(&mut second)).await);
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed_after_the_idle_time() {
    let server = start_with(sim(), |config| config.server.idle_timeout_seconds = ms(300)).await;
    let mut fresh = connect(server.address).await;
    let mut used = send(server.address, head("GET", "/health", "").as_bytes()).await;
    assert_eq!(read_reply(&mut used).await.unwrap().status, 200);
    assert!(within(3, is_closed(&mut fresh)).await);
    assert!(within(3, is_closed(&mut used)).await);
    // A long answer is no idle connection.
    let slow =
        start_with(SimConfig { step_us: 30_000, ..sim() }, |config| config.server.idle_timeout_seconds = ms(100)).await;
    let reply = slow.complete(&json!({"prompt": "hi", "max_tokens": 20})).await;
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn too_many_or_too_large_headers_are_refused() {
    let server = start().await;
    let many = "x-one-of-many: 1\r\n".repeat(200);
    let large = format!("x-large: {}\r\n", "a".repeat(100_000));
    for headers in [many, large] {
        let mut stream = connect(server.address).await;
        let _ = stream.write_all(head("GET", "/health", &headers).as_bytes()).await;
        let reply = within(5, read_reply(&mut stream)).await;
        assert!(reply.is_none_or(|reply| reply.status == 431));
    }
    for garbage in [
        b"\x16\x03\x01\x02\x00\x01\x00".as_slice(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
    ] {
        let mut stream = send(server.address, garbage).await;
        let reply = within(12, read_reply(&mut stream)).await;
        assert!(reply.is_none_or(|reply| reply.status == 400 || reply.status == 505));
    }
    server.assert_serves().await;
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let server = start().await;
    let two =
        head("GET", "/health/live", "x-request-id: one\r\n") + &head("GET", "/v1/models", "x-request-id: two\r\n");
    let mut stream = send(server.address, two.as_bytes()).await;
    for id in ["one", "two"] {
        assert_eq!(read_reply(&mut stream).await.unwrap().header("x-request-id"), Some(id));
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_request() {
    let long = SimConfig { context_length_tokens: 1 << 20, n_seq_max: 1, n_cells: None, ..sim() };
    let server = start_with(long, |config| config.server.write_timeout_seconds = ms(300)).await;
    let mut stream = send(server.address, &endless()).await;
    assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
    eventually("the request runs", || server.engine.stats().requests_running == 1).await;
    let stats = server.idle().await; // nobody reads, so the socket fills up and the request is cancelled
    assert_eq!(stats.cancelled_total, 1);
    server.assert_serves().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_request_streamed_or_not() {
    let slow = SimConfig { step_us: 5_000, ..sim() };
    let server = start_with(slow, |_| {}).await;
    for (i, stream) in [true, false].into_iter().enumerate() {
        let body = json!({"prompt": "hi", "max_tokens": 900, "stream": stream}).to_string();
        let client = send(server.address, &post_bytes(TEXT, "", body.as_bytes())).await;
        eventually("the request runs", || server.engine.stats().requests_running == 1).await;
        drop(client);
        let left = Instant::now();
        assert_eq!(server.idle().await.cancelled_total, i as u64 + 1, "streamed: {stream}");
        assert!(left.elapsed() < Duration::from_secs(1), "{:?}", left.elapsed());
    }
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_stop_a_request() {
    let server = start().await;
    let mut idle = Vec::new();
    for i in 0..1_000 {
        let mut stream = connect(server.address).await;
        if i % 2 == 0 {
            let _ = stream.write_all(b"GET / HT").await; // half of a request is idle too
        }
        idle.push(stream);
    }
    within(5, server.assert_serves()).await;
    assert!(server.get("/metrics").await.text().contains("minerva_connections_open 100"));
    drop(idle);
}

#[tokio::test]
async fn at_the_limit_the_longest_idle_connection_makes_room_and_busy_ones_stay() {
    let slow = SimConfig { step_us: 10_000, ..sim() };
    let server = start_with(slow, |config| config.server.max_connections = 3).await;
    let mut busy = send(server.address, &endless()).await;
    assert_eq!(read_head(&mut busy).await.unwrap().0, 200);
    let mut oldest = connect(server.address).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let mut newer = connect(server.address).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(within(5, server.get("/health/live")).await.status, 200);
    assert!(within(2, is_closed(&mut oldest)).await, "the oldest had to go");
    let still_open = tokio::time::timeout(Duration::from_millis(50), is_closed(&mut newer)).await;
    assert!(still_open.is_err(), "the newer one had not");
    assert!(client::read_chunk(&mut busy).await.is_some());
}

#[tokio::test]
async fn when_every_connection_is_busy_a_new_one_gets_503() {
    let slow = SimConfig { step_us: 10_000, ..sim() };
    let server = start_with(slow, |config| config.server.max_connections = 2).await;
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut stream = send(server.address, &endless()).await;
        assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
        busy.push(stream);
    }
    let mut refused = send(server.address, head("GET", "/health/live", "").as_bytes()).await;
    let reply = within(3, read_reply(&mut refused)).await.unwrap();
    assert_eq!(reply.error(), (503, "too_many_connections".to_owned(), None));
    drop(busy);
    server.idle().await;
    assert_eq!(server.get("/health/live").await.status, 200);
}
