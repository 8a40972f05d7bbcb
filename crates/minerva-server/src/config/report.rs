//! What `minerva config` prints: each setting, its value, and where it came from; or the reference of all settings.

use std::fmt::Write as _;
use std::path::PathBuf;

use figment::Figment;
use figment::value::Value;
use serde::Serialize;

use super::kind::Kind;
use super::settings::{Initial, Setting};
use super::{LAYER_COMMAND_LINE, LAYER_DEFAULT, LAYER_ENVIRONMENT, ReportFormat, SETTINGS, Source};

/// Every setting's value and source, in the table's order. Secrets are replaced before they get here.
#[derive(Debug)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    setting: &'static Setting,
    value: String,
    source: Source,
}

impl Report {
    pub(super) fn new(figment: &Figment) -> Self {
        let row = |setting: &'static Setting| {
            let source = match figment.find_metadata(setting.path).map(|metadata| metadata.name.as_ref()) {
                None | Some(LAYER_DEFAULT) => Source::Default,
                Some(LAYER_ENVIRONMENT) => Source::Environment(setting.env),
                Some(LAYER_COMMAND_LINE) => Source::CommandLine(setting.flag),
                Some(file) => Source::File(PathBuf::from(file)),
            };
            let value =
                figment.find_value(setting.path).map_or_else(|_| String::new(), |value| show(setting.kind, &value));
            Row { setting, value, source }
        };
        Self { rows: SETTINGS.iter().map(row).collect() }
    }

    /// Where the value of the setting at `path` came from.
    pub fn source(&self, path: &str) -> Source {
        let row = self.rows.iter().find(|row| row.setting.path == path);
        row.map_or(Source::Default, |row| row.source.clone())
    }

    /// The text of one format.
    pub fn print(&self, format: ReportFormat) -> String {
        match format {
            ReportFormat::Table => self.table(),
            ReportFormat::Json => self.json(),
            ReportFormat::Markdown => reference(),
        }
    }

    fn table(&self) -> String {
        let width = |cell: fn(&Row) -> usize| self.rows.iter().map(cell).max().unwrap_or(0);
        let (path, value) = (width(|row| row.setting.path.len()), width(|row| row.value.len()).min(40));
        let mut text = format!("{:path$}  {:value$}  source\n", "setting", "value");
        for Row { setting, value: shown, source } in &self.rows {
            let _ = writeln!(text, "{:path$}  {shown:value$}  {source}", setting.path);
        }
        text
    }

    fn json(&self) -> String {
        #[derive(Serialize)]
        struct Entry {
            setting: &'static str,
            value: String,
            source: String,
        }
        let entry = |row: &Row| {
            let Row { setting, value, source } = row;
            Entry { setting: setting.path, value: value.clone(), source: source.to_string() }
        };
        let entries: Vec<_> = self.rows.iter().map(entry).collect();
        serde_json::to_string_pretty(&entries).unwrap_or_default() + "\n"
    }
}

fn show(kind: Kind, value: &Value) -> String {
    match (kind, value) {
        (Kind::List { secret: true }, Value::Array(_, keys)) if keys.is_empty() => "none".to_owned(),
        (Kind::List { secret: true }, Value::Array(_, keys)) => format!("({} hidden)", keys.len()),
        (Kind::List { .. }, Value::Array(_, items)) if items.is_empty() => "none".to_owned(),
        (_, Value::Array(_, items)) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
        (Kind::Megabytes { .. }, Value::Num(..)) => {
            value.to_u128().map_or_else(String::new, |bytes| format!("{} MiB", bytes >> 20))
        }
        (_, Value::String(_, text)) => text.clone(),
        (_, Value::Bool(_, value)) => value.to_string(),
        (_, Value::Num(_, number)) => {
            number.to_u128().map_or_else(|| number.to_f64().unwrap_or_default().to_string(), |n| n.to_string())
        }
        (Kind::Text, Value::Empty(..)) => "none".to_owned(),
        (Kind::Uint { words, .. }, Value::Empty(..)) => {
            words.iter().find(|(_, number)| number.is_none()).map_or("auto", |(word, _)| word).to_owned()
        }
        (_, Value::Empty(..)) => "auto".to_owned(),
        (_, Value::Char(..) | Value::Dict(..)) => String::new(),
    }
}

