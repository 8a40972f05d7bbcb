//! Low-rank adapters of a model.

use crate::gguf::{FileBuilder, GgmlType, Header};

/// An adapter of rank `rank` for the matrices of `base` that `wanted` names. A token table that is the output layer too gets none.
pub fn adapter(base: &Header, rank: u64, wanted: impl Fn(&str) -> bool) -> FileBuilder {
    let mut file = FileBuilder::new();
    file.set("general.type", "adapter".to_owned())
        .set("general.architecture", base.architecture().to_owned())
        .set("general.name", format!("synthetic adapter of rank {rank}"))
        .set("adapter.type", "lora".to_owned())
        .set("adapter.lora.alpha", 2.0 * rank as f32);
    let is_tied = base.tensor("output.weight").is_none();
    for tensor in &base.tensors {
        let name = tensor.name.as_str();
        let is_table = name == "token_embd.weight";
        let is_matrix =
            tensor.dims.len() > 1 && name.ends_with(".weight") && !name.contains("norm") && !name.contains("conv");
        if !is_matrix || is_table && is_tied || !wanted(name) {
            continue;
        }
        let [n_in, n_out] = [tensor.dims[0], tensor.dims[1]];
        let planes = &tensor.dims[2..];
        let [a, b] = if is_table { [[rank, n_out], [rank, n_in]] } else { [[n_in, rank], [rank, n_out]] };
        for (half, matrix) in [("lora_a", a), ("lora_b", b)] {
            let dims: Vec<u64> = matrix.iter().chain(planes).copied().collect();
            file.add_tensor(&format!("{name}.{half}"), GgmlType::F32, &dims);
        }
    }
    file
}
