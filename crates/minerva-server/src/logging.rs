//! Log lines in the guide's form, `[LEVEL] message key=value`, on stderr.

use std::fmt::{self, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// What is logged when `RUST_LOG` says nothing.
const DEFAULT_FILTER: &str = "info";
/// Comes before what `RUST_LOG` says. llama.cpp writes thousands of lines about a load at debug level, in which ours would
/// drown; `RUST_LOG=debug,llama.cpp=debug,ggml=debug` shows them.
const QUIET_FILTER: &str = "llama.cpp=warn,ggml=warn";

/// Sends log lines to stderr, filtered by the text of `RUST_LOG`.
///
/// # Errors
/// A filter that cannot be parsed, or logging that was set up before.
pub(crate) fn init(filter: Option<&str>, with_time: bool) -> anyhow::Result<()> {
    let filter = env_filter(filter)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .event_format(GuideFormat { with_time })
        .with_writer(std::io::stderr)
        .try_init()
        .map_err(|problem| anyhow::anyhow!("logging is already set up: {problem}"))
}

fn env_filter(filter: Option<&str>) -> anyhow::Result<EnvFilter> {
    let filter = filter.filter(|filter| !filter.is_empty()).unwrap_or(DEFAULT_FILTER);
    EnvFilter::try_new(format!("{QUIET_FILTER},{filter}"))
        .map_err(|problem| anyhow::anyhow!("`RUST_LOG` is `{filter}`: {problem}"))
}

/// `[INFO] GPU Context initialized: device=Metal, max_memory=21474MB`, with the time in front on request.
struct GuideFormat {
    with_time: bool,
}

impl<S, N> FormatEvent<S, N> for GuideFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.with_time {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            write!(writer, "{} ", utc(now.as_secs(), now.subsec_millis()))?;
        }
        write!(writer, "[{}] ", event.metadata().level())?;
        let mut line = Line { message: String::new(), fields: String::new() };
        event.record(&mut line);
        writeln!(writer, "{}{}", line.message, line.fields)
    }
}

/// The message first, then ` key=value` for each field; never with colours, whatever features others switch on.
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

/// `2026-03-01T12:00:00.000Z`. Source: the days-to-date algorithm of Howard Hinnant's `civil_from_days`.
fn utc(seconds: u64, millis: u32) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468; // days since 1 March of the year 0
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(filter: Option<&str>) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(env_filter(filter).unwrap())
            .event_format(GuideFormat { with_time: false })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("GPU Context initialized: device={}, max_memory={}MB", "Metal", 21474);
            tracing::debug!("Loading model with gpu_layers={}", 40);
            tracing::warn!(reason = "no room", "GPU OOM, falling back to CPU");
            tracing::debug!(target: "llama.cpp", "a tensor");
            tracing::info!(target: "ggml", "a buffer");
            tracing::warn!(target: "ggml", "trouble");
        });
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_look_as_in_the_guide_and_llama_cpp_is_quiet_unless_it_is_named() {
        expect_test::expect![[r#"
            [INFO] GPU Context initialized: device=Metal, max_memory=21474MB
            [WARN] GPU OOM, falling back to CPU reason="no room"
            [WARN] trouble
        "#]]
        .assert_eq(&logged(None));
        expect_test::expect![[r#"
            [INFO] GPU Context initialized: device=Metal, max_memory=21474MB
            [DEBUG] Loading model with gpu_layers=40
            [WARN] GPU OOM, falling back to CPU reason="no room"
            [WARN] trouble
        "#]]
        .assert_eq(&logged(Some("debug")));
        assert_eq!(
            logged(Some("warn,llama.cpp=debug,ggml=off")),
            "[WARN] GPU OOM, falling back to CPU reason=\"no room\"\n[DEBUG] a tensor\n"
        );
        assert!(env_filter(Some("nonsense=loud")).is_err());
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(utc(0, 7), "1970-01-01T00:00:00.007Z");
        assert_eq!(utc(951_782_400, 0), "2000-02-29T00:00:00.000Z");
        assert_eq!(utc(1_893_456_000 - 1, 999), "2029-12-31T23:59:59.999Z");
    }
}
