use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::estimate::ProjectorShape;
use crate::gguf::{Array, Header, Value};
use crate::synthetic;

const GIB: u64 = 1 << 30;

fn shape(name: &str) -> ModelShape {
    let file = synthetic::shape(name).unwrap();
    ModelShape::of(&Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()).unwrap()
}

fn machine(text: &str) -> PlanMachine {
    text.parse().unwrap()
}

fn fits(plan: &Plan) {
    for rung in &plan.rungs {
        for (load, device) in rung.estimate.devices.iter().zip(&plan.devices) {
            assert!(load.total_bytes() <= device.budget_bytes(), "{rung}");
        }
        assert!(rung.estimate.host_allocated_bytes(plan.host.maps_weights) <= plan.host.free_bytes, "{rung}");
    }
}

#[test]
fn a_model_that_fits_gets_all_it_wished_for() {
    let plan = plan(
        &shape("llama2-7b-q4_0"),
        &Wishes { n_sequences: Some(1), ..Wishes::default() },
        &machine("cuda:24GiB,ram:32GiB"),
    )
    .unwrap();
    assert_eq!(plan.best().placement.n_gpu_layers(), 33);
    assert!(plan.best().gave_up.is_empty());
    assert_eq!(plan.best().context_tokens, DEFAULT_CONTEXT_TOKENS);
    assert!(plan.largest_context_tokens > DEFAULT_CONTEXT_TOKENS);
    fits(&plan);
}

#[test]
fn a_large_model_is_shared_between_unequal_devices_whatever_their_order() {
    let model = shape("llama3-70b-q4_0");
    let wishes = Wishes { n_sequences: Some(1), ..Wishes::default() };
    let plan_for = |text: &str| plan(&model, &wishes, &machine(text)).unwrap();
    let (one, other) = (plan_for("cuda:24GiB,cuda:8GiB,ram:32GiB"), plan_for("cuda:8GiB,cuda:24GiB,ram:32GiB"));
    fits(&one);
    let layers = one.best().placement.layers_per_device();
    assert!(layers[0] > 2 * layers[1] && layers[1] > 0, "{layers:?}");
    assert_eq!(one.rungs, other.rungs);
    assert_eq!(one.devices, other.devices);
    assert_eq!((one.given_positions, other.given_positions), (vec![0, 1], vec![1, 0]));
}

#[test]
fn experts_leave_before_layers_do() {
    let model = shape("mixtral-8x7b-q4_0");
    let wishes = Wishes { n_sequences: Some(1), context_tokens: Some(4096), ..Wishes::default() };
    for room in ["cuda:24GiB", "cuda:16GiB", "cuda:10GiB"] {
        let plan = plan(&model, &wishes, &machine(&format!("{room},ram:64GiB"))).unwrap();
        fits(&plan);
        let best = plan.best();
        assert_eq!(best.placement.n_gpu_layers(), 33, "{room}: {plan}");
        assert!(!best.placement.expert_layers_on_host().is_empty(), "{room}: {plan}");
    }
}

#[test]
fn at_a_part_of_the_room_experts_left_behind_are_faster_than_whole_layers_left_behind() {
    for name in ["mixtral-8x7b-q4_0", "qwen3moe-30b-q4_0", "gpt-oss-20b-q4_0"] {
        let model = shape(name);
        let wishes = Wishes { n_sequences: Some(1), context_tokens: Some(4096), ..Wishes::default() };
        let all = plan(&model, &wishes, &machine("cuda:200GiB,ram:256GiB")).unwrap();
        let needed = all.best().estimate.devices[0].total_bytes();
        for percent in [30, 50, 80] {
            let device = PlanDevice {
                limit_bytes: needed * percent / 100 + (500 << 20),
                ..PlanDevice::empty("cuda", PlanDeviceKind::Cuda, 200 * GIB)
            };
            let machine = PlanMachine { devices: vec![device], host: PlanHost::empty(256 * GIB) };
            let plan = plan(&model, &wishes, &machine).unwrap();
            fits(&plan);
            let best = plan.best();
            assert_eq!(best.placement.n_gpu_layers(), model.n_layers + 1, "{name} at {percent} %: {plan}");
            let n_cells = best.estimate.devices[0].cache_bytes;
            assert_eq!((n_cells, best.estimate.host.cache_bytes), (all.best().estimate.devices[0].cache_bytes, 0));
            let search = search::Search::new(&model, &wishes, &machine).unwrap();
            let whole_layers = search.place_fewer_layers(&search.first_draft().unwrap(), 0).unwrap();
            let (ours, theirs) = (best.speed.decode_tokens_per_second, whole_layers.speed.decode_tokens_per_second);
            // Few large experts are nearly the whole layer: there is nothing to win.
            let least = if name.starts_with("mixtral") { 0.98 * theirs } else { theirs };
            assert!(ours > least, "{name} at {percent} %: {ours} against {theirs} tokens per second");
        }
    }
}

