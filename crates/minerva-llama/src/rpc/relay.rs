//! Stands between llama.cpp's RPC client and a server, so that a server that goes away is an error and not an abort.
//!
//! llama.cpp's client calls `abort()` when a connection fails, when a reply has another length than it expects, and when
//! it cannot connect. So it is given a connection inside this process instead, and a thread of ours passes requests on to
//! the real server. When the server is gone, the thread answers in its place: allocations fail, tensors are zeros, and
//! [`Link::is_lost`] turns true before the first such answer is sent. [`Model`](crate::Model) and
//! [`Context`](crate::Context) look at it after each call, so nothing computed from those zeros is ever handed out.
//!
//! The relay also keeps the memory limit: it counts allocations, refuses the one that passes the limit, and reports no
//! more than the limit as the device's memory.

use std::collections::HashMap;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use super::graph;
use super::protocol::{self, HEAD_BYTES, Reply};

/// Bytes that go on in one piece.
const CHUNK_BYTES: usize = 256 << 10;

/// What a server that a model may use is known by.
#[derive(Debug)]
pub(crate) struct Link {
    /// As the user wrote it.
    pub(crate) address: String,
    /// The limit on each of its devices.
    pub(super) memory_limit_bytes: Option<u64>,
    /// Its devices, as [`Device::index`](crate::Device::index).
    pub(super) devices: OnceLock<Vec<usize>>,
    is_lost: AtomicBool,
}

impl Link {
    pub(super) fn new(address: String, memory_limit_bytes: Option<u64>) -> Self {
        Self { address, memory_limit_bytes, devices: OnceLock::new(), is_lost: AtomicBool::new(false) }
    }

    /// Whether the server went away. It stays lost: what it held is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::SeqCst)
    }

    fn lose(&self, problem: &io::Error) {
        if !self.is_lost.swap(true, Ordering::SeqCst) {
            tracing::error!(address = self.address, "the RPC server is lost: {problem}");
        }
    }
}

/// Serves llama.cpp's client until it closes its last connection, which it does not do while the process lives.
///
/// It connects twice: once to count the devices, once for the handle that [`add_rpc_server`](super::add_rpc_server)
/// keeps. After that nobody else can connect.
pub(super) fn run(listener: TcpListener, server: TcpStream, link: Arc<Link>) {
    let mut relay = Relay { server: Some(server), link, buffers: HashMap::new(), allocated: HashMap::new() };
    if let Err(problem) = relay.serve_twice(listener) {
        relay.fail(&problem);
    }
}

struct Relay {
    /// `None` when the server is lost.
    server: Option<TcpStream>,
    link: Arc<Link>,
    /// Device and size of each buffer on the server.
    buffers: HashMap<u64, (u32, u64)>,
    /// Bytes allocated on each device.
    allocated: HashMap<u32, u64>,
}

impl Relay {
    /// The second connection ends the first: llama.cpp's sockets are inherited by whatever process is started at that moment, and
    /// then its closing the first one is not seen.
    fn serve_twice(&mut self, listener: TcpListener) -> io::Result<()> {
        let (first, _) = listener.accept()?;
        let handle = first.try_clone()?;
        let next = thread::Builder::new().name("minerva-rpc".into()).spawn(move || {
            let next = listener.accept();
            let _ = handle.shutdown(Shutdown::Both); // closed already, as a rule
            next
        })?;
        let served = self.serve(first);
        let (second, _) = next.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        served.and_then(|()| self.serve(second))
    }

