//! Devices of other processes: workers on loopback, started from this very binary. What they compute, what they may
//! take, and what happens to this process when they go away.
//!
//! A binary of its own, because devices that are added stay in llama.cpp's list for the life of the process.
//! Needs the default model: `cargo xtask setup` fetches it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[path = "support/rpc_worker.rs"]
mod rpc_worker;

use rpc_worker::Worker;

use minerva_llama::{
    Batch, Context, ContextParams, DecodeError, DeviceKind, LoadError, Model, ModelParams, RpcError, RpcServer,
    RpcWorkerError, RpcWorkerOptions, Simulation, add_rpc_server, devices, has_rpc, serve_rpc,
};

const MIB: u64 = 1 << 20;

/// One test at a time: each has a model and a worker or two.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn model_path() -> PathBuf {
    std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model").into()
}

/// Plain weights everywhere: repacked ones, which only this process could have, round otherwise.
fn on(devices: &[usize], n_gpu_layers: u32) -> ModelParams {
    ModelParams { devices: devices.to_vec(), n_gpu_layers, use_extra_buffers: false, ..ModelParams::default() }
}

fn load(params: &ModelParams) -> Result<Arc<Model>, LoadError> {
    Model::load(&model_path(), params, &mut |_| ControlFlow::Continue(()))
}

/// Small compute buffers: the scores of 512 tokens alone take 96 MiB.
fn small() -> ContextParams {
    ContextParams { n_ctx: 256, n_ubatch: 32, n_threads: 1, n_threads_batch: 1, ..ContextParams::default() }
}

/// Decodes greedily; `before` runs before each step, with the number of tokens so far.
fn greedy(model: &Arc<Model>, n: usize, mut before: impl FnMut(usize)) -> Result<Vec<i32>, DecodeError> {
    let mut context = Context::new(model, &small()).expect("a context");
    let mut tokens = model.tokenize("The capital of France is", true, false).expect("tokenizes");
    let (n_prompt, mut done) = (tokens.len(), 0);
    let mut batch = Batch::new(&context);
    while tokens.len() < n_prompt + n {
        before(tokens.len() - n_prompt);
        batch.clear();
        for (pos, &token) in tokens.iter().enumerate().skip(done) {
            batch.push(token, pos as u32, 0, pos + 1 == tokens.len()).expect("within limits");
        }
        context.decode(&mut batch)?;
        done = tokens.len();
        let logits = context.logits(batch.len() - 1).expect("asked for");
        let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(token, _)| token);
        tokens.push(i32::try_from(best).expect("a token id"));
    }
    Ok(tokens.split_off(n_prompt))
}

fn on_the_cpu() -> Vec<i32> {
    greedy(&load(&on(&[], 0)).expect("loads"), 24, |_| {}).expect("decodes")
}

#[test]
fn half_of_the_layers_on_a_worker_give_the_tokens_of_the_cpu() {
    let _turn = turn();
    assert!(has_rpc(), "workspace builds have RPC: GGML_RPC in .cargo/config.toml");
    let worker = Worker::start();
    let added = worker.add();
    let device = devices().swap_remove(added[0]);
    assert_eq!((device.kind, &device.description), (DeviceKind::Gpu, &worker.address));
    assert!(device.name.starts_with("RPC") && device.free_bytes > 0 && device.free_bytes <= device.total_bytes);
    let expected = on_the_cpu();
    for n_gpu_layers in [15, u32::MAX] {
        let model = load(&on(&added, n_gpu_layers)).expect("loads");
        assert_eq!(greedy(&model, 24, |_| {}).expect("decodes"), expected, "{n_gpu_layers} layers");
    }
    assert_eq!(worker.add(), added, "a server is added once");
}

#[test]
fn two_unequal_workers_share_a_model_by_their_limits_and_a_simulated_load_says_how() {
    let _turn = turn();
    let workers = [Worker::start(), Worker::start()];
    let limits = [100 * MIB, 400 * MIB];
    let mut added = Vec::new();
    for (worker, limit) in workers.iter().zip(limits) {
        let server = RpcServer { memory_limit_bytes: Some(limit), ..RpcServer::new(&worker.address) };
        added.extend(add_rpc_server(&server).expect("the worker answers"));
    }
    let all = devices();
    for (&index, limit) in added.iter().zip(limits) {
        assert_eq!((all[index].total_bytes, all[index].free_bytes), (limit, limit));
    }
    let params = on(&added, u32::MAX);
    let plan = Simulation::load(&model_path(), &params).expect("simulates").memory_bytes(&small()).expect("measures");
    let names: Vec<_> = plan.iter().map(|device| device.device.clone()).collect();
    assert_eq!(names, [all[added[0]].name.as_str(), all[added[1]].name.as_str(), "Host"]);
    let (less, more) = (&plan[0], &plan[1]);
    assert!(less.weights_bytes > 5 * MIB && more.weights_bytes > 2 * less.weights_bytes, "{plan:?}");
    assert!(less.kv_bytes > 0 && more.kv_bytes > 2 * less.kv_bytes, "{plan:?}");

    let model = load(&params).expect("loads");
    let context = Context::new(&model, &small()).expect("a context");
    for real in context.memory_bytes().expect("known").iter().filter(|real| real.device != "Host") {
        let planned = plan.iter().find(|planned| planned.device == real.device).expect("planned");
        assert_eq!((planned.weights_bytes, planned.kv_bytes), (real.weights_bytes, real.kv_bytes));
    }
    let taken = less.weights_bytes + less.kv_bytes;
    let free = devices()[added[0]].free_bytes;
    assert!(free <= limits[0] - taken && free + taken + less.compute_bytes + MIB > limits[0], "{free} {plan:?}");
    drop(context);
    assert_eq!(greedy(&model, 24, |_| {}).expect("decodes"), on_the_cpu());
}