#[test]
fn where_crossings_are_slow_whole_layers_leave_and_the_user_has_the_last_word() {
    let model = shape("qwen3moe-30b-q4_0");
    let mut machine = machine("rpc:10GiB,ram:64GiB");
    let wishes = Wishes { n_sequences: Some(1), context_tokens: Some(4096), ..Wishes::default() };
    let placed = |machine: &PlanMachine, wishes: &Wishes| {
        let plan = plan(&model, wishes, machine).unwrap();
        fits(&plan);
        let placement = &plan.best().placement;
        (placement.n_gpu_layers(), placement.expert_layers_on_host().len())
    };
    machine.devices[0].crossing_ns = 5_000_000; // another town
    let (n_layers, n_experts_left) = placed(&machine, &wishes);
    assert!(n_layers < 40 && n_experts_left == 0, "{n_layers} {n_experts_left}");
    let fixed = Wishes { gpu_layers: Some(49), ..wishes.clone() };
    let (n_layers, n_experts_left) = placed(&machine, &fixed);
    assert!(n_layers == 49 && n_experts_left > 0, "{n_layers} {n_experts_left}");
    let fixed = Wishes { expert_layers_on_host: Some(100), ..wishes.clone() };
    assert_eq!(placed(&machine, &fixed), (49, 48));
    machine.devices[0].crossing_ns = 20_000;
    machine.devices[0].bandwidth *= 10;
    assert_eq!(placed(&machine, &wishes).0, 49, "experts leave first");
    let fixed = Wishes { expert_layers_on_host: Some(0), ..wishes };
    let (n_layers, n_experts_left) = placed(&machine, &fixed);
    assert!(n_layers < 40 && n_experts_left == 0, "{n_layers} {n_experts_left}");
}

#[test]
fn what_the_user_fixed_stays_and_what_was_given_up_is_said() {
    let model = shape("llama3-8b-q8_0");
    let fixed =
        Wishes { n_sequences: Some(4), context_tokens: Some(8192), ubatch_tokens: Some(512), ..Wishes::default() };
    let plan = plan(&model, &fixed, &machine("cuda:8GiB,ram:32GiB")).unwrap();
    fits(&plan);
    for rung in &plan.rungs {
        assert_eq!((rung.settings.n_sequences, rung.context_tokens, rung.settings.ubatch_tokens), (4, 8192, 512));
    }
    assert!(plan.best().placement.n_gpu_layers() < 33);
    assert!(plan.best().gave_up.iter().any(|what| what.contains("layers on devices")), "{:?}", plan.best().gave_up);
}

#[test]
fn open_wishes_shrink_when_that_keeps_the_model_on_the_device() {
    // 4.5 GiB of weights; eight sequences of 8192 tokens are another 32 GiB.
    let plan = plan(&shape("llama2-7b-q4_0"), &Wishes::default(), &machine("cuda:12GiB,ram:64GiB")).unwrap();
    fits(&plan);
    assert_eq!(plan.best().placement.n_gpu_layers(), 33, "{plan}");
    assert!(plan.best().settings.n_sequences < DEFAULT_N_SEQUENCES);
    assert!(plan.best().gave_up.iter().any(|what| what.contains("sequences")));
}

#[test]
fn each_rung_takes_less_than_the_one_above_and_the_last_is_the_cpu() {
    for name in ["llama2-7b-q4_0", "qwen3moe-30b-q4_0", "gemma3-4b-q4_0"] {
        let plan = plan(&shape(name), &Wishes::default(), &machine("cuda:10GiB,ram:64GiB")).unwrap();
        fits(&plan);
        let on_device = |rung: &Rung| rung.estimate.devices.first().map_or(0, crate::estimate::DeviceLoad::total_bytes);
        let sums: Vec<u64> = plan.rungs.iter().map(on_device).collect();
        assert!(sums.windows(2).all(|pair| pair[1] < pair[0]), "{name}: {sums:?}");
        assert!(plan.rungs.last().unwrap().is_cpu());
        assert!(plan.rungs.len() > 3);
    }
}

