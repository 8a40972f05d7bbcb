//! Which devices this machine has, how much memory they leave, and which one runs the model.
//!
//! Pure Rust: NVIDIA's driver library is loaded at run time, Metal is recognised, never called, and llama.cpp is not known here
//! at all, so callers say what their build of it can do ([`BuildBackends`]). Nothing in this crate allocates device memory.
//! Start with [`GpuContext`], the guide's four steps; below it [`Machine::probe`] collects plain data and a pure function
//! selects from it. [`Diagnosis`] prints everything. What a model file says about itself is in [`gguf`], which needs no device.
//!
//! # Invariants
//! - Without a driver, without `/proc`, in any container: there is an answer, and it says what is missing.
//! - A GPU that was asked for by name is used or is an error; only `auto` falls back, and it says why.
//! - `cuda:N` counts as CUDA counts in this process. Devices are matched by UUID or PCI address, never by number.
//! - A driver that hangs, fails or lies costs a reason in the answer, and at most a few seconds once per process.
//! - Free memory counts the page cache as free and stays below every limit of the control groups.
// Raw strings in tests are as expect-test writes them.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::needless_raw_string_hashes))]
#![deny(unsafe_code)] // but for the one query in `nvml` that old drivers demand

mod boot;
mod cgroup;
mod choice;
mod context;
mod cpu;
mod device;
mod diagnosis;
mod driver;
mod error;
pub mod estimate;
pub mod findings;
pub mod gguf;
mod machine;
mod memory;
#[cfg_attr(not(target_os = "macos"), allow(dead_code))] // its parser is tested on every system
mod metal;
mod nvml;
pub mod plan;
mod ram;
mod select;
pub mod synthetic;
#[cfg(test)]
mod testing;
mod visible;

pub use boot::hardware_fingerprint;
pub use cgroup::CgroupLimits;
pub use choice::{BuildBackends, DeviceChoice, ParseChoiceError};
pub use context::{GpuContext, GpuOptions};
pub use cpu::CpuInfo;
pub use device::{ComputeCapability, DeviceInfo, GpuDevice, MIN_COMPUTE_CAPABILITY, MemoryKind};
pub use diagnosis::Diagnosis;
pub use error::GpuError;
pub use machine::Machine;
pub use memory::{
    CPU_SHARE_PERCENT, CUDA_SHARE_PERCENT, LimitSource, METAL_SHARE_PERCENT, MemoryEstimate, ParseBytesError,
    default_limit_bytes, format_bytes, parse_bytes, share_percent,
};
pub use nvml::{DriverState, MIN_DRIVER_MAJOR};
pub use ram::SystemMemory;
pub use visible::DeviceOrder;
