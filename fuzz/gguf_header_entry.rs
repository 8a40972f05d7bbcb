//! What the fuzz drivers run on each input, and what must hold for every input: no panic, and a header that keeps its word.

use std::io::{self, Read};
use std::sync::OnceLock;

use minerva_gpu::estimate::{
    DeviceTraits, HeadShape, ModelShape, ProjectorSettings, ProjectorShape, estimate_projector,
};
use minerva_gpu::gguf::{FileBuilder, GgmlType, GgufError, Header, Value};
use minerva_gpu::plan::{Companions, PlanMachine, Wishes, plan_with};

/// Inputs up to this length are also read in pieces of a few bytes, which is slow.
const PIECES_BYTES: usize = 4096;

/// Reads `data` as a whole file, then as the beginning of a large one whose weights follow.
///
/// Returns how each reading ended, without the input's own texts and numbers: a driver without coverage tells new behaviour
/// by it.
///
/// # Panics
/// When the reader breaks a promise: that is a finding.
pub(crate) fn gguf_header(data: &[u8]) -> [String; 2] {
    [data.len() as u64, 1 << 40].map(|file_bytes| {
        let parsed = Header::parse(data, file_bytes);
        if data.len() <= PIECES_BYTES {
            let pieces = Header::read(Pieces(data), file_bytes);
            assert_eq!(outcome(&parsed), outcome(&pieces), "read in pieces");
        }
        match &parsed {
            Err(error) => shape(error),
            Ok(header) => {
                check_promises(header);
                check_round_trip(header);
                match header.check_for_llama() {
                    Ok(()) if header.metadata.get("adapter.type").is_some() => adapt(header),
                    Ok(()) => plan_for(header),
                    Err(error) => shape(&error),
                }
            }
        }
    })
}

fn outcome(parsed: &Result<Header, GgufError>) -> String {
    match parsed {
        Ok(header) => format!("{header:?}"),
        Err(error) => error.to_string(),
    }
}

/// The error's text up to the first thing that comes from the input, and the rule that it broke.
fn shape(error: &GgufError) -> String {
    let rule = if let GgufError::Invalid { rule, .. } = error { rule.as_str() } else { "" };
    let words = |text: &str, n: usize| {
        let words = text.split(' ').take_while(|word| !word.contains(['`', '"']));
        words.filter(|word| !word.contains(|c: char| c.is_ascii_digit())).take(n).collect::<Vec<_>>().join(" ")
    };
    let variant = std::mem::discriminant(error);
    format!("{variant:?}: {} / {}", words(&error.to_string(), 4), words(rule, 5))
}

/// Whatever a file claims, planning for it neither panics nor takes long, and a plan that is made fits.
fn plan_for(header: &Header) -> String {
    if header.architecture() == "clip" {
        return projector_of(header);
    }
    let model = match ModelShape::of(header) {
        Ok(model) => model,
        Err(error) => return error.to_string().split('`').next().unwrap_or_default().to_owned(),
    };
    let machine: PlanMachine = "cuda:24GiB,rpc:8GiB,ram:32GiB".parse().expect("a machine");
    outcome_of_plan(&model, &machine)
}

/// Whatever an adapter claims, a model that takes it can be planned with it.
fn adapt(header: &Header) -> String {
    static BASE: OnceLock<ModelShape> = OnceLock::new();
    let mut model = BASE.get_or_init(base).clone();
    match model.add_adapter(header) {
        Ok(()) => outcome_of_plan(&model, &"cuda:8GiB,ram:8GiB".parse().expect("a machine")),
        Err(error) => error.to_string().split('`').next_back().unwrap_or_default().to_owned(),
    }
}

/// What the adapters of the corpus belong to.
fn base() -> ModelShape {
    let mut file = FileBuilder::new();
    file.set("general.architecture", "llama")
        .set("llama.block_count", 2_u32)
        .set("llama.context_length", 128_u32)
        .set("llama.embedding_length", 64_u32)
        .set("llama.expert_count", 8_u32)
        .set("llama.expert_used_count", 2_u32)
        .set("llama.attention.head_count", 4_u32);
    for (name, dims) in [
        ("token_embd.weight", &[64, 4][..]),
        ("output.weight", &[64, 4]),
        ("blk.0.attn_q.weight", &[64, 64]),
        ("blk.1.ffn_up_exps.weight", &[64, 32, 8]),
    ] {
        file.add_tensor(name, GgmlType::Q8_0, dims);
    }
    let header = Header::parse(&file.header_bytes(), file.file_bytes()).expect("a header");
    ModelShape::of(&header).expect("a shape")
}