#[test]
fn other_settings_keep_a_rungs_places_and_must_fit_there() {
    let (model, wishes) = (shape("llama2-7b-q4_0"), Wishes { n_sequences: Some(1), ..Wishes::default() });
    let roomy = machine("cuda:24GiB,ram:32GiB");
    let rung = plan(&model, &wishes, &roomy).unwrap().best().clone();
    let same = with_settings(&model, &wishes, &roomy, &rung, &rung.settings, None).unwrap();
    assert_eq!(same, rung);
    let without = LoadSettings { flash_attention: false, ..rung.settings.clone() };
    let without = with_settings(&model, &wishes, &roomy, &rung, &without, None).unwrap();
    assert_eq!((&without.placement, without.context_tokens), (&rung.placement, rung.context_tokens));
    let bytes = |rung: &Rung| rung.estimate.devices[0].total_bytes();
    assert!(bytes(&without) > bytes(&rung), "scores are stored");
    // Just enough for the rung itself.
    let mut tight = roomy.clone();
    tight.devices[0].limit_bytes = bytes(&rung) + tight.devices[0].overhead_bytes;
    tight.devices[0].free_bytes = tight.devices[0].limit_bytes;
    tight.devices[0].total_bytes = tight.devices[0].limit_bytes;
    assert_eq!(with_settings(&model, &wishes, &tight, &rung, &without.settings, None), None);

    // On the host alone what is allocated must be there, and the share holds.
    let host = machine("ram:64GiB");
    let on_cpu = plan(&model, &wishes, &host).unwrap().best().clone();
    let wide = LoadSettings { cache_type_k: GgmlType::F32, cache_type_v: GgmlType::F32, ..on_cpu.settings.clone() };
    assert!(with_settings(&model, &wishes, &host, &on_cpu, &wide, None).is_some());
    let mut full = host.clone();
    full.host.free_bytes = 1 << 30;
    assert_eq!(with_settings(&model, &wishes, &full, &on_cpu, &wide, None), None);
}

#[test]
fn without_room_and_without_a_fallback_there_is_the_guides_error() {
    let model = shape("llama2-7b-q4_0");
    let wishes = Wishes { cpu_fallback: false, gpu_layers: Some(33), ..Wishes::default() };
    let error = plan(&model, &wishes, &machine("cuda:1GiB,ram:32GiB")).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("Out of memory: GPU memory exceeded: ") && text.contains(" + ") && text.contains(" > "),
        "{text}"
    );
    let error = plan(
        &model,
        &Wishes::default(),
        &PlanMachine { host: PlanHost { maps_weights: false, ..PlanHost::empty(GIB) }, devices: vec![] },
    );
    assert!(error.unwrap_err().to_string().starts_with("Out of memory: system memory exceeded"));
}

