//! The table of settings: one row each, with every name it goes by, its kind, its default and its description.
//!
//! `--help`, `minerva config` and docs/configuration.md are printed from here. A new setting is a row here and a field in
//! [`typed`](super::typed); a test checks that the two agree.

use figment::value::Value;

use super::Values;
use super::kind::{Kind, nothing};

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// Section and key in the config file, such as `gpu.layers_to_gpu`.
    pub path: &'static str,
    /// The environment variable.
    pub env: &'static str,
    /// The flag, without dashes.
    pub flag: &'static str,
    /// A one-letter flag.
    pub short: Option<char>,
    /// llama-server's flag of several letters behind one dash, such as `ngl`.
    pub dash: Option<&'static str>,
    /// Other long flags that mean the same.
    pub aliases: &'static [&'static str],
    /// The flag that sets a switch to false.
    pub off: Option<&'static str>,
    /// What values are allowed.
    pub kind: Kind,
    /// The value when nobody sets it.
    pub initial: Initial,
    /// One or two sentences: meaning, unit, and what the default does.
    pub help: &'static str,
}

/// A default value.
#[derive(Debug, Clone, Copy)]
pub enum Initial {
    /// Chosen by Minerva, or simply absent.
    Unset,
    /// A switch.
    Bool(bool),
    /// A number.
    Uint(u64),
    /// A number of seconds.
    Seconds(f64),
    /// A share, such as a probability.
    Share(f64),
    /// A word or text.
    Text(&'static str),
    /// No items.
    Empty,
}

impl Initial {
    fn value(self) -> Value {
        match self {
            Self::Unset => nothing(),
            Self::Bool(value) => Value::from(value),
            Self::Uint(value) => Value::from(value),
            Self::Seconds(value) | Self::Share(value) => Value::from(value),
            Self::Text(value) => Value::from(value),
            Self::Empty => Value::from(Vec::<Value>::new()),
        }
    }
}

impl Setting {
    /// `("gpu", "layers_to_gpu")`.
    pub fn section_and_key(&self) -> (&'static str, &'static str) {
        self.path.split_once('.').unwrap_or(("server", self.path))
    }

    /// Every way to write the flag, for the reference.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--{}", self.flag)];
        flags.extend(self.short.map(|short| format!("-{short}")));
        flags.extend(self.dash.map(|dash| format!("-{dash}")));
        flags.extend(self.aliases.iter().map(|alias| format!("--{alias}")));
        flags.extend(self.off.map(|off| format!("--{off}")));
        flags
    }

    const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }

    const fn dash(mut self, dash: &'static str) -> Self {
        self.dash = Some(dash);
        self
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    const fn off(mut self, off: &'static str) -> Self {
        self.off = Some(off);
        self
    }
}

const fn setting(
    path: &'static str,
    env: &'static str,
    flag: &'static str,
    kind: Kind,
    initial: Initial,
    help: &'static str,
) -> Setting {
    Setting { path, env, flag, short: None, dash: None, aliases: &[], off: None, kind, initial, help }
}

/// The defaults as the weakest layer.
pub(super) fn defaults() -> Values {
    SETTINGS.iter().map(|setting| (setting, setting.initial.value())).collect()
}

