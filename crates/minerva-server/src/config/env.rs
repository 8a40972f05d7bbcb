//! The environment: one variable per setting.

use std::path::{Path, PathBuf};

use super::{ConfigError, SETTINGS, Values};

/// What the environment says.
#[derive(Debug, Default)]
pub(super) struct Environment {
    pub(super) values: Values,
    /// `MINERVA_CONFIG`.
    pub(super) config_file: Option<PathBuf>,
    pub(super) home: Option<PathBuf>,
    /// The model that `cargo xtask setup` fetched, as it tells cargo: `cargo run -p minerva-server` then needs no flag.
    pub(super) fetched_model: Values,
    pub(super) warnings: Vec<String>,
}

/// Reads `vars`. An empty variable counts as unset, as in a container file that passes everything through.
pub(super) fn read(vars: impl IntoIterator<Item = (String, String)>) -> Result<Environment, ConfigError> {
    let mut environment = Environment::default();
    for (name, text) in vars {
        if text.is_empty() {
            continue;
        }
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.env == name) {
            let value = setting.kind.parse_text(&text).map_err(|allowed| ConfigError::Value {
                place: format!("`{name}`"),
                given: if setting.kind.is_secret() { "not usable".to_owned() } else { format!("`{text}`") },
                allowed,
            })?;
            environment.values.push((setting, value));
        } else if name == "MINERVA_CONFIG" {
            environment.config_file = Some(PathBuf::from(text));
        } else if name == FETCHED_MODEL {
            let setting = SETTINGS.iter().find(|setting| setting.path == "model.path");
            let value =
                setting.filter(|_| Path::new(&text).is_file()).and_then(|s| Some((s, s.kind.parse_text(&text).ok()?)));
            environment.fetched_model.extend(value);
        } else if name == HOME {
            environment.home = Some(PathBuf::from(text));
        } else if name.starts_with("MINERVA_") && !OF_OTHERS.contains(&name.as_str()) {
            // Not an error: others may have variables with our prefix too.
            let hint = super::file::nearest(&name, SETTINGS.iter().map(|setting| setting.env));
            let hint = hint.map_or_else(String::new, |hint| format!("; did you mean `{hint}`?"));
            environment.warnings.push(format!("`{name}` is no setting of Minerva and is ignored{hint}"));
        }
    }
    Ok(environment)
}

/// Variables of minerva-llama, and of our own tools and tests.
const OF_OTHERS: &[&str] =
    &["MINERVA_BACKENDS_DIR", "MINERVA_CACHE_DIR", "MINERVA_URL", crate::probing::KNOWN_PROBLEMS];

/// Set by target/setup.toml for everything that cargo starts.
const FETCHED_MODEL: &str = "MINERVA_TEST_MODEL";

const HOME: &str = if cfg!(windows) { "USERPROFILE" } else { "HOME" };
