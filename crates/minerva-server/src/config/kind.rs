//! What a setting's value may look like, in text (variables, flags) and in JSON (the config file).

use figment::value::{Empty, Value};
use serde_json::Value as Json;

/// The values that a setting takes. A problem is worded to follow "it must be".
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// `true` or `false`; as a flag, its bare presence.
    Bool,
    /// A whole number, or one of a few words; `None` stands for "chosen by Minerva".
    Uint {
        /// The smallest number allowed.
        min: u64,
        /// The largest number allowed.
        max: u64,
        /// Words, and the number that each stands for.
        words: &'static [(&'static str, Option<u64>)],
    },
    /// A time in seconds, fractions allowed.
    Seconds {
        /// The largest value allowed.
        max: f64,
    },
    /// A share, such as a probability.
    Share,
    /// A size: `4gb` or `512mb` in text, MiB as a plain number in JSON.
    Megabytes {
        /// Whether 0 means none.
        zero: bool,
    },
    /// A size in bytes; text may carry a unit.
    Bytes {
        /// The smallest size allowed.
        min: u64,
    },
    /// Any text.
    Text,
    /// One of a few words.
    OneOf(&'static [&'static str]),
    /// `auto`, `cpu`, `metal`, `cuda`, `cuda:N` or a device number.
    Device,
    /// Texts, separated by commas.
    List {
        /// Never shown.
        secret: bool,
    },
}

impl Kind {
    /// Checks a value from a variable or a flag.
    pub fn parse_text(self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        match self {
            Self::Bool => match text.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" => Ok(Value::from(true)),
                "false" | "0" | "no" | "off" => Ok(Value::from(false)),
                _ => Err(self.allowed()),
            },
            Self::Uint { min, max, words } => {
                if let Some((_, number)) = words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)) {
                    return Ok(number.map_or_else(nothing, Value::from));
                }
                let number = text.parse::<u64>().ok().filter(|number| (min..=max).contains(number));
                number.map(Value::from).ok_or_else(|| self.allowed())
            }
            Self::Seconds { max } => {
                let number = text.parse::<f64>().ok().filter(|seconds| *seconds > 0.0 && *seconds <= max);
                number.map(Value::from).ok_or_else(|| self.allowed())
            }
            Self::Share => {
                let number = text.parse::<f64>().ok().filter(|share| (0.0..=1.0).contains(share));
                number.map(Value::from).ok_or_else(|| self.allowed())
            }
            Self::Megabytes { .. } | Self::Bytes { .. } => {
                if matches!(self, Self::Megabytes { .. }) && text.eq_ignore_ascii_case("auto") {
                    return Ok(nothing());
                }
                if matches!(self, Self::Megabytes { zero: true }) && (text == "0" || text.eq_ignore_ascii_case("off")) {
                    return Ok(Value::from(0_u64));
                }
                let bytes = minerva_gpu::parse_bytes(text).ok().filter(|bytes| *bytes >= self.min_bytes());
                bytes.map(Value::from).ok_or_else(|| self.allowed())
            }
            Self::Text if text.is_empty() => Err(self.allowed()),
            Self::Text => Ok(Value::from(text)),
            Self::OneOf(words) => {
                let word = words.iter().find(|word| word.eq_ignore_ascii_case(text));
                word.map(|word| Value::from(*word)).ok_or_else(|| self.allowed())
            }
            Self::Device => {
                let text = text.to_ascii_lowercase();
                let is_known = text.parse::<u32>().is_ok() || text.parse::<minerva_gpu::DeviceChoice>().is_ok();
                if is_known { Ok(Value::from(text)) } else { Err(self.allowed()) }
            }
            Self::List { .. } => self.list(text.split(',')),
        }
    }

    /// Checks a value of the config file; `null` is not for here, since it means "not set".
    pub fn parse_json(self, json: &Json) -> Result<Value, String> {
        match (self, json) {
            // Numbers, booleans and texts follow the same rules as text, so that "40" and 40 mean the same.
            (Self::Megabytes { zero }, Json::Number(number)) => {
                let bytes = number.as_u64().and_then(|mib| mib.checked_mul(1 << 20)).filter(|bytes| zero || *bytes > 0);
                bytes.map(Value::from).ok_or_else(|| self.allowed())
            }
            (Self::List { .. }, Json::Array(items)) => {
                let texts = items.iter().map(|item| item.as_str().ok_or_else(|| self.allowed()));
                self.list(texts.collect::<Result<Vec<_>, _>>()?.into_iter())
            }
            (Self::Bool, Json::Bool(value)) => Ok(Value::from(*value)),
            (Self::Bool, _) | (Self::Text | Self::OneOf(_), Json::Number(_) | Json::Bool(_)) => Err(self.allowed()),
            (_, Json::String(text)) => self.parse_text(text),
            (_, Json::Number(number)) => self.parse_text(&number.to_string()),
            _ => Err(self.allowed()),
        }
    }

    /// Texts without the blanks around them, and without empty ones. A list of secrets that is given is not empty: a key that somebody
    /// forgot to fill in would let everybody in.
    fn list<'a>(self, items: impl Iterator<Item = &'a str>) -> Result<Value, String> {
        let items: Vec<Value> = items.map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect();
        if items.is_empty() && self.is_secret() { Err(self.allowed()) } else { Ok(Value::from(items)) }
    }

    /// What the value must be.
    pub fn allowed(self) -> String {
        match self {
            Self::Bool => "true or false".to_owned(),
            Self::Uint { min, max, words } => {
                let words: String = words.iter().fold(String::new(), |text, (word, _)| format!("{text}, or `{word}`"));
                format!("a whole number from {min} to {max}{words}")
            }
            Self::Seconds { max } => format!("a number of seconds above 0 and up to {max}"),
            Self::Share => "a number from 0 to 1".to_owned(),
            Self::Megabytes { zero } => {
                let zero = if zero { ", or 0; `off` is 0" } else { "" };
                format!(
                    "a size with its unit such as `4gb` or `512mb`, or `auto`; in the config file, a number of MiB{zero}"
                )
            }
            Self::Bytes { min } => format!("a size of at least {min} bytes, such as `4mb`"),
            Self::Text => "a text that is not empty".to_owned(),
            Self::OneOf(words) => format!("one of {}", words.join(", ")),
            Self::Device => "auto, cpu, metal, cuda, cuda:N or a device number".to_owned(),
            Self::List { .. } => "a text, or several separated by commas (in the config file, an array)".to_owned(),
        }
    }

    /// Whether the value must never be shown.
    pub fn is_secret(self) -> bool {
        matches!(self, Self::List { secret: true })
    }

    fn min_bytes(self) -> u64 {
        match self {
            Self::Bytes { min } => min,
            // A bare `4096` would be bytes: nobody means to run a model in less than a MiB.
            _ => 1 << 20,
        }
    }
}

