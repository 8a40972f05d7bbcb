//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context as _;
use minerva_engine::EngineConfig;
use serde_json::{Value, json};

use super::gate::{self, Gate};
use super::workload::Workload;

/// Measures OpenAI-compatible servers by turns in one run: ours, a peer, and the engine without a server.
///
/// Each side is a server that runs already (--url, --peer) or one that this run starts on a free port (target/release's
/// minerva-server, --peer-server). Started sides, and the engine, get the same model and the same --threads, --slots
/// and --cells.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "bench_serve", bin_name = "cargo xtask bench-serve")]
pub struct Args {
    /// Our server, if it runs already
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// The server to compare with, if it runs already
    #[arg(long, value_name = "URL")]
    pub peer: Option<String>,
    /// Start our server from this file [default: minerva-server beside this program]
    #[arg(long, value_name = "FILE", conflicts_with = "url")]
    pub server: Option<PathBuf>,
    /// Start the peer from this file: llama-server, or what takes its flags
    #[arg(long, value_name = "FILE", conflicts_with = "peer")]
    pub peer_server: Option<PathBuf>,
    /// One more argument for our server; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub server_arg: Vec<OsString>,
    /// One more argument for the peer; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub peer_arg: Vec<OsString>,
    /// The model for everything that this run starts
    #[arg(long, value_name = "FILE", env = "MINERVA_TEST_MODEL")]
    pub model: Option<PathBuf>,
    /// Compute threads of everything that this run starts (-t)
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Sequences at once, the same (-np)
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// KV cells of all sequences together, the same (-c)
    #[arg(long, value_name = "N")]
    pub cells: Option<u32>,

    /// What to run, in this order
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["one", "eight", "thirty-two", "shared-prefix", "long-prompt-beside"])]
    pub workload: Vec<Workload>,
    /// Rounds of each workload, all contenders by turns in each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: u64,
    /// Multiplies the number of requests and the length of timed workloads
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive)]
    pub scale: f64,
    /// Which random prompts; printed, so that a run can be repeated [default: the clock]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// The longest that one request may take
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = positive)]
    pub timeout: f64,
    /// How many times the KV cells the requests of `overload` need together
    #[arg(long, value_name = "FACTOR", default_value_t = 4.0, value_parser = positive)]
    pub load: f64,
    /// Flash attention of a llama-server that this run starts; `best` tries both before each workload, one round each, and keeps
    /// the one with more tokens a second [default: the peer's]
    #[arg(long, value_enum, requires = "peer_server")]
    pub peer_fa: Option<PeerFa>,
    /// Before each round wait until the machine is busy with less than this, at most 5 minutes
    #[arg(long, value_name = "CORES", value_parser = positive)]
    pub calm: Option<f64>,
    /// Measure the engine too, in a process of its own without a server
    #[arg(long)]
    pub engine_beside: bool,
    /// Settings of that engine as JSON, over the flags above
    #[arg(long, value_name = "JSON")]
    pub engine_config: Option<String>,

    /// Write everything here, raw samples included
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the report here
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Write charts here, as SVG
    #[arg(long, value_name = "FILE")]
    pub chart: Option<PathBuf>,
    /// Exit with 1 unless it holds: `one>=1.0`, `one/engine>=0.96`, `shared-prefix.ttft-p99<=0.1`, `abort.errors<=0`; may be
    /// repeated. benches/README.md has the metrics; throughput if none is named
    #[arg(long, value_name = "GATE")]
    pub gate: Vec<Gate>,
    /// The gates that Minerva promises, of those workloads that are run, and against a peer if there is one
    #[arg(long)]
    pub promises: bool,

    /// The model's name in requests to us [default: the first of /v1/models]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// The same for the peer
    #[arg(long, value_name = "NAME")]
    pub peer_model: Option<String>,
    /// A key for our server, or two with a comma between them (fairness, canary) [default for a server that is started: two
    /// of this run's]
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    pub api_key: Vec<String>,
    /// The same for the peer
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    pub peer_api_key: Vec<String>,
    /// The process behind --url, to read its threads, files and memory
    #[arg(long, value_name = "PID", requires = "url")]
    pub pid: Option<u32>,
    /// The process behind --peer
    #[arg(long, value_name = "PID", requires = "peer")]
    pub peer_pid: Option<u32>,
    /// Be the engine's process
    #[arg(long, hide = true)]
    pub(super) engine_worker: bool,
}

