//! What a probe found, as plain data, and how to say it: what happened, to what, and what to do about it.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::LoadError;

/// ggml's name of the device without which nothing runs.
pub(super) const CPU: &str = "CPU";

/// What was tried.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// Every backend that is part of the program.
    Backends,
    /// One file of a `dynamic-backends` build.
    Module(PathBuf),
    /// llama.cpp's name of a device, such as `CUDA0`.
    Device(String),
    /// Weights repacked for the matrix units of this device.
    Repacked(String),
    /// NVIDIA's driver library (NVML).
    Driver,
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backends => f.write_str("this program's set of backends"),
            Self::Module(path) => {
                write!(f, "the module {}", path.file_name().unwrap_or(path.as_os_str()).to_string_lossy())
            }
            Self::Device(name) => write!(f, "the device {name}"),
            Self::Repacked(name) => write!(f, "repacked weights on {name}"),
            Self::Driver => f.write_str("the NVIDIA driver library"),
        }
    }
}

/// What was being done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// A module is loaded, or the backends of the program start.
    Load,
    /// A device is asked for its name and memory; the driver library for everything.
    List,
    /// A few kilobytes of its memory.
    Allocate,
    /// A small matrix product.
    Compute,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "while it was loaded",
            Self::List => "when it was asked what it is",
            Self::Allocate => "when a little of its memory was allocated",
            Self::Compute => "on its first product",
        })
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "how")]
pub enum Failure {
    /// The process that tried it ended.
    Crashed {
        /// The signal or exit code in words.
        cause: String,
        /// Its last words on stderr.
        detail: String,
    },
    /// It did not come back.
    Hung {
        /// How long was waited.
        waited_ms: u64,
    },
    /// It returned an error.
    Refused {
        /// The error.
        detail: String,
    },
    /// It computed something else.
    Wrong {
        /// How far off.
        detail: String,
    },
    /// Something before it used up the time.
    NotTried,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crashed { cause, detail } if detail.is_empty() => write!(f, "crashed ({cause})"),
            Self::Crashed { cause, detail } => write!(f, "crashed ({cause}: {detail})"),
            Self::Hung { waited_ms } => write!(f, "did not answer for {:.1} s", *waited_ms as f64 / 1e3),
            Self::Refused { detail } => write!(f, "failed ({detail})"),
            Self::Wrong { detail } => write!(f, "computed wrong numbers ({detail})"),
            Self::NotTried => f.write_str("was not tried, because the time was used up"),
        }
    }
}

/// Something that is left out, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What.
    pub subject: Subject,
    /// During what.
    pub step: Step,
    /// What happened.
    pub failure: Failure,
}

impl fmt::Display for Problem {
    /// `the device CUDA0 crashed (…) on its first product and is left out: <what to do>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subject, step, failure } = self;
        match failure {
            Failure::NotTried => write!(f, "{subject} {failure}, and is left out: {}", self.advice()),
            _ => write!(f, "{subject} {failure} {step} and is left out: {}", self.advice()),
        }
    }
}

