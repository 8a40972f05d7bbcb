//! What the user asked for (`--gpu=`) and what the build can do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The value of `--gpu=`: `auto`, `cpu`, `metal`, `cuda` or `cuda:N`.
///
/// The guide's sixth value, `debug`, asks for a [`Diagnosis`](crate::Diagnosis) and names no device; the server handles it
/// before it parses this.
///
/// # Examples
/// ```
/// use minerva_gpu::DeviceChoice;
/// assert_eq!("cuda:1".parse(), Ok(DeviceChoice::Cuda(Some(1))));
/// assert_eq!(DeviceChoice::Cuda(Some(1)).to_string(), "cuda:1");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceChoice {
    /// The best usable GPU that the build supports, else the CPU.
    #[default]
    Auto,
    /// The CPU; no GPU is touched.
    Cpu,
    /// The Metal device of a Mac.
    Metal,
    /// The best usable NVIDIA GPU, or the one with this CUDA number.
    ///
    /// Numbers count the devices that CUDA shows to this process, so they follow `CUDA_VISIBLE_DEVICES` and
    /// `CUDA_DEVICE_ORDER`: with `CUDA_VISIBLE_DEVICES=3`, `cuda:0` is the GPU that nvidia-smi calls 3.
    Cuda(Option<u32>),
}

/// A `--gpu=` value that is none of [`DeviceChoice`]'s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a device: use `auto`, `cpu`, `metal`, `cuda` or `cuda:N` (N counts from 0)")]
pub struct ParseChoiceError {
    /// The value as it was given.
    pub given: String,
}

impl FromStr for DeviceChoice {
    type Err = ParseChoiceError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let error = || ParseChoiceError { given: given.to_owned() };
        match given.trim().to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "metal" => Ok(Self::Metal),
            "cuda" => Ok(Self::Cuda(None)),
            other => match other.strip_prefix("cuda:") {
                // `u32::from_str` would also take a sign.
                Some(n) if n.bytes().all(|b| b.is_ascii_digit()) => {
                    n.parse().map(|n| Self::Cuda(Some(n))).map_err(|_| error())
                }
                _ => Err(error()),
            },
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::Cpu => f.pad("cpu"),
            Self::Metal => f.pad("metal"),
            Self::Cuda(None) => f.pad("cuda"),
            Self::Cuda(Some(n)) => f.pad(&format!("cuda:{n}")),
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = ParseChoiceError;

    fn try_from(given: String) -> Result<Self, Self::Error> {
        given.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

/// The GPU backends that llama.cpp was built with; every build has the CPU.
///
/// This crate does not know llama.cpp, so the caller says. [`Default`] is a build for the CPU alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BuildBackends {
    /// Built with `--features cuda`, or with the CUDA module beside it.
    pub cuda: bool,
    /// Built with `--features metal`.
    pub metal: bool,
    /// Built with `--features vulkan`. Shown in the diagnosis; no device is selected for it.
    pub vulkan: bool,
}

impl BuildBackends {
    /// Every backend: selection then says what the machine could use, whatever the build.
    pub const ALL: Self = Self { cuda: true, metal: true, vulkan: true };
}

impl fmt::Display for BuildBackends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cpu")?;
        for (built, name) in [(self.cuda, "cuda"), (self.metal, "metal"), (self.vulkan, "vulkan")] {
            if built {
                write!(f, ", {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_documented_value_parses_and_prints_back() {
        for (text, choice) in [
            ("auto", DeviceChoice::Auto),
            ("cpu", DeviceChoice::Cpu),
            ("metal", DeviceChoice::Metal),
            ("cuda", DeviceChoice::Cuda(None)),
            ("cuda:0", DeviceChoice::Cuda(Some(0))),
            ("cuda:15", DeviceChoice::Cuda(Some(15))),
        ] {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
            let json = serde_json::to_string(&choice).unwrap();
            assert_eq!(json, format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<DeviceChoice>(&json).unwrap(), choice);
        }
        assert_eq!(" CUDA:2 ".parse(), Ok(DeviceChoice::Cuda(Some(2))));
    }

    #[test]
    fn other_values_are_refused_with_the_valid_ones_in_the_text() {
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:4294967296", "cuda 0", "debug"] {
            let error = bad.parse::<DeviceChoice>().unwrap_err();
            assert_eq!(error.given, bad);
            for valid in ["`auto`", "`cpu`", "`metal`", "`cuda`", "`cuda:N`"] {
                assert!(error.to_string().contains(valid), "{error}");
            }
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_prints_back(text in ".{0,20}") {
            if let Ok(choice) = text.parse::<DeviceChoice>() {
                prop_assert_eq!(choice.to_string().parse(), Ok(choice));
            }
        }

        #[test]
        fn every_index_survives(n: u32) {
            let choice = DeviceChoice::Cuda(Some(n));
            prop_assert_eq!(choice.to_string().parse(), Ok(choice));
        }
    }
}