#[test]
fn a_limit_on_the_clients_side_is_a_load_error_and_the_memory_comes_back() {
    let _turn = turn();
    let mut worker = Worker::start();
    let server = RpcServer { memory_limit_bytes: Some(60 * MIB), ..RpcServer::new(&worker.address) };
    let added = add_rpc_server(&server).expect("the worker answers");
    let error = load(&on(&added, u32::MAX)).expect_err("94 MiB of weights");
    assert!(error.to_string().contains("unable to allocate"), "{error}");
    assert_eq!(devices()[added[0]].free_bytes, 60 * MIB, "what was allocated before the refusal was freed");
    let model = load(&on(&added, 8)).expect("8 of 31 layers fit");
    let large = Context::new(&model, &ContextParams { n_ubatch: 256, ..small() });
    assert!(matches!(large, Err(LoadError::Call(_))), "48 MiB for scores: {large:?}");
    assert_eq!(greedy(&model, 24, |_| {}).expect("decodes"), on_the_cpu());
    assert!(worker.is_running());
}

#[cfg(target_os = "linux")]
#[test]
fn a_worker_that_runs_out_of_memory_is_a_load_error_and_serves_on() {
    let _turn = turn();
    let mut worker = Worker::with_memory_limit(Some(80 * MIB));
    let added = worker.add();
    let error = load(&on(&added, u32::MAX)).expect_err("94 MiB of weights");
    assert!(error.to_string().contains("unable to allocate"), "{error}");
    assert!(worker.is_running());
    let model = load(&on(&added, 4)).expect("4 of 31 layers fit");
    assert_eq!(greedy(&model, 24, |_| {}).expect("decodes"), on_the_cpu());
}

#[test]
fn a_worker_killed_while_decoding_is_an_error_and_another_one_can_take_its_place() {
    let _turn = turn();
    let mut worker = Worker::start();
    let model = load(&on(&worker.add(), 15)).expect("loads");
    let error = greedy(&model, 24, |n| {
        if n == 5 {
            worker.kill();
        }
    });
    let Err(DecodeError::DeviceLost { address }) = error else { panic!("{error:?}") };
    assert_eq!(address, worker.address);
    assert_eq!(model.lost_server(), Some(worker.address.as_str()));
    let context = Context::new(&model, &small());
    assert!(matches!(context, Err(LoadError::DeviceLost { .. })), "{context:?}");
    drop(model);

    let next = Worker::start();
    let model = load(&on(&next.add(), 15)).expect("loads");
    assert_eq!(greedy(&model, 24, |_| {}).expect("decodes"), on_the_cpu());
}

#[test]
fn a_worker_killed_in_the_middle_of_a_step_is_an_error() {
    let _turn = turn();
    let mut worker = Worker::start();
    let model = load(&on(&worker.add(), u32::MAX)).expect("loads");
    let mut context =
        Context::new(&model, &ContextParams { n_ctx: 2048, n_ubatch: 512, ..small() }).expect("a context");
    let mut batch = Batch::new(&context);
    for pos in 0..2000 {
        batch.push(100 + pos % 50, pos.unsigned_abs(), 0, pos == 1999).expect("within limits");
    }
    let result = std::thread::scope(|scope| {
        // 2,000 tokens on one thread take seconds.
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            worker.kill();
        });
        context.decode(&mut batch)
    });
    assert!(matches!(result, Err(DecodeError::DeviceLost { .. })), "{result:?}");
    assert!(context.logits(1999).is_none(), "zeros are never handed out");
}

