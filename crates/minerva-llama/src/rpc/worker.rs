//! The other end: offers devices of this machine to one client at a time.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};

use super::function;
use crate::error::{CallError, call};
use crate::{DeviceKind, RpcError, backend, devices, sys};

/// What a worker offers, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcWorkerOptions {
    /// Where to listen. llama.cpp's server takes IPv4 only. Port 0 takes a free one.
    pub address: SocketAddrV4,
    /// Names of the devices to offer, such as `CUDA0`. Empty: every GPU, or the CPU where there is none.
    pub devices: Vec<String>,
    /// Compute threads of the CPU device.
    pub n_threads: usize,
    /// The most memory that this process may allocate from now on, in bytes (Linux only). A request for more fails.
    pub memory_limit_bytes: Option<u64>,
    /// Listen on an address that other machines can reach. llama.cpp's RPC has no authentication, and its server trusts
    /// its client with this process's memory.
    pub insecure: bool,
}

impl RpcWorkerOptions {
    /// A worker for clients on this machine.
    pub fn new(port: u16, n_threads: usize) -> Self {
        Self {
            address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port),
            devices: Vec::new(),
            n_threads,
            memory_limit_bytes: None,
            insecure: false,
        }
    }
}

/// Why a worker cannot run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RpcWorkerError {
    /// The build has no RPC.
    #[error(transparent)]
    Rpc(#[from] RpcError),
    /// An address that other machines can reach, without the consent to it.
    #[error(
        "{address} can be reached from other machines, and llama.cpp's RPC has no authentication: whoever connects runs \
        computations here and can crash this process or take it over; listen on 127.0.0.1, or say `--insecure`"
    )]
    Insecure {
        /// Where it was to listen.
        address: SocketAddrV4,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// Where it was to listen.
        address: SocketAddrV4,
        /// What the system said.
        source: io::Error,
    },
    /// A device that this machine does not have.
    #[error("there is no device `{name}`: this build sees {known}")]
    Device {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The memory limit cannot be set.
    #[error("cannot limit the memory of this process to {limit_bytes} bytes more")]
    MemoryLimit {
        /// The limit asked for.
        limit_bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// llama.cpp's server ended; it says why on stderr.
    #[error("llama.cpp's RPC server on {address} ended")]
    Ended {
        /// Where it listened.
        address: SocketAddrV4,
    },
    /// llama.cpp failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Serves one client after another; returns only when that is not possible. `ready` gets the address before the first
/// one is accepted. llama.cpp's server prints to stdout: use it in a process of its own.
///
/// # Errors
/// [`RpcWorkerError`]. Memory that runs out while a client is served ends that client's session and is logged; the worker
/// goes on.
#[doc(alias = "ggml_backend_rpc_start_server")]
pub fn serve_rpc(options: &RpcWorkerOptions, ready: impl FnOnce(SocketAddrV4)) -> Result<Infallible, RpcWorkerError> {
    if !options.address.ip().is_loopback() && !options.insecure {
        return Err(RpcWorkerError::Insecure { address: options.address });
    }
    backend::init();
    let start = function(c"ggml_backend_rpc_start_server").ok_or(RpcError::NotBuilt)?;
    let mut raw_devices = Vec::new();
    for index in offered(&options.devices)? {
        raw_devices.push(backend::raw_device(index));
    }
    let address = free_address(options.address)?;
    let endpoint = CString::new(address.to_string()).unwrap_or_default(); // digits, dots, a colon
    if let Some(limit_bytes) = options.memory_limit_bytes {
        limit_memory(limit_bytes).map_err(|source| RpcWorkerError::MemoryLimit { limit_bytes, source })?;
    }
    ready(address);
    loop {
        let (n_threads, n_devices) = (options.n_threads.max(1), raw_devices.len());
        let served = call(|error| {
            // SAFETY: `start` is ggml's function of this name; the endpoint is NUL-terminated and the list of devices,
            // which are ggml's and live as long as the program, has `n_devices` entries.
            unsafe {
                sys::mnv_rpc_serve(start, endpoint.as_ptr(), n_threads, n_devices, raw_devices.as_mut_ptr(), error)
            }
        });
        match served {
            Err(CallError::NoMemory) => tracing::error!("out of memory: the client's session was ended"),
            result => {
                result?;
                return Err(RpcWorkerError::Ended { address });
            }
        }
    }
}

/// The devices asked for, or every GPU, or the CPU.
fn offered(wanted: &[String]) -> Result<Vec<usize>, RpcWorkerError> {
    let mut all = devices();
    all.retain(|device| !backend::is_left_out(&device.name));
    if !wanted.is_empty() {
        let index_of = |name: &String| all.iter().find(|device| device.name.eq_ignore_ascii_case(name));
        let known = || all.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
        let unknown = |name: &String| RpcWorkerError::Device { name: name.clone(), known: known() };
        return wanted.iter().map(|name| Ok(index_of(name).ok_or_else(|| unknown(name))?.index)).collect();
    }
    let of_kind = |is_wanted: fn(DeviceKind) -> bool| -> Vec<_> {
        all.iter().filter(|device| is_wanted(device.kind)).map(|device| device.index).collect()
    };
    let gpus = of_kind(|kind| matches!(kind, DeviceKind::Gpu | DeviceKind::IntegratedGpu));
    Ok(if gpus.is_empty() { of_kind(|kind| kind == DeviceKind::Cpu) } else { gpus })
}

/// llama.cpp says nothing of why it cannot listen, and takes no port 0.
fn free_address(address: SocketAddrV4) -> Result<SocketAddrV4, RpcWorkerError> {
    let port = TcpListener::bind(address).and_then(|listener| listener.local_addr()).map(|bound| bound.port());
    let port = port.map_err(|source| RpcWorkerError::Bind { address, source })?;
    Ok(SocketAddrV4::new(*address.ip(), port))
}

/// Bounds what this process may allocate beyond what it has. Private writable memory counts, thread stacks included,
/// mapped files do not.
#[cfg(target_os = "linux")]
fn limit_memory(limit_bytes: u64) -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let status = std::fs::read_to_string("/proc/self/status")?;
    let taken_kib =
        status.lines().find_map(|line| line.strip_prefix("VmData:")?.trim().strip_suffix(" kB")?.parse().ok());
    let taken_bytes = taken_kib.unwrap_or(0_u64) << 10;
    let maximum = getrlimit(Resource::Data).maximum;
    let limit = taken_bytes.saturating_add(limit_bytes).min(maximum.unwrap_or(u64::MAX));
    Ok(setrlimit(Resource::Data, Rlimit { current: Some(limit), maximum })?)
}

#[cfg(not(target_os = "linux"))]
fn limit_memory(_limit_bytes: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