/// docs/configuration.md, from the table alone.
pub fn reference() -> String {
    let mut text = INTRODUCTION.to_owned();
    let mut last_section = "";
    for setting in SETTINGS {
        let (section, key) = setting.section_and_key();
        if section != last_section {
            let _ = write!(text, "\n## `{section}`\n");
            last_section = section;
        }
        let flags = setting.flags().iter().map(|flag| format!("`{flag}`")).collect::<Vec<_>>().join(", ");
        let _ = write!(text, "\n### `{key}`\n\n{}\n\n", setting.help);
        let _ = writeln!(text, "- Value: {}", setting.kind.allowed());
        let _ = writeln!(text, "- Default: {}", default_text(setting));
        let _ = writeln!(text, "- Variable: `{}`", setting.env);
        let _ = writeln!(text, "- Flags: {flags}");
    }
    text
}

const INTRODUCTION: &str = "\
# Configuration

<!-- Printed by `minerva config --markdown` from the table in crates/minerva-server/src/config/settings.rs: edit that. -->

Every setting can be written in four places; a later one wins over an earlier one:

1. the default;
2. the config file, `~/.minerva/config.json` (another one: `--config FILE` or `MINERVA_CONFIG`), in JSON with the sections
   below: `{\"gpu\": {\"device\": \"auto\", \"layers_to_gpu\": 40}}`;
3. an environment variable;
4. a flag on the command line. llama-server's usual flags mean here what they mean there.

`minerva config` prints each value and where it came from. A value that is not allowed, and an unknown key or flag, is an
error that names the place, with exit code 2; an unknown variable that begins with `MINERVA_` is a line in the log. What is
logged is set by `RUST_LOG` (`RUST_LOG=debug minerva …`); llama.cpp's own lines are shown from warnings up unless they are asked
for by name (`RUST_LOG=debug,llama.cpp=debug,ggml=debug`). Prompts and answers are never logged.

A second SIGTERM or SIGINT ends the server at once, with exit code 143 or 130.
";

/// Without a value these do nothing.
const OFF_UNLESS_SET: [&str; 2] = ["model.simulate", "performance.cache_disk_size_mb"];

fn default_text(setting: &Setting) -> String {
    match setting.initial {
        Initial::Unset if matches!(setting.kind, Kind::Text) => "none".to_owned(),
        Initial::Unset => format!("`{}`", if OFF_UNLESS_SET.contains(&setting.path) { "off" } else { "auto" }),
        Initial::Bool(value) => format!("`{value}`"),
        Initial::Uint(value) => format!("`{value}`"),
        Initial::Seconds(value) | Initial::Share(value) => format!("`{value}`"),
        Initial::Text(value) => format!("`{value}`"),
        Initial::Empty => "none".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Invocation, load};
    use super::*;

    #[test]
    fn the_strongest_source_wins_and_is_named() {
        let directory = std::env::temp_dir().join(format!("minerva-report-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let file = directory.join("config.json");
        std::fs::write(&file, r#"{"gpu": {"layers_to_gpu": 1, "context_size": 1024}, "server": {"port": 1}}"#).unwrap();
        let line = ["minerva", "--port", "3"].map(std::ffi::OsString::from);
        let mut invocation = Invocation::parse(super::super::Program::Minerva, line).unwrap();
        invocation.config_file = Some(file.clone());
        let vars = [("MINERVA_GPU_LAYERS", "2"), ("MINERVA_PORT", "2"), ("MINERVA_API_KEY", "sk-1")];
        let loaded = load(&invocation, vars.map(|(k, v)| (k.to_owned(), v.to_owned()))).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();

        let report = &loaded.report;
        assert_eq!(report.source("server.port"), Source::CommandLine("port"));
        assert_eq!(report.source("gpu.layers_to_gpu"), Source::Environment("MINERVA_GPU_LAYERS"));
        assert_eq!(report.source("gpu.context_size"), Source::File(file));
        assert_eq!(report.source("gpu.device"), Source::Default);
        let gpu = &loaded.config.gpu;
        assert_eq!((loaded.config.server.port, gpu.layers_to_gpu, gpu.context_size), (3, Some(2), Some(1024)));
        let table = report.print(ReportFormat::Table);
        assert!(table.contains("(1 hidden)") && !table.contains("sk-1"), "{table}");
        assert!(!report.print(ReportFormat::Json).contains("sk-1"));
    }

    #[test]
    fn the_reference_has_every_setting_with_its_default() {
        let text = reference();
        for setting in SETTINGS {
            assert!(text.contains(setting.env) && text.contains(setting.help), "{}", setting.path);
        }
    }
}
