//! `minerva rpc-worker`: lends this machine's devices to a Minerva elsewhere. Reads neither the config file nor variables,
//! which are the server's.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::ExitCode;

use clap::Parser;
use minerva_engine::{RpcWorkerOptions, serve_rpc};
use minerva_gpu::Machine;
use tracing::info;

use crate::{logging, probing};

/// Lends this machine's devices to another Minerva, one client at a time: `minerva --rpc HOST:PORT` uses them.
///
/// llama.cpp's RPC has neither authentication nor encryption, and its server trusts its client: see docs/rpc.md.
#[derive(Debug, Parser)]
#[command(name = "minerva rpc-worker", version)]
struct Args {
    /// The IPv4 address to listen on.
    #[arg(long, default_value_t = Ipv4Addr::LOCALHOST)]
    host: Ipv4Addr,
    /// The port to listen on; 0 takes a free one, which the log names.
    #[arg(long, default_value_t = 50052)]
    port: u16,
    /// A device to lend, such as `CUDA0` or `CPU`; repeatable, or separated by commas [default: every GPU, or the CPU]
    #[arg(long, value_delimiter = ',')]
    device: Vec<String>,
    /// Compute threads of the CPU [default: the CPUs that this process may use]
    #[arg(long, short)]
    threads: Option<usize>,
    /// The most memory that this process may allocate, such as `8gb`; not for the memory of GPUs (Linux only).
    #[arg(long, value_name = "SIZE", value_parser = minerva_gpu::parse_bytes)]
    memory_limit: Option<u64>,
    /// Listen on an address that other machines can reach.
    #[arg(long)]
    insecure: bool,
}

/// Runs the worker with the process's arguments; the one at position 1 brought us here.
pub(crate) fn run() -> ExitCode {
    let args = std::env::args_os().enumerate().filter(|(position, _)| *position != 1).map(|(_, arg)| arg);
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(text) => {
            let _ = text.print();
            return ExitCode::from(if text.use_stderr() { 2 } else { 0 });
        }
    };
    let filter = std::env::var("RUST_LOG").ok();
    if let Err(problem) = logging::init(filter.as_deref(), false) {
        let _ = writeln!(std::io::stderr(), "error: {problem}");
        return ExitCode::from(2);
    }
    if let Some(reason) = probing::default_config().and_then(|probe| probing::probe(&probe).nothing_works()) {
        tracing::error!("nothing here can be lent: {reason}");
        return ExitCode::FAILURE;
    }
    let options = RpcWorkerOptions {
        address: SocketAddrV4::new(args.host, args.port),
        devices: args.device,
        n_threads: args.threads.unwrap_or_else(|| Machine::probe().cpu.threads),
        memory_limit_bytes: args.memory_limit,
        insecure: args.insecure,
    };
    match serve_rpc(&options, |address| info!("lending devices on {address}")) {
        Ok(never) => match never {},
        Err(problem) => {
            tracing::error!("{:#}", anyhow::Error::new(problem));
            ExitCode::FAILURE
        }
    }
}
