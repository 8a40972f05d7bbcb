//! Every setting, where it may be written, and which source wins.
//!
//! Sources, weakest first: the defaults, `~/.minerva/config.json`, `MINERVA_…` variables, the command line. [`SETTINGS`]
//! is the one table behind all four, behind `--help` and behind `minerva config`; each source is checked value by value
//! against it, so an error names the file key, variable or flag. figment merges the layers and remembers who won.
//! Start with [`SETTINGS`]; [`load`] puts it together.

mod cli;
mod env;
mod file;
mod kind;
mod report;
mod settings;
mod typed;

use std::path::PathBuf;

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

pub use cli::{Action, Invocation, Program, ReportFormat};
pub(crate) use cli::{PROBE, RPC_WORKER};
pub use report::{Report, reference};
pub use settings::{SETTINGS, Setting};
pub use typed::{Config, GpuSettings, ModelSettings, PerformanceSettings, Seconds, ServerSettings};

/// Why the configuration is not usable. Programs exit with code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// clap's own text, help and version included.
    #[error(transparent)]
    CommandLine(#[from] clap::Error),
    /// A value is not of its setting's kind or outside its range. Secrets are not repeated.
    #[error("{place} is {given}: it must be {allowed}")]
    Value {
        /// The flag, variable or file key.
        place: String,
        /// The value as it was written.
        given: String,
        /// What would have been right.
        allowed: String,
    },
    /// A key of the config file is none of ours.
    #[error("unknown setting `{key}` in {}{}", file.display(), hint.as_ref().map_or_else(String::new, |hint| format!("; did you mean `{hint}`?")))]
    UnknownKey {
        /// The key with its section.
        key: String,
        /// The file.
        file: PathBuf,
        /// The setting with the nearest name, when one is near.
        hint: Option<String>,
    },
    /// A file that was asked for cannot be read or parsed.
    #[error("cannot use {what} {}: {problem}", file.display())]
    File {
        /// What the file is for.
        what: &'static str,
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Two settings that are fine by themselves do not go together.
    #[error("{0}")]
    Conflict(String),
    /// The merged values do not fit the typed configuration: the table and [`Config`] disagree, which is our bug.
    #[error("the settings table does not match the configuration: {0}")]
    Internal(#[from] Box<figment::Error>),
}

/// The error of a line in a file that was asked for.
pub(crate) fn in_line(what: &'static str, file: &std::path::Path, line: usize, problem: &str) -> ConfigError {
    ConfigError::File { what, file: file.to_path_buf(), problem: format!("line {line}: {problem}") }
}

/// Where the winning value of a setting was written, weakest first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Nobody set it.
    Default,
    /// The config file.
    File(PathBuf),
    /// An environment variable.
    Environment(&'static str),
    /// A flag.
    CommandLine(&'static str),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(name) => f.write_str(name),
            Self::CommandLine(flag) => write!(f, "--{flag}"),
        }
    }
}

/// The merged configuration and where each value came from.
#[derive(Debug)]
pub struct Loaded {
    /// The typed values.
    pub config: Config,
    /// Each setting's value and source, for `minerva config`.
    pub report: Report,
    /// Things worth a WARN line once logging is up.
    pub warnings: Vec<String>,
}

/// Merges every source. `vars` is the process environment, passed in so that tests need not touch it.
///
/// # Errors
/// [`ConfigError`], naming the source of the value that is wrong.
pub fn load(invocation: &Invocation, vars: impl IntoIterator<Item = (String, String)>) -> Result<Loaded, ConfigError> {
    let environment = env::read(vars)?;
    let (path, is_explicit) = match invocation.config_file.clone().or(environment.config_file) {
        Some(path) => (Some(path), true),
        None => (environment.home.map(|home| home.join(".minerva").join("config.json")), false),
    };
    let file = file::read(path.as_deref(), is_explicit)?;
    let file_name = path.map(|path| path.display().to_string()).unwrap_or_default();
    let figment = Figment::new()
        .merge(Layer::new(LAYER_DEFAULT, settings::defaults()))
        .merge(Layer::new(LAYER_DEFAULT, environment.fetched_model))
        .merge(Layer::new(&file_name, file))
        .merge(Layer::new(LAYER_ENVIRONMENT, environment.values))
        .merge(Layer::new(LAYER_COMMAND_LINE, invocation.values.clone()));
    let report = Report::new(&figment);
    let mut config: Config = figment.extract().map_err(Box::new)?;
    config.resolve(&report)?;
    let mut warnings = environment.warnings;
    warnings.extend(config.warnings());
    Ok(Loaded { config, report, warnings })
}

const LAYER_DEFAULT: &str = "default";
const LAYER_ENVIRONMENT: &str = "environment";
const LAYER_COMMAND_LINE: &str = "command line";

/// Checked values by path (`gpu.device`), on their way into figment.
pub(crate) type Values = Vec<(&'static Setting, Value)>;

/// One source as figment sees it.
struct Layer {
    name: String,
    dict: Dict,
}

impl Layer {
    fn new(name: &str, values: Values) -> Self {
        let mut dict = Dict::new();
        for (setting, value) in values {
            let (section, key) = setting.section_and_key();
            let section = dict.entry(section.to_owned()).or_insert_with(|| Value::from(Dict::new()));
            if let Value::Dict(_, section) = section {
                section.insert(key.to_owned(), value);
            }
        }
        Self { name: name.to_owned(), dict }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.dict.clone()))
    }
}
