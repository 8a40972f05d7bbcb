//! The command line, built from the table of settings.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};
use minerva_engine::ProjectorConfig;
use minerva_gpu::plan::PlanMachine;

use super::kind::Kind;
use super::settings::Setting;
use super::{ConfigError, SETTINGS, Values};

/// Which binary reads its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `minerva-server`: serves, nothing else.
    Server,
    /// `minerva`: subcommands; without one it serves.
    Minerva,
}

/// The subcommand that is no server: [`rpc_worker`](crate::rpc_worker) reads its arguments, which share names with settings.
pub(crate) const RPC_WORKER: &str = "rpc-worker";

/// The hidden subcommand of both programs: the child that tries the devices ([`probing`](crate::probing)).
pub(crate) const PROBE: &str = "__probe";

/// What the command line asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Action {
    /// Load the model and answer requests.
    #[default]
    Serve,
    /// Print every setting and its source.
    Config(ReportFormat),
    /// Print what is known about devices, memory and the build (`--gpu=debug`).
    Diagnose,
    /// Try everything anew and print what works and what to do about the rest (`minerva doctor`).
    Doctor,
    /// Print what the model will take, and where, without loading it (`minerva plan`).
    Plan {
        /// A machine that does not exist, in place of this one.
        machine: Option<PlanMachine>,
        /// A projector to leave room for.
        projector: Option<ProjectorConfig>,
        /// As JSON.
        json: bool,
    },
    /// Measure the open settings and print what was tried (`minerva tune`).
    Tune {
        /// As JSON.
        json: bool,
    },
}

/// How settings are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReportFormat {
    /// A table for people.
    #[default]
    Table,
    /// Name, value and source of each setting.
    Json,
    /// The reference, without values of this machine: docs/configuration.md.
    Markdown,
}

/// A parsed command line.
#[derive(Debug, Clone, Default)]
pub struct Invocation {
    /// What to do.
    pub action: Action,
    /// `--config FILE`.
    pub config_file: Option<PathBuf>,
    /// The settings given as flags.
    pub(crate) values: Values,
}

impl Invocation {
    /// Parses the arguments, the program's name first.
    ///
    /// # Errors
    /// clap's text (help and version come this way too), or a value that its setting does not allow.
    pub fn parse(program: Program, args: impl IntoIterator<Item = OsString>) -> Result<Self, ConfigError> {
        let matches = command(program).try_get_matches_from(expand_dashes(args))?;
        let mut action = Action::Serve;
        let mut model = None;
        let mut matches = &matches;
        if let Some((name, inner)) = matches.subcommand() {
            if name == RPC_WORKER {
                let text = format!("`{name}` has flags of its own and comes first: see `minerva {name} --help`");
                return Err(command(program).error(clap::error::ErrorKind::ArgumentConflict, text).into());
            }
            if name == "config" {
                action = Action::Config(match (inner.get_flag("json"), inner.get_flag("markdown")) {
                    (true, _) => ReportFormat::Json,
                    (_, true) => ReportFormat::Markdown,
                    _ => ReportFormat::Table,
                });
            }
            if name == "doctor" {
                action = Action::Doctor;
            }
            if name == "plan" {
                action = Action::Plan { machine: None, projector: projector(inner), json: inner.get_flag("json") };
                model = inner.get_one::<String>("model").cloned();
            }
            if name == "tune" {
                action = Action::Tune { json: inner.get_flag("json") };
                model = inner.get_one::<String>("model").cloned();
            }
            matches = inner; // global arguments are visible from the inside, wherever they were written
        }
        let mut invocation =
            Self { action, config_file: matches.get_one::<PathBuf>("config-file").cloned(), values: Values::new() };
        for setting in SETTINGS {
            let mut texts = given(setting, matches);
            if setting.path == "model.path" {
                texts.extend(model.take());
            }
            for text in texts {
                invocation.set(setting, &text)?;
            }
        }
        Ok(invocation)
    }

