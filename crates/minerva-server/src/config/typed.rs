//! The configuration as the rest of the server uses it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use minerva_engine::{
    AdapterConfig, CacheIsolation, ClientSecret, DiskCache, DraftConfig, DraftingConfig, EngineConfig, FlashAttention,
    KvType, Reservation, RpcServer, Speculation, TuneConfig, TuneMode,
};
use minerva_gpu::DeviceChoice;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Report};

/// Every setting, typed; the fields are described in [`SETTINGS`](super::SETTINGS).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct Config {
    pub model: ModelSettings,
    pub gpu: GpuSettings,
    pub performance: PerformanceSettings,
    pub draft: DraftModelSettings,
    pub server: ServerSettings,
}

/// Which model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct ModelSettings {
    pub path: Option<PathBuf>,
    pub name: Option<String>,
    pub chat_template_file: Option<PathBuf>,
    pub adapters: Vec<String>,
    pub simulate: Option<u32>,
}

/// Where it runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct GpuSettings {
    pub enabled: bool,
    pub device: String,
    pub backend: String,
    pub layers_to_gpu: Option<u32>,
    pub expert_layers_on_host: Option<u32>,
    pub context_size: Option<u32>,
    /// In bytes here, whatever the unit it was written in.
    pub max_memory_mb: Option<u64>,
    pub fallback_to_cpu: bool,
    pub rpc_servers: Vec<String>,
    pub rpc_insecure: bool,
    pub probe: bool,
    pub probe_seconds: Seconds,
}

/// How fast, and with how much memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct PerformanceSettings {
    pub threads: Option<u32>,
    pub threads_batch: Option<u32>,
    pub batch_size: Option<u32>,
    pub kv_cells: Option<u32>,
    pub n_batch: u32,
    pub n_ubatch: Option<u32>,
    pub flash_attention: FlashAttention,
    pub kv_type_k: KvType,
    pub kv_type_v: KvType,
    pub kv_may_quantize: bool,
    pub kv_unified: bool,
    pub extra_buffers: bool,
    pub mmap: bool,
    pub tune: TuneMode,
    pub tune_seconds: Seconds,
    /// Not settings: what somebody set to its default wants that default, and tuning leaves it.
    #[serde(skip)]
    pub fixed_kv_types: bool,
    #[serde(skip)]
    pub fixed_kv_layout: bool,
    pub token_buffer: usize,
    /// In bytes here.
    pub cache_size_mb: Option<u64>,
    pub ctx_checkpoints: u32,
    /// In bytes here.
    pub cache_disk_size_mb: Option<u64>,
    pub cache_dir: Option<PathBuf>,
    pub warm_file: Option<PathBuf>,
    pub reserve: Reservation,
    pub cache_isolation: CacheIsolation,
    pub speculation: Speculation,
    pub trace_file: Option<PathBuf>,
    pub max_itl_ms: Option<u64>,
    pub max_queued_requests: usize,
    pub max_queued_tokens: usize,
}

/// Which model writes ahead of it, and how far.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct DraftModelSettings {
    pub path: Option<PathBuf>,
    pub device: String,
    pub layers_to_gpu: Option<u32>,
    pub kv_cells: Option<u32>,
    pub max_tokens: u32,
    pub min_tokens: u32,
    pub min_probability: f64,
}

/// How it is served.
#[derive(Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the table of settings describes each field")]
pub struct ServerSettings {
    pub host: String,
    pub port: u16,
    pub api_keys: Vec<String>,
    pub api_key_file: Option<PathBuf>,
    pub insecure: bool,
    pub accept_any_model: bool,
    pub strict: bool,
    pub allow_priority: bool,
    pub allow_origins: Vec<String>,
    pub allow_hosts: Vec<String>,
    pub grace_seconds: Seconds,
    pub max_connections: usize,
    pub max_body_bytes: usize,
    pub header_timeout_seconds: Seconds,
    pub body_timeout_seconds: Seconds,
    pub write_timeout_seconds: Seconds,
    pub idle_timeout_seconds: Seconds,
    pub ping_seconds: Seconds,
    pub step_deadline_seconds: Seconds,
    pub worker_threads: usize,
    pub log_timestamps: bool,
}

