//! Room for the connections that the settings allow: each takes a file descriptor.

/// Descriptors for everything that is no connection: the model, logs, the listener, the runtime.
const OTHER_FILES: u64 = 128;

/// Raises the soft limit on open files as far as needed and allowed. Returns the connections that fit.
#[cfg(unix)]
pub(crate) fn allow_connections(wanted: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let needed = wanted as u64 + OTHER_FILES;
    let limit = getrlimit(Resource::Nofile);
    let Some(current) = limit.current.filter(|current| *current < needed) else { return wanted };
    let raised = limit.maximum.map_or(needed, |maximum| maximum.min(needed));
    let new = Rlimit { current: Some(raised), maximum: limit.maximum };
    let available = if setrlimit(Resource::Nofile, new).is_ok() { raised } else { current };
    let fit = (available.saturating_sub(OTHER_FILES) as usize).clamp(1, wanted);
    if fit < wanted {
        tracing::warn!(wanted, fit, "the limit on open files allows fewer connections; raise it with `ulimit -n`");
    }
    fit
}

/// Other systems have no such limit.
#[cfg(not(unix))]
pub(crate) fn allow_connections(wanted: usize) -> usize {
    wanted
}
