//! Who is measured: a server that runs already, one that this run starts, or the engine itself.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Map, Value, json};

use super::answer::Sample;
use super::client::Client;
use super::direct::EngineProcess;
use super::drive;
use super::footprint::{Footprint, private_mib};
use super::http::HttpClient;
use super::process::ServerProcess;
use super::workload::Round;
use crate::machine::OthersWatch;

/// How long a server may take to free what a finished round used, at least and at most.
const SETTLE: Duration = Duration::from_secs(1);
const SETTLE_LIMIT: Duration = Duration::from_secs(15);

/// Between two readings of a server's memory.
const MEMORY_PERIOD: Duration = Duration::from_secs(1);

/// One side of the comparison.
pub(super) struct Contender {
    /// `ours`, `peer` or `engine`.
    pub(super) name: &'static str,
    /// Where it runs and what it says about itself, in one line.
    pub(super) line: String,
    /// The same in full.
    pub(super) about: Value,
    how: How,
}

enum How {
    Server {
        client: Client,
        http: HttpClient,
        pid: Option<u32>,
        /// Keeps a server alive that this run has started.
        _process: Option<ServerProcess>,
    },
    Engine(EngineProcess),
}

impl Contender {
    /// A server at a URL, `process` if this run has started it.
    pub(super) async fn server(
        name: &'static str,
        http: HttpClient,
        model: Option<String>,
        pid: Option<u32>,
        process: Option<ServerProcess>,
    ) -> anyhow::Result<Self> {
        let mut about = Map::new();
        for path in ["/v1/models", "/v1/status", "/props"] {
            if let Ok((status, body)) = http.get(path).await
                && status.is_success()
                && let Ok(json) = serde_json::from_str::<Value>(&body)
            {
                about.insert(path.to_owned(), json);
            }
        }
        let about = Value::Object(about);
        let first = || about.pointer("/~1v1~1models/data/0/id")?.as_str().map(str::to_owned);
        let Some(model) = model.or_else(first) else {
            bail!("{name}: {} does not answer /v1/models with a model", http.url);
        };
        let mut line = format!("{} model {model}", http.url);
        if let Some(process) = &process {
            line = format!("`{}`", process.line);
        }
        for (label, pointer) in SHOWN {
            if let Some(value) = about.pointer(pointer).filter(|value| !value.is_null()) {
                let _ = write!(line, ", {label} {}", value.to_string().trim_matches('"'));
            }
        }
        let client = Client::Http { http: http.clone(), model };
        Ok(Self { name, line, about, how: How::Server { client, http, pid, _process: process } })
    }

    /// The engine in a process of its own.
    pub(super) fn engine(config: &minerva_engine::EngineConfig) -> anyhow::Result<Self> {
        let process = EngineProcess::start(config)?;
        let number = |key: &str| process.about.pointer(&format!("/0/{key}")).map_or_else(String::new, Value::to_string);
        let line = format!(
            "minerva-engine in a process of its own, {} sequences, {} cells, {} threads",
            number("n_seq_max"),
            number("n_cells"),
            number("placement/n_threads"),
        );
        let about = json!({ "info": process.about, "config": config });
        Ok(Self { name: "engine", line, about, how: How::Engine(process) })
    }

    /// Runs one round, with what the process holds before and after it.
    pub(super) async fn run(&mut self, round: Round, timeout: Duration) -> anyhow::Result<Sample> {
        let name = self.name;
        let before = self.footprint().await;
        let watch = OthersWatch::start(self.pid());
        let mut memory = Vec::new();
        let sample = match &mut self.how {
            How::Server { client, pid, .. } => tokio::select! {
                sample = drive::run(client, round, timeout) => sample,
                never = watch_memory(*pid, &mut memory) => match never {},
            },
            // There, asking and computing share a process.
            How::Engine(process) => process.run(round, timeout).map(|sample| Sample { load_cpu_ms: None, ..sample }),
        };
        let others_cores = watch.and_then(|watch| watch.cores());
        let mut sample = sample.with_context(|| format!("{name}, {}", round.workload.name()))?;
        (sample.others_cores, sample.memory, sample.before) = (others_cores, memory, Some(before));
        let began = Instant::now();
        loop {
            tokio::time::sleep(SETTLE).await;
            let after = self.footprint().await;
            let is_idle = after.left_over().is_none_or(|left| left == 0.0);
            sample.after = Some(after);
            if is_idle || began.elapsed() > SETTLE_LIMIT {
                return Ok(sample);
            }
        }
    }

    /// Cells and sequences of a server that says so.
    pub(super) fn sizes(&self) -> Option<(u32, u32)> {
        let number = |pointer: &str| u32::try_from(self.about.pointer(pointer)?.as_u64()?).ok();
        let ours = number("/~1v1~1status/model/n_cells").zip(number("/~1v1~1status/model/n_seq_max"));
        ours.or_else(|| {
            let sequences = number("/~1props/total_slots")?;
            let per_sequence = number("/~1props/default_generation_settings/n_ctx")?;
            Some((per_sequence.checked_mul(sequences)?, sequences))
        })
    }

    fn pid(&self) -> Option<u32> {
        match &self.how {
            How::Server { pid, .. } => *pid,
            How::Engine(process) => Some(process.pid()),
        }
    }

    async fn footprint(&self) -> Footprint {
        match &self.how {
            How::Server { http, .. } => {
                let metrics = http.get("/metrics").await.ok().filter(|(status, _)| status.is_success());
                Footprint::of(self.pid(), &metrics.map(|(_, body)| body).unwrap_or_default())
            }
            How::Engine(_) => Footprint::of(self.pid(), ""),
        }
    }
}

/// Notes the private memory of a process until this is dropped.
async fn watch_memory(pid: Option<u32>, readings: &mut Vec<(f64, f64)>) -> Infallible {
    let began = Instant::now();
    loop {
        if let Some(mib) = pid.and_then(private_mib) {
            readings.push((began.elapsed().as_secs_f64(), mib));
        }
        tokio::time::sleep(MEMORY_PERIOD).await;
    }
}

/// Parts of the answers that tell one build and its settings from another: (label, JSON pointer). What a server does not
/// have is left out; the JSON report has everything.
const SHOWN: [(&str, &str); 14] = [
    ("build", "/~1props/build_info"),
    ("slots", "/~1props/total_slots"),
    ("tokens per slot", "/~1props/default_generation_settings/n_ctx"),
    ("weights", "/~1props/model_ftype"),
    ("version", "/~1v1~1status/build/version"),
    ("llama.cpp", "/~1v1~1status/build/llama_cpp"),
    ("device", "/~1v1~1status/model/placement/device"),
    ("threads", "/~1v1~1status/model/placement/n_threads"),
    ("flash attention", "/~1v1~1status/model/placement/flash_attention"),
    ("KV type", "/~1v1~1status/model/placement/kv_type"),
    ("extra buffers", "/~1v1~1status/model/placement/extra_buffers"),
    ("sequences", "/~1v1~1status/model/n_seq_max"),
    ("cells", "/~1v1~1status/model/n_cells"),
    ("compiler", "/~1v1~1status/build/compiler"),
];
