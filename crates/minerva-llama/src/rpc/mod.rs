//! Devices of another process or machine, over llama.cpp's RPC.
//!
//! [`add_rpc_server`] puts a server's devices into the list that [`devices`](crate::devices) returns; a model then uses
//! them like GPUs. [`serve_rpc`] is the other end. llama.cpp's RPC has no authentication and no encryption, and its server
//! trusts its client: docs/rpc.md has the limits. Start with [`add_rpc_server`]; [`relay`] says why a server that goes
//! away does not take this process along.

mod graph;
mod protocol;
mod relay;
mod worker;

use std::ffi::{CStr, CString, c_void};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};

use crate::error::call;
use crate::model::LOADING;
use crate::{backend, sys};

pub(crate) use relay::Link;
pub use worker::{RpcWorkerError, RpcWorkerOptions, serve_rpc};

/// A server to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RpcServer {
    /// `host:port`.
    pub address: String,
    /// The most memory to use on each of its devices, in bytes. Servers report the memory of their host and have no limit
    /// of their own.
    pub memory_limit_bytes: Option<u64>,
}

impl RpcServer {
    /// A server without a memory limit.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), memory_limit_bytes: None }
    }

    /// Whether the address can only be on this machine. A name is not looked up: only `localhost` counts.
    pub fn is_loopback(&self) -> bool {
        let host = self.address.rsplit_once(':').map_or(self.address.as_str(), |(host, _)| host);
        host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
    }
}

/// Why a server's devices cannot be used. Nothing was added.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpcError {
    /// llama.cpp was compiled without its RPC backend.
    #[error("this build has no RPC: llama.cpp was compiled without GGML_RPC=ON, or its RPC module is missing")]
    NotBuilt,
    /// Not `host:port`, or a name that has no address.
    #[error("cannot resolve the RPC server `{address}`")]
    Address {
        /// As it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("cannot connect to the RPC server {address}")]
    Unreachable {
        /// As it was given.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody listens but does not answer in time.
    #[error("the RPC server {address} does not answer: it serves one client at a time, and may have one")]
    Busy {
        /// As it was given.
        address: String,
    },
    /// What answers is no RPC server.
    #[error("{address} does not speak llama.cpp's RPC")]
    Protocol {
        /// As it was given.
        address: String,
        /// What went wrong.
        source: io::Error,
    },
    /// A server of another release of llama.cpp.
    #[error(
        "the RPC server {address} speaks version {major}.{minor}, this build {}.{}",
        protocol::MAJOR,
        protocol::MINOR
    )]
    Version {
        /// As it was given.
        address: String,
        /// Its major version.
        major: u8,
        /// Its minor version.
        minor: u8,
    },
    /// The server has nothing to offer.
    #[error("the RPC server {address} has no devices")]
    NoDevices {
        /// As it was given.
        address: String,
    },
    /// This process has no socket or no thread left.
    #[error("cannot start the relay to an RPC server")]
    Relay(#[source] io::Error),
    /// llama.cpp failed.
    #[error(transparent)]
    Call(#[from] crate::CallError),
}

/// How long to wait for a connection, per address of a name.
const CONNECT_TIME: Duration = Duration::from_secs(1);
/// How long to wait for the answer to the first question: a server that has a client leaves others waiting.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// How long to wait for the name service.
const RESOLVE_TIME: Duration = Duration::from_secs(5);
/// A host that says nothing for so long, not even to its kernel's probes, is gone.
const SILENCE_TIME: Duration = Duration::from_secs(30);

/// The servers that were added, in order.
static LINKS: Mutex<Vec<Arc<Link>>> = Mutex::new(Vec::new());

/// Whether this build of llama.cpp has RPC.
pub fn has_rpc() -> bool {
    backend::init();
    function(c"ggml_backend_rpc_add_server").is_some()
}

/// Connects to a server and adds its devices to the list; returns their places in it. A server that was added before and
/// is still there is not added twice. Takes at most a few seconds.
///
/// # Errors
/// [`RpcError`]; the process does not end, whatever answers at the address.
#[doc(alias = "ggml_backend_rpc_add_server")]
pub fn add_rpc_server(server: &RpcServer) -> Result<Vec<usize>, RpcError> {
    backend::init();
    let add = function(c"ggml_backend_rpc_add_server").ok_or(RpcError::NotBuilt)?;
    let _loading = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    let is_same = |link: &&Arc<Link>| {
        link.address == server.address && link.memory_limit_bytes == server.memory_limit_bytes && !link.is_lost()
    };
    if let Some(link) = links().iter().find(is_same) {
        return Ok(link.devices.get().cloned().unwrap_or_default());
    }
    let connection = connect(&server.address)?;
    let link = Arc::new(Link::new(server.address.clone(), server.memory_limit_bytes));
    let endpoint = start_relay(connection, &link).map_err(RpcError::Relay)?;
    let devices = register(add, &endpoint, &server.address)?;
    link.devices.get_or_init(|| devices.clone());
    LINKS.lock().unwrap_or_else(PoisonError::into_inner).push(link);
    Ok(devices)
}

/// The servers that `devices` belong to.
pub(crate) fn links_of(devices: &[usize]) -> Vec<Arc<Link>> {
    let mut links = links();
    links.retain(|link| link.devices.get().is_some_and(|of_link| of_link.iter().any(|index| devices.contains(index))));
    links
}

fn links() -> Vec<Arc<Link>> {
    LINKS.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// A connection that has shaken hands, to a server that has devices. llama.cpp's client would end the process on each
/// of these errors.
fn connect(address: &str) -> Result<TcpStream, RpcError> {
    let name = || address.to_owned();
    let addresses = resolve(address).map_err(|source| RpcError::Address { address: name(), source })?;
    let mut problem = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let connection = addresses.iter().find_map(|address| match TcpStream::connect_timeout(address, CONNECT_TIME) {
        Ok(connection) => Some(connection),
        Err(source) => {
            problem = source;
            None
        }
    });
    let Some(mut connection) = connection else {
        return Err(RpcError::Unreachable { address: name(), source: problem });
    };
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => RpcError::Busy { address: name() },
        _ => RpcError::Protocol { address: name(), source },
    };
    set_up(&connection).map_err(RpcError::Relay)?;
    let [major, minor, _] = protocol::hello(&mut connection).map_err(failed)?;
    if major != protocol::MAJOR || minor > protocol::MINOR {
        return Err(RpcError::Version { address: name(), major, minor });
    }
    if protocol::device_count(&mut connection).map_err(failed)? == 0 {
        return Err(RpcError::NoDevices { address: name() });
    }
    connection.set_read_timeout(None).map_err(RpcError::Relay)?; // a step may take long; the probes find a dead host
    Ok(connection)
}

/// The name service has no timeout of its own, so it is asked on a thread that may be left behind.
fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    let (send, answer) = mpsc::channel();
    let name = address.to_owned();
    thread::Builder::new().name("minerva-resolve".into()).spawn(move || {
        let _ = send.send(name.to_socket_addrs().map(Vec::from_iter));
    })?;
    answer.recv_timeout(RESOLVE_TIME).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn set_up(connection: &TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(ANSWER_TIME))?;
    let socket = SockRef::from(connection);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(SILENCE_TIME))?;
    let probe = SILENCE_TIME / 6;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(probe).with_interval(probe))
}