/// `-1` and 0 mean "choose for me" where llama-server has it so.
const AUTO_OR_ZERO: &[(&str, Option<u64>)] = &[("auto", None), ("0", None)];
const AUTO_OR_MINUS_ONE: &[(&str, Option<u64>)] = &[("auto", None), ("-1", None)];
/// More layers than any model has; the engine cuts it down to the model's own number.
const ALL_LAYERS: u64 = 10_000;
const LAYERS: &[(&str, Option<u64>)] = &[("auto", None), ("-1", None), ("all", Some(ALL_LAYERS))];
const KV_TYPES: Kind = Kind::OneOf(&["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]);
const HOUR: Kind = Kind::Seconds { max: 3_600.0 };

/// Every setting, in the order of the reference.
#[rustfmt::skip] // one setting, one paragraph
pub static SETTINGS: &[Setting] = &[
    // The model.
    setting("model.path", "MINERVA_MODEL", "model", Kind::Text, Initial::Unset,
        "The GGUF file to run (the first one of a split model). What cargo starts in a checkout finds the default model without it, through \
        `MINERVA_TEST_MODEL`.").short('m'),
    setting("model.name", "MINERVA_MODEL_NAME", "model-name", Kind::Text, Initial::Unset,
        "The name that requests use for the model, next to `default`. Unset: the file name without `.gguf`.")
        .short('a').alias(&["alias"]),
    setting("model.chat_template_file", "MINERVA_CHAT_TEMPLATE_FILE", "chat-template-file", Kind::Text, Initial::Unset,
        "A Jinja chat template to use in place of the model's own."),
    setting("model.adapters", "MINERVA_LORA", "lora", Kind::List { secret: false }, Initial::Empty,
        "Low-rank adapters (LoRA) of the model, GGUF files: `FILE`, or `FILE:SCALE` for more or less of one. Every request is computed \
        with all of them; they are part of the plan.").alias(&["lora-scaled"]),
    setting("model.simulate", "MINERVA_SIMULATE", "simulate", Kind::Uint { min: 0, max: 10_000, words: &[("off", None)] },
        Initial::Unset,
        "Answer with the simulator instead of a model, with steps of so many milliseconds: for tests and for trying clients."),
    // The device.
    setting("gpu.enabled", "MINERVA_GPU_ENABLED", "gpu-enabled", Kind::Bool, Initial::Bool(true),
        "`false` is the same as `gpu.device = \"cpu\"`."),
    setting("gpu.device", "MINERVA_GPU_DEVICE", "gpu", Kind::Device, Initial::Text("auto"),
        "Where to run: auto, cpu, metal, cuda, cuda:N, or a number N, which is device N of `gpu.backend` (without one: \
        cuda:N, on macOS metal). `auto` takes a GPU when there is one and says so in the log when there is none; a GPU \
        named here that is not there is an error. The flag also takes `debug`: print the whole diagnosis and exit. With `minerva plan` it also \
        takes a machine that does not exist: `--device cuda:24GiB,cuda:8GiB@600GB/s,ram:32GiB`.")
        .alias(&["device"]),
    setting("gpu.backend", "MINERVA_GPU_BACKEND", "gpu-backend", Kind::OneOf(&["auto", "cpu", "metal", "cuda"]),
        Initial::Text("auto"),
        "The kind of device that `auto` and device numbers mean. A device named by a stronger source wins over it."),
    setting("gpu.layers_to_gpu", "MINERVA_GPU_LAYERS", "n-gpu-layers",
        Kind::Uint { min: 0, max: ALL_LAYERS, words: LAYERS }, Initial::Unset,
        "Layers to keep on the GPU, never more than the model has. `auto`: as many as fit in the memory limit.")
        .dash("ngl").alias(&["gpu-layers"]),
    setting("gpu.expert_layers_on_host", "MINERVA_GPU_EXPERT_LAYERS_ON_HOST", "n-cpu-moe",
        Kind::Uint { min: 0, max: ALL_LAYERS, words: LAYERS }, Initial::Unset,
        "Of a mixture of experts: layers whose experts stay on the host, the first ones. `auto`: as few as fit, or none where \
        fewer whole layers on the GPU are clearly faster.").dash("ncmoe"),
    setting("gpu.context_size", "MINERVA_GPU_CONTEXT_SIZE", "ctx",
        Kind::Uint { min: 16, max: 1 << 24, words: AUTO_OR_ZERO }, Initial::Unset,
        "The most tokens one request may have, prompt and answer together. `auto`: what the model was trained for, as far \
        as memory allows. Not llama-server's `-c`: see `performance.kv_cells`."),
    setting("gpu.max_memory_mb", "MINERVA_GPU_MEMORY_LIMIT", "gpu-memory-limit", Kind::Megabytes { zero: false }, Initial::Unset,
        "The most device memory to use: a number of MiB in the config file, a size with a unit (`4gb`) elsewhere. `auto`: \
        80 % of a CUDA device, half of the system's memory with Metal, a quarter of it on the CPU."),
    setting("gpu.fallback_to_cpu", "MINERVA_CPU_FALLBACK", "cpu-fallback", Kind::Bool, Initial::Bool(true),
        "Run on the CPU when no GPU can be used, or none has room for the model, instead of exiting.").off("no-fallback"),
    setting("gpu.rpc_servers", "MINERVA_RPC", "rpc", Kind::List { secret: false }, Initial::Empty,
        "RPC servers (`minerva rpc-worker` on other machines) that take layers of the model like GPUs: `host:port`, or \
        `host:port=24gb` to use no more than that of each of its devices. See docs/rpc.md."),
    setting("gpu.rpc_insecure", "MINERVA_RPC_INSECURE", "rpc-insecure", Kind::Bool, Initial::Bool(false),
        "Use RPC servers on other machines. llama.cpp's RPC has neither authentication nor encryption: whoever is on the \
        network between can read and change prompts and answers."),
    setting("gpu.probe", "MINERVA_PROBE", "probe", Kind::Bool, Initial::Bool(true),
        "Try backends and devices in a child process first, and leave out what crashes, hangs or computes wrong numbers. \
        `false` saves a fraction of a second and lets a broken driver end the server. See docs/troubleshooting.md.")
        .off("no-probe"),
    setting("gpu.probe_seconds", "MINERVA_PROBE_SECONDS", "probe-time", Kind::Seconds { max: 300.0 }, Initial::Seconds(5.0),
        "How long a device may take to answer when it is tried (three times as long on macOS); all of them together get a \
        second more. GPUs without persistence mode take seconds to wake."),
    // Speed and memory.
    setting("performance.threads", "MINERVA_GPU_THREADS", "threads", Kind::Uint { min: 1, max: 1_024, words: AUTO_OR_MINUS_ONE },
        Initial::Unset,
        "Compute threads. `auto`: the CPUs that this process may use, cgroup limits included.").short('t'),
    setting("performance.threads_batch", "MINERVA_THREADS_BATCH", "threads-batch",
        Kind::Uint { min: 1, max: 1_024, words: AUTO_OR_MINUS_ONE }, Initial::Unset,
        "Compute threads for prompts. `auto`: as many as `performance.threads`.").dash("tb"),
    setting("performance.batch_size", "MINERVA_BATCH_SIZE", "parallel", Kind::Uint { min: 1, max: 256, words: AUTO_OR_MINUS_ONE },
        Initial::Unset,
        "Sequences that are computed at once, so the tokens of one decode step: the guide's batch of 1 to 16. More requests \
        than that wait in the queue. Not llama-server's `-b`: see `performance.n_batch`.").dash("np"),
    setting("performance.kv_cells", "MINERVA_KV_CELLS", "ctx-size", Kind::Uint { min: 16, max: 1 << 28, words: AUTO_OR_ZERO },
        Initial::Unset,
        "KV cells that all sequences share: the memory of the context, as llama-server's `-c`.").short('c'),
    setting("performance.n_batch", "MINERVA_N_BATCH", "batch-size", Kind::Uint { min: 1, max: 1 << 20, words: &[] },
        Initial::Uint(2048), "The most tokens of one step, over all sequences; at least as many as there are sequences.").short('b'),
    setting("performance.n_ubatch", "MINERVA_N_UBATCH", "ubatch-size", Kind::Uint { min: 1, max: 1 << 20, words: AUTO_OR_ZERO },
        Initial::Unset, "The most tokens that the device computes at once; compute buffers grow with it. `auto`: 512, or less \
        when memory is short.").dash("ub"),
    setting("performance.flash_attention", "MINERVA_FLASH_ATTENTION", "flash-attn", Kind::OneOf(&["auto", "on", "off"]),
        Initial::Text("auto"), "Flash attention. A quantized V cache needs it.").dash("fa"),
    setting("performance.kv_type_k", "MINERVA_KV_TYPE_K", "cache-type-k", KV_TYPES, Initial::Text("f16"),
        "Element type of the K cache.").dash("ctk"),
    setting("performance.kv_type_v", "MINERVA_KV_TYPE_V", "cache-type-v", KV_TYPES, Initial::Text("f16"),
        "Element type of the V cache.").dash("ctv"),
    setting("performance.kv_may_quantize", "MINERVA_KV_MAY_QUANTIZE", "cache-may-quantize", Kind::Bool, Initial::Bool(false),
        "Let an f16 cache become q8_0 when memory is short: half the size, and slightly other answers."),
    setting("performance.kv_unified", "MINERVA_KV_UNIFIED", "kv-unified", Kind::Bool, Initial::Bool(false),
        "One pool of KV cells for all sequences, instead of a stream of cells per sequence.").dash("kvu").off("no-kv-unified"),
    setting("performance.extra_buffers", "MINERVA_EXTRA_BUFFERS", "repack", Kind::Bool, Initial::Bool(true),
        "Let the CPU backend repack weights for its matrix units (AMX and such).").off("no-repack"),
    setting("performance.mmap", "MINERVA_MMAP", "mmap", Kind::Bool, Initial::Bool(true),
        "Map the model file instead of reading it into memory.").off("no-mmap"),
    setting("performance.tune", "MINERVA_TUNE", "tune", Kind::OneOf(&["off", "cached", "force"]), Initial::Text("cached"),
        "Measure the settings that nobody fixed (flash attention, cache type, threads, micro-batch) and take the fastest: `cached` \
        at the first load of a model on a device, `force` at this one, `off` never. See docs/tuning.md."),
    setting("performance.tune_seconds", "MINERVA_TUNE_SECONDS", "tune-time", Kind::Seconds { max: 600.0 }, Initial::Seconds(6.0),
        "How long measuring may take. With 20 s or more the layouts of the cache are compared too; `minerva tune` takes 60 s."),
    setting("performance.token_buffer", "MINERVA_TOKEN_BUFFER", "token-buffer", Kind::Uint { min: 1, max: 4_096, words: &[] },
        Initial::Uint(32),
        "Tokens of one stream that may go out in a single write. It only matters when a client reads slower than the model \
        writes: a client that keeps up gets every token by itself."),
    setting("performance.cache_size_mb", "MINERVA_CACHE_SIZE_MB", "cache-size", Kind::Megabytes { zero: true },
        Initial::Unset,
        "Host memory for what sequences held when their KV cells were needed by others: long conversations come back from there \
        instead of being computed again, and so do requests that had to yield. 0 is none. By default a sixteenth of the \
        host's memory, at most 8 GiB and a quarter of what the model leaves free.").dash("cram"),
    setting("performance.ctx_checkpoints", "MINERVA_CTX_CHECKPOINTS", "ctx-checkpoints",
        Kind::Uint { min: 0, max: 1024, words: &[] }, Initial::Uint(32),
        "The most checkpoints of one text in that memory, where a sequence's memory cannot be cut back (recurrent and hybrid models, and \
        sliding windows that keep nothing else): prompts go on from there that begin like it. 0 is none."),
    setting("performance.cache_disk_size_mb", "MINERVA_CACHE_DISK_SIZE_MB", "cache-disk-size", Kind::Megabytes { zero: true },
        Initial::Unset,
        "Disk for what is in host memory and what has to leave it: prompts come back from there instead of being computed again, after \
        a restart too. Off unless set. See \"On disk\" in docs/architecture.md for what is written."),
    setting("performance.cache_dir", "MINERVA_CACHE_KV_DIR", "cache-dir", Kind::Text, Initial::Unset,
        "The folder for `performance.cache_disk_size_mb`, for one server at a time. By default `kv` in Minerva's cache folder \
        (`MINERVA_CACHE_DIR`, or `minerva` in the user's: `XDG_CACHE_HOME`, `LOCALAPPDATA` or `~/.cache`)."),
    setting("performance.warm_file", "MINERVA_WARM", "warm", Kind::Text, Initial::Unset,
        "A file of prompts that are computed before the server is ready and stay in host memory: each line a text, or a JSON object \
        with `prompt` or `messages` and, if it may give way to others, `\"pin\": false`."),
    setting("performance.reserve", "MINERVA_RESERVE", "reserve", Kind::OneOf(&["full", "expected"]), Initial::Text("expected"),
        "With one pool of KV cells, how many are set aside for a request: `full`: its prompt and all that it may generate. `expected`: its \
        prompt and what answers usually take, so that more run at once; when answers turn out longer the last to come waits with what it has \
        and goes on with the same tokens."),
    setting("performance.cache_isolation", "MINERVA_CACHE_ISOLATION", "cache-isolation", Kind::OneOf(&["none", "key"]),
        Initial::Text("none"),
        "`key`: requests share cached prompts only with requests of the same API key, so that nobody finds out by the time of \
        an answer what others have sent. `none`: everybody shares."),
    setting("performance.speculation", "MINERVA_SPECULATION", "speculation", Kind::OneOf(&["off", "ngram", "draft", "auto"]),
        Initial::Text("auto"),
        "How the next tokens of a text are guessed, to be computed several at a time, as long as it pays. `ngram`: what followed the \
        same tokens earlier in the text; `draft`: what a draft model writes, or without one the model's own head for multi-token \
        prediction (MTP); `auto`: the one, or else the other if the model has it. Guesses are kept only as far as sampling agrees with them."),
    setting("performance.trace_file", "MINERVA_TRACE_FILE", "trace-file", Kind::Text, Initial::Unset,
        "Write down what is asked of the scheduler and what it answers, at most 4 GiB. Tokens are replaced by numbers that tell \
        nothing but which of them are equal. `cargo xtask replay FILE` runs it again."),
    setting("performance.max_itl_ms", "MINERVA_MAX_ITL_MS", "max-itl-ms", Kind::Uint { min: 1, max: 60_000, words: &[] },
        Initial::Unset,
        "The longest gap between two tokens of a stream that prompts of others may cause, in milliseconds, as far as \
        steps can be cut that short. By default about two and a half times what it is without them."),
    setting("performance.max_queued_requests", "MINERVA_MAX_QUEUED_REQUESTS", "max-queued-requests",
        Kind::Uint { min: 1, max: 1_000_000, words: &[] }, Initial::Uint(256),
        "Requests that have no sequence yet, those on their way to a free one included; one more is refused with 429."),
    setting("performance.max_queued_tokens", "MINERVA_MAX_QUEUED_TOKENS", "max-queued-tokens",
        Kind::Uint { min: 1, max: 1 << 40, words: &[] }, Initial::Uint(1 << 20),
        "Prompt tokens that may wait; a request that would pass this is refused with 429."),
    // The draft model.
    setting("draft.path", "MINERVA_MODEL_DRAFT", "model-draft", Kind::Text, Initial::Unset,
        "A small GGUF file with the vocabulary of the model, which writes ahead of it (`performance.speculation`). It is part of the \
        plan, and given up before the model has less of anything.").dash("md").alias(&["spec-draft-model"]),
    setting("draft.device", "MINERVA_DEVICE_DRAFT", "device-draft", Kind::Device, Initial::Text("auto"),
        "Where the draft model runs: auto, cpu, metal, cuda or cuda:N, one of the model's devices. `auto`: beside most of the model's \
        layers.").dash("devd").alias(&["spec-draft-device"]),
    setting("draft.layers_to_gpu", "MINERVA_GPU_LAYERS_DRAFT", "n-gpu-layers-draft",
        Kind::Uint { min: 0, max: ALL_LAYERS, words: LAYERS }, Initial::Unset,
        "Layers of the draft model on its device. `auto`: all.").dash("ngld")
        .alias(&["gpu-layers-draft", "spec-draft-ngl"]),
    setting("draft.kv_cells", "MINERVA_CTX_SIZE_DRAFT", "ctx-size-draft",
        Kind::Uint { min: 16, max: 1 << 28, words: AUTO_OR_ZERO }, Initial::Unset,
        "KV cells of the draft model. `auto`: as many as one sequence of the model may have, or with one pool of cells as many as \
        all share. A text that is longer gets no drafts.").dash("cd"),
    setting("draft.max_tokens", "MINERVA_DRAFT_MAX", "draft-max", Kind::Uint { min: 1, max: 64, words: &[] },
        Initial::Uint(16), "The most tokens that the draft model, or the model's own head, writes ahead at once; how many of these pay is found out.")
        .alias(&["draft", "draft-n", "spec-draft-n-max"]),
    setting("draft.min_tokens", "MINERVA_DRAFT_MIN", "draft-min", Kind::Uint { min: 0, max: 64, words: &[] },
        Initial::Uint(0), "A draft of fewer tokens is not used.").alias(&["draft-n-min", "spec-draft-n-min"]),
    setting("draft.min_probability", "MINERVA_DRAFT_P_MIN", "draft-p-min", Kind::Share, Initial::Share(0.5),
        "A draft ends before a token that its author gives less than this probability, 0 to 1.").alias(&["spec-draft-p-min"]),
    // The server.
    setting("server.host", "MINERVA_HOST", "host", Kind::Text, Initial::Text("127.0.0.1"),
        "The address to listen on. One that other machines can reach needs an API key or `server.insecure`."),
    setting("server.port", "MINERVA_PORT", "port", Kind::Uint { min: 0, max: 65_535, words: &[] }, Initial::Uint(8080),
        "The port to listen on; 0 takes a free one, which the log names."),
    setting("server.api_keys", "MINERVA_API_KEY", "api-key", Kind::List { secret: true }, Initial::Empty,
        "Keys that requests must carry, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`. Repeatable, or separated by \
        commas. Health routes need none. Other users of the machine can see flags: prefer the file."),
    setting("server.api_key_file", "MINERVA_API_KEY_FILE", "api-key-file", Kind::Text, Initial::Unset,
        "A file with one key per line (empty lines and lines that begin with `#` are skipped), added to `server.api_keys`."),
    setting("server.insecure", "MINERVA_INSECURE", "insecure", Kind::Bool, Initial::Bool(false),
        "Listen on an address that other machines can reach without any API key."),
    setting("server.accept_any_model", "MINERVA_ACCEPT_ANY_MODEL", "accept-any-model", Kind::Bool, Initial::Bool(false),
        "Answer requests whatever `model` they name, instead of 404 for a name that is not the model's."),
    setting("server.strict", "MINERVA_STRICT", "strict", Kind::Bool, Initial::Bool(false),
        "Refuse requests with fields that Minerva does not know, instead of ignoring those fields."),
    setting("server.allow_priority", "MINERVA_ALLOW_PRIORITY", "allow-priority", Kind::Bool, Initial::Bool(false),
        "Let requests ask to be served before others, with a `priority` below 0. Above 0, which is after others, is always \
        allowed."),
    setting("server.allow_origins", "MINERVA_ALLOW_ORIGINS", "allow-origin", Kind::List { secret: false }, Initial::Empty,
        "Web pages that may call this server: origins such as `https://chat.example`, or `*`. Without it requests from \
        other origins are refused, so that no web page can use a server on its visitor's machine."),
    setting("server.allow_hosts", "MINERVA_ALLOW_HOSTS", "allow-host", Kind::List { secret: false }, Initial::Empty,
        "Host names under which a server bound to loopback may be addressed besides `localhost`, or `*`: what a reverse \
        proxy on this machine passes on. Other names are refused (DNS rebinding)."),
    setting("server.grace_seconds", "MINERVA_GRACE_SECONDS", "grace", HOUR, Initial::Seconds(30.0),
        "After SIGTERM or SIGINT: how long running and queued requests may still take."),
    setting("server.max_connections", "MINERVA_MAX_CONNECTIONS", "max-connections",
        Kind::Uint { min: 1, max: 100_000, words: &[] }, Initial::Uint(1_024),
        "Open connections. At the limit the longest idle one is closed for a new one; when all are busy, the new one gets 503."),
    setting("server.max_body_bytes", "MINERVA_MAX_BODY", "max-body", Kind::Bytes { min: 1_024 }, Initial::Uint(4 << 20),
        "The largest request body. A 128k-token prompt is about 0.6 MB."),
    setting("server.header_timeout_seconds", "MINERVA_HEADER_TIMEOUT", "header-timeout", HOUR, Initial::Seconds(10.0),
        "From the first byte of a request until its headers are complete; then the connection is closed."),
    setting("server.body_timeout_seconds", "MINERVA_BODY_TIMEOUT", "body-timeout", HOUR, Initial::Seconds(20.0),
        "A request body may take this long, and one second more per 64 KiB; then 408."),
    setting("server.write_timeout_seconds", "MINERVA_WRITE_TIMEOUT", "write-timeout", HOUR, Initial::Seconds(30.0),
        "A client that does not read must take 16 KiB, or all there is, within this time; then its request is cancelled."),
    setting("server.idle_timeout_seconds", "MINERVA_IDLE_TIMEOUT", "idle-timeout", HOUR, Initial::Seconds(75.0),
        "How long a connection may stay open without a request."),
    setting("server.ping_seconds", "MINERVA_SSE_PING", "sse-ping-interval", HOUR, Initial::Seconds(15.0),
        "A stream that has nothing to say for this long gets a comment line, so that proxies do not close it."),
    setting("server.step_deadline_seconds", "MINERVA_STEP_DEADLINE", "step-deadline", HOUR, Initial::Seconds(60.0),
        "A step of the engine that takes longer than this means that the device hangs: readiness turns to 503."),
    setting("server.worker_threads", "MINERVA_WORKER_THREADS", "worker-threads", Kind::Uint { min: 1, max: 64, words: &[] },
        Initial::Uint(2), "Threads for HTTP. They do little: computing is the engine's."),
    setting("server.log_timestamps", "MINERVA_LOG_TIMESTAMPS", "log-timestamps", Kind::Bool, Initial::Bool(false),
        "Begin each log line with the time. What is logged is set by `RUST_LOG`."),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_settings_share_a_name() {
        let mut seen = BTreeSet::new();
        for setting in SETTINGS {
            assert!(setting.path.contains('.'), "{}", setting.path);
            for name in setting.flags().into_iter().chain([setting.path.to_owned(), setting.env.to_owned()]) {
                assert!(seen.insert(name.clone()), "{name} twice");
            }
        }
    }

    #[test]
    fn every_default_is_a_value_that_its_kind_allows() {
        for setting in SETTINGS {
            let text = match setting.initial {
                Initial::Unset | Initial::Empty => continue,
                Initial::Bool(value) => value.to_string(),
                Initial::Uint(value) => value.to_string(),
                Initial::Seconds(value) | Initial::Share(value) => value.to_string(),
                Initial::Text(value) => value.to_owned(),
            };
            assert!(setting.kind.parse_text(&text).is_ok(), "{}", setting.path);
        }
    }

    #[test]
    fn every_variable_and_file_key_of_the_guide_is_there() {
        let env: Vec<_> = SETTINGS.iter().map(|setting| setting.env).collect();
        for name in [
            "GPU_DEVICE",
            "GPU_LAYERS",
            "GPU_CONTEXT_SIZE",
            "GPU_MEMORY_LIMIT",
            "CPU_FALLBACK",
            "GPU_THREADS",
            "BATCH_SIZE",
            "TOKEN_BUFFER",
        ] {
            assert!(env.contains(&format!("MINERVA_{name}").as_str()), "{name}");
        }
        let paths: Vec<_> = SETTINGS.iter().map(|setting| setting.path).collect();
        for path in [
            "gpu.enabled",
            "gpu.device",
            "gpu.backend",
            "gpu.layers_to_gpu",
            "gpu.context_size",
            "gpu.max_memory_mb",
            "gpu.fallback_to_cpu",
            "performance.threads",
            "performance.batch_size",
            "performance.token_buffer",
            "performance.cache_size_mb",
        ] {
            assert!(paths.contains(&path), "{path}");
        }
    }
}