    /// Takes a flag's text; of several the last one counts.
    fn set(&mut self, setting: &'static Setting, text: &str) -> Result<(), ConfigError> {
        let is_main = setting.path == "gpu.device";
        let allowed = match (setting.kind.parse_text(text), setting.kind, &mut self.action) {
            (Ok(value), ..) => {
                self.values.push((setting, value));
                return Ok(());
            }
            (Err(_), Kind::Device, action) if is_main && text == "debug" => {
                *action = Action::Diagnose;
                return Ok(());
            }
            (Err(allowed), Kind::Device, Action::Plan { machine, .. }) if is_main => match text.parse() {
                Ok(made_up) => {
                    *machine = Some(made_up);
                    return Ok(());
                }
                Err(problem) => format!("{allowed}; as a machine, {problem}"),
            },
            (Err(allowed), ..) => allowed,
        };
        let given = if setting.kind.is_secret() { "not usable".to_owned() } else { format!("`{text}`") };
        Err(ConfigError::Value { place: format!("`--{}`", setting.flag), given, allowed })
    }
}

/// The flag's texts, the last of which counts; several of a list in one.
fn given(setting: &Setting, matches: &ArgMatches) -> Vec<String> {
    if let Some(off) = setting.off
        && matches.get_flag(off)
    {
        return vec!["false".to_owned()];
    }
    let texts: Vec<_> = matches.get_many::<String>(setting.path).into_iter().flatten().cloned().collect();
    let is_list = matches!(setting.kind, Kind::List { .. }) && !texts.is_empty();
    if is_list { vec![texts.join(",")] } else { texts }
}

fn command(program: Program) -> Command {
    let name = if program == Program::Server { "minerva-server" } else { "minerva" };
    let config_file =
        Arg::new("config-file").long("config").value_name("FILE").value_parser(clap::value_parser!(PathBuf));
    let mut command = Command::new(name)
        .version(env!("CARGO_PKG_VERSION"))
        .about("Serves a GGUF language model through llama.cpp over an OpenAI-compatible HTTP API")
        .args_override_self(true)
        .arg(config_file.global(true).help("The config file [env: MINERVA_CONFIG] [default: ~/.minerva/config.json]"))
        .args(SETTINGS.iter().flat_map(args));
    if program == Program::Minerva {
        let json = Arg::new("json").long("json").action(ArgAction::SetTrue).help("As JSON");
        let markdown = Arg::new("markdown").long("markdown").action(ArgAction::SetTrue);
        let markdown = markdown.conflicts_with("json").help("The reference of all settings: docs/configuration.md");
        command = command.subcommand(Command::new("serve").about("Serve; the same as no subcommand")).subcommand(
            Command::new("config")
                .about("Print each setting's value and where it came from")
                .args([json.clone(), markdown]),
        );
        let model = Arg::new("model").value_name("MODEL").conflicts_with("model.path");
        let model = model.help("The GGUF file, the same as --model");
        let about = "Say what a model will take, and where, without loading it: on this machine, as it would be served with \
            the same flags, or with `--device` on one that does not exist";
        let plan = Command::new("plan").about(about).args([model.clone(), json.clone()]).args(projector_args());
        command = command.subcommand(plan);
        let about = "Measure the settings that no flag fixes and print what was tried; a server with the same flags then uses the \
            result";
        command = command.subcommand(Command::new("tune").about(about).args([model, json]));
        command = command.subcommand(
            Command::new("doctor").about("Try every device and say what works, what does not, and what to do about it"),
        );
        command = command.subcommand(Command::new(RPC_WORKER).about("Lend this machine's devices to another Minerva"));
    }
    command
}

/// What `plan` alone takes: the server loads no projectors yet.
fn projector_args() -> [Arg; 3] {
    let file = Arg::new("mmproj").long("mmproj").value_name("FILE").value_parser(clap::value_parser!(PathBuf));
    let host = Arg::new("no-mmproj-offload").long("no-mmproj-offload").action(ArgAction::SetTrue).requires("mmproj");
    let tokens = Arg::new("image-max-tokens").long("image-max-tokens").value_name("N").requires("mmproj");
    [
        file.help("Leave room for this projector of images or sound. The server does not load projectors yet"),
        host.help("The projector goes onto the host"),
        tokens
            .value_parser(clap::value_parser!(u32).range(1..))
            .help("The most tokens of one picture, for projectors that have no fixed size"),
    ]
}

fn projector(plan: &ArgMatches) -> Option<ProjectorConfig> {
    Some(ProjectorConfig {
        path: plan.get_one::<PathBuf>("mmproj")?.clone(),
        on_host: plan.get_flag("no-mmproj-offload"),
        image_max_tokens: plan.get_one::<u32>("image-max-tokens").copied(),
    })
}