    /// Passes requests on until the client closes. Errors are the client's; the server's end in [`fail`](Self::fail).
    fn serve(&mut self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut requests = BufReader::with_capacity(CHUNK_BYTES, client.try_clone()?);
        let mut head = [0; HEAD_BYTES];
        loop {
            match requests.read_exact(&mut head) {
                Err(problem) if problem.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            }
            let command = head[0];
            let n_bytes = protocol::word(&head, 1).unwrap_or_default();
            if command == protocol::HELLO {
                io::copy(&mut requests.by_ref().take(n_bytes), &mut io::sink())?;
                client.write_all(&protocol::hello_answer())?;
            } else if protocol::is_short(command) {
                let mut payload = Vec::new();
                requests.by_ref().take(n_bytes).read_to_end(&mut payload)?;
                self.short(command, &payload, &mut client)?;
            } else if command == protocol::GRAPH_COMPUTE {
                let mut graph = Vec::new();
                if requests.by_ref().take(n_bytes).read_to_end(&mut graph)? as u64 != n_bytes {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let request = protocol::request(command, &graph::without_history(graph));
                self.on_server(|server| server.write_all(&request));
            } else {
                self.forward(head, n_bytes, &mut requests)?;
            }
        }
    }

    /// A request without a reply, of any length: tensors.
    fn forward(&mut self, head: [u8; HEAD_BYTES], n_bytes: u64, requests: &mut impl Read) -> io::Result<()> {
        let mut chunk = head.to_vec();
        let mut left = n_bytes;
        loop {
            let room = (CHUNK_BYTES - chunk.len()) as u64;
            let got = requests.by_ref().take(left.min(room)).read_to_end(&mut chunk)? as u64;
            if got < left.min(room) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= got;
            self.on_server(|server| server.write_all(&chunk));
            if left == 0 {
                return Ok(());
            }
            chunk.clear();
        }
    }

    fn short(&mut self, command: u8, payload: &[u8], client: &mut TcpStream) -> io::Result<()> {
        let request = protocol::request(command, payload);
        match protocol::reply(command, payload) {
            Reply::None => {
                if let Some((device, bytes)) = protocol::word(payload, 0).and_then(|id| self.buffers.remove(&id)) {
                    *self.allocated.entry(device).or_default() -= bytes;
                }
                self.on_server(|server| server.write_all(&request));
                Ok(())
            }
            Reply::Tensor(n_bytes) => self.tensor(&request, n_bytes, client),
            Reply::Short(refusal) if command == protocol::ALLOC_BUFFER && !self.has_room(payload) => {
                client.write_all(&protocol::answer(&refusal))
            }
            Reply::Short(in_its_place) => {
                let mut reply = in_its_place.clone();
                let answered = self.on_server(|server| {
                    server.write_all(&request)?;
                    protocol::read_reply(server, &mut reply)
                });
                if answered.is_none() {
                    reply = in_its_place; // it may have been half read
                }
                self.note(command, payload, &mut reply);
                client.write_all(&protocol::answer(&reply))
            }
        }
    }

    /// A tensor on its way to the client, with zeros for what the server did not send.
    fn tensor(&mut self, request: &[u8], n_bytes: u64, client: &mut TcpStream) -> io::Result<()> {
        self.on_server(|server| {
            server.write_all(request)?;
            protocol::expect_length(server, n_bytes)
        });
        let mut chunk = n_bytes.to_ne_bytes().to_vec();
        let mut left = n_bytes;
        loop {
            let start = chunk.len();
            let n = left.min((CHUNK_BYTES - start) as u64);
            chunk.resize(start + n as usize, 0);
            if self.on_server(|server| server.read_exact(&mut chunk[start..])).is_none() {
                chunk[start..].fill(0);
            }
            client.write_all(&chunk)?;
            left -= n;
            if left == 0 {
                return Ok(());
            }
            chunk.clear();
        }
    }

    /// Whether an allocation stays within the limit.
    fn has_room(&self, payload: &[u8]) -> bool {
        let (Some(limit), Some(device)) = (self.link.memory_limit_bytes, protocol::device(payload)) else {
            return true;
        };
        let taken = self.allocated.get(&device).copied().unwrap_or_default();
        let wanted = protocol::word(payload, 4).unwrap_or_default();
        let fits = taken.saturating_add(wanted) <= limit;
        if !fits {
            let address = &self.link.address;
            tracing::error!(
                address,
                "an RPC buffer of {wanted} bytes is refused: {taken} are taken, the limit is {limit}"
            );
        }
        fits
    }

    /// Keeps count of buffers, and of the limit in what a device says of its memory (free bytes first, then all).
    fn note(&mut self, command: u8, payload: &[u8], reply: &mut [u8]) {
        let (Some(first), Some(second), Some(device)) =
            (protocol::word(reply, 0), protocol::word(reply, 8), protocol::device(payload))
        else {
            return;
        };
        let taken = self.allocated.entry(device).or_default();
        if command == protocol::ALLOC_BUFFER && first != 0 {
            *taken += second;
            self.buffers.insert(first, (device, second));
        } else if let (protocol::GET_DEVICE_MEMORY, Some(limit)) = (command, self.link.memory_limit_bytes) {
            reply[..8].copy_from_slice(&first.min(limit.saturating_sub(*taken)).to_ne_bytes());
            reply[8..].copy_from_slice(&second.min(limit).to_ne_bytes());
        }
    }

    /// Does something with the server while there is one. `None` when it is lost, or was just now.
    fn on_server<T>(&mut self, f: impl FnOnce(&mut TcpStream) -> io::Result<T>) -> Option<T> {
        match f(self.server.as_mut()?) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.fail(&problem);
                None
            }
        }
    }

    fn fail(&mut self, problem: &io::Error) {
        self.link.lose(problem);
        self.server = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_first_connection_that_somebody_inherited_does_not_keep_the_second_waiting() {
        let listen = || TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let (listener, far) = (listen(), listen());
        let address = listener.local_addr().expect("bound");
        let server = TcpStream::connect(far.local_addr().expect("bound")).expect("a server");
        let link = Arc::new(Link::new("far:1".to_owned(), None));
        let relay = thread::spawn(move || run(listener, server, link));
        let hello = || {
            let mut client = TcpStream::connect(address).expect("it listens");
            client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
            client.write_all(&protocol::request(protocol::HELLO, &[0; 24])).expect("it reads");
            let mut reply = [0; 8 + protocol::HELLO_REPLY_BYTES];
            client.read_exact(&mut reply).expect("it answers");
            client
        };
        let mut first = hello();
        let second = hello();
        assert_eq!(first.read(&mut [0]).expect("closed"), 0, "the first is over");
        drop(second);
        relay.join().expect("it ends");
    }
}