/// Starts the thread between llama.cpp and the server; returns the address for llama.cpp.
fn start_relay(server: TcpStream, link: &Arc<Link>) -> io::Result<CString> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let endpoint = CString::new(listener.local_addr()?.to_string()).unwrap_or_default(); // digits, dots, a colon
    // llama.cpp ends the process when it gets no socket: two for the connection, two more for its first look.
    let spare = [listener.try_clone()?, listener.try_clone()?, listener.try_clone()?, listener.try_clone()?];
    let link = Arc::clone(link);
    thread::Builder::new().name("minerva-rpc".into()).spawn(move || relay::run(listener, server, link))?;
    drop(spare);
    Ok(endpoint)
}

/// Makes llama.cpp connect to `endpoint` and puts the devices into its list. The caller holds [`LOADING`].
fn register(add: *mut c_void, endpoint: &CStr, address: &str) -> Result<Vec<usize>, RpcError> {
    let mut registry = ptr::null_mut();
    // SAFETY: `add` is ggml's function of this name; the endpoint is NUL-terminated; `registry` receives the result.
    call(|error| unsafe { sys::mnv_rpc_add(add, endpoint.as_ptr(), &raw mut registry, error) })?;
    if registry.is_null() {
        return Err(RpcError::NoDevices { address: address.to_owned() });
    }
    let _registry = backend::REGISTRY.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: no preconditions after `init`.
    let first = unsafe { sys::ggml_backend_dev_count() };
    // SAFETY: a live registry that ggml never frees; nobody reads ggml's list while the write lock is held.
    unsafe { sys::ggml_backend_register(registry) };
    // SAFETY: as above.
    let end = unsafe { sys::ggml_backend_dev_count() };
    Ok((first..end).collect())
}

/// A function of the RPC backend by name, if the build has one.
fn function(name: &CStr) -> Option<*mut c_void> {
    let _registry = backend::REGISTRY.read().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a NUL-terminated name, and `init` ran.
    let registry = unsafe { sys::ggml_backend_reg_by_name(c"RPC".as_ptr()) };
    if registry.is_null() {
        return None;
    }
    // SAFETY: a live registry and a NUL-terminated name.
    let function = unsafe { sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr()) };
    (!function.is_null()).then_some(function)
}