fn outcome_of_plan(model: &ModelShape, machine: &PlanMachine) -> String {
    let head = HeadShape::of(model);
    match plan_with(model, &Wishes::default(), machine, &Companions { head: head.as_ref(), ..Companions::default() }) {
        Ok(plan) => {
            for (at, device) in plan.devices.iter().enumerate() {
                assert!(plan.best().device_bytes(at) <= device.budget_bytes(), "{plan}");
            }
            format!("planned {}", plan.rungs.len())
        }
        Err(error) => error.to_string().split(':').take(2).collect(),
    }
}

fn projector_of(header: &Header) -> String {
    let projector = match ProjectorShape::of(header) {
        Ok(projector) => projector,
        Err(error) => return error.to_string().split('`').next().unwrap_or_default().to_owned(),
    };
    for flash_attention in [true, false] {
        let settings = ProjectorSettings { flash_attention, ..ProjectorSettings::default() };
        for device in [None, Some(DeviceTraits::CUDA)] {
            let estimate = estimate_projector(&projector, device, &settings);
            assert_eq!(estimate.bytes.devices.len(), usize::from(device.is_some()));
        }
    }
    format!("estimated {:?}", projector.kinds())
}

fn check_promises(header: &Header) {
    assert!(header.alignment.is_power_of_two());
    assert!(header.data_offset <= header.file_bytes);
    let mut end = 0;
    for tensor in &header.tensors {
        assert_eq!(header.tensor(&tensor.name), Some(tensor));
        assert!(!tensor.name.is_empty() && (1..=4).contains(&tensor.dims.len()));
        assert!(tensor.n_elements() > 0);
        assert!(tensor.offset >= end && tensor.offset.is_multiple_of(header.alignment));
        assert_eq!(tensor.ggml_type.tensor_bytes(&tensor.dims), Some(tensor.bytes));
        end = tensor.offset + tensor.bytes;
        assert!(header.data_offset + end <= header.file_bytes);
    }
    for (key, value) in header.metadata.iter() {
        assert_eq!(header.metadata.get(key).map(Value::type_name), Some(value.type_name()));
        // None of these panics, whatever the type.
        let _ = header.metadata.u32(key);
        let _ = header.metadata.u64(key);
        let _ = header.metadata.f32(key);
        let _ = header.metadata.bool(key);
        let _ = header.metadata.str(key);
        let _ = header.metadata.strings(key).map(|strings| strings.map(|strings| strings.iter().count()));
        let _ = header.metadata.u32_per_layer(key, header.metadata.array_len(key).ok().flatten().unwrap_or(3) as u32);
        let _ = value.to_string();
    }
}

/// Written again and read again it is the same header, but for the version and the size.
fn check_round_trip(header: &Header) {
    let mut file = FileBuilder::new();
    for (key, value) in header.metadata.iter() {
        file.set(key, value.clone());
    }
    if header.metadata.get("general.alignment").is_some() {
        file.alignment(header.alignment as u32);
    }
    for tensor in &header.tensors {
        file.add_tensor(&tensor.name, tensor.ggml_type, &tensor.dims);
    }
    let again = Header::parse(&file.header_bytes(), file.file_bytes()).expect("what was read can be written and read");
    assert_eq!(again.tensors, header.tensors);
    let entries = |header: &Header| header.metadata.iter().map(|entry| format!("{entry:?}")).collect::<Vec<_>>();
    assert_eq!(entries(&again), entries(header));
}

/// A reader that gives one to seven bytes at a time.
struct Pieces<'a>(&'a [u8]);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = (self.0.len() % 7 + 1).min(self.0.len()).min(buffer.len());
        buffer[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        Ok(n)
    }
}
