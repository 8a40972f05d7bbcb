//! Who is let in: keys, hosts, origins.

use minerva_server::api::ROUTES;
use serde_json::json;

use crate::client::{Reply, head, post_bytes, read_reply, send};
use crate::server::{TestServer, sim, start, start_with};

async fn with_key() -> TestServer {
    start_with(sim(), |config| config.server.api_keys = vec!["sk-right".to_owned(), "sk-other".to_owned()]).await
}

async fn raw(server: &TestServer, bytes: &[u8]) -> Reply {
    read_reply(&mut send(server.address, bytes).await).await.unwrap()
}

#[tokio::test]
async fn with_keys_every_route_but_health_is_401_without_one() {
    let server = with_key().await;
    for route in ROUTES {
        let path = route.path.replace('*', "sim");
        let method = if route.is_post { "POST" } else { "GET" };
        for key in ["", "authorization: Bearer sk-wrong\r\n", "x-api-key: sk-righ\r\n"] {
            let reply = raw(&server, head(method, &path, key).as_bytes()).await;
            if route.is_public {
                assert_eq!(reply.status, 200, "{path}");
                assert!(path.starts_with("/health"), "{path} is public");
            } else {
                assert_eq!(reply.error(), (401, "invalid_api_key".to_owned(), None), "{path}");
                assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
            }
        }
    }
    for path in ["/", "/v1/nothing", "/health/../metrics", "/%6detrics", "//metrics"] {
        assert_eq!(server.get(path).await.status, 401, "{path}: what exists is not told without a key");
    }
}

#[tokio::test]
async fn a_right_key_in_either_header_is_let_in() {
    let server = with_key().await;
    let body = json!({"prompt": "hi", "max_tokens": 1}).to_string();
    for key in ["authorization: Bearer sk-right\r\n", "x-api-key: sk-other\r\n"] {
        let reply = raw(&server, &post_bytes("/v1/completions", key, body.as_bytes())).await;
        assert_eq!(reply.status, 200);
        assert_eq!(raw(&server, head("GET", "/metrics", key).as_bytes()).await.status, 200);
    }
}

#[tokio::test]
async fn a_name_that_is_not_loopback_is_refused() {
    let server = start().await;
    let refused = (403, "host_not_allowed".to_owned(), None);
    let rebound = head("GET", "/v1/models", "host: evil.example\r\n");
    assert_eq!(raw(&server, rebound.as_bytes()).await.error(), refused);
    let missing = b"GET /v1/models HTTP/1.1\r\n\r\n";
    assert_eq!(raw(&server, missing).await.error(), (400, "bad_host".to_owned(), None));
    let allowed = start_with(sim(), |config| config.server.allow_hosts = vec!["Evil.example".to_owned()]).await;
    assert_eq!(raw(&allowed, rebound.as_bytes()).await.status, 200);
}

#[tokio::test]
async fn no_web_page_gets_in_unless_its_origin_is_allowed() {
    let server = start().await;
    let body = json!({"prompt": "hi", "max_tokens": 1}).to_string();
    let post = |headers: &str| post_bytes("/v1/completions", headers, body.as_bytes());
    let reply = raw(&server, &post("origin: https://evil.example\r\n")).await;
    assert_eq!(reply.error().1, "origin_not_allowed");
    assert_eq!(reply.header("access-control-allow-origin"), None);
    // A form, and a script that does not say what it sends, need no preflight: the type keeps them out.
    for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""] {
        let reply = raw(&server, &post(&format!("content-type: {content_type}\r\n"))).await;
        assert_eq!(reply.error().0, 415, "{content_type}");
    }
    let gzip = raw(&server, &post("content-encoding: gzip\r\n")).await;
    assert_eq!(gzip.error(), (415, "unsupported_encoding".to_owned(), None));
}

#[tokio::test]
async fn an_allowed_origin_gets_its_preflight_without_a_key_and_may_read_the_answer() {
    let server = start_with(sim(), |config| {
        config.server.allow_origins = vec!["https://chat.example".to_owned()];
        config.server.api_keys = vec!["sk-right".to_owned()];
    })
    .await;
    let origin = "origin: https://chat.example\r\n";
    let preflight =
        head("OPTIONS", "/v1/chat/completions", &format!("{origin}access-control-request-method: POST\r\n"));
    let reply = raw(&server, preflight.as_bytes()).await;
    assert_eq!(reply.status, 204);
    assert_eq!(reply.header("access-control-allow-origin"), Some("https://chat.example"));
    assert!(reply.header("access-control-allow-headers").unwrap().contains("authorization"));
    // Official clients send headers of their own.
    let own = "access-control-request-method: POST\r\naccess-control-request-headers: authorization,x-stainless-os\r\n";
    let reply = raw(&server, head("OPTIONS", "/v1/chat/completions", &format!("{origin}{own}")).as_bytes()).await;
    assert_eq!(reply.header("access-control-allow-headers"), Some("authorization,x-stainless-os"));
    assert_eq!(raw(&server, head("OPTIONS", "/v1/chat/completions", "").as_bytes()).await.status, 401);
    let reply = raw(&server, head("GET", "/v1/models", &format!("{origin}x-api-key: sk-right\r\n")).as_bytes()).await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, Some("https://chat.example")));
}
