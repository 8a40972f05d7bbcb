//! What the tests of several modules share: a fake root folder, and GPUs that are not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::nvml::{MemoryReading, RawGpu};

/// A folder with `/proc` and `/sys` files of the test's making.
pub(crate) struct FakeRoot(tempfile::TempDir);

impl FakeRoot {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let file = self.0.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
}

/// `tests/fake/nvml.rs`, built with these options. The file must live as long as what is loaded from it.
pub(crate) struct FakeLibrary(tempfile::TempDir);

impl FakeLibrary {
    pub(crate) fn build(options: &[&str], env: &[(&str, &str)]) -> Self {
        let library = Self(tempfile::tempdir().unwrap());
        let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
        let status = Command::new(rustc)
            .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=nvml"])
            .args(["-Cpanic=abort", "-Aunexpected_cfgs", "-o"])
            .arg(library.path())
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake/nvml.rs"))
            .args(options)
            .envs(env.iter().copied())
            .status()
            .unwrap();
        assert!(status.success());
        library
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().join("libnvidia-ml.so.1")
    }
}

/// An RTX 4090 with 24 GiB, all of it free.
pub(crate) fn gpu(nvml_index: u32) -> RawGpu {
    RawGpu {
        nvml_index,
        name: "NVIDIA GeForce RTX 4090".to_owned(),
        uuid: Some(format!("GPU-{nvml_index:08}")),
        pci_bus_id: Some(format!("0000:{:02x}:00.0", 0x65 + nvml_index)),
        compute_capability: Some((8, 9)),
        memory: MemoryReading::Bytes { total: 24 << 30, free: 24 << 30 },
        speed: 1,
        bandwidth: Some(1_008_096_000_000),
        mig: None,
        error: None,
    }
}
