//! The estimator of `minerva-gpu` against llama.cpp's own figures, from loads that allocate nothing, and against real loads.
//!
//! Every synthetic shape and the default model, in every combination of context, cache type, sequences, micro-batch and flash
//! attention, on the host, half and wholly on an RPC device, and over two unequal ones: about 7,000 rows. Run it with
//! `--nocapture` for the table: `cargo test --release -p minerva-llama --test estimate -- --nocapture`.
#![allow(clippy::print_stdout, reason = "the table is what the test is for")]
#![allow(clippy::cast_precision_loss, reason = "byte counts to MiB and percent")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[path = "support/rpc_worker.rs"]
mod rpc_worker;

use minerva_gpu::estimate::{
    DeviceLoad, DeviceTraits, Estimate, HeadShape, HostTraits, LoadSettings, ModelShape, Placement, estimate,
};
use minerva_gpu::gguf::{GgmlType, Header};
use minerva_gpu::plan::{Wishes, plan};
use minerva_gpu::synthetic;
use minerva_llama::{
    Adapter, Context, ContextKind, ContextParams, DeviceBytes, FlashAttention, KvType, LoadError, Model, ModelParams,
    Simulation, VocabSize,
};
use rpc_worker::Worker;

const MIB: f64 = 1_048_576.0;

/// A context, as the estimator and as llama.cpp want it.
struct Case {
    settings: LoadSettings,
    params: ContextParams,
    label: String,
}

fn cases() -> Vec<Case> {
    let types = [
        ("f16", GgmlType::F16, KvType::F16),
        ("q8_0", GgmlType::Q8_0, KvType::Q8_0),
        ("q4_0", GgmlType::Q4_0, KvType::Q4_0),
    ];
    let mut cases = Vec::new();
    for context in [512, 4096, 32768] {
        for kv_type in types {
            for (n_sequences, ubatch) in [(1, 128), (1, 512), (8, 128), (8, 512)] {
                for flash in [true, false] {
                    cases.push(case(context, kv_type, n_sequences, ubatch, flash));
                }
            }
        }
    }
    cases
}

fn case(context: u32, kv: (&str, GgmlType, KvType), n_sequences: u32, ubatch: u32, flash: bool) -> Case {
    let (type_name, ggml_type, kv_type) = kv;
    // Without flash attention llama.cpp has no quantised V.
    let (ggml_type_v, kv_type_v) = if flash { (ggml_type, kv_type) } else { (GgmlType::F16, KvType::F16) };
    Case {
        settings: LoadSettings {
            context_tokens: context,
            n_sequences,
            ubatch_tokens: ubatch,
            flash_attention: flash,
            cache_type_k: ggml_type,
            cache_type_v: ggml_type_v,
            ..LoadSettings::default()
        },
        params: ContextParams {
            n_ctx: context,
            n_seq_max: n_sequences,
            n_ubatch: ubatch,
            flash_attention: if flash { FlashAttention::On } else { FlashAttention::Off },
            type_k: kv_type,
            type_v: kv_type_v,
            full_windows: false,
            ..ContextParams::default()
        },
        label: format!("context {context}, {type_name}, {n_sequences} sequences, ubatch {ubatch}, flash {flash}"),
    }
}

/// One device of one row.
struct Row {
    /// The largest of the misses, each as a share of what is allowed: 1 is the bound.
    miss: f64,
    /// Of all the device's bytes.
    miss_of_sum: f64,
    line: String,
}

#[derive(Default)]
struct Table {
    rows: Vec<Row>,
    ours: Duration,
    theirs: Duration,
}

#[test]
fn estimates_are_within_their_bounds_for_every_shape_setting_and_placement() {
    let workers = [Worker::start(), Worker::start()];
    let devices: Vec<usize> = workers.iter().flat_map(Worker::add).collect();
    let only = std::env::var("SHAPE").ok();
    let dir = tempfile::tempdir().expect("a directory");
    let mut table = Table::default();
    let mut models: Vec<(String, PathBuf)> = vec![("SmolLM2".to_owned(), real_model())];
    for name in synthetic::NAMES {
        let path = dir.path().join(format!("{name}.gguf"));
        synthetic::shape(name).expect("known").write_header_only(&path).expect("written");
        models.push((name.to_owned(), path));
    }
    models.retain(|(name, _)| only.as_deref().is_none_or(|only| name.starts_with(only)));
    for (name, path) in &models {
        check_model(name, path, &devices, &mut table);
    }
    table.print();
    let outside: Vec<&str> = table.rows.iter().filter(|row| row.miss > 1.0).map(|row| row.line.as_str()).collect();
    assert!(outside.is_empty(), "{} of {} rows are outside", outside.len(), table.rows.len());
}

