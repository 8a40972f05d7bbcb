//! The stages of the sampler by name, and the order in which llama-server runs them.

use serde::{Deserialize, Serialize};

/// One stage of the sampler. Bias and bans come before the first, the draw after the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SamplerStage {
    /// `repeat_penalty`, `frequency_penalty` and `presence_penalty`.
    Penalties,
    /// The `dry_` parameters: a penalty on what would continue a repetition.
    Dry,
    /// `top_n_sigma`.
    TopNSigma,
    /// `top_k`.
    TopK,
    /// `typical_p`.
    #[serde(rename = "typ_p")]
    TypicalP,
    /// `top_p`.
    TopP,
    /// `min_p`.
    MinP,
    /// The `xtc_` parameters: now and then the likeliest tokens go.
    Xtc,
    /// `temperature`, and `dynatemp_range` around it.
    Temperature,
    /// The `adaptive_` parameters, which change the draw: it runs last wherever it stands.
    AdaptiveP,
}

impl SamplerStage {
    /// llama-server's order. Source: `common_params_sampling` in llama.cpp's `common/common.h` at the pinned commit.
    pub const DEFAULT_ORDER: [Self; 9] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
    ];

    const ALL: [Self; 10] = [
        Self::Penalties,
        Self::Dry,
        Self::TopNSigma,
        Self::TopK,
        Self::TypicalP,
        Self::TopP,
        Self::MinP,
        Self::Xtc,
        Self::Temperature,
        Self::AdaptiveP,
    ];

    /// Its name in a request's `samplers`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Penalties => "penalties",
            Self::Dry => "dry",
            Self::TopNSigma => "top_n_sigma",
            Self::TopK => "top_k",
            Self::TypicalP => "typ_p",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Xtc => "xtc",
            Self::Temperature => "temperature",
            Self::AdaptiveP => "adaptive_p",
        }
    }

    /// Its letter where `samplers` is one string.
    pub fn code(self) -> char {
        match self {
            Self::Penalties => 'e',
            Self::Dry => 'd',
            Self::TopNSigma => 's',
            Self::TopK => 'k',
            Self::TypicalP => 'y',
            Self::TopP => 'p',
            Self::MinP => 'm',
            Self::Xtc => 'x',
            Self::Temperature => 't',
            Self::AdaptiveP => 'a',
        }
    }

    /// The stage with this name, in any of llama-server's spellings: `top_k`, `top-k`, `topk`, in capitals too.
    pub fn from_name(name: &str) -> Option<Self> {
        let plain = |name: &str| name.replace(['_', '-'], "").to_ascii_lowercase();
        match plain(name).as_str() {
            "nucleus" => Some(Self::TopP),
            "temp" => Some(Self::Temperature),
            "typ" | "typicalp" => Some(Self::TypicalP),
            given => Self::ALL.into_iter().find(|stage| plain(stage.name()) == given),
        }
    }

    /// The stage with this letter.
    pub fn from_code(code: char) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| stage.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_found_by_its_name_its_letter_and_its_json() {
        for stage in SamplerStage::ALL {
            let name = stage.name();
            assert_eq!(SamplerStage::from_code(stage.code()), Some(stage));
            for spelling in [name.to_owned(), name.replace('_', "-"), name.replace('_', ""), name.to_uppercase()] {
                assert_eq!(SamplerStage::from_name(&spelling), Some(stage), "{spelling}");
            }
            assert_eq!(serde_json::to_string(&stage).expect("writes"), format!("\"{name}\""));
        }
        for (alias, stage) in [
            ("nucleus", SamplerStage::TopP),
            ("temp", SamplerStage::Temperature),
            ("typ", SamplerStage::TypicalP),
            ("typical_p", SamplerStage::TypicalP),
        ] {
            assert_eq!(SamplerStage::from_name(alias), Some(stage));
        }
        assert_eq!((SamplerStage::from_name("infill"), SamplerStage::from_code('i')), (None, None));
    }
}