/// The value that stands for "not set": an `Option` in [`Config`](super::Config) reads it as `None`.
pub(crate) fn nothing() -> Value {
    Value::from(Empty::None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYERS: Kind = Kind::Uint { min: 0, max: 99, words: &[("auto", None), ("all", Some(99))] };

    #[test]
    fn text_and_json_numbers_mean_the_same() {
        assert_eq!(LAYERS.parse_text("40").unwrap().to_u128(), Some(40));
        assert_eq!(LAYERS.parse_json(&Json::from(40)).unwrap().to_u128(), Some(40));
        assert_eq!(LAYERS.parse_json(&Json::from("40")).unwrap().to_u128(), Some(40));
        assert_eq!(LAYERS.parse_text("all").unwrap().to_u128(), Some(99));
        assert_eq!(LAYERS.parse_text("AUTO").unwrap(), nothing());
    }

    #[test]
    fn values_out_of_range_or_of_another_kind_are_refused() {
        for text in ["100", "-1", "1.5", "", "NaN", "forty", "99999999999999999999999"] {
            assert!(LAYERS.parse_text(text).is_err(), "{text}");
        }
        for text in ["0", "-3", "NaN", "inf", "1e9"] {
            assert!(Kind::Seconds { max: 3600.0 }.parse_text(text).is_err(), "{text}");
        }
        for text in ["-0.1", "1.1", "NaN", "half", ""] {
            assert!(Kind::Share.parse_text(text).is_err(), "{text}");
        }
        for json in [Json::from(vec![1]), Json::from(1.5), Json::Bool(true)] {
            assert!(LAYERS.parse_json(&json).is_err(), "{json}");
        }
    }

    const LIMIT: Kind = Kind::Megabytes { zero: false };

    #[test]
    fn a_memory_limit_has_a_unit_in_text_and_counts_mebibytes_in_the_file() {
        let limit = |value: Result<Value, String>| value.unwrap().to_u128();
        assert_eq!(limit(LIMIT.parse_text("512mb")), Some(512 << 20));
        assert_eq!(limit(LIMIT.parse_json(&Json::from(4096))), Some(4096 << 20));
        assert_eq!(limit(LIMIT.parse_json(&Json::from("4gb"))), limit(LIMIT.parse_text("4GB")));
        assert!(LIMIT.parse_text("4096").is_err(), "4096 bytes is a forgotten unit");
        assert!(LIMIT.parse_text("0").is_err() && LIMIT.parse_json(&Json::from(0)).is_err());
        let cache = Kind::Megabytes { zero: true };
        assert_eq!((limit(cache.parse_text("0")), limit(cache.parse_json(&Json::from(0)))), (Some(0), Some(0)));
        assert_eq!((limit(cache.parse_text("Off")), LIMIT.parse_text("off").is_err()), (Some(0), true));
    }

    #[test]
    fn a_list_of_keys_that_is_given_has_a_key() {
        let (keys, names) = (Kind::List { secret: true }, Kind::List { secret: false });
        let listed = |value: Value| value.into_array().unwrap().len();
        for empty in ["", ",", "  , "] {
            assert!(keys.parse_text(empty).is_err(), "{empty:?}");
            assert_eq!(listed(names.parse_text(empty).unwrap()), 0);
            assert!(keys.parse_json(&serde_json::json!([empty.replace(',', "")])).is_err(), "{empty:?}");
        }
        assert!(keys.parse_json(&serde_json::json!([])).is_err());
        let given = keys.parse_json(&serde_json::json!([" sk-one ", ""])).unwrap();
        assert_eq!(given, Value::from(vec![Value::from("sk-one")]));
    }

    #[test]
    fn a_device_number_is_a_device() {
        for text in ["auto", "CPU", "metal", "cuda", "cuda:1", "0", "7"] {
            assert!(Kind::Device.parse_text(text).is_ok(), "{text}");
        }
        for text in ["gpu", "cuda:", "cuda:x", "-1", ""] {
            assert!(Kind::Device.parse_text(text).is_err(), "{text}");
        }
    }
}