/// Flash attention of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PeerFa {
    /// On.
    On,
    /// Off.
    Off,
    /// Whichever generates more tokens a second.
    Best,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "not a number above 0".to_owned())
}

impl Args {
    /// Our server's program.
    pub(super) fn server_path(&self) -> anyhow::Result<PathBuf> {
        let beside =
            || Ok(std::env::current_exe()?.with_file_name(format!("minerva-server{}", std::env::consts::EXE_SUFFIX)));
        self.server.clone().map_or_else(beside, Ok)
    }

    fn model(&self) -> anyhow::Result<&PathBuf> {
        self.model.as_ref().context("give a GGUF file with --model, or run it as `cargo xtask bench-serve`")
    }

    /// The gates of this run.
    pub(super) fn gates(&self) -> Vec<Gate> {
        let promised =
            gate::promises().into_iter().filter(|gate| self.promises && self.workload.contains(&gate.workload));
        self.gate.iter().cloned().chain(promised).collect()
    }

    /// llama-server's flags, which ours takes too.
    pub(super) fn server_flags(&self, extra: &[OsString]) -> anyhow::Result<Vec<OsString>> {
        let mut flags = vec![OsString::from("-m"), self.model()?.into()];
        for (flag, value) in [("-t", self.threads), ("-np", self.slots), ("-c", self.cells)] {
            flags.extend(value.into_iter().flat_map(|value| [flag.into(), value.to_string().into()]));
        }
        flags.extend_from_slice(extra);
        Ok(flags)
    }

    /// The same settings for the engine, with `--engine-config` on top.
    pub(super) fn engine_config(&self) -> anyhow::Result<EngineConfig> {
        let mut config = json!({});
        let mut set = |key: &str, value: Value| {
            if !value.is_null() {
                config[key] = value;
            }
        };
        set("model_path", json!(self.model));
        for (key, value) in [("n_threads", self.threads), ("n_seq_max", self.slots), ("n_cells", self.cells)] {
            set(key, json!(value));
        }
        if let Some(text) = &self.engine_config {
            let own: serde_json::Map<String, Value> = serde_json::from_str(text).context("`--engine-config`")?;
            own.into_iter().for_each(|(key, value)| set(&key, value));
        }
        serde_json::from_value(config).context("`--engine-config`")
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    #[test]
    fn started_servers_and_the_engine_get_the_same_settings() {
        Args::command().debug_assert();
        let line = "x --model m.gguf --threads 2 --cells 9 --peer-arg --no-webui --engine-config {\"n_batch\":7}";
        let args = Args::parse_from(line.split(' '));
        assert_eq!(
            args.server_flags(&args.peer_arg).expect("flags"),
            ["-m", "m.gguf", "-t", "2", "-c", "9", "--no-webui"]
        );
        let config = args.engine_config().expect("a config");
        assert_eq!((config.n_threads, config.n_cells, config.n_batch, config.n_seq_max), (Some(2), Some(9), 7, None));
        assert_eq!(args.workload.len(), 5);
    }

    #[test]
    fn workloads_are_listed_with_commas() {
        let args = Args::parse_from(["x", "--workload", "abort,one", "--scale", "0.5"]);
        assert_eq!(args.workload, [Workload::Abort, Workload::One]);
        assert!(Args::try_parse_from(["x", "--scale", "0"]).is_err());
    }
}
