//! On which terms requests are served: whose they are, their priority and their deadline.

use std::time::{Duration, Instant};

use minerva_engine::SimConfig;
use serde_json::json;

use crate::client::{post_with, read_reply, send};
use crate::server::{eventually, sim, start, start_with, within};

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn a_second_key_is_served_at_once_while_the_first_floods() {
    let slow = SimConfig { n_seq_max: 2, step_us: 5_000, max_queued_requests: 300, ..sim() };
    let server = start_with(slow, |config| config.server.api_keys = vec!["one".to_owned(), "two".to_owned()]).await;
    let long = json!({"prompt": "hi", "max_tokens": 500}).to_string();
    let header = |key: &str| format!("Authorization: Bearer {key}\r\n");
    let mut flood = Vec::new();
    for _ in 0..100 {
        flood.push(send(server.address, &crate::client::post_bytes(TEXT, &header("one"), long.as_bytes())).await);
    }
    eventually("the flood is there", || server.engine.stats().requests_queued >= 98).await;
    let began = Instant::now();
    let short = json!({"prompt": "hello", "max_tokens": 2}).to_string();
    let reply = within(5, post_with(server.address, TEXT, &header("two"), short.as_bytes())).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    let metrics = post_metrics(&server).await;
    assert!(metrics.contains("minerva_preemptions_total 1"), "{metrics}");
    drop(flood);
    server.idle().await;
}

async fn post_metrics(server: &crate::server::TestServer) -> String {
    let mut stream =
        send(server.address, crate::client::head("GET", "/metrics", "X-Api-Key: one\r\n").as_bytes()).await;
    read_reply(&mut stream).await.unwrap().text()
}

#[tokio::test]
async fn a_deadline_that_passes_in_the_queue_is_504() {
    let slow = SimConfig { n_seq_max: 1, step_us: 5_000, ..sim() };
    let server = start_with(slow, |_| {}).await;
    let long = json!({"prompt": "hi", "max_tokens": 900}).to_string();
    let busy = send(server.address, &crate::client::post_bytes(TEXT, "", long.as_bytes())).await;
    eventually("it runs", || server.engine.stats().requests_running == 1).await;
    let reply = within(5, server.complete(&json!({"prompt": "hi", "max_tokens": 2, "deadline_ms": 50}))).await;
    assert_eq!(reply.error(), (504, "deadline_expired".to_owned(), None));
    drop(busy);
    server.idle().await;
}

#[tokio::test]
async fn only_where_it_is_allowed_may_a_request_go_before_others() {
    let server = start().await;
    let ask = |priority: i64| json!({"prompt": "hi", "max_tokens": 2, "priority": priority});
    assert_eq!(server.complete(&ask(5)).await.status, 200);
    let refused = server.complete(&ask(-1)).await.error();
    assert_eq!(refused, (400, "priority_not_allowed".to_owned(), Some("priority".to_owned())));
    assert_eq!(server.complete(&ask(1 << 40)).await.error().0, 400);
    let server = start_with(sim(), |config| config.server.allow_priority = true).await;
    assert_eq!(server.complete(&ask(-1)).await.status, 200);
}

#[tokio::test]
async fn terms_out_of_range_are_refused_by_name() {
    let server = start().await;
    for (field, value) in [("deadline_ms", json!(0)), ("deadline_ms", json!(90_000_000)), ("max_itl_ms", json!(60_001))]
    {
        let reply = server.complete(&json!({"prompt": "hi", "max_tokens": 2, field: value})).await;
        assert_eq!(reply.error(), (400, "invalid_value".to_owned(), Some(field.to_owned())), "{}", reply.text());
    }
}
