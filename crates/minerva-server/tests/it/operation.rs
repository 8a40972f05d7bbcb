//! What an operator looks at: health, status, metrics, ids, models.

use std::collections::BTreeMap;
use std::time::Instant;

use minerva_engine::{LoadProgress, SimConfig};
use minerva_server::Phase;
use serde_json::json;

use crate::client::{head, post_bytes, read_head, read_reply, send};
use crate::server::{ms, sim, start, start_loading, start_with};

#[tokio::test]
async fn health_and_status_answer_while_the_model_loads() {
    let server = start_loading(|_| {}).await;
    server.app.set_phase(Phase::Loading(LoadProgress { stage: "weights".to_owned(), fraction: 0.25 }));
    let started = Instant::now();
    assert_eq!(server.get("/health/live").await.status, 200);
    for path in ["/health", "/health/ready"] {
        let reply = server.get(path).await;
        let expected = json!({"status": "loading", "stage": "weights", "progress": 0.25});
        assert_eq!((reply.status, reply.json()), (503, expected));
    }
    let status = server.get("/v1/status").await.json();
    assert_eq!((&status["state"], &status["load"]["fraction"]), (&json!("loading"), &json!(0.25)));
    assert_eq!(server.get("/v1/models").await.json()["data"], json!([]));
    assert!(server.get("/metrics").await.text().contains("minerva_ready 0"));
    assert!(started.elapsed().as_millis() < 600, "{:?}", started.elapsed());

    server.app.set_phase(Phase::Ready(server.engine.clone()));
    assert_eq!(server.get("/health/ready").await.status, 200);
    assert_eq!(server.get("/v1/status").await.json()["state"], "ready");
}

#[tokio::test]
async fn a_step_that_hangs_turns_readiness_off_and_leaves_status_alone() {
    let stuck = SimConfig { step_us: 1_500_000, ..sim() };
    let server = start_with(stuck, |config| config.server.step_deadline_seconds = ms(100)).await;
    assert_eq!(server.get("/health/ready").await.status, 200);
    let body = json!({"prompt": "hi", "max_tokens": 1, "stream": true}).to_string();
    let _stream = send(server.address, &post_bytes("/v1/completions", "", body.as_bytes())).await;
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    let started = Instant::now();
    let reply = server.get("/health/ready").await;
    assert_eq!((reply.status, reply.json()), (503, json!({"status": "stalled"})));
    assert_eq!(server.get("/v1/status").await.json()["requests"]["running"], json!(1));
    assert!(started.elapsed().as_millis() < 200);
    assert_eq!(server.get("/health/live").await.status, 200);
}

#[tokio::test]
async fn status_says_where_the_model_runs_and_how_busy_it_is() {
    let server = start().await;
    let status = server.get("/v1/status").await.json();
    for pointer in [
        "/device/kind",
        "/device/name",
        "/device/layers_on_gpu",
        "/device/layers_total",
        "/device/reason",
        "/build/llama_cpp",
        "/model/name",
        "/model/placement/n_threads",
        "/model/placement/memory",
        "/model/placement/limit_bytes",
        "/requests/running",
        "/requests/queued",
        "/uptime_seconds",
        "/engine/kv_cells_total",
    ] {
        assert!(status.pointer(pointer).is_some(), "{pointer} in {status:#}");
    }
}

#[tokio::test]
async fn the_model_list_names_the_context_of_one_request() {
    let server = start().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["data"][0]["id"]), (&json!("list"), &json!("sim")));
    assert_eq!(list["data"][0]["max_model_len"], json!(1024));
    assert_eq!(server.get("/v1/models/sim").await.json()["meta"]["n_ctx"], json!(1024));
    assert_eq!(server.get("/v1/models/default").await.json()["object"], "model");
    assert_eq!(server.get("/v1/models/gpt-4").await.error().1, "model_not_found");
    assert_eq!(server.get("/v1/models/%73im").await.json()["object"], "model");
    assert_eq!(server.get("/v1/models/a/b").await.error().1, "model_not_found");
}