/// The keys stay out of `{:?}`, and so out of logs.
impl std::fmt::Debug for ServerSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = format!("{}:{}", self.host, self.port);
        f.debug_struct("ServerSettings")
            .field("address", &address)
            .field("n_api_keys", &self.api_keys.len())
            .finish_non_exhaustive()
    }
}

/// A time in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seconds(pub f64);

impl Seconds {
    /// The same time for tokio.
    pub fn duration(self) -> Duration {
        Duration::try_from_secs_f64(self.0).unwrap_or(Duration::MAX)
    }
}

impl Config {
    /// The defaults, as if no source said anything.
    ///
    /// # Errors
    /// None that a test of this crate would not have found.
    pub fn defaults() -> Result<Self, ConfigError> {
        Ok(super::load(&super::Invocation::default(), [])?.config)
    }

    /// Follows references between settings and checks those that depend on each other.
    pub(super) fn resolve(&mut self, report: &Report) -> Result<(), ConfigError> {
        if let Some(path) = &self.server.api_key_file {
            let keys = read_keys(path)?;
            self.server.api_keys.extend(keys);
        }
        let stronger = report.source("gpu.device") > report.source("gpu.backend");
        self.gpu.device = self.gpu.resolved_device(stronger)?;
        let is_set = |path: &str| report.source(path) != super::Source::Default;
        self.performance.fixed_kv_types = is_set("performance.kv_type_k") || is_set("performance.kv_type_v");
        self.performance.fixed_kv_layout = is_set("performance.kv_unified");
        Ok(())
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.performance.n_ubatch.is_some_and(|n| n > self.performance.n_batch) {
            warnings.push("`performance.n_ubatch` is larger than `performance.n_batch`, which bounds it".to_owned());
        }
        if self.draft.path.is_some() && !self.performance.speculation.drafts() {
            warnings.push("`performance.speculation` leaves the draft model out: it is not loaded".to_owned());
        }
        if self.performance.cache_dir.is_some() && self.disk_cache().is_none() {
            warnings.push(
                "`performance.cache_dir` is set, and `performance.cache_disk_size_mb` is not: nothing is written"
                    .to_owned(),
            );
        }
        if self.disk_cache().is_some() && self.performance.cache_size_mb == Some(0) {
            warnings.push("`performance.cache_size_mb` is 0: without host memory nothing gets to disk".to_owned());
        }
        warnings
    }

    /// The address to listen on.
    ///
    /// # Errors
    /// [`ConfigError::Conflict`] when the host is no address, or when other machines could reach a server without a key.
    pub fn address(&self) -> Result<SocketAddr, ConfigError> {
        let ip = match self.server.host.as_str() {
            "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
            "*" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            host => host.trim_matches(['[', ']']).parse().map_err(|_| {
                ConfigError::Conflict(format!("`server.host` is `{host}`: it must be an IP address or `localhost`"))
            })?,
        };
        if !ip.is_loopback() && self.server.api_keys.is_empty() && !self.server.insecure {
            return Err(ConfigError::Conflict(format!(
                "`server.host` is {ip}, which other machines can reach, and no API key is set: set one with `--api-key-file` \
                or `MINERVA_API_KEY`, listen on 127.0.0.1, or say `--insecure`"
            )));
        }
        Ok(SocketAddr::new(ip, self.server.port))
    }