#[test]
fn repacked_weights_must_fit_though_the_file_is_mapped() {
    let (model, wishes) = (shape("llama2-7b-q4_0"), Wishes { n_sequences: Some(1), ..Wishes::default() });
    let with = |text: &str, repacked: &[GgmlType]| {
        let mut machine = machine(text);
        machine.host.traits.repacked_types = repacked.to_vec();
        plan(&model, &wishes, &machine)
    };
    // 3.6 GiB of weights, which the system may drop as long as they are the file's.
    let repacked = [GgmlType::Q4_0, GgmlType::Q4_K];
    let stored = with("ram:3GiB", &[]).unwrap();
    assert_eq!(stored.best().estimate.copied_weights_bytes, 0);
    let tight = with("ram:3GiB", &repacked).unwrap();
    assert!(tight.best().as_stored && tight.best().gave_up.iter().any(|what| what.contains("layout")), "{tight}");
    assert_eq!(tight.best().settings, stored.best().settings);
    let other = with("ram:3GiB", &[GgmlType::Q4_K]).unwrap();
    assert!(!other.best().as_stored && other.best().gave_up == stored.best().gave_up, "{other}");
    // Where copies have room, what comes beside them is as much as without: also when weights are beyond the share already.
    for ram in ["ram:8GiB", "ram:12GiB", "ram:16GiB", "ram:64GiB"] {
        let (one, other) = (with(ram, &repacked).unwrap(), with(ram, &[]).unwrap());
        fits(&one);
        assert!(!one.best().as_stored, "{one}");
        assert_eq!(
            (&one.best().settings, one.best().context_tokens),
            (&other.best().settings, other.best().context_tokens),
            "{ram}"
        );
    }
    assert_eq!(tight.largest_context_tokens, stored.largest_context_tokens);
    // Beside a device that pins nothing, what stays on the host may have no room for copies either: still a plan on the device.
    for wishes in [wishes.clone(), Wishes { cpu_fallback: false, ..wishes.clone() }] {
        let mut machine = machine("rpc:3GiB,ram:3GiB");
        machine.host.traits.repacked_types = repacked.to_vec();
        let plan = plan(&model, &wishes, &machine).unwrap();
        fits(&plan);
        assert!(plan.best().as_stored && plan.best().placement.n_gpu_layers() > 16, "{plan}");
    }
    // A plan on a device keeps its last rung.
    let plan = with("cuda:24GiB,ram:3GiB", &repacked).unwrap();
    assert!(!plan.best().as_stored && plan.rungs.last().is_some_and(|rung| rung.is_cpu() && rung.as_stored), "{plan}");
    let roomy = with("ram:16GiB", &repacked).unwrap();
    let (all, looked_up) = (roomy.best().estimate.host.weights_bytes, 32_000 * 4096 / 32 * 18); // the token table
    let repacked_bytes = roomy.best().estimate.copied_weights_bytes;
    assert!(
        repacked_bytes <= all - looked_up && repacked_bytes > (all - looked_up) / 100 * 99,
        "{repacked_bytes} of {all}"
    );
    // Beside a device that pins host memory nothing is repacked; beside one that does not, what is left on the host is.
    let repacked_beside = |device: &str| {
        let plan = with(&format!("{device}:3GiB,ram:16GiB"), &repacked).unwrap();
        fits(&plan);
        assert!((1..33).contains(&plan.best().placement.n_gpu_layers()), "{plan}");
        assert!(!plan.best().as_stored);
        plan.best().estimate.copied_weights_bytes
    };
    assert_eq!(repacked_beside("cuda"), 0);
    assert!((1..repacked_bytes).contains(&repacked_beside("rpc")));
}

#[test]
fn a_fixed_micro_batch_leaves_the_rungs_below_fewer_layers() {
    let wishes =
        Wishes { n_sequences: Some(2), ubatch_tokens: Some(512), may_quantise_cache: true, ..Wishes::default() };
    let plan = plan(&shape("llama2-7b-q4_0"), &wishes, &machine("cuda:24GiB,ram:64GiB")).unwrap();
    fits(&plan);
    assert_eq!(plan.best().settings.cache_type_k, GgmlType::F16, "{plan}");
    assert!(plan.rungs.iter().any(|rung| !rung.is_cpu() && rung.settings.cache_type_k == GgmlType::Q8_0), "{plan}");
    assert!(plan.rungs.iter().all(|rung| rung.settings.ubatch_tokens == 512), "{plan}");
}

#[test]
fn wishes_that_contradict_each_other_are_refused() {
    let model = shape("qwen2-1.5b-q4_0");
    let machine = machine("ram:8GiB");
    let no_flash = Wishes { flash_attention: Some(false), cache_type_v: Some(GgmlType::Q8_0), ..Wishes::default() };
    assert!(matches!(plan(&model, &no_flash, &machine), Err(PlanError::Wish { setting: "cache-type-v", .. })));
    let too_long = Wishes { n_cells: Some(1024), context_tokens: Some(2048), ..Wishes::default() };
    assert!(matches!(plan(&model, &too_long, &machine), Err(PlanError::Wish { setting: "ctx", .. })));
}

#[test]
fn a_machine_is_read_from_text() {
    let machine = machine("cuda:24GiB,metal:16gb@200GB/s,ram:32GiB@40GB/s");
    assert_eq!(machine.devices.len(), 2);
    assert_eq!((machine.devices[1].kind, machine.devices[1].bandwidth), (PlanDeviceKind::Metal, 150_000_000_000));
    assert_eq!((machine.host.total_bytes, machine.host.bandwidth), (32 * GIB, 30_000_000_000));
    for bad in ["", "cuda:24GiB", "ram:", "ram:0", "ram:1GiB,ram:1GiB", "tpu:4GiB,ram:1GiB", "cuda:4GiB@fast,ram:1GiB"]
    {
        assert!(bad.parse::<PlanMachine>().is_err(), "{bad}");
    }
}

