//! The routes, and what every request goes through before it gets to one: host and origin, key, route, method.
//!
//! [`ROUTES`] is the whole surface. A test walks it to see that a key is needed everywhere but for health.

mod body;
mod cache_hints;
pub(crate) mod chat;
mod completions;
mod constraint;
pub(crate) mod error;
pub(crate) mod fields;
mod generation;
mod health;
mod models;
mod params;
mod sampling;
mod status;
mod unsupported;
pub(crate) mod wire;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use tracing::{debug, error};

use self::error::ApiError;
use self::wire::Shape;
use crate::browser::Refusal;
use crate::http::{Busy, Guard, ResponseBody};
use crate::state::{App, InFlightGuard};

/// One path and what answers there.
#[derive(Debug)]
pub struct Route {
    /// The path; a trailing `*` stands for one more segment.
    pub path: &'static str,
    /// GET (and HEAD) or POST.
    pub is_post: bool,
    /// Answered without a key.
    pub is_public: bool,
    endpoint: Endpoint,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Generate(Shape),
    Models,
    Model,
    Status,
    Metrics,
    Live,
    Ready,
}

const fn get(path: &'static str, endpoint: Endpoint) -> Route {
    Route { path, is_post: false, is_public: false, endpoint }
}

const fn health_route(path: &'static str, endpoint: Endpoint) -> Route {
    Route { path, is_post: false, is_public: true, endpoint }
}

/// Every route.
pub static ROUTES: &[Route] = &[
    Route { path: "/v1/chat/completions", is_post: true, is_public: false, endpoint: Endpoint::Generate(Shape::Chat) },
    Route { path: "/v1/completions", is_post: true, is_public: false, endpoint: Endpoint::Generate(Shape::Completion) },
    get("/v1/models", Endpoint::Models),
    get("/v1/models/*", Endpoint::Model),
    get("/v1/status", Endpoint::Status),
    get("/metrics", Endpoint::Metrics),
    health_route("/health", Endpoint::Ready),
    health_route("/health/live", Endpoint::Live),
    health_route("/health/ready", Endpoint::Ready),
];

impl Route {
    fn find(path: &str) -> Option<&'static Self> {
        let matches = |route: &&Self| match route.path.strip_suffix('*') {
            Some(start) => path.strip_prefix(start).is_some_and(|rest| !rest.is_empty()),
            None => route.path == path,
        };
        ROUTES.iter().find(matches)
    }

    fn takes(&self, method: &Method) -> bool {
        if self.is_post { method == Method::POST } else { method == Method::GET || method == Method::HEAD }
    }

    fn allow(&self) -> &'static str {
        if self.is_post { "POST, OPTIONS" } else { "GET, HEAD, OPTIONS" }
    }
}

/// What endpoints need to know about a request besides the request.
struct Call<'a> {
    app: &'a Arc<App>,
    busy: &'a Busy,
    request_id: &'a str,
    started: Instant,
}

/// A response, and what has to last as long as it.
struct Answered {
    response: Response<ResponseBody>,
    in_flight: Option<InFlightGuard>,
}

impl From<Response<ResponseBody>> for Answered {
    fn from(response: Response<ResponseBody>) -> Self {
        Self { response, in_flight: None }
    }
}

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What is counted where nobody was there to be answered: nginx's number for it.
const CLIENT_LEFT: u16 = 499;

/// Answers one request, whatever it is.
pub(crate) async fn handle(app: Arc<App>, request: Request<Incoming>, busy: Busy) -> Response<ResponseBody> {
    let started = Instant::now();
    let request_id = sane_id(request.headers()).unwrap_or_else(|| app.new_id("req-"));
    let route = Route::find(request.uri().path());
    let endpoint = route.map_or("other", |route| route.path);
    busy.set_unread_body(!request.body().is_end_stream());
    let checked = app.browser.check(request.version(), request.uri(), request.headers());
    // Dropped with this function's future, should the client leave before there is a response.
    let mut guard = Guard { app, endpoint, status: CLIENT_LEFT, started, request_id, in_flight: None, busy };
    let Guard { ref app, ref request_id, ref busy, .. } = guard;
    let call = Call { app, busy, request_id, started };
    let answering = AssertUnwindSafe(answer(&call, route, request, &checked)).catch_unwind();
    let answered = answering.await.unwrap_or_else(|_| Err(ApiError::internal("answering a request panicked")));
    let Answered { mut response, in_flight } = answered.unwrap_or_else(|error| {
        app.metrics.count_rejection(error.code);
        log_error(&error, request_id, endpoint);
        Answered::from(error_response(&error))
    });
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert(X_REQUEST_ID, value);
    }
    if let Ok(Some(origin)) = checked
        && let Ok(value) = HeaderValue::from_str(&origin)
    {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, value);
        headers.insert(header::VARY, HeaderValue::from_static("origin, access-control-request-headers"));
        let readable = HeaderValue::from_static("x-request-id, retry-after");
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, readable);
    }
    (guard.status, guard.in_flight) = (response.status().as_u16(), in_flight);
    response.map(|body| body.guarded(guard))
}