impl Problem {
    /// What to do about it.
    pub fn advice(&self) -> String {
        let detail = match &self.failure {
            Failure::Crashed { detail, .. } | Failure::Refused { detail } | Failure::Wrong { detail } => {
                detail.as_str()
            }
            Failure::Hung { .. } | Failure::NotTried => "",
        };
        let said = |words: &str| detail.to_ascii_lowercase().contains(words);
        let of_gpu = matches!(&self.subject, Subject::Device(name) | Subject::Repacked(name) if name != CPU);
        let text = if said("no kernel image") {
            "this build has no code for the GPU's compute capability: rebuild for it (`CUDA_ARCHITECTURES` of backends/cuda/build.sh, \
            or `CMAKE_CUDA_ARCHITECTURES` with `--features cuda`)"
        } else if said("driver version is insufficient") || said("unsupported toolchain") {
            "the driver is older than the CUDA of this build: update the driver, or build with an older CUDA toolkit"
        } else if said("libcuda.so") || said("nvcuda.dll") {
            "there is no NVIDIA driver here: install one, or start the container with `--gpus all`"
        } else if said("cannot open shared object file") || said("undefined symbol") {
            "a library that it needs is missing or of another version: install it, or build the module on this machine"
        } else if said("api version") {
            "it was built for another version of llama.cpp: build it anew from the sources of this bundle"
        } else if said("out of memory") || said("cannot be allocated") {
            "other programs hold its memory (`nvidia-smi` names them): end them and start again"
        } else if said("no device") || said("operation not permitted") || said("no permission") {
            "this process may not use the GPU: check /dev/nvidia* and the container's device list"
        } else {
            match (&self.subject, &self.failure) {
                (Subject::Driver, _) => {
                    "look for `Xid` in the kernel log (`sudo dmesg`); reinstall the driver if `nvidia-smi` fails too"
                }
                (_, Failure::Crashed { cause, .. }) if cause.contains("illegal instruction") => {
                    "it was compiled for another processor: use the bundle, or build Minerva on this machine"
                }
                (_, Failure::Hung { .. }) => {
                    "look for `Xid` in the kernel log (`sudo dmesg`), reset the GPU (`sudo nvidia-smi --gpu-reset`) or reboot; for a \
                    GPU that is only slow to wake, turn on persistence mode or raise `gpu.probe_seconds`"
                }
                (_, Failure::NotTried) => "solve the other problem first, or raise `gpu.probe_seconds`",
                (Subject::Module(_), _) => "the file is damaged or built for something else: replace it, or remove it",
                (Subject::Repacked(_), _) => {
                    "the rest works, more slowly; rebuild with a newer compiler (docs/ffi.md, \"AMX\")"
                }
                (_, Failure::Wrong { .. }) => {
                    "the driver or the hardware is faulty: update the driver, turn overclocking off, test the memory"
                }
                _ if of_gpu => "update the driver; if `nvidia-smi` fails too, reboot",
                _ => "rebuild Minerva on this machine",
            }
        };
        text.to_owned()
    }
}

/// A device that llama.cpp lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedDevice {
    /// llama.cpp's name.
    pub name: String,
    /// The hardware's name.
    pub description: String,
    /// Where it is, if the backend tells.
    pub pci_bus_id: Option<String>,
    /// Whether it is a GPU.
    pub is_gpu: bool,
    /// The file that its backend came from.
    pub module: Option<PathBuf>,
    /// Whether it did all that was asked of it.
    pub works: bool,
}

/// The outcome of a probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The modules that work, to be loaded in this order.
    pub modules: Vec<PathBuf>,
    /// Every device that was listed.
    pub devices: Vec<ProbedDevice>,
    /// What is left out and why.
    pub problems: Vec<Problem>,
    /// Why the probe itself did not work; then nothing is left out.
    pub gave_up: Option<String>,
    /// Variables that hide the GPUs from backends which crash as soon as they start. They must be set before the process starts.
    pub hide_gpus: Vec<(String, String)>,
    /// Whether this is what an earlier process found.
    pub is_cached: bool,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

impl ProbeReport {
    /// Why nothing at all can run here; `None` when something can.
    pub fn nothing_works(&self) -> Option<String> {
        if self.gave_up.is_some() || self.devices.iter().any(|device| device.works && device.name == CPU) {
            return None;
        }
        let reasons: Vec<_> = self.problems.iter().map(Problem::to_string).collect();
        Some(if reasons.is_empty() { "no backend for the CPU was found".to_owned() } else { reasons.join("; ") })
    }