#[test]
fn a_gpu_that_others_use_is_not_filled_to_the_brim() {
    let mut machine = machine("cuda:24GiB,rpc:8GiB,ram:32GiB");
    let [cuda, rpc] = &mut machine.devices[..] else { panic!("{machine:?}") };
    assert_eq!(cuda.budget_bytes(), cuda.limit_bytes - cuda.overhead_bytes, "the share leaves enough");
    cuda.free_bytes = 12 << 30;
    assert_eq!(cuda.budget_bytes(), (11 << 30) - cuda.overhead_bytes);
    assert_eq!(cuda.room_bytes(), (12 << 30) - cuda.overhead_bytes);
    assert_eq!((rpc.budget_bytes(), rpc.room_bytes()), (8 << 30, 8 << 30));
    cuda.free_bytes = 1 << 30;
    assert_eq!(cuda.budget_bytes(), 0, "no room, and no overflow");
}

#[test]
fn the_table_shows_every_device_and_every_rung() {
    let plan = plan(&shape("llama3-70b-q4_0"), &Wishes::default(), &machine("cuda:24GiB,cuda:8GiB,ram:32GiB")).unwrap();
    let table = plan.to_string();
    for word in ["cuda:24GiB", "cuda:8GiB", "host", "tokens per second", "largest context", "if a load fails", "CPU: "]
    {
        assert!(table.contains(word), "{word}:\n{table}");
    }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "a time of the release build")]
fn a_plan_for_a_7b_header_takes_less_than_10_ms() {
    let file = synthetic::shape("llama2-7b-q4_0").unwrap();
    let bytes = file.header_bytes();
    let machine = machine("cuda:8GiB,ram:32GiB");
    let times: Vec<Duration> = (0..25)
        .map(|_| {
            let start = Instant::now();
            let model = ModelShape::of(&Header::parse(&bytes, file.file_bytes()).unwrap()).unwrap();
            plan(&model, &Wishes::default(), &machine).unwrap();
            start.elapsed()
        })
        .collect();
    // The least is what planning takes; the other tests, which run beside this one, only add to it.
    assert!(times.iter().min().unwrap() < &Duration::from_millis(10), "{times:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_the_machine_a_plan_fits_and_does_not_depend_on_the_order_of_devices(
        name in prop::sample::select(vec!["llama2-7b-q4_0", "qwen3moe-30b-q4_0", "gemma3-4b-q4_0", "deepseek2-lite-q4_0", "jamba-mini-q4_0"]),
        gib in prop::collection::vec(1_u64..40, 0..4),
        n_sequences in prop::option::of(1_u32..9),
        context in prop::option::of(prop::sample::select(vec![512_u32, 4096, 20_000])),
        rotate in 0_usize..4,
    ) {
        let model = shape(name);
        let devices: Vec<PlanDevice> =
            gib.iter().map(|gib| PlanDevice::empty(format!("cuda:{gib}GiB"), PlanDeviceKind::Cuda, gib * GIB)).collect();
        let machine = PlanMachine { devices, host: PlanHost::empty(256 * GIB) };
        let wishes = Wishes { n_sequences, context_tokens: context, ..Wishes::default() };
        let one = plan(&model, &wishes, &machine).unwrap();
        fits(&one);
        let mut turned = machine;
        let n = turned.devices.len().max(1);
        turned.devices.rotate_left(rotate % n);
        let other = plan(&model, &wishes, &turned).unwrap();
        prop_assert_eq!(one.rungs, other.rungs);
    }
}

fn with_draft(text: &str, wishes: &Wishes, asked: &DraftWishes) -> Plan {
    let draft = shape("qwen2-1.5b-q4_0");
    let companions = Companions { draft: Some((&draft, *asked)), ..Companions::default() };
    plan_with(&shape("llama2-7b-q4_0"), wishes, &machine(text), &companions).unwrap()
}

#[test]
fn a_draft_model_is_part_of_the_plan_and_the_first_thing_to_go() {
    let plan = with_draft("cuda:24GiB,ram:32GiB", &Wishes::default(), &DraftWishes::default());
    let (best, next) = (plan.best(), &plan.rungs[1]);
    let draft = best.draft.as_ref().expect("it fits");
    assert_eq!((draft.device, draft.placement.n_gpu_layers()), (Some(0), 29));
    assert!(draft.estimate.devices[0].weights_bytes > 500 << 20);
    assert!(best.device_bytes(0) <= plan.devices[0].budget_bytes());
    assert_eq!((next.draft.as_ref(), next.placement.n_gpu_layers()), (None, 33), "no layer goes before it does");
    assert!(next.gave_up.iter().any(|given_up| given_up.contains("draft model")), "{:?}", next.gave_up);
    for pair in plan.rungs.windows(2).filter(|pair| !pair[1].is_cpu()) {
        assert!(pair[1].device_bytes(0) < pair[0].device_bytes(0), "{plan}");
    }
    let text = plan.to_string();
    assert!(text.contains("and the draft model") && !best.to_string().eq(&next.to_string()), "{text}");
    assert!(best.to_string().contains("with the draft model"), "{best}");
}