async fn answer(
    call: &Call<'_>,
    route: Option<&'static Route>,
    request: Request<Incoming>,
    checked: &Result<Option<String>, Refusal>,
) -> Result<Answered, ApiError> {
    let forbidden = |code, message| Err(ApiError::request(StatusCode::FORBIDDEN, code, message));
    match checked {
        Ok(_) => {}
        Err(Refusal::BadHost) => {
            return Err(ApiError::invalid("bad_host", "the request needs one valid `Host` header"));
        }
        Err(Refusal::Host) => {
            return forbidden("host_not_allowed", "this host name is not served; see `--allow-host`");
        }
        Err(Refusal::Origin) => {
            return forbidden("origin_not_allowed", "this origin may not use the server; see `--allow-origin`");
        }
    }
    // A preflight cannot carry a key, and only an allowed origin's gets this far.
    let is_preflight = request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ORIGIN)
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let is_public = is_preflight || route.is_some_and(|route| route.is_public);
    let client = call.app.keys.client(request.headers());
    if !is_public && client.is_none() {
        let message = "a valid API key is required: `Authorization: Bearer KEY`";
        return Err(ApiError::request(StatusCode::UNAUTHORIZED, "invalid_api_key", message));
    }
    let Some(route) = route else {
        let message = "there is nothing at this path; `/v1/chat/completions` is where most requests go";
        return Err(ApiError::request(StatusCode::NOT_FOUND, "unknown_url", message));
    };
    if request.method() == Method::OPTIONS {
        let wanted = request.headers().get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
        return Ok(options(route, is_preflight, wanted).into());
    }
    if !route.takes(request.method()) {
        let message = format!("this path takes {}", route.allow());
        let error = ApiError::request(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message);
        return Err(error.with(|more| more.allow = Some(route.allow())));
    }
    let app = call.app;
    Ok(match route.endpoint {
        Endpoint::Generate(shape) => generation::answer(call, request, shape, client.unwrap_or(0)).await?,
        Endpoint::Models => json(models::list(app)).into(),
        Endpoint::Model => {
            let name = request.uri().path().strip_prefix(route.path.trim_end_matches('*')).unwrap_or_default();
            let name = percent_encoding::percent_decode_str(name).decode_utf8_lossy();
            json(models::get(app, &name)?).into()
        }
        Endpoint::Status => json(status::print(app)).into(),
        Endpoint::Metrics => {
            let mut response = Response::new(ResponseBody::whole(crate::metrics::print(app)));
            let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(header::CONTENT_TYPE, text);
            response.into()
        }
        Endpoint::Live => health::live().into(),
        Endpoint::Ready => health::ready(app).into(),
    })
}

/// An allowed origin may send what headers it likes: official clients send many of their own.
fn options(route: &Route, is_preflight: bool, wanted: Option<HeaderValue>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::whole(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, HeaderValue::from_static(route.allow()));
    if is_preflight {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(route.allow()));
        let usual = || HeaderValue::from_static("authorization, content-type, x-api-key, x-request-id");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.unwrap_or_else(usual));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    }
    response
}

/// 200 with JSON.
fn json(bytes: Vec<u8>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::whole(bytes));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn error_response(error: &ApiError) -> Response<ResponseBody> {
    let mut response = json(error.body());
    *response.status_mut() = error.status;
    let headers = response.headers_mut();
    if let Some(seconds) = error.more.retry_after_s {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    if let Some(allow) = error.more.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// The client's message can have parts of the request in it, so only the code is logged.
fn log_error(error: &ApiError, request_id: &str, endpoint: &'static str) {
    let status = error.status.as_u16();
    if let Some(log) = &error.more.log {
        error!(endpoint, status, code = error.code, request_id, "request failed: {log}");
    } else {
        let param = error.more.param.as_deref().map(|param| param.chars().take(64).collect::<String>());
        debug!(endpoint, status, code = error.code, ?param, request_id, "request refused");
    }
}

/// The client's own id for the request, if it is short and plain enough for headers and logs.
fn sane_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(X_REQUEST_ID)?.to_str().ok()?;
    let is_sane =
        (1..=128).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte));
    is_sane.then(|| id.to_owned())
}