    /// What the engine is told.
    ///
    /// # Errors
    /// No model, an unreadable chat template file, a draft model that is missing or whose settings contradict each other, a device that cannot be, or an RPC server on another machine without
    /// the consent to it.
    pub fn engine(&self) -> Result<EngineConfig, ConfigError> {
        let Some(path) = &self.model.path else {
            return Err(ConfigError::Conflict(
                "no model: name a GGUF file with `--model FILE`, `MINERVA_MODEL` or `model.path` in the config file \
                (`cargo xtask serve` fetches one)"
                    .to_owned(),
            ));
        };
        let chat_template = match &self.model.chat_template_file {
            Some(file) => Some(read_text(file, "the chat template file")?),
            None => None,
        };
        let (gpu, performance) = (&self.gpu, &self.performance);
        Ok(EngineConfig {
            model_path: path.clone(),
            model_name: self.model.name.clone(),
            device: self.device()?,
            rpc_servers: gpu.rpc_servers()?,
            n_gpu_layers: gpu.layers_to_gpu,
            n_expert_layers_on_host: gpu.expert_layers_on_host,
            fallback_to_cpu: gpu.fallback_to_cpu,
            memory_limit_bytes: gpu.max_memory_mb,
            context_length_tokens: gpu.context_size,
            n_cells: performance.kv_cells,
            n_seq_max: performance.batch_size,
            n_batch: performance.n_batch,
            n_ubatch: performance.n_ubatch,
            n_threads: performance.threads,
            n_threads_batch: performance.threads_batch,
            flash_attention: performance.flash_attention,
            kv_type_k: performance.kv_type_k,
            kv_type_v: performance.kv_type_v,
            kv_may_quantize: performance.kv_may_quantize,
            kv_unified: performance.kv_unified,
            use_extra_buffers: performance.extra_buffers,
            use_mmap: performance.mmap,
            max_queued_requests: performance.max_queued_requests,
            max_queued_tokens: performance.max_queued_tokens,
            max_itl_ms: performance.max_itl_ms,
            host_cache_bytes: performance.cache_size_mb,
            max_checkpoints: performance.ctx_checkpoints,
            reservation: performance.reserve,
            disk_cache: self.disk_cache(),
            cache_isolation: performance.cache_isolation,
            speculation: performance.speculation,
            draft: self.draft()?,
            drafting: self.drafting()?,
            adapters: self.model.adapters()?,
            trace_path: performance.trace_file.clone(),
            chat_template,
            tune: TuneConfig {
                mode: performance.tune,
                budget_ms: u64::try_from(performance.tune_seconds.duration().as_millis()).unwrap_or(u64::MAX),
                fixed_kv_types: performance.fixed_kv_types,
                fixed_kv_layout: performance.fixed_kv_layout,
            },
            probe: None, // only a program can be started a second time: `probing`
        })
    }

    /// The draft model, if there is one.
    fn draft(&self) -> Result<Option<DraftConfig>, ConfigError> {
        let draft = &self.draft;
        let Some(path) = &draft.path else {
            return Ok(None);
        };
        let wrong = |problem| ConfigError::Conflict(format!("`draft.device` is `{}`: {problem}", draft.device));
        // A number is one of CUDA's, as llama.cpp's first name for it would be.
        let device = match draft.device.parse::<u32>() {
            Ok(number) => DeviceChoice::Cuda(Some(number)),
            Err(_) => draft.device.parse::<DeviceChoice>().map_err(|problem| wrong(problem.to_string()))?,
        };
        Ok(Some(DraftConfig {
            model_path: path.clone(),
            device,
            n_gpu_layers: draft.layers_to_gpu,
            n_cells: draft.kv_cells,
        }))
    }

    /// How far guesses go.
    fn drafting(&self) -> Result<DraftingConfig, ConfigError> {
        let draft = &self.draft;
        if draft.min_tokens > draft.max_tokens {
            return Err(ConfigError::Conflict(format!(
                "`draft.min_tokens` is {}, which is more than `draft.max_tokens`: {}",
                draft.min_tokens, draft.max_tokens
            )));
        }
        Ok(DraftingConfig {
            max_tokens: draft.max_tokens,
            min_tokens: draft.min_tokens,
            min_probability: draft.min_probability as f32,
        })
    }

    /// The disk tier of the prefix cache, if there is to be one. Clients go by their API keys, whatever the order of these.
    pub fn disk_cache(&self) -> Option<DiskCache> {
        let limit_bytes = self.performance.cache_disk_size_mb.filter(|&bytes| bytes > 0)?;
        let keys = (1..).zip(&self.server.api_keys);
        let clients = keys.map(|(number, key)| (number, ClientSecret::of_api_key(key.as_bytes()))).collect();
        Some(DiskCache { dir: self.performance.cache_dir.clone(), limit_bytes, clients })
    }

