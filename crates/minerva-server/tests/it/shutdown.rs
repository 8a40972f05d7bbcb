//! The end of a server: what was accepted is finished. The signals are sent to the real binary.

use std::time::{Duration, Instant};

use minerva_engine::SimConfig;
use minerva_server::Outcome;
use serde_json::json;

use crate::client::{self, head, post_bytes, read_head, read_reply, send};
use crate::process::Process;
use crate::server::{ms, sim, start, start_loading, start_with, within};

fn stream_of(tokens: u32) -> Vec<u8> {
    let body = json!({"prompt": "hi", "max_tokens": tokens, "stream": true});
    post_bytes("/v1/completions", "", body.to_string().as_bytes())
}

#[tokio::test]
async fn accepted_streams_finish_while_new_requests_are_refused_and_health_answers() {
    let slow = SimConfig { step_us: 10_000, n_seq_max: 2, ..sim() };
    let mut server = start_with(slow, |_| {}).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = send(server.address, &stream_of(30)).await; // two run, two wait
        assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
        streams.push(stream);
    }
    let mut idle = send(server.address, head("GET", "/health", "").as_bytes()).await;
    assert_eq!(read_reply(&mut idle).await.unwrap().status, 200);
    server.stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let refused = server.complete(&json!({"prompt": "hi"})).await;
    assert_eq!(refused.error(), (503, "shutting_down".to_owned(), None));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(server.get("/health/ready").await.json(), json!({"status": "shutting_down"}));
    assert_eq!(server.get("/health/live").await.status, 200);
    assert_eq!(server.get("/v1/status").await.json()["state"], "shutting_down");
    for stream in &mut streams {
        let mut text = Vec::new();
        while let Some(chunk) = within(10, client::read_chunk(stream)).await.filter(|chunk| !chunk.is_empty()) {
            text.extend(chunk);
        }
        let events = client::events(std::str::from_utf8(&text).unwrap());
        assert_eq!((events.last().unwrap(), events.len()), (&json!("[DONE]"), 32));
    }
    let address = server.address;
    assert_eq!(server.stopped().await, Outcome::Drained);
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

#[tokio::test]
async fn when_the_grace_time_is_over_streams_end_with_an_error() {
    let slow = SimConfig { step_us: 10_000, ..sim() };
    let mut server = start_with(slow, |config| config.server.grace_seconds = ms(200)).await;
    let mut stream = send(server.address, &stream_of(1_000)).await;
    let whole = json!({"prompt": "hi", "max_tokens": 1_000}).to_string();
    let mut whole = send(server.address, &post_bytes("/v1/completions", "", whole.as_bytes())).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop();
    let reply = within(5, read_reply(&mut stream)).await.unwrap();
    assert_eq!(reply.events().last().unwrap()["error"]["code"], "shutting_down");
    assert!(!reply.text().contains("[DONE]"));
    assert_eq!(within(5, read_reply(&mut whole)).await.unwrap().error().1, "shutting_down");
    assert_eq!(server.stopped().await, Outcome::CutOff(2));
}

#[tokio::test]
async fn an_idle_server_ends_at_once_even_with_open_connections() {
    for loading in [false, true] {
        let mut server = if loading { start_loading(|_| {}).await } else { start().await };
        let mut idle = send(server.address, head("GET", "/health/live", "").as_bytes()).await;
        assert_eq!(read_reply(&mut idle).await.unwrap().status, 200);
        let started = Instant::now();
        server.stop();
        assert_eq!(server.stopped().await, Outcome::Drained);
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_eight_streams_finish_and_the_exit_code_is_0() {
    let mut process = Process::start(&["--simulate", "10", "-np", "8"], &[]).await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = send(process.address, &stream_of(40)).await;
        assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
        streams.push(stream);
    }
    process.signal("-TERM");
    for stream in &mut streams {
        let mut text = Vec::new();
        while let Some(chunk) = within(10, client::read_chunk(stream)).await.filter(|chunk| !chunk.is_empty()) {
            text.extend(chunk);
        }
        assert!(text.ends_with(b"data: [DONE]\n\n"));
    }
    assert_eq!(process.wait(Duration::from_secs(5)).code(), Some(0));
    let log: Vec<String> = process.log.try_iter().collect();
    assert!(log.iter().any(|line| line.starts_with("[INFO] shutting down; a second signal ends")), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_server_at_once() {
    for (signal, code) in [("-TERM", 143), ("-INT", 130)] {
        let mut process = Process::start(&["--simulate", "20"], &[]).await;
        let mut stream = send(process.address, &stream_of(1_000)).await;
        assert_eq!(read_head(&mut stream).await.unwrap().0, 200);
        process.signal("-TERM");
        std::thread::sleep(Duration::from_millis(200));
        assert!(process.child.try_wait().unwrap().is_none(), "it waits for the stream");
        process.signal(signal);
        assert_eq!(process.wait(Duration::from_secs(1)).code(), Some(code));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_process_ends_within_a_second() {
    let mut process = Process::start(&["--simulate", "0"], &[]).await;
    process.signal("-INT");
    assert_eq!(process.wait(Duration::from_secs(1)).code(), Some(0));
}