    /// Whether a model can be loaded in this process.
    pub(crate) fn check(&self) -> Result<(), LoadError> {
        let variables: Vec<_> = self.hide_gpus.iter().map(|(name, value)| format!("{name}={value}")).collect();
        match self.nothing_works() {
            Some(reason) => Err(LoadError::NothingWorks { reason }),
            None if variables.is_empty() => Ok(()),
            None => {
                let problems: Vec<_> = self.problems.iter().map(Problem::to_string).collect();
                let reason =
                    format!("{}; start it with {} to do without GPUs", problems.join("; "), variables.join(" "));
                Err(LoadError::NothingWorks { reason })
            }
        }
    }

    /// The problem of a device, or of the module that it comes from.
    pub fn problem_of(&self, device: &ProbedDevice) -> Option<&Problem> {
        self.problems.iter().find(|problem| match &problem.subject {
            Subject::Device(name) => *name == device.name,
            Subject::Module(path) => device.module.as_ref() == Some(path),
            _ => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(subject: Subject, step: Step, failure: Failure) -> String {
        Problem { subject, step, failure }.to_string()
    }

    #[test]
    fn a_problem_is_one_line_that_ends_in_what_to_do() {
        let cuda = || Subject::Device("CUDA0".to_owned());
        let aborted = |detail: &str| Failure::Crashed { cause: "aborted".to_owned(), detail: detail.to_owned() };
        for (text, begin, end) in [
            (
                problem(
                    cuda(),
                    Step::Compute,
                    aborted("CUDA error: no kernel image is available for execution on the device"),
                ),
                "the device CUDA0 crashed (aborted: CUDA error: no kernel image is available for execution on the device) on its \
                first product and is left out: this build has no code for the GPU's compute capability",
                "with `--features cuda`)",
            ),
            (
                problem(
                    Subject::Module("/a/libggml-cpu-zen4.so".into()),
                    Step::Compute,
                    Failure::Crashed { cause: "illegal instruction".to_owned(), detail: String::new() },
                ),
                "the module libggml-cpu-zen4.so crashed (illegal instruction) on its first product",
                "use the bundle, or build Minerva on this machine",
            ),
            (
                problem(cuda(), Step::List, Failure::Hung { waited_ms: 5000 }),
                "the device CUDA0 did not answer for 5.0 s when it was asked what it is and is left out: look for `Xid`",
                "raise `gpu.probe_seconds`",
            ),
            (
                problem(
                    Subject::Module("libggml-cuda.so".into()),
                    Step::Load,
                    Failure::Refused { detail: "libcuda.so.1: cannot open shared object file".to_owned() },
                ),
                "the module libggml-cuda.so failed (libcuda.so.1:",
                "start the container with `--gpus all`",
            ),
            (
                problem(
                    cuda(),
                    Step::Allocate,
                    Failure::Refused { detail: "cudaMalloc failed: out of memory".to_owned() },
                ),
                "the device CUDA0 failed",
                "end them and start again",
            ),
            (
                problem(cuda(), Step::List, aborted("CUDA driver version is insufficient for CUDA runtime version")),
                "the device CUDA0 crashed",
                "older CUDA toolkit",
            ),
            (problem(cuda(), Step::List, Failure::NotTried), "the device CUDA0 was not tried", "`gpu.probe_seconds`"),
        ] {
            assert!(text.starts_with(begin) && text.ends_with(end) && !text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn without_a_cpu_that_works_nothing_does() {
        let cpu = ProbedDevice {
            name: CPU.to_owned(),
            description: String::new(),
            pci_bus_id: None,
            is_gpu: false,
            module: None,
            works: true,
        };
        let works = ProbeReport { devices: vec![cpu.clone()], ..ProbeReport::default() };
        assert_eq!(works.nothing_works(), None);
        let broken = ProbeReport { devices: vec![ProbedDevice { works: false, ..cpu }], ..ProbeReport::default() };
        assert!(broken.nothing_works().is_some());
        assert_eq!(ProbeReport { gave_up: Some("no child".to_owned()), ..broken }.nothing_works(), None);
    }
}
