//! How much of a device Minerva may use: the guide's shares, the user's override, and sizes as people write them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceInfo, GpuDevice, MemoryKind};

/// Share of the system's RAM that a Metal device may use, in percent: the rest of the Mac lives in the same memory.
pub const METAL_SHARE_PERCENT: u64 = 50;

/// Share of its memory that a CUDA device may use, in percent.
///
/// Also for unified CUDA devices (GB10, Jetson): those machines are there for the GPU, and [`MemoryEstimate::budget_bytes`]
/// keeps below what is free in any case.
pub const CUDA_SHARE_PERCENT: u64 = 80;

/// Share of the system's RAM that the CPU backend may use, in percent.
pub const CPU_SHARE_PERCENT: u64 = 25;

/// The guide's share for a kind of device, in percent.
pub fn share_percent(kind: GpuDevice) -> u64 {
    match kind {
        GpuDevice::Metal => METAL_SHARE_PERCENT,
        GpuDevice::Cuda => CUDA_SHARE_PERCENT,
        GpuDevice::Cpu => CPU_SHARE_PERCENT,
    }
}

/// The bytes of `total_bytes` that a device of this kind may use, rounded down.
///
/// # Examples
/// ```
/// use minerva_gpu::{GpuDevice, default_limit_bytes};
/// assert_eq!(default_limit_bytes(GpuDevice::Cuda, 24 << 30), (24 << 30) * 4 / 5);
/// ```
pub fn default_limit_bytes(kind: GpuDevice, total_bytes: u64) -> u64 {
    let percent = share_percent(kind);
    // In two parts: `total_bytes * percent` could overflow.
    total_bytes / 100 * percent + total_bytes % 100 * percent / 100
}

/// What may be allocated on one device, read at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEstimate {
    /// The kind of device.
    pub device: GpuDevice,
    /// Its own memory, or the system's.
    pub memory_kind: MemoryKind,
    /// All there is; for RAM after the cgroup's limit.
    pub total_bytes: u64,
    /// Free now; page cache counts as free, as in the kernel's `MemAvailable`.
    pub free_bytes: u64,
    /// The most that Minerva may use: the share, or the override, never more than the total.
    pub limit_bytes: u64,
    /// The smaller of limit and free: what a plan may spend now.
    pub budget_bytes: u64,
    /// Where the limit comes from.
    pub limit_source: LimitSource,
}

impl MemoryEstimate {
    pub(crate) fn of(device: &DeviceInfo, limit_source: LimitSource) -> Self {
        Self {
            device: device.kind,
            memory_kind: device.memory_kind,
            total_bytes: device.total_bytes,
            free_bytes: device.free_bytes,
            limit_bytes: device.limit_bytes,
            budget_bytes: device.limit_bytes.min(device.free_bytes),
            limit_source,
        }
    }
}

/// Where a limit comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitSource {
    /// The guide's share of the device's memory.
    Share {
        /// The share.
        percent: u64,
    },
    /// The user's number (`MINERVA_GPU_MEMORY_LIMIT`, `max_memory_mb`).
    Override,
}

impl fmt::Display for LimitSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share { percent } => write!(f, "{percent} % share"),
            Self::Override => f.write_str("set by the user"),
        }
    }
}

/// Reads a size as people write it: `4gb`, `1.5 GiB`, `512m`, `1024`.
///
/// Units are powers of 1024 with and without the `i`, so the guide's `4gb` is 2^32 bytes, the same as its
/// `max_memory_mb: 4096`. No unit means bytes. Case and spaces around the unit do not matter; a fraction of a byte is cut off.
///
/// # Errors
/// [`ParseBytesError`] for anything else, a sign included, and for what does not fit in a `u64`.
///
/// # Examples
/// ```
/// use minerva_gpu::parse_bytes;
/// assert_eq!(parse_bytes("4gb"), Ok(4 << 30));
/// assert_eq!(parse_bytes("1.5 GiB"), Ok(3 << 29));
/// assert!(parse_bytes("-1gb").is_err());
/// ```
pub fn parse_bytes(text: &str) -> Result<u64, ParseBytesError> {
    let invalid = || ParseBytesError::Invalid { given: text.to_owned() };
    let overflow = || ParseBytesError::Overflow { given: text.to_owned() };
    let trimmed = text.trim();
    let number_end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(number_end);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(invalid()),
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(invalid()),
        Some(parts) => parts,
        None => (number, ""),
    };
    if whole.is_empty() || fraction.contains('.') {
        return Err(invalid());
    }
    let whole: u64 = whole.parse().map_err(|_| overflow())?; // only digits, so only too long
    let whole = whole.checked_mul(1 << shift).ok_or_else(overflow)?;
    // Digits past the 18th are less than a byte even of a terabyte.
    let digits = &fraction[..fraction.len().min(18)];
    let fraction = if digits.is_empty() {
        0
    } else {
        let numerator: u128 = digits.parse().map_err(|_| invalid())?;
        let denominator = 10_u128.pow(digits.len() as u32);
        ((numerator << shift) / denominator) as u64 // below 2^40
    };
    whole.checked_add(fraction).ok_or_else(overflow)
}

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseBytesError {
    /// Not a number with a known unit.
    #[error(
        "`{given}` is not a size: use a number with b, kb, mb, gb or tb (powers of 1024), such as `4gb` or `1.5gib`"
    )]
    Invalid {
        /// The text as it was given.
        given: String,
    },
    /// More than a `u64` of bytes.
    #[error("`{given}` is more bytes than 64 bits can count")]
    Overflow {
        /// The text as it was given.
        given: String,
    },
}

