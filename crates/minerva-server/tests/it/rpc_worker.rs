//! A worker process that stands in for a GPU: what it says of its memory and what it can allocate are for the tests to choose.

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// `minerva rpc-worker` with so many bytes to allocate.
pub(crate) struct Worker {
    child: Child,
    pub(crate) address: String,
}

impl Worker {
    pub(crate) fn start(memory_limit: Option<u64>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minerva"));
        command.args(["rpc-worker", "--port", "0", "--threads", "1"]).env_clear().stderr(Stdio::piped());
        if let Some(bytes) = memory_limit {
            command.args(["--memory-limit", &bytes.to_string()]);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address =
            lines.find_map(|line| line.strip_prefix("[INFO] lending devices on ").map(str::to_owned)).unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        while std::net::TcpStream::connect(&address).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, address }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Stands between a server and a worker, and says that less memory is free from one question on.
pub(crate) struct Shrinking {
    pub(crate) address: String,
    n_asked: Arc<AtomicUsize>,
}

impl Shrinking {
    /// The questions before `first` get the worker's own answer, that one and all later ones `free_bytes`.
    pub(crate) fn between(worker: &Worker, first: usize, free_bytes: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, target) = (listener.local_addr().unwrap().to_string(), worker.address.clone());
        let n_asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&n_asked);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (server, counter) = (TcpStream::connect(&target).unwrap(), Arc::clone(&counter));
                std::thread::spawn(move || pass_on(client, server, &counter, first, free_bytes));
            }
        });
        Self { address, n_asked }
    }

    /// How often somebody asked for the free memory so far.
    pub(crate) fn n_asked(&self) -> usize {
        self.n_asked.load(Ordering::SeqCst)
    }
}

/// Commands of llama.cpp's RPC that have a reply (ggml-rpc.cpp at the pin), and the one that asks for the memory.
const WITH_REPLY: [u8; 11] = [0, 1, 2, 3, 7, 8, 9, GET_DEVICE_MEMORY, 13, 14, 15];
const GET_DEVICE_MEMORY: u8 = 11;

/// Requests are a command, a length and so many bytes; replies a length and so many bytes. Ends with the connection.
fn pass_on(
    mut client: TcpStream,
    mut server: TcpStream,
    asked: &AtomicUsize,
    first: usize,
    free: u64,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    loop {
        let mut head = [0; 9];
        client.read_exact(&mut head)?;
        server.write_all(&head)?;
        let (command, n_bytes) = (head[0], u64::from_ne_bytes(*head.last_chunk().unwrap()));
        io::copy(&mut Read::by_ref(&mut client).take(n_bytes), &mut server)?;
        if !WITH_REPLY.contains(&command) {
            continue;
        }
        let mut length = [0; 8];
        server.read_exact(&mut length)?;
        client.write_all(&length)?;
        let n_bytes = u64::from_ne_bytes(length);
        if command != GET_DEVICE_MEMORY {
            io::copy(&mut Read::by_ref(&mut server).take(n_bytes), &mut client)?;
            continue;
        }
        // Free bytes, then all bytes.
        let mut memory = [0; 16];
        server.read_exact(&mut memory)?;
        if asked.fetch_add(1, Ordering::SeqCst) + 1 >= first {
            memory[..8].copy_from_slice(&free.to_ne_bytes());
        }
        client.write_all(&memory)?;
    }
}