    /// The device asked for.
    ///
    /// # Errors
    /// Only for a name that the table let through and `minerva-gpu` does not know.
    pub fn device(&self) -> Result<DeviceChoice, ConfigError> {
        let device = &self.gpu.device;
        device.parse().map_err(|problem| ConfigError::Conflict(format!("`gpu.device` is `{device}`: {problem}")))
    }
}

impl GpuSettings {
    /// `enabled`, `device` and `backend` as one device name.
    fn resolved_device(&self, device_is_stronger: bool) -> Result<String, ConfigError> {
        if !self.enabled {
            return Ok("cpu".to_owned());
        }
        if self.device == "auto" {
            return Ok(if device_is_stronger { "auto" } else { &self.backend }.to_owned());
        }
        let Ok(number) = self.device.parse::<u32>() else { return Ok(self.device.clone()) };
        match (self.backend.as_str(), number) {
            ("auto", 0) if cfg!(target_os = "macos") => Ok("metal".to_owned()),
            ("auto" | "cuda", number) => Ok(format!("cuda:{number}")),
            (backend, 0) => Ok(backend.to_owned()),
            (backend, number) => {
                Err(ConfigError::Conflict(format!("`gpu.device` is {number}, but {backend} has only device 0")))
            }
        }
    }

    fn rpc_servers(&self) -> Result<Vec<RpcServer>, ConfigError> {
        let servers: Vec<_> = self.rpc_servers.iter().map(|text| rpc_server(text)).collect::<Result<_, _>>()?;
        if let Some(server) = servers.iter().find(|server| !server.is_loopback() && !self.rpc_insecure) {
            return Err(ConfigError::Conflict(format!(
                "`gpu.rpc_servers` has {}, which is not on this machine, and llama.cpp's RPC has neither authentication nor \
                encryption: use a tunnel to 127.0.0.1, or say `--rpc-insecure`",
                server.address
            )));
        }
        Ok(servers)
    }
}

impl ModelSettings {
    fn adapters(&self) -> Result<Vec<AdapterConfig>, ConfigError> {
        self.adapters.iter().map(|text| adapter(text)).collect()
    }
}

/// `file.gguf` or `file.gguf:0.5`.
fn adapter(text: &str) -> Result<AdapterConfig, ConfigError> {
    let scaled = text.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.parse::<f32>().ok()?)));
    // A file may be called like that.
    let scaled = scaled.filter(|_| !Path::new(text).is_file());
    let (path, scale) = scaled.unwrap_or((text, 1.0));
    if path.is_empty() || !scale.is_finite() {
        return Err(ConfigError::Value {
            place: "`model.adapters`".to_owned(),
            given: format!("`{text}`"),
            allowed: "`FILE` or `FILE:SCALE`, with a finite number".to_owned(),
        });
    }
    Ok(AdapterConfig { path: PathBuf::from(path), scale })
}

/// `host:port` or `host:port=24gb`.
fn rpc_server(text: &str) -> Result<RpcServer, ConfigError> {
    let wrong = || ConfigError::Value {
        place: "`gpu.rpc_servers`".to_owned(),
        given: format!("`{text}`"),
        allowed: "`host:port`, or with a memory limit `host:port=24gb`".to_owned(),
    };
    let (address, limit) = text.split_once('=').map_or((text, None), |(address, limit)| (address, Some(limit)));
    let has_port = address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let memory_limit_bytes = match limit.map(|limit| limit.parse::<u64>().is_err().then_some(limit)) {
        None => None,
        Some(None) => return Err(wrong()), // a bare number of bytes is a forgotten unit
        Some(Some(limit)) => Some(minerva_gpu::parse_bytes(limit).map_err(|_| wrong())?),
    };
    if has_port { Ok(RpcServer { address: address.to_owned(), memory_limit_bytes }) } else { Err(wrong()) }
}

