//! The element types of tensors: their ids in files, names, and how many bytes a row takes.

use std::fmt;

/// How a tensor's elements are stored: plain numbers, or blocks of quantized ones with their scales.
///
/// Source: `enum ggml_type` and `type_traits` of ggml at our pin. The ids of removed types (4, 5, 31 to 33, 36 to 38) are not
/// types here: llama.cpp does not load them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)] // the names of ggml, letter for letter
#[doc(alias = "ggml_type")]
#[non_exhaustive]
pub enum GgmlType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    I8,
    I16,
    I32,
    I64,
    F64,
    IQ1_M,
    BF16,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
    Q1_0,
    Q2_0,
}

/// One line of ggml's table.
struct Traits {
    ggml_type: GgmlType,
    id: u32,
    name: &'static str,
    block_elements: u64,
    block_bytes: u64,
}

const fn traits(ggml_type: GgmlType, id: u32, name: &'static str, block_elements: u64, block_bytes: u64) -> Traits {
    Traits { ggml_type, id, name, block_elements, block_bytes }
}

/// In the order of the enum, so that a type is its own index.
const TABLE: [Traits; 35] = [
    traits(GgmlType::F32, 0, "f32", 1, 4),
    traits(GgmlType::F16, 1, "f16", 1, 2),
    traits(GgmlType::Q4_0, 2, "q4_0", 32, 18),
    traits(GgmlType::Q4_1, 3, "q4_1", 32, 20),
    traits(GgmlType::Q5_0, 6, "q5_0", 32, 22),
    traits(GgmlType::Q5_1, 7, "q5_1", 32, 24),
    traits(GgmlType::Q8_0, 8, "q8_0", 32, 34),
    traits(GgmlType::Q8_1, 9, "q8_1", 32, 36),
    traits(GgmlType::Q2_K, 10, "q2_K", 256, 84),
    traits(GgmlType::Q3_K, 11, "q3_K", 256, 110),
    traits(GgmlType::Q4_K, 12, "q4_K", 256, 144),
    traits(GgmlType::Q5_K, 13, "q5_K", 256, 176),
    traits(GgmlType::Q6_K, 14, "q6_K", 256, 210),
    traits(GgmlType::Q8_K, 15, "q8_K", 256, 292),
    traits(GgmlType::IQ2_XXS, 16, "iq2_xxs", 256, 66),
    traits(GgmlType::IQ2_XS, 17, "iq2_xs", 256, 74),
    traits(GgmlType::IQ3_XXS, 18, "iq3_xxs", 256, 98),
    traits(GgmlType::IQ1_S, 19, "iq1_s", 256, 50),
    traits(GgmlType::IQ4_NL, 20, "iq4_nl", 32, 18),
    traits(GgmlType::IQ3_S, 21, "iq3_s", 256, 110),
    traits(GgmlType::IQ2_S, 22, "iq2_s", 256, 82),
    traits(GgmlType::IQ4_XS, 23, "iq4_xs", 256, 136),
    traits(GgmlType::I8, 24, "i8", 1, 1),
    traits(GgmlType::I16, 25, "i16", 1, 2),
    traits(GgmlType::I32, 26, "i32", 1, 4),
    traits(GgmlType::I64, 27, "i64", 1, 8),
    traits(GgmlType::F64, 28, "f64", 1, 8),
    traits(GgmlType::IQ1_M, 29, "iq1_m", 256, 56),
    traits(GgmlType::BF16, 30, "bf16", 1, 2),
    traits(GgmlType::TQ1_0, 34, "tq1_0", 256, 54),
    traits(GgmlType::TQ2_0, 35, "tq2_0", 256, 66),
    traits(GgmlType::MXFP4, 39, "mxfp4", 32, 17),
    traits(GgmlType::NVFP4, 40, "nvfp4", 64, 36),
    traits(GgmlType::Q1_0, 41, "q1_0", 128, 18),
    traits(GgmlType::Q2_0, 42, "q2_0", 64, 18),
];

impl GgmlType {
    /// Every type, in the order of their ids.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|traits| traits.ggml_type)
    }

    /// The type with this id in a file; `None` for ids that never were and for types that were removed.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|traits| traits.id == id).map(|traits| traits.ggml_type)
    }

    /// The type with this name, in any case: `Q4_K`, `q4_k`.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|traits| traits.name.eq_ignore_ascii_case(name)).map(|traits| traits.ggml_type)
    }

    fn traits(self) -> &'static Traits {
        &TABLE[self as usize]
    }

    /// Its id in files.
    pub fn id(self) -> u32 {
        self.traits().id
    }

    /// Its name as llama.cpp prints it: `q4_K`.
    pub fn name(self) -> &'static str {
        self.traits().name
    }

    /// Elements of one block; 1 for plain numbers. A row holds whole blocks.
    #[doc(alias = "ggml_blck_size")]
    pub fn block_elements(self) -> u64 {
        self.traits().block_elements
    }

    /// Bytes of one block, scales included.
    #[doc(alias = "ggml_type_size")]
    pub fn block_bytes(self) -> u64 {
        self.traits().block_bytes
    }

    /// Bytes of `n_elements` elements in a row; `None` if they are not whole blocks or do not fit in a `u64`.
    #[doc(alias = "ggml_row_size")]
    pub fn row_bytes(self, n_elements: u64) -> Option<u64> {
        if !n_elements.is_multiple_of(self.block_elements()) {
            return None;
        }
        (n_elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// Bytes of a tensor of these dimensions, the row first; `None` where [`row_bytes`](Self::row_bytes) has none, and for a
    /// product that does not fit.
    #[doc(alias = "ggml_nbytes")]
    pub fn tensor_bytes(self, dims: &[u64]) -> Option<u64> {
        let (&row, rows) = dims.split_first()?;
        rows.iter().try_fold(self.row_bytes(row)?, |bytes, &n| bytes.checked_mul(n))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_id_and_name_and_is_its_own_index() {
        assert_eq!(GgmlType::all().count(), TABLE.len());
        for (index, ggml_type) in GgmlType::all().enumerate() {
            assert_eq!(ggml_type as usize, index);
            assert_eq!(GgmlType::from_id(ggml_type.id()), Some(ggml_type));
            assert_eq!(GgmlType::from_name(&ggml_type.name().to_uppercase()), Some(ggml_type));
            assert!(ggml_type.block_elements() > 0 && ggml_type.block_bytes() > 0);
        }
        for removed in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(GgmlType::from_id(removed), None);
        }
        assert_eq!(GgmlType::from_name("q4_3"), None);
    }

    #[test]
    fn rows_are_whole_blocks_and_never_wrap() {
        assert_eq!(GgmlType::Q4_K.row_bytes(4096), Some(16 * 144));
        assert_eq!(GgmlType::Q4_K.row_bytes(255), None);
        assert_eq!(GgmlType::F32.row_bytes(u64::MAX / 2), None);
        assert_eq!(GgmlType::Q8_0.tensor_bytes(&[64, 3, 2]), Some(2 * 34 * 6));
        assert_eq!(GgmlType::F16.tensor_bytes(&[(1 << 42) + 1, 1 << 22]), None);
        assert_eq!(GgmlType::F16.tensor_bytes(&[]), None);
    }
}
