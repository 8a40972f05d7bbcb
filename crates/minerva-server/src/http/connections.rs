//! Who is connected, who is busy, and who has to go when there is no room.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::config::ServerSettings;
use crate::state::App;

/// Time limits of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) header: Duration,
    pub(crate) idle: Duration,
    pub(crate) write: Duration,
}

/// Every open connection.
pub(crate) struct Connections {
    app: Arc<App>,
    max: usize,
    limits: Limits,
    next_id: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    closed: Notify,
}

impl Connections {
    pub(crate) fn new(app: &Arc<App>, settings: &ServerSettings) -> Self {
        let limits = Limits {
            header: settings.header_timeout_seconds.duration(),
            idle: settings.idle_timeout_seconds.duration(),
            write: settings.write_timeout_seconds.duration(),
        };
        let open = Mutex::default();
        Self {
            app: Arc::clone(app),
            max: settings.max_connections,
            limits,
            next_id: 0.into(),
            open,
            closed: Notify::new(),
        }
    }

    /// A place for one more connection, if need be that of the longest idle one. `None` when all are busy.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Admitted> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= self.max && !self.evict_from(&mut open) {
            return None;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection::new(self.limits));
        open.insert(id, Arc::clone(&connection));
        self.app.metrics.connections_open.store(open.len() as u64, Ordering::Relaxed);
        Some(Admitted { id, connection, connections: Arc::clone(self) })
    }

    /// Closes the longest idle connection.
    pub(crate) fn evict_idle(&self) -> bool {
        self.evict_from(&mut self.open.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn evict_from(&self, open: &mut HashMap<u64, Arc<Connection>>) -> bool {
        let idle = open.iter().filter_map(|(id, connection)| connection.idle_since().map(|since| (since, *id)));
        let Some((_, id)) = idle.min() else { return false };
        if let Some(connection) = open.remove(&id) {
            connection.evict.notify_one();
            self.app.metrics.connections_evicted.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Returns once no connection is open.
    pub(crate) async fn none(&self) {
        loop {
            let closed = self.closed.notified();
            if self.open.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
                return;
            }
            closed.await;
        }
    }
}

/// A connection's place; dropping it gives the place back.
pub(crate) struct Admitted {
    id: u64,
    connection: Arc<Connection>,
    connections: Arc<Connections>,
}

impl Deref for Admitted {
    type Target = Arc<Connection>;

    fn deref(&self) -> &Self::Target {
        &self.connection
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(&self.id);
        self.connections.app.metrics.connections_open.store(open.len() as u64, Ordering::Relaxed);
        drop(open);
        self.connections.closed.notify_waiters();
    }
}

/// What is known about one connection. Times are milliseconds since it was opened.
#[derive(Debug)]
pub(crate) struct Connection {
    opened: Instant,
    limits: Limits,
    /// Requests whose response is not complete: 0 or 1, since hyper takes one at a time.
    n_busy: AtomicU32,
    idle_since_ms: AtomicU64,
    /// When the first byte of the next request came, plus one; 0 while none did.
    head_since_ms: AtomicU64,
    /// Whether the peer may still be sending a body that nobody read.
    has_unread_body: AtomicBool,
    evict: Notify,
}

impl Connection {
    fn new(limits: Limits) -> Self {
        Self {
            opened: Instant::now(),
            limits,
            n_busy: 0.into(),
            idle_since_ms: 0.into(),
            head_since_ms: 0.into(),
            has_unread_body: false.into(),
            evict: Notify::new(),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// A request has begun; it ends when the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Busy {
        self.n_busy.fetch_add(1, Ordering::SeqCst);
        self.head_since_ms.store(0, Ordering::SeqCst);
        Busy(Arc::clone(self))
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.n_busy.load(Ordering::SeqCst) == 0
    }

    /// Bytes arrived.
    pub(super) fn on_read(&self) {
        if self.is_idle() && self.head_since_ms.load(Ordering::Relaxed) == 0 {
            self.head_since_ms.store(self.now_ms() + 1, Ordering::SeqCst);
        }
    }

    pub(super) fn has_unread_body(&self) -> bool {
        self.has_unread_body.load(Ordering::SeqCst)
    }

    /// When the connection fell idle, comparable between connections; `None` while it is busy.
    fn idle_since(&self) -> Option<Instant> {
        self.is_idle().then(|| self.opened + Duration::from_millis(self.idle_since_ms.load(Ordering::SeqCst)))
    }

    /// Resolves when the connection has to make room for another.
    pub(crate) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Whether the peer took too long to send a request.
    pub(crate) fn expired(&self) -> bool {
        let now = self.now_ms();
        let passed = |since: u64, limit: Duration| u128::from(now.saturating_sub(since)) >= limit.as_millis();
        let head_since = self.head_since_ms.load(Ordering::SeqCst);
        let is_slow_head = head_since > 0 && passed(head_since - 1, self.limits.header);
        self.is_idle() && (is_slow_head || passed(self.idle_since_ms.load(Ordering::SeqCst), self.limits.idle))
    }

    /// When to ask [`expired`](Self::expired) next: the limits are kept to within a quarter.
    pub(crate) fn until_check(&self) -> Duration {
        (self.limits.header.min(self.limits.idle) / 4).max(Duration::from_millis(10))
    }

    fn now_ms(&self) -> u64 {
        self.opened.elapsed().as_millis() as u64
    }
}

/// A request on a connection, from its head to the end of its response.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Connection>);

impl Busy {
    /// Notes whether the peer may still be sending a body that nobody is going to read.
    pub(crate) fn set_unread_body(&self, is_unread: bool) {
        self.0.has_unread_body.store(is_unread, Ordering::SeqCst);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.idle_since_ms.store(self.0.now_ms(), Ordering::SeqCst);
        self.0.n_busy.fetch_sub(1, Ordering::SeqCst);
    }
}