#[test]
fn a_draft_model_never_costs_the_main_model_a_layer_a_sequence_or_a_cell() {
    for gib in 3..=24 {
        let (text, wishes) = (format!("cuda:{gib}GiB,ram:32GiB"), Wishes::default());
        let both = with_draft(&text, &wishes, &DraftWishes::default());
        let alone = plan(&shape("llama2-7b-q4_0"), &wishes, &machine(&text)).unwrap();
        let kept = |rung: &Rung| (rung.placement.n_gpu_layers(), rung.settings.n_sequences, rung.context_tokens);
        assert_eq!(kept(both.best()), kept(alone.best()), "{text}");
        assert!(both.best().device_bytes(0) <= both.devices[0].budget_bytes(), "{text}");
        if both.best().draft.is_none() {
            assert!(both.best().gave_up.iter().any(|given_up| given_up.contains("draft model")), "{text}");
        }
        assert_eq!((&both.devices, &both.host), (&alone.devices, &alone.host), "the machine is what it is");
    }
}

#[test]
fn a_draft_model_goes_where_it_is_told_to() {
    let text = "cuda:8GiB,cuda:24GiB,ram:32GiB";
    let place = |place, gpu_layers| {
        let asked = DraftWishes { place, gpu_layers, n_cells: Some(1024) };
        let plan = with_draft(text, &Wishes { n_sequences: Some(1), ..Wishes::default() }, &asked);
        let draft = plan.best().draft.clone().expect("it fits");
        assert_eq!(draft.settings.context_tokens, 1024);
        let given = draft.device.map(|at| plan.given_positions[at]);
        (given, draft.placement.n_gpu_layers())
    };
    assert_eq!(place(DraftPlace::Device(0), None), (Some(0), 29));
    assert_eq!(place(DraftPlace::Device(1), Some(5)), (Some(1), 5));
    assert_eq!(place(DraftPlace::Device(1), Some(0)), (None, 0));
    assert_eq!(place(DraftPlace::Host, None), (None, 0));
    let (main, draft) = (shape("llama2-7b-q4_0"), shape("qwen2-1.5b-q4_0"));
    let nowhere = DraftWishes { place: DraftPlace::Device(2), ..DraftWishes::default() };
    let companions = Companions { draft: Some((&draft, nowhere)), ..Companions::default() };
    let problem = plan_with(&main, &Wishes::default(), &machine(text), &companions).unwrap_err();
    assert!(problem.to_string().contains("device-draft"), "{problem}");
}

fn projector(name: &str) -> ProjectorShape {
    let file = synthetic::projector(name).unwrap();
    ProjectorShape::of(&Header::parse(&file.header_bytes(), file.file_bytes()).unwrap()).unwrap()
}

fn with_head(text: &str, wishes: &Wishes) -> (HeadShape, Plan) {
    let model = shape("deepseek2-mtp-q4_0");
    let head = HeadShape::of(&model).expect("a head");
    let companions = Companions { head: Some(&head), ..Companions::default() };
    let plan = plan_with(&model, wishes, &machine(text), &companions).unwrap();
    (head, plan)
}