#[test]
fn a_worker_killed_while_loading_is_a_load_error() {
    let _turn = turn();
    let mut worker = Worker::start();
    let params = on(&worker.add(), u32::MAX);
    let result = Model::load(&model_path(), &params, &mut |fraction| {
        if fraction > 0.3 {
            worker.kill();
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(result, Err(LoadError::DeviceLost { .. })), "{result:?}");
    let simulated = Simulation::load(&model_path(), &params);
    assert!(matches!(simulated, Err(LoadError::DeviceLost { .. })), "{simulated:?}");
    assert_eq!(devices()[params.devices[0]].total_bytes, 0, "a lost device has no memory");
}

#[test]
fn addresses_without_a_worker_are_errors_in_bounded_time() {
    let _turn = turn();
    let n_devices = devices().len();
    let try_add = |address: &str| {
        let started = Instant::now();
        let error = add_rpc_server(&RpcServer::new(address)).expect_err("there is no worker");
        (error, started.elapsed())
    };
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").to_string();
    let (error, time) = try_add(&free);
    assert!(matches!(error, RpcError::Unreachable { .. }) && time < Duration::from_secs(1), "{error} {time:?}");
    let (error, time) = try_add("192.0.2.1:50052"); // reserved for documentation: nobody has it
    assert!(matches!(error, RpcError::Unreachable { .. }) && time < Duration::from_secs(2), "{error} {time:?}");
    for address in ["", "127.0.0.1", "127.0.0.1:port", "127.0.0.1:99999", ":"] {
        let (error, _) = try_add(address);
        assert!(matches!(error, RpcError::Address { .. } | RpcError::Unreachable { .. }), "{address}: {error:?}");
    }

    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (error, time) = try_add(&silent.local_addr().expect("bound").to_string());
    assert!(matches!(error, RpcError::Busy { .. }) && time < Duration::from_secs(3), "{error} {time:?}");

    for (answer, is_expected) in [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            (|error| matches!(error, RpcError::Protocol { .. })) as fn(_) -> _,
        ),
        (Vec::new(), |error| matches!(error, RpcError::Protocol { .. })),
        ([&28_u64.to_ne_bytes()[..], &[6; 28]].concat(), |error| matches!(error, RpcError::Version { major: 6, .. })),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        std::thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            let mut request = [0; 33];
            let _ = client.read_exact(&mut request);
            let _ = client.write_all(&answer);
        });
        let (error, _) = try_add(&address);
        let text = format!("{error:?}");
        assert!(is_expected(error), "{text}");
    }
    assert_eq!(devices().len(), n_devices, "nothing was added");
}

#[test]
fn a_second_client_is_told_that_the_worker_is_busy() {
    let _turn = turn();
    let worker = Worker::start();
    worker.add();
    let same = RpcServer { memory_limit_bytes: Some(MIB), ..RpcServer::new(&worker.address) };
    let error = add_rpc_server(&same).expect_err("the first connection is still there");
    assert!(matches!(error, RpcError::Busy { .. }), "{error}");
}

#[test]
fn a_worker_refuses_an_open_address_without_consent_and_a_device_that_is_not_there() {
    let open = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let refused = serve_rpc(&RpcWorkerOptions { address: open, ..RpcWorkerOptions::new(0, 1) }, |_| {});
    let Err(error @ RpcWorkerError::Insecure { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("no authentication"), "{error}");
    let options = RpcWorkerOptions { devices: vec!["CUDA99".into()], ..RpcWorkerOptions::new(0, 1) };
    let error = serve_rpc(&options, |_| {}).expect_err("no machine has so many");
    assert!(error.to_string().starts_with("there is no device `CUDA99`: this build sees "), "{error}");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port();
    assert!(matches!(serve_rpc(&RpcWorkerOptions::new(port, 1), |_| {}), Err(RpcWorkerError::Bind { .. })));
}

#[test]
fn only_addresses_of_this_machine_are_loopback() {
    for (address, is_loopback) in [
        ("127.0.0.1:1", true),
        ("localhost:1", true),
        ("[::1]:1", true),
        ("127.8.8.8:1", true),
        ("10.0.0.1:1", false),
        ("0.0.0.0:1", false),
        ("localhost.example:1", false),
        ("[2001:db8::1]:1", false),
        ("", false),
    ] {
        assert_eq!(RpcServer::new(address).is_loopback(), is_loopback, "{address}");
    }
}

/// Resident bytes, open files and threads of this process (Linux).
fn held() -> (u64, usize, usize) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let rss =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let count = |path: &str| std::fs::read_dir(path).map_or(0, Iterator::count);
    (rss.unwrap_or(0) * 1024, count("/proc/self/fd"), count("/proc/self/task"))
}

#[test]
fn loads_that_fail_again_and_again_leave_nothing_behind() {
    let _turn = turn();
    let n: usize = std::env::var("FAILING_LOADS").ok().and_then(|text| text.parse().ok()).unwrap_or(30);
    let worker = Worker::with_memory_limit(Some(60 * MIB));
    let params = on(&worker.add(), u32::MAX);
    let fail = || load(&params).expect_err("92 MiB of weights do not fit in 60");
    (0..5).for_each(|_| drop(fail()));
    let before = held();
    for _ in 0..n {
        assert!(fail().to_string().contains("unable to allocate"), "the reason is the allocation");
    }
    let after = held();
    println!("{n} failing loads: {before:?} -> {after:?} (resident bytes, files, threads)");
    assert_eq!((before.1, before.2), (after.1, after.2), "open files and threads");
    assert!(after.0 < before.0 + 16 * MIB, "{before:?} {after:?}");
}
