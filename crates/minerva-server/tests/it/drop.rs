//! Many clients, some of which leave: nobody else notices, and nothing is left behind.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use minerva_engine::SimConfig;
use serde_json::json;

use crate::client::{post_bytes, read_head, read_reply, send};
use crate::server::{eventually, sim, start_with, within};

const CLIENTS: u64 = 32;
const REQUESTS: u64 = 200;

/// The server's ends of connections that are not closed. By port: other tests of this process have sockets too.
fn open_sockets(port: u16) -> usize {
    const LISTEN: &str = "0A";
    const TIME_WAIT: &str = "06";
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let is_open = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
        local.ends_with(&format!(":{port:04X}")) && ![LISTEN, TIME_WAIT].contains(&state)
    };
    table.lines().skip(1).filter(is_open).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_third_of_32_clients_leaves_at_any_moment_and_the_others_do_not_notice() {
    let sim = SimConfig { step_us: 300, us_per_token: 5, n_seq_max: 8, max_queued_requests: 512, ..sim() };
    let server = Arc::new(start_with(sim, |_| {}).await);
    assert_eq!(open_sockets(server.address.port()), 0);
    let (finished, dropped) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let random = Arc::new(RandomState::new());
    let clients = (0..CLIENTS).map(|client| {
        let (server, random) = (Arc::clone(&server), Arc::clone(&random));
        let (finished, dropped) = (Arc::clone(&finished), Arc::clone(&dropped));
        tokio::spawn(async move {
            for number in (client..REQUESTS).step_by(CLIENTS as usize) {
                let dice = random.hash_one(number);
                let body = json!({"prompt": format!("request {number} ").repeat(10), "max_tokens": 20, "stream": true});
                let mut stream =
                    send(server.address, &post_bytes("/v1/completions", "", body.to_string().as_bytes())).await;
                if number % 3 == 0 {
                    // While it waits, in prefill or in the middle of the answer.
                    tokio::time::sleep(Duration::from_micros(dice % 40_000)).await;
                    dropped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                let reply = within(30, read_reply(&mut stream)).await.unwrap();
                let events = reply.events();
                assert_eq!((reply.status, events.last().unwrap()), (200, &json!("[DONE]")), "{}", reply.text());
                let ends = events.iter().filter(|event| event["choices"][0]["finish_reason"] == "length").count();
                assert_eq!(ends, 1);
                finished.fetch_add(1, Ordering::Relaxed);
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    assert_eq!((finished.load(Ordering::Relaxed), dropped.load(Ordering::Relaxed)), (133, 67));
    let stats = server.idle().await;
    assert!(stats.cancelled_total > 20 && stats.cancelled_total <= 67, "{stats:?}");
    assert_eq!(stats.failed_total, 0);
    eventually("every socket is closed", || open_sockets(server.address.port()) == 0).await;
    let reported = server.get("/v1/status").await.json();
    assert_eq!(reported["requests"], json!({"running": 0, "queued": 0, "in_flight": 0}));
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_frees_its_place() {
    let slow = SimConfig { n_seq_max: 1, step_us: 5_000, max_queued_requests: 1, ..sim() };
    let server = start_with(slow, |_| {}).await;
    let body = json!({"prompt": "hi", "max_tokens": 500, "stream": true}).to_string();
    let bytes = post_bytes("/v1/completions", "", body.as_bytes());
    let mut running = send(server.address, &bytes).await;
    assert_eq!(read_head(&mut running).await.unwrap().0, 200);
    eventually("one runs", || server.engine.stats().requests_running == 1).await;
    for _ in 0..3 {
        let mut queued = send(server.address, &bytes).await;
        assert_eq!(read_head(&mut queued).await.unwrap().0, 200);
        drop(queued);
        eventually("the place is free", || server.engine.stats().requests_queued == 0).await;
    }
    assert_eq!(server.engine.stats().requests_running, 1, "the first one goes on");
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_is_counted() {
    let server = start_with(SimConfig { step_us: 5_000, ..sim() }, |_| {}).await;
    let body = json!({"prompt": "hi", "max_tokens": 500}).to_string();
    let client = send(server.address, &post_bytes("/v1/completions", "", body.as_bytes())).await;
    eventually("it runs", || server.engine.stats().requests_running == 1).await;
    drop(client);
    assert_eq!(server.idle().await.cancelled_total, 1);
    let metrics = server.get("/metrics").await.text();
    let line = "minerva_http_requests_total{endpoint=\"/v1/completions\",status=\"499\"} 1";
    assert!(metrics.lines().any(|own| own == line), "{metrics}");
}