fn check_model(name: &str, path: &Path, devices: &[usize], table: &mut Table) {
    let header = Header::open(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    let model = ModelShape::of(&header).unwrap_or_else(|error| panic!("{name}: {error}"));
    let all = model.n_layers + 1;
    let mut placements = vec![
        ("host", Placement::split(&model, &[0])),
        ("half", Placement::split(&model, &[all / 2])),
        ("all", Placement::split(&model, &[all])),
        // Not all layers: with all of them on several devices llama.cpp's simulation forgets where the norms go, which a real
        // load does not. The other test has that case.
        ("two devices", Placement::split(&model, &[all / 3, all / 2])),
    ];
    if model.n_experts > 0 {
        let experts = Placement::split(&model, &[all]).with_experts_on_host(0..model.n_layers / 2);
        placements.push(("half of the experts on the host", experts));
    }
    for (where_, placement) in &placements {
        let params = model_params(placement, devices);
        let simulation = simulate(path, &params, &model).unwrap_or_else(|error| panic!("{name}, {where_}: {error}"));
        for case in cases().iter().filter(|case| exists(name, case)) {
            let start = Instant::now();
            let ours = estimate(&model, &case.settings, placement, &[DeviceTraits::RPC; 2], &HostTraits::default());
            table.ours += start.elapsed();
            let start = Instant::now();
            let theirs =
                simulation.memory_bytes(&case.params).unwrap_or_else(|error| panic!("{name}, {}: {error}", case.label));
            table.theirs += start.elapsed();
            for (ours, theirs) in ours.devices.iter().chain([&ours.host]).zip(&theirs) {
                table.rows.push(row(&format!("{name} | {where_} | {}", case.label), ours, theirs));
            }
        }
    }
}

/// Compressed attention has one type for both caches, so none that is quantised without flash attention. State-space models
/// really allocate their states in a simulation, which takes a second: their contexts make no difference to these.
const STATES: [&str; 4] = ["mamba-2.8b-q8_0", "mamba2-2.7b-q8_0", "jamba-mini-q4_0", "granitehybrid-7b-q4_0"];

fn exists(name: &str, case: &Case) -> bool {
    let has_types = !name.starts_with("deepseek2") || case.params.type_k == case.params.type_v;
    has_types && (!STATES.contains(&name) || case.params.n_ctx == 4096 && case.params.type_k == KvType::Q8_0)
}

fn model_params(placement: &Placement, devices: &[usize]) -> ModelParams {
    ModelParams {
        devices: devices[..placement.n_devices()].to_vec(),
        n_gpu_layers: placement.n_gpu_layers(),
        layers_per_device: placement.layers_per_device(),
        expert_layers_on_host: placement.expert_layers_on_host(),
        use_extra_buffers: false,
        ..ModelParams::default()
    }
}

fn row(label: &str, ours: &DeviceLoad, theirs: &DeviceBytes) -> Row {
    let one = |ours: u64, theirs: u64, percent: f64, least_mib: f64| {
        ours.abs_diff(theirs) as f64 / (theirs as f64 * percent / 100.0).max(least_mib * MIB)
    };
    let total = theirs.weights_bytes + theirs.kv_bytes + theirs.compute_bytes;
    let mib = |bytes: u64| bytes as f64 / MIB;
    Row {
        miss: one(ours.weights_bytes, theirs.weights_bytes, 0.1, 1.0)
            .max(one(ours.cache_bytes, theirs.kv_bytes, 0.1, 1.0))
            .max(one(ours.compute_bytes, theirs.compute_bytes, 5.0, 16.0))
            .max(one(ours.total_bytes(), total, 2.0, 32.0)),
        miss_of_sum: ours.total_bytes().abs_diff(total) as f64 / total.max(1) as f64,
        line: format!(
            "{label} | {} | weights {:.2} / {:.2}, cache {:.2} / {:.2}, compute {:.2} / {:.2} MiB",
            theirs.device,
            mib(ours.weights_bytes),
            mib(theirs.weights_bytes),
            mib(ours.cache_bytes),
            mib(theirs.kv_bytes),
            mib(ours.compute_bytes),
            mib(theirs.compute_bytes)
        ),
    }
}

impl Table {
    fn print(&mut self) {
        self.rows.sort_by(|a, b| b.miss.total_cmp(&a.miss));
        println!("estimate / llama.cpp, the worst first; 1.00 is the bound");
        // One row of each model and placement.
        let mut seen = std::collections::HashSet::new();
        let name_and_place = |row: &Row| row.line.split(" | ").take(2).collect::<Vec<_>>().join(" | ");
        for row in self.rows.iter().filter(|row| row.miss > 0.001 && seen.insert(name_and_place(row))) {
            println!("{:.2} {}", row.miss, row.line);
        }
        let exact = self.rows.iter().filter(|row| row.miss_of_sum == 0.0).count();
        let mut of_sum: Vec<f64> = self.rows.iter().map(|row| row.miss_of_sum).collect();
        of_sum.sort_by(f64::total_cmp);
        println!(
            "{} rows: {exact} exact; of a device's sum: median {:.4} %, 99th percentile {:.4} %, worst {:.3} %",
            self.rows.len(),
            100.0 * of_sum[of_sum.len() / 2],
            100.0 * of_sum[of_sum.len() * 99 / 100],
            100.0 * of_sum[of_sum.len() - 1],
        );
        println!("time: estimates {:?}, llama.cpp's simulations {:?}", self.ours, self.theirs);
    }
}

/// Shapes whose weights take adapters in different ways: grouped heads, windows, experts, compressed attention, states.
const ADAPTED: [&str; 7] = [
    "llama2-7b-q4_0",
    "gemma3-4b-q4_0",
    "qwen2moe-14b-q4_0",
    "mixtral-8x7b-q4_0",
    "deepseek2-lite-q4_0",
    "mamba2-2.7b-q8_0",
    "granitehybrid-7b-q4_0",
];

#[test]
fn adapters_take_what_was_estimated() {
    let worker = Worker::start();
    let devices = worker.add();
    let dir = tempfile::tempdir().expect("a directory");
    let mut models = vec![("SmolLM2", real_model())];
    for name in ADAPTED {
        let path = dir.path().join(format!("{name}.gguf"));
        // DeepSeek's lite model is known by the number of its layers.
        let n_layers = if name.starts_with("deepseek2") { 27 } else { 4 };
        let shape = synthetic::shape_with_layers(name, n_layers).expect("known");
        shape.write_header_only(&path).expect("written");
        models.push((name, path));
    }
    let mut table = Table::default();
    for (name, path) in models {
        let header = Header::open(&path).expect("a header");
        let mut shape = ModelShape::of(&header).expect("a shape");
        let mut adapters = Vec::new();
        for (rank, wanted) in [(16, ""), (5, "attn_q")] {
            let path = dir.path().join(format!("{name}-{rank}.gguf"));
            let file = synthetic::adapter(&header, rank, |weight| {
                let is_late =
                    ["blk.1", "blk.2"].iter().any(|layer| weight.starts_with(layer)) && name.starts_with("deepseek2");
                weight.contains(wanted) && !is_late
            });
            if Header::parse(&file.header_bytes(), file.file_bytes()).expect("a header").tensors.is_empty() {
                continue; // no such weight
            }
            file.write_random(&path, rank, &mut |_| {}).expect("written");
            shape.add_adapter(&Header::open(&path).expect("a header")).expect("an adapter of this model");
            adapters.push(Adapter { path, scale: 0.5 });
        }
        let all = shape.n_layers + 1;
        let mut placements = vec![
            ("host", Placement::split(&shape, &[0])),
            ("half", Placement::split(&shape, &[all / 2])),
            ("all", Placement::split(&shape, &[all])),
        ];
        if shape.n_experts > 0 {
            let experts = Placement::split(&shape, &[all]).with_experts_on_host(0..shape.n_layers / 2);
            placements.push(("half of the experts on the host", experts));
        }
        for (where_, placement) in &placements {
            let params = ModelParams { adapters: adapters.clone(), ..model_params(placement, &devices) };
            let simulation = simulate(&path, &params, &shape).unwrap_or_else(|error| panic!("{name}: {error}"));
            for (context, n_sequences, ubatch, flash) in
                [(512, 1, 128, true), (4096, 8, 512, true), (4096, 1, 512, false)]
            {
                let case = case(context, ("f16", GgmlType::F16, KvType::F16), n_sequences, ubatch, flash);
                let ours = estimate(&shape, &case.settings, placement, &[DeviceTraits::RPC], &HostTraits::default());
                let theirs = simulation.memory_bytes(&case.params).expect("measures");
                for (ours, theirs) in ours.devices.iter().chain([&ours.host]).zip(&theirs) {
                    table.rows.push(row(&format!("{name} | {where_} | {}", case.label), ours, theirs));
                }
                if name == "SmolLM2" {
                    let params = ModelParams { use_mmap: false, ..params.clone() };
                    let model = Model::load(&path, &params, &mut |_| ControlFlow::Continue(())).expect("loads");
                    check_real(&model, &case, (&ours, &theirs), (1 << 20, 1 << 20), where_);
                }
            }
        }
    }
    table.print();
    let outside: Vec<&str> = table.rows.iter().filter(|row| row.miss > 1.0).map(|row| row.line.as_str()).collect();
    assert!(outside.is_empty(), "{outside:#?}");
}

#[test]
fn heads_take_what_was_estimated() {
    let dir = tempfile::tempdir().expect("a directory");
    let worker = Worker::start();
    let devices = worker.add();
    let mut table = Table::default();
    for name in synthetic::NAMES_WITH_HEAD {
        let path = dir.path().join(format!("{name}.gguf"));
        synthetic::shape(name).expect("known").write_header_only(&path).expect("written");
        let shape = ModelShape::of(&Header::open(&path).expect("a header")).expect("a shape");
        let HeadShape { model, head } = HeadShape::of(&shape).expect("a head");
        let all = shape.n_layers_all + 1;
        for (where_, n_layers) in [("host", 0), ("half", all / 2), ("all", all)] {
            let placement = Placement::split(&shape, &[n_layers]);
            let of_head = Placement::split(&head, &[if n_layers > 0 { 2 } else { 0 }]);
            let params = ModelParams { with_head: true, ..model_params(&placement, &devices) };
            let simulation = simulate(&path, &params, &shape).unwrap_or_else(|error| panic!("{name}: {error}"));
            for (context, n_sequences, ubatch, flash) in
                [(512, 1, 128, true), (4096, 8, 512, true), (4096, 1, 512, false)]
            {
                let case = case(context, ("f16", GgmlType::F16, KvType::F16), n_sequences, ubatch, flash);
                let (traits, host) = ([DeviceTraits::RPC], HostTraits::default());
                let ours = estimate(&model, &case.settings, &placement, &traits, &host);
                let of_head = estimate(&head, &case.settings, &of_head, &traits, &host);
                let with = |kind| ContextParams { kind, ..case.params.clone() };
                let theirs = simulation.memory_bytes(&with(ContextKind::ModelWithHidden)).expect("measures");
                let theirs_of_head = simulation.memory_bytes(&with(ContextKind::Head)).expect("measures");
                let ours = ours.devices.iter().chain([&ours.host]);
                let of_head = of_head.devices.iter().chain([&of_head.host]);
                for (((ours, of_head), theirs), theirs_of_head) in ours.zip(of_head).zip(&theirs).zip(&theirs_of_head) {
                    // Its weights are loaded with the model's.
                    let ours = DeviceLoad { weights_bytes: ours.weights_bytes + of_head.weights_bytes, ..*ours };
                    table.rows.push(row(&format!("{name} | {where_} | {}", case.label), &ours, theirs));
                    let of_head = DeviceLoad { weights_bytes: ours.weights_bytes, ..*of_head };
                    table.rows.push(row(
                        &format!("{name}, head | {where_} | {}", case.label),
                        &of_head,
                        theirs_of_head,
                    ));
                }
            }
        }
    }
    table.print();
    let wrong: Vec<&str> = table.rows.iter().filter(|row| row.miss > 0.0).map(|row| row.line.as_str()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// As the engine does it.
fn simulate(path: &Path, params: &ModelParams, shape: &ModelShape) -> Result<Simulation, LoadError> {
    let vocab = VocabSize { architecture: &shape.architecture, n_tokens: shape.n_vocab };
    Simulation::load_without_vocabulary(path, params, vocab)
}

fn real_model() -> PathBuf {
    std::env::var_os("MINERVA_TEST_MODEL").expect("run `cargo xtask setup` first: it fetches the test model").into()
}

#[test]
fn a_plan_for_a_70b_header_on_unequal_devices_fits_by_llama_cpps_own_figures() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("70b.gguf");
    synthetic::shape("llama3-70b-q4_0").expect("known").write_header_only(&path).expect("written");
    let model = ModelShape::of(&Header::open(&path).expect("a header")).expect("a shape");
    let workers = [Worker::start(), Worker::start()];
    let devices: Vec<usize> = workers.iter().flat_map(Worker::add).collect();
    let wishes = Wishes { n_sequences: Some(1), ..Wishes::default() };
    let plan_for = |text: &str| plan(&model, &wishes, &text.parse().expect("a machine")).expect("it fits");
    let (one, other) = (plan_for("rpc:24GiB,rpc:8GiB,ram:32GiB"), plan_for("rpc:8GiB,rpc:24GiB,ram:32GiB"));
    assert_eq!(one.rungs, other.rungs, "the order of the devices changes nothing");
    println!("{one}");
    for rung in one.rungs.iter().filter(|rung| !rung.is_cpu()) {
        let params = model_params(&rung.placement, &devices);
        let simulation = simulate(&path, &params, &model).expect("simulates");
        let context = ContextParams {
            n_ctx: rung.settings.context_tokens,
            n_ubatch: rung.settings.ubatch_tokens,
            n_seq_max: rung.settings.n_sequences,
            flash_attention: FlashAttention::On,
            full_windows: rung.settings.full_windows,
            ..ContextParams::default()
        };
        for (bytes, device) in simulation.memory_bytes(&context).expect("measures").iter().zip(&one.devices) {
            let sum = bytes.weights_bytes + bytes.kv_bytes + bytes.compute_bytes;
            assert!(sum <= device.budget_bytes(), "{rung}: {bytes:?} on {device:?}");
        }
    }
}

#[test]
fn estimates_and_simulations_are_what_real_loads_take() {
    let path = real_model();
    let workers = [Worker::start(), Worker::start()];
    let devices: Vec<usize> = workers.iter().flat_map(Worker::add).collect();
    let shape = ModelShape::of(&Header::open(&path).expect("a header")).expect("a shape");
    for layers in [&[0][..], &[15], &[31], &[10, 11], &[10, 21]] {
        let placement = Placement::split(&shape, layers);
        let params = ModelParams { use_mmap: false, ..model_params(&placement, &devices) };
        let simulation = simulate(&path, &params, &shape).expect("simulates");
        let model = Model::load(&path, &params, &mut |_| ControlFlow::Continue(())).expect("loads");
        for (context, n_sequences, flash) in [(512, 1, true), (2048, 8, true), (2048, 4, false)] {
            let case = case(context, ("f16", GgmlType::F16, KvType::F16), n_sequences, 512, flash);
            let estimate =
                estimate(&shape, &case.settings, &placement, &[DeviceTraits::RPC; 2], &HostTraits::default());
            let simulated = simulation.memory_bytes(&case.params).expect("measures");
            // What the simulation forgets costs it copies of one hidden state.
            let slack = if layers == [10, 21] { 5 << 20 } else { 1 << 20 };
            check_real(&model, &case, (&estimate, &simulated), (1 << 20, slack), &format!("{layers:?}"));
        }
    }
}

/// What a real context takes, against estimate and simulation, each with the bytes that it may be off.
fn check_real(
    model: &Arc<Model>,
    case: &Case,
    (estimate, simulated): (&Estimate, &[DeviceBytes]),
    slack: (u64, u64),
    where_: &str,
) {
    let real = Context::new(model, &case.params).expect("a context").memory_bytes().expect("known");
    let sum = |bytes: &DeviceBytes| bytes.weights_bytes + bytes.kv_bytes + bytes.compute_bytes;
    for (estimated, simulated) in estimate.devices.iter().chain([&estimate.host]).zip(simulated) {
        let real = real.iter().find(|real| real.device == simulated.device).cloned().unwrap_or_default();
        let label = format!("{where_}, {}: {estimated:?} {simulated:?} {real:?}", case.label);
        assert!(estimated.total_bytes().abs_diff(sum(&real)) <= slack.0, "{label}");
        assert!(sum(simulated).abs_diff(sum(&real)) <= slack.1, "{label}");
    }
}