fn read_keys(path: &Path) -> Result<Vec<String>, ConfigError> {
    let text = read_text(path, "the API key file")?;
    let keys: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    if keys.is_empty() {
        let problem = "it has no key".to_owned();
        return Err(ConfigError::File { what: "the API key file", file: path.to_path_buf(), problem });
    }
    Ok(keys.into_iter().map(ToOwned::to_owned).collect())
}

fn read_text(path: &Path, what: &'static str) -> Result<String, ConfigError> {
    let mut text = std::fs::read_to_string(path).map_err(|problem| ConfigError::File {
        what,
        file: path.to_path_buf(),
        problem: problem.to_string(),
    })?;
    if text.starts_with('\u{feff}') {
        text.remove(0); // some editors write a byte order mark
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::super::{Invocation, SETTINGS, load};
    use super::*;

    fn with(vars: &[(&str, &str)]) -> Config {
        load(&Invocation::default(), vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))).unwrap().config
    }

    #[test]
    fn the_table_and_the_types_have_the_same_settings() {
        let json = serde_json::to_value(Config::defaults().unwrap()).unwrap();
        let mut typed: Vec<String> = Vec::new();
        for (section, fields) in json.as_object().unwrap() {
            typed.extend(fields.as_object().unwrap().keys().map(|key| format!("{section}.{key}")));
        }
        let mut table: Vec<_> = SETTINGS.iter().map(|setting| setting.path.to_owned()).collect();
        typed.sort();
        table.sort();
        assert_eq!(typed, table);
    }

    #[test]
    fn the_defaults_of_the_table_are_those_of_the_engine() {
        let config = with(&[("MINERVA_MODEL", "a.gguf")]);
        let tune = TuneConfig { mode: TuneMode::Cached, ..TuneConfig::default() };
        assert_eq!(
            config.engine().unwrap(),
            EngineConfig { tune, ..EngineConfig::new("a.gguf") },
            "only a server tunes"
        );
    }

    #[test]
    fn a_cache_type_that_somebody_set_is_fixed_even_if_it_is_the_default() {
        let tune = |vars: &[(&str, &str)]| with(&[&[("MINERVA_MODEL", "a")], vars].concat()).engine().unwrap().tune;
        assert_eq!((tune(&[]).fixed_kv_types, tune(&[]).fixed_kv_layout), (false, false));
        assert!(tune(&[("MINERVA_KV_TYPE_V", "f16")]).fixed_kv_types);
        assert!(tune(&[("MINERVA_KV_UNIFIED", "false")]).fixed_kv_layout);
        let set = tune(&[("MINERVA_TUNE", "force"), ("MINERVA_TUNE_SECONDS", "1.5")]);
        assert_eq!((set.mode, set.budget_ms), (TuneMode::Force, 1500));
    }

    #[test]
    fn a_device_number_or_auto_follows_the_backend_and_a_disabled_gpu_is_the_cpu() {
        let device = |vars: &[(&str, &str)]| with(vars).gpu.device;
        assert_eq!(device(&[("MINERVA_GPU_BACKEND", "metal")]), "metal");
        assert_eq!(device(&[("MINERVA_GPU_DEVICE", "1"), ("MINERVA_GPU_BACKEND", "cuda")]), "cuda:1");
        assert_eq!(device(&[("MINERVA_GPU_DEVICE", "cpu"), ("MINERVA_GPU_BACKEND", "cuda")]), "cpu");
        assert_eq!(device(&[("MINERVA_GPU_DEVICE", "cuda"), ("MINERVA_GPU_ENABLED", "false")]), "cpu");
        assert_eq!(device(&[]), "auto");
    }

    #[test]
    fn adapters_may_have_a_scale() {
        let adapters =
            |text: &str| with(&[("MINERVA_MODEL", "a"), ("MINERVA_LORA", text)]).engine().map(|engine| engine.adapters);
        let of = |path: &str, scale| AdapterConfig { path: PathBuf::from(path), scale };
        assert_eq!(adapters("b.gguf, c.gguf:0.5").unwrap(), [of("b.gguf", 1.0), of("c.gguf", 0.5)]);
        assert_eq!(adapters("C:\\d.gguf:-2").unwrap(), [of("C:\\d.gguf", -2.0)]);
        assert_eq!(adapters("C:\\d.gguf").unwrap(), [of("C:\\d.gguf", 1.0)], "a colon of a path");
        for wrong in [":0.5", "b.gguf:inf", "b.gguf:nan"] {
            let problem = adapters(wrong).unwrap_err().to_string();
            assert!(problem.contains(wrong) && problem.contains("FILE:SCALE"), "{problem}");
        }
    }

    #[test]
    fn an_address_that_others_can_reach_needs_a_key() {
        let open = with(&[("MINERVA_HOST", "0.0.0.0")]);
        assert!(open.address().unwrap_err().to_string().contains("no API key is set"));
        assert!(with(&[("MINERVA_HOST", "::")]).address().is_err());
        assert!(with(&[("MINERVA_HOST", "0.0.0.0"), ("MINERVA_API_KEY", "k")]).address().is_ok());
        assert!(with(&[("MINERVA_HOST", "0.0.0.0"), ("MINERVA_INSECURE", "1")]).address().is_ok());
        assert!(with(&[("MINERVA_HOST", "[::1]")]).address().is_ok());
        assert!(with(&[("MINERVA_HOST", "example.com")]).address().is_err());
    }

    #[test]
    fn keys_are_lines_of_a_file_and_a_byte_order_mark_is_none_of_them() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\u{feff}first\r\n# a comment\n\n second \n").unwrap();
        assert_eq!(read_keys(file.path()).unwrap(), ["first", "second"]);
    }

    #[test]
    fn rpc_servers_have_a_port_may_have_a_limit_and_are_on_this_machine_unless_said_otherwise() {
        let rpc = |rpc: &str, insecure: &str| {
            with(&[("MINERVA_MODEL", "a"), ("MINERVA_RPC", rpc), ("MINERVA_RPC_INSECURE", insecure)]).engine()
        };
        let servers = rpc("localhost:1, 127.0.0.1:50052=24GiB", "false").unwrap().rpc_servers;
        assert_eq!(servers[0], RpcServer::new("localhost:1"));
        assert_eq!((servers[1].address.as_str(), servers[1].memory_limit_bytes), ("127.0.0.1:50052", Some(24 << 30)));
        assert!(rpc("10.0.0.2:50052", "false").unwrap_err().to_string().contains("neither authentication"));
        assert_eq!(rpc("10.0.0.2:50052", "true").unwrap().rpc_servers.len(), 1);
        for wrong in ["localhost", ":1", "localhost:70000", "localhost:1=24", "localhost:1=lots", "localhost:1="] {
            let problem = rpc(wrong, "true").unwrap_err().to_string();
            assert!(problem.contains(wrong) && problem.contains("host:port"), "{problem}");
        }
    }

    #[test]
    fn a_draft_model_has_a_file_and_settings_that_agree() {
        let engine = |vars: &[(&str, &str)]| with(&[&[("MINERVA_MODEL", "a")], vars].concat()).engine();
        assert_eq!(engine(&[]).unwrap().draft, None);
        let draft = engine(&[("MINERVA_MODEL_DRAFT", "b.gguf")]).unwrap().draft;
        assert_eq!(draft, Some(DraftConfig::new("b.gguf")), "the defaults are the engine's");
        let set = [("MINERVA_MODEL_DRAFT", "b"), ("MINERVA_DEVICE_DRAFT", "cuda:1"), ("MINERVA_DRAFT_P_MIN", "0.25")];
        let set = engine(&set).unwrap();
        assert_eq!((set.draft.unwrap().device, set.drafting.min_probability), (DeviceChoice::Cuda(Some(1)), 0.25));
        let problem = engine(&[("MINERVA_DRAFT_MIN", "20")]).unwrap_err().to_string();
        assert!(problem.contains("more than `draft.max_tokens`: 16"), "{problem}");
    }

    #[test]
    fn keys_stay_out_of_debug_output() {
        let config = with(&[("MINERVA_API_KEY", "sk-one,sk-two")]);
        assert_eq!(config.server.api_keys.len(), 2);
        assert!(!format!("{config:?}").contains("sk-"));
    }
}