/// Bytes for people, in powers of 1024: `78.1 GiB`, `512 B`.
pub fn format_bytes(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift > 0 {
            return format!("{:.1} {unit}", bytes as f64 / (1_u64 << shift) as f64);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_powers_of_1024_in_any_case() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("7b", 7),
            ("1k", 1 << 10),
            ("1kb", 1 << 10),
            ("2KiB", 2 << 10),
            ("512mb", 512 << 20),
            ("4gb", 4 << 30),
            ("4GB", 4 << 30),
            (" 4 GiB ", 4 << 30),
            ("1.5gb", 3 << 29),
            ("0.5kb", 512),
            ("1.9b", 1),
            ("2tb", 2 << 40),
            ("18446744073709551615", u64::MAX),
            ("0.9999999999999999999999999999tb", (1 << 40) - 1),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_and_too_much_is_told_apart() {
        for text in [
            "", "gb", "-1", "+1", "1e3", "1.gb", ".5gb", "1..5", "1.2.3", "4xb", "4 g b", "4gb!", "４gb", "0x10",
            "1,5gb",
        ] {
            assert!(matches!(parse_bytes(text), Err(ParseBytesError::Invalid { .. })), "{text}");
        }
        for text in ["18446744073709551616", "16777216tb", "99999999999999999999999kb"] {
            assert!(matches!(parse_bytes(text), Err(ParseBytesError::Overflow { .. })), "{text}");
        }
    }

    #[test]
    fn the_shares_are_the_guides() {
        assert_eq!(default_limit_bytes(GpuDevice::Metal, 16 << 30), 8 << 30);
        assert_eq!(default_limit_bytes(GpuDevice::Cuda, 1000), 800);
        assert_eq!(default_limit_bytes(GpuDevice::Cpu, 16 << 30), 4 << 30);
        assert_eq!(default_limit_bytes(GpuDevice::Cuda, 0), 0);
        assert!(default_limit_bytes(GpuDevice::Cuda, u64::MAX) < u64::MAX);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,24}") {
            let _ = parse_bytes(&text);
        }

        #[test]
        fn whole_sizes_are_exact(n in 0_u64..1 << 24, unit in 0_usize..5, spaced: bool, upper: bool) {
            let name = ["b", "kb", "mb", "gb", "tb"][unit];
            let mut text = format!("{n}{}{name}", if spaced { " " } else { "" });
            if upper { text = text.to_ascii_uppercase(); }
            prop_assert_eq!(parse_bytes(&text), Ok(n << (10 * unit)));
        }

        #[test]
        fn decimals_are_within_a_byte_of_the_float(whole in 0_u64..1 << 20, millis in 0_u64..1000) {
            let bytes = parse_bytes(&format!("{whole}.{millis:03}gb")).unwrap();
            let exact = (u128::from(whole * 1000 + millis) << 30) / 1000;
            prop_assert_eq!(u128::from(bytes), exact);
        }

        #[test]
        fn a_share_is_the_exact_percentage(total: u64) {
            for kind in [GpuDevice::Metal, GpuDevice::Cuda, GpuDevice::Cpu] {
                let exact = u128::from(total) * u128::from(share_percent(kind)) / 100;
                prop_assert_eq!(u128::from(default_limit_bytes(kind, total)), exact);
            }
        }
    }
}