fn args(setting: &'static Setting) -> impl Iterator<Item = Arg> {
    let (section, key) = setting.section_and_key();
    let heading = match section {
        "model" => "Model",
        "gpu" => "Device",
        "performance" => "Speed and memory",
        "draft" => "Draft model",
        _ => "Server",
    };
    let words = if let Kind::OneOf(words) = setting.kind { format!(" [{}]", words.join("|")) } else { String::new() };
    let dash = setting.dash.map_or_else(String::new, |dash| format!(" [also: -{dash}]"));
    let mut arg = Arg::new(setting.path)
        .long(setting.flag)
        .visible_aliases(setting.aliases.iter().copied())
        .aliases(setting.dash)
        .global(true)
        .help_heading(heading)
        .help(format!("{}{words}{dash} [env: {}]", setting.help, setting.env))
        .hide_short_help(section == "server" && setting.path.ends_with("_seconds"));
    if let Some(short) = setting.short {
        arg = arg.short(short);
    }
    arg = match setting.kind {
        Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true").value_name("BOOL"),
        Kind::List { .. } => arg.action(ArgAction::Append).value_name("TEXT"),
        Kind::Uint { .. } => arg.value_name("N").allow_negative_numbers(true),
        Kind::Seconds { .. } => arg.value_name("SECONDS"),
        Kind::Share => arg.value_name("SHARE"),
        Kind::Megabytes { .. } | Kind::Bytes { .. } => arg.value_name("SIZE"),
        Kind::Device => arg.action(ArgAction::Append).value_name("DEVICE"), // `plan` takes a machine beside it
        Kind::OneOf(_) => arg.value_name("WORD"),
        Kind::Text if key.ends_with("path") || key.ends_with("file") => arg.value_name("FILE"),
        Kind::Text => arg.value_name("TEXT"),
    };
    let off = setting.off.map(|off| {
        let help = format!("The same as --{}=false", setting.flag);
        let off = Arg::new(off).long(off).action(ArgAction::SetTrue).global(true).help_heading(heading).help(help);
        off.overrides_with(setting.path)
    });
    if setting.off.is_some() {
        arg = arg.overrides_with(setting.off.unwrap_or_default());
    }
    std::iter::once(arg).chain(off)
}