#[tokio::test]
async fn every_response_has_a_request_id_and_a_sane_one_is_kept() {
    let server = start().await;
    let id = async |given: &str| {
        let mut stream = send(server.address, head("GET", "/nothing", given).as_bytes()).await;
        read_reply(&mut stream).await.unwrap().header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(id("x-request-id: my-id_1\r\n").await, "my-id_1");
    let long = format!("x-request-id: {}\r\n", "a".repeat(200));
    for given in ["", "x-request-id: a b\r\n", "x-request-id: \"\r\n", long.as_str()] {
        assert!(id(given).await.starts_with("req-"));
    }
    assert_ne!(id("").await, id("").await);
}

/// The parts of the exposition format that Prometheus insists on.
fn parse_metrics(text: &str) -> BTreeMap<String, f64> {
    let mut kinds = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            let (name, kind) = head.split_once(' ').unwrap();
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} has two TYPE lines");
        } else if !line.starts_with('#') {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let kind = kinds
                .get(name)
                .or_else(|| kinds.get(base.unwrap_or_default()))
                .unwrap_or_else(|| panic!("no TYPE: {line}"));
            assert!(kind != "counter" || name.ends_with("_total"), "{name}");
            assert!(name.starts_with("minerva_"), "{name}");
            assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
        }
    }
    samples
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = start().await;
    let request = json!({"prompt": "hello", "max_tokens": 5});
    server.complete(&request).await;
    server.complete(&json!({"prompt": "hello", "max_tokens": 5, "stream": true})).await;
    server.complete(&json!({"prompt": 1})).await;
    server.idle().await;
    let reply = server.get("/metrics").await;
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let samples = parse_metrics(&reply.text());
    for (series, value) in [
        ("minerva_http_requests_total{endpoint=\"/v1/completions\",status=\"200\"}", 2.0),
        ("minerva_http_requests_total{endpoint=\"/v1/completions\",status=\"400\"}", 1.0),
        ("minerva_requests_rejected_total{reason=\"invalid_type\"}", 1.0),
        ("minerva_generated_tokens_total", 10.0),
        ("minerva_time_to_first_token_seconds_count", 2.0),
        ("minerva_inter_token_latency_seconds_count", 8.0),
        ("minerva_queue_seconds_count", 2.0),
        ("minerva_request_duration_seconds_count", 2.0),
        ("minerva_requests_running", 0.0),
        ("minerva_requests_queued", 0.0),
        ("minerva_kv_cells_used", 0.0),
        // "hello" is too short to be the beginning of anything.
        ("minerva_prefix_cache_misses_total{reason=\"first\"}", 2.0),
        ("minerva_prefix_cache_misses_total{reason=\"evicted\"}", 0.0),
        ("minerva_ready", 1.0),
        ("minerva_model_info{model=\"sim\",device=\"Cpu\"}", 1.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series} in {samples:#?}");
    }
    assert!(samples["minerva_kv_cells_total"] > 0.0);
}

#[tokio::test]
async fn metrics_tell_what_constraints_cost() {
    let server = start_with(SimConfig { spread: 3.0, ..sim() }, |_| {}).await;
    let before = parse_metrics(&server.get("/metrics").await.text());
    assert_eq!(before.get("minerva_constraint_compile_seconds_count"), Some(&0.0));
    let request = |regex: &str| json!({"prompt": "hi", "max_tokens": 20, "guided_regex": regex});
    for regex in ["[a-z]{8}", "[a-z]{8}", "[0-9]{4}", "[a-z]{8}"] {
        assert_eq!(server.complete(&request(regex)).await.status, 200);
    }
    assert_eq!(server.complete(&request("(")).await.status, 400);
    server.idle().await;
    let after = parse_metrics(&server.get("/metrics").await.text());
    for (series, value) in [
        ("minerva_constraint_compile_seconds_count", 3.0), // the one that fails too
        ("minerva_constraint_compile_seconds_bucket{le=\"+Inf\"}", 3.0),
        ("minerva_constraint_cache_hits_total", 2.0),
        ("minerva_constraint_cache_misses_total", 3.0),
        ("minerva_constraint_cache_entries", 3.0),
        // The first mask of a constraint comes with its compilation, and after the last token there is none.
        ("minerva_constraint_mask_seconds_count", 3.0 * 7.0 + 3.0),
    ] {
        assert_eq!(after.get(series), Some(&value), "{series}");
    }
    assert!(after["minerva_constraint_compile_seconds_sum"] > 0.0);
    assert!(after["minerva_constraint_mask_seconds_sum"] > 0.0);
    assert!(after["minerva_constraint_cache_bytes"] >= 2.0 * 65_536.0);
    assert!(after["minerva_constraint_mask_wait_seconds_count"] <= after["minerva_constraint_mask_seconds_count"]);
    assert!(after["minerva_sampler_seconds_total"] > before["minerva_sampler_seconds_total"]);
}

#[tokio::test]
async fn a_stream_says_no_buffering_and_no_caching() {
    let server = start().await;
    let body = json!({"prompt": "hi", "max_tokens": 1, "stream": true}).to_string();
    let mut stream = send(server.address, &post_bytes("/v1/completions", "", body.as_bytes())).await;
    let (_, headers) = read_head(&mut stream).await.unwrap();
    let has = |name: &str, value: &str| headers.iter().any(|(key, text)| key == name && text == value);
    assert!(has("cache-control", "no-cache") && has("x-accel-buffering", "no"), "{headers:?}");
}
