//! The config file: JSON in the guide's form, with sections.

use std::io::Read as _;
use std::path::Path;

use serde_json::Value as Json;

use super::kind::nothing;
use super::settings::Initial;
use super::{ConfigError, SETTINGS, Values};

/// Far more than every setting at its longest.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads `path`. A file that nobody asked for by name may be missing.
pub(super) fn read(path: Option<&Path>, is_explicit: bool) -> Result<Values, ConfigError> {
    let Some(path) = path else { return Ok(Values::new()) };
    let error = |problem: String| ConfigError::File { what: "the config file", file: path.to_path_buf(), problem };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(missing) if missing.kind() == std::io::ErrorKind::NotFound && !is_explicit => return Ok(Values::new()),
        Err(other) => return Err(error(other.to_string())),
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|problem| error(problem.to_string()))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(error(format!("it is larger than {MAX_FILE_BYTES} bytes")));
    }
    // Some editors write a byte order mark.
    parse(text.strip_prefix('\u{feff}').unwrap_or(&text), path)
}

fn parse(text: &str, path: &Path) -> Result<Values, ConfigError> {
    let error = |problem: String| ConfigError::File { what: "the config file", file: path.to_path_buf(), problem };
    let json: Json = serde_json::from_str(text).map_err(|problem| error(problem.to_string()))?;
    let Json::Object(sections) = json else { return Err(error("it is not a JSON object".to_owned())) };
    let mut values = Values::new();
    for (section, entries) in &sections {
        let Json::Object(entries) = entries else {
            return Err(unknown(section, path).unwrap_or_else(|| error(format!("`{section}` must be an object"))));
        };
        for (key, json) in entries {
            let dotted = format!("{section}.{key}");
            let Some(setting) = SETTINGS.iter().find(|setting| setting.path == dotted) else {
                return Err(unknown(&dotted, path).unwrap_or_else(|| error(format!("`{dotted}` is no setting"))));
            };
            if json.is_null() && matches!(setting.initial, Initial::Unset) {
                values.push((setting, nothing()));
                continue;
            }
            let value = setting.kind.parse_json(json).map_err(|allowed| ConfigError::Value {
                place: format!("`{dotted}` in {}", path.display()),
                given: if setting.kind.is_secret() { "not usable".to_owned() } else { format!("`{json}`") },
                allowed,
            })?;
            values.push((setting, value));
        }
    }
    Ok(values)
}

/// The error for a key that is none of ours; `None` for the name of a section.
fn unknown(key: &str, path: &Path) -> Option<ConfigError> {
    if SETTINGS.iter().any(|setting| setting.section_and_key().0 == key) {
        return None;
    }
    let hint = nearest(key, SETTINGS.iter().map(|setting| setting.path)).map(ToOwned::to_owned);
    Some(ConfigError::UnknownKey { key: key.chars().take(80).collect(), file: path.to_path_buf(), hint })
}

/// The name with the fewest edits from `given`, when they are few enough to be a slip.
pub(super) fn nearest<'a>(given: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = names.map(|name| (edit_distance(given, name), name)).min()?;
    (scored.0 <= 1 + given.len() / 6).then_some(scored.1)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(100).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        parse(text, Path::new("config.json")).map(|values| values.len()).expect_err("must be refused").to_string()
    }

    #[test]
    fn the_guides_example_is_accepted_as_it_stands() {
        let text = r#"{
            "gpu": {"enabled": true, "device": "auto", "backend": "metal", "layers_to_gpu": 40, "context_size": 2048,
                    "max_memory_mb": 4096, "fallback_to_cpu": true},
            "performance": {"threads": 4, "batch_size": 1, "token_buffer": 32, "cache_size_mb": 512}
        }"#;
        assert_eq!(parse(text, Path::new("config.json")).unwrap().len(), 11);
    }

    #[test]
    fn an_error_names_the_key_the_file_and_what_is_allowed() {
        assert_eq!(
            message(r#"{"gpu": {"layers_to_gpu": "forty"}}"#),
            "`gpu.layers_to_gpu` in config.json is `\"forty\"`: it must be a whole number from 0 to 10000, or `auto`, or `-1`, or `all`"
        );
        assert_eq!(
            message(r#"{"gpu": {"layer_to_gpu": 40}}"#),
            "unknown setting `gpu.layer_to_gpu` in config.json; did you mean `gpu.layers_to_gpu`?"
        );
        assert_eq!(message("[]"), "cannot use the config file config.json: it is not a JSON object");
        assert!(message(r#"{"gpu": 1}"#).ends_with("`gpu` must be an object"));
        assert!(message("{").contains("EOF while parsing"));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\u{feff}{\"gpu\": {\"layers_to_gpu\": 4}}").unwrap();
        assert_eq!(read(Some(file.path()), true).unwrap().len(), 1);
    }

    #[test]
    fn a_secret_is_not_repeated_in_an_error() {
        let message = message(r#"{"server": {"api_keys": {"sk-secret": 1}}}"#);
        assert!(!message.contains("sk-secret"), "{message}");
    }
}