#[test]
fn a_head_is_part_of_the_plan_where_its_layer_is() {
    let (head, plan) = with_head("cuda:24GiB,ram:32GiB", &Wishes::default());
    let (best, next) = (plan.best(), &plan.rungs[1]);
    let load = best.draft.as_ref().expect("it fits");
    assert!(load.is_head && load.device == Some(0), "{load:?}");
    assert_eq!(load.settings.context_tokens, best.settings.context_tokens);
    let weights = load.estimate.devices[0].weights_bytes;
    assert!(weights > 300 << 20 && load.estimate.devices[0].cache_bytes > 0, "one layer of experts: {weights}");
    assert!(best.device_bytes(0) <= plan.devices[0].budget_bytes());
    assert!(next.draft.is_none() && next.placement == best.placement, "no layer goes before it does");
    assert!(plan.to_string().contains("and the head") && best.to_string().contains("with the head"), "{plan}");
    // On the host with everything else, and on the device that has its layer.
    for (text, wishes) in [
        ("ram:64GiB", Wishes::default()),
        (
            "cuda:12GiB,cuda:6GiB,ram:32GiB",
            Wishes { n_sequences: Some(1), context_tokens: Some(4096), ..Wishes::default() },
        ),
        ("cuda:6GiB,ram:64GiB", Wishes { gpu_layers: Some(4), ..Wishes::default() }),
    ] {
        let (_, plan) = with_head(text, &wishes);
        let best = plan.best();
        let load = best.draft.as_ref().unwrap_or_else(|| panic!("{text}: {plan}"));
        assert_eq!(load.device, best.placement.device_of(head.model.n_layers), "{text}");
        for (at, device) in plan.devices.iter().enumerate() {
            assert!(best.device_bytes(at) <= device.budget_bytes(), "{text}: {plan}");
        }
    }
    // Other settings of the same load are other settings of the head.
    let machine = machine("cuda:24GiB,ram:32GiB");
    let model = shape("deepseek2-mtp-q4_0");
    let other = LoadSettings { ubatch_tokens: 256, ..best.settings.clone() };
    let changed = with_settings(&model, &Wishes::default(), &machine, best, &other, Some(&head)).unwrap();
    let changed = changed.draft.expect("it stays");
    assert_eq!(changed.settings.ubatch_tokens, 256);
    assert!(changed.estimate.devices[0].compute_bytes < load.estimate.devices[0].compute_bytes);
}

#[test]
fn heads_that_llama_cpp_cannot_compute_are_not_used() {
    let head_of = |change: &dyn Fn(&mut crate::gguf::FileBuilder)| {
        let mut file = synthetic::shape_with_layers("glm4moe-106b-mtp-q4_0", 3).unwrap();
        change(&mut file);
        let header = Header::parse(&file.header_bytes(), file.file_bytes()).unwrap();
        HeadShape::of(&ModelShape::of(&header).unwrap())
    };
    assert!(head_of(&|_| {}).is_some());
    assert!(head_of(&|file| _ = file.set("glm4moe.nextn_predict_layers", 2_u32)).is_none(), "two of them");
    assert!(head_of(&|file| _ = file.set("glm4moe.nextn_predict_layers", 0_u32)).is_none());
    assert!(head_of(&|file| _ = file.set("glm4moe.leading_dense_block_count", 3_u32)).is_none(), "no experts are read");
    let set =
        |key: &'static str, value: Value| head_of(&move |file| _ = file.set(&format!("glm4moe.{key}"), value.clone()));
    assert!(set("embedding_length_out", 4096_u32.into()).is_some());
    for (key, value) in [
        ("embedding_length_out", 2048_u32),
        ("embedding_length_out", 8192),
        ("pooling_type", 1),
        ("expert_gating_func", 7),
    ] {
        assert!(set(key, value.into()).is_none(), "{key} = {value}");
    }
    let sections = Value::Array(Array::I32(vec![16, 24, 24, 0]));
    assert!(set("rope.dimension_sections", sections).is_none(), "several positions a token");
    let heads = Value::Array(Array::U32(vec![8, 8, 4]));
    assert!(set("attention.head_count_kv", heads).is_none(), "other heads than the first layer's");
    assert!(HeadShape::of(&shape("glm4moe-106b-q4_0")).is_none());
    assert!(HeadShape::of(&shape("llama2-7b-q4_0")).is_none());
    // llama.cpp takes a DeepSeek of these many layers for one that does not compress queries.
    let lite = synthetic::shape_with_layers("deepseek2-mtp-q4_0", 28).unwrap();
    let lite = ModelShape::of(&Header::parse(&lite.header_bytes(), lite.file_bytes()).unwrap()).unwrap();
    assert!(HeadShape::of(&lite).is_none());
}

fn with_projector(text: &str, wishes: &Wishes, place: ProjectorPlace, draft: bool) -> Plan {
    let (draft_shape, projector) = (shape("qwen2-1.5b-q4_0"), projector("mmproj-gemma3"));
    let companions = Companions {
        head: None,
        draft: draft.then_some((&draft_shape, DraftWishes::default())),
        projector: Some((&projector, ProjectorWishes { place, ..ProjectorWishes::default() })),
    };
    plan_with(&shape("llama2-7b-q4_0"), wishes, &machine(text), &companions).unwrap()
}