/// Turns llama-server's `-ngl 5` and `-ngl=5` into `--ngl 5` and `--ngl=5`: clap would read `-n -g -l`.
fn expand_dashes(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut is_literal = false;
    let expand = |arg: OsString| {
        let Some(text) = arg.to_str() else { return arg };
        is_literal |= text == "--";
        let Some(name) = text.strip_prefix('-').filter(|_| !is_literal) else { return arg };
        let name = name.split_once('=').map_or(name, |(name, _)| name);
        let is_ours = SETTINGS.iter().any(|setting| setting.dash == Some(name));
        if is_ours { format!("-{text}").into() } else { arg }
    };
    args.into_iter().map(expand).collect()
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::*;

    fn parse(line: &str) -> Result<Invocation, ConfigError> {
        Invocation::parse(Program::Minerva, line.split(' ').map(OsString::from))
    }

    #[test]
    fn the_command_is_one_that_clap_finds_consistent() {
        command(Program::Minerva).debug_assert();
        command(Program::Server).debug_assert();
    }

    #[test]
    fn the_usual_flags_of_llama_server_work() {
        let line = "minerva -m a.gguf -c 8192 --ctx 1024 -ngl 40 -np=8 -t 4 -tb 6 -b 1024 -ub=256 -fa on -ctk q8_0 -ctv q8_0 \
                    --host ::1 --port 9 --api-key one --api-key two,three --no-mmap -kvu";
        let config = load(&parse(line).unwrap(), []).unwrap().config;
        let (gpu, performance) = (&config.gpu, &config.performance);
        assert_eq!((gpu.layers_to_gpu, gpu.context_size, performance.kv_cells), (Some(40), Some(1024), Some(8192)));
        assert_eq!(
            (performance.batch_size, performance.threads, performance.threads_batch),
            (Some(8), Some(4), Some(6))
        );
        assert_eq!((performance.n_batch, performance.n_ubatch, performance.kv_unified), (1024, Some(256), true));
        assert!(!performance.mmap);
        assert_eq!(config.server.api_keys, ["one", "two", "three"]);
        assert_eq!(config.address().unwrap().to_string(), "[::1]:9");
    }

    #[test]
    fn minus_one_all_and_auto_are_layers_too_and_the_last_flag_wins() {
        let layers = |line: &str| load(&parse(line).unwrap(), []).unwrap().config.gpu.layers_to_gpu;
        assert_eq!(layers("minerva -ngl 3 -ngl -1"), None);
        assert_eq!(layers("minerva -ngl all"), Some(10_000));
        assert_eq!(layers("minerva --n-gpu-layers=5 -ngl=7"), Some(7));
    }

    #[test]
    fn a_wrong_value_names_the_flag_and_the_limit() {
        assert_eq!(
            parse("minerva --port 70000").unwrap_err().to_string(),
            "`--port` is `70000`: it must be a whole number from 0 to 65535"
        );
        assert!(parse("minerva --prot 1").unwrap_err().to_string().contains("--port"));
    }

    #[test]
    fn gpu_debug_is_an_action_and_flags_may_stand_on_either_side_of_a_subcommand() {
        assert_eq!(parse("minerva --gpu=debug").unwrap().action, Action::Diagnose);
        assert_eq!(parse("minerva doctor --gpu=cuda").unwrap().action, Action::Doctor);
        let before = parse("minerva --port 1 config --json").unwrap();
        assert_eq!((before.action, before.values.len()), (Action::Config(ReportFormat::Json), 1));
        let after = parse("minerva serve --port 1").unwrap();
        assert_eq!((after.action, after.values.len()), (Action::Serve, 1));
    }

    #[test]
    fn plan_takes_the_flags_of_the_server_and_a_machine_beside_the_device() {
        let plan = |line: &str| {
            let invocation = parse(line).unwrap();
            let config = load(&invocation, []).unwrap().config;
            (invocation.action, config.model.path, config.gpu.device)
        };
        let path = |path: &str| Some(PathBuf::from(path));
        let (machine, json) = ("cuda:24GiB,ram:64GiB".parse().ok(), true);
        let made_up = (Action::Plan { machine, projector: None, json }, path("a.gguf"), "cpu".to_owned());
        assert_eq!(plan("minerva plan a.gguf --device cuda:24GiB,ram:64GiB --gpu=cpu --json"), made_up);
        assert_eq!(plan("minerva plan --json --gpu cpu --port 9 -m a.gguf --device=cuda:24GiB,ram:64GiB"), made_up);
        let action = Action::Plan { machine: None, projector: None, json: false };
        let here = (action, path("a.gguf"), "cuda:1".to_owned());
        assert_eq!(plan("minerva --np 4 plan --device cuda:1 a.gguf"), here);
        assert!(parse("minerva plan a.gguf -m b.gguf").unwrap_err().to_string().contains("cannot be used with"));
        assert!(parse("minerva plan --device cuda:24GiB").unwrap_err().to_string().contains("as a machine"));
        assert!(parse("minerva --device cuda:24GiB,ram:64GiB").is_err(), "only for a plan");
    }

    #[test]
    fn only_a_plan_takes_a_projector() {
        let projector = |line: &str| match parse(line).unwrap().action {
            Action::Plan { projector, .. } => projector,
            action => panic!("{action:?}"),
        };
        let config = |on_host, image_max_tokens| {
            Some(ProjectorConfig { path: PathBuf::from("p.gguf"), on_host, image_max_tokens })
        };
        assert_eq!(projector("minerva plan a.gguf --mmproj p.gguf"), config(false, None));
        let line = "minerva plan a.gguf --mmproj p.gguf --no-mmproj-offload --image-max-tokens 256";
        assert_eq!(projector(line), config(true, Some(256)));
        assert_eq!(projector("minerva plan a.gguf"), None);
        assert!(parse("minerva plan a.gguf --no-mmproj-offload").is_err(), "of what?");
        assert!(parse("minerva --mmproj p.gguf").is_err(), "the server loads none");
    }

    #[test]
    fn the_flags_of_the_server_are_not_for_the_rpc_worker() {
        assert!(parse("minerva --port 1 rpc-worker").unwrap_err().to_string().contains("comes first"));
    }

    #[test]
    fn switches_take_a_bare_flag_a_value_or_their_opposite() {
        let fallback = |line: &str| load(&parse(line).unwrap(), []).unwrap().config.gpu.fallback_to_cpu;
        assert!(!fallback("minerva --no-fallback"));
        assert!(!fallback("minerva --cpu-fallback=off"));
        assert!(fallback("minerva --cpu-fallback"));
        assert!(fallback("minerva --no-fallback --cpu-fallback"), "the last one wins");
    }
}