#[test]
fn a_projector_is_beside_the_model_and_goes_onto_the_host_first() {
    let wishes = Wishes { n_sequences: Some(1), ..Wishes::default() };
    let plan = with_projector("cuda:24GiB,ram:32GiB", &wishes, ProjectorPlace::Beside, false);
    let (best, next) = (plan.best(), &plan.rungs[1]);
    let there = best.projector.as_ref().expect("it fits");
    assert_eq!((there.device, there.is_bound), (Some(0), false));
    assert!(there.estimate.devices[0].weights_bytes > 800 << 20 && there.estimate.host.weights_bytes == 0);
    assert!(best.gave_up.is_empty() && best.device_bytes(0) <= plan.devices[0].budget_bytes());
    let here = next.projector.as_ref().expect("the host has room");
    assert_eq!((here.device, next.placement.n_gpu_layers()), (None, 33), "no layer goes before it does");
    assert!(next.gave_up.contains(&"the projector is on the host".to_owned()), "{:?}", next.gave_up);
    for pair in plan.rungs.windows(2).filter(|pair| !pair[1].is_cpu()) {
        assert!(pair[1].device_bytes(0) < pair[0].device_bytes(0), "{plan}");
    }
    assert!(plan.rungs.iter().all(|rung| rung.projector.is_some()), "pictures are understood on every rung");
    assert!(plan.to_string().contains("  and the projector") && best.to_string().contains("with the projector"));
    let asked = with_projector("cuda:24GiB,ram:32GiB", &wishes, ProjectorPlace::Host, false);
    assert_eq!(asked.best().projector.as_ref().map(|load| load.device), Some(None));
    assert!(asked.best().gave_up.is_empty(), "it is what was asked for");
}

#[test]
fn a_projector_never_costs_the_main_model_a_layer_a_sequence_or_a_cell() {
    let wishes = Wishes::default();
    let mut places = Vec::new();
    for gib in 3..=24 {
        let text = format!("cuda:{gib}GiB,ram:32GiB");
        let both = with_projector(&text, &wishes, ProjectorPlace::Beside, false);
        let alone = plan(&shape("llama2-7b-q4_0"), &wishes, &machine(&text)).unwrap();
        let kept = |rung: &Rung| (rung.placement.n_gpu_layers(), rung.settings.n_sequences, rung.context_tokens);
        assert_eq!(kept(both.best()), kept(alone.best()), "{text}");
        assert!(both.best().device_bytes(0) <= both.devices[0].budget_bytes(), "{text}");
        assert_eq!((&both.devices, &both.host), (&alone.devices, &alone.host), "the machine is what it is");
        let load = both.best().projector.as_ref().expect("the host has room");
        let says_so = both.best().gave_up.iter().any(|given_up| given_up.contains("the projector is on the host"));
        assert_eq!(load.device.is_none() && !both.best().is_cpu(), says_so, "{text}: {:?}", both.best().gave_up);
        places.push(load.device.is_some());
    }
    assert!(places.contains(&true) && places.contains(&false), "{places:?}");
}

#[test]
fn a_draft_model_gets_what_the_projector_leaves() {
    let (text, wishes) = ("cuda:24GiB,ram:32GiB", Wishes { n_sequences: Some(1), ..Wishes::default() });
    let both = with_projector(text, &wishes, ProjectorPlace::Beside, true);
    let best = both.best();
    assert_eq!(best.draft.as_ref().map(|load| load.device), Some(Some(0)));
    assert_eq!(best.projector.as_ref().map(|load| load.device), Some(Some(0)));
    assert!(best.to_string().contains("with the draft model and the projector"), "{best}");
    let without = [
        with_draft(text, &wishes, &DraftWishes::default()),
        with_projector(text, &wishes, ProjectorPlace::Beside, false),
    ];
    let main = best.estimate.devices[0].total_bytes();
    let parts: u64 = without.iter().map(|plan| plan.best().device_bytes(0) - main).sum();
    assert_eq!(best.device_bytes(0), main + parts);
    let order: Vec<(bool, Option<Option<usize>>)> = both.rungs[..3]
        .iter()
        .map(|rung| (rung.draft.is_some(), rung.projector.as_ref().map(|load| load.device)))
        .collect();
    assert_eq!(order, [(true, Some(Some(0))), (false, Some(Some(0))), (false, Some(None))], "one thing at a time");
    fits(&both);
}

#[test]
fn a_projector_without_room_anywhere_is_left_out_and_the_plan_says_so() {
    let plan = with_projector("cuda:24GiB,ram:512MiB", &Wishes::default(), ProjectorPlace::Host, false);
    assert_eq!(plan.best().projector, None);
    assert!(plan.best().gave_up.iter().any(|given_up| given_up.starts_with("the projector: its ")), "{plan}");
}
