//! llama.cpp's and ggml's messages, as `tracing` events with the target `llama.cpp`. Nothing reaches stdout or stderr, but for
//! errors in a process that only tries things out.

use std::ffi::{CStr, c_char, c_void};
use std::io::Write as _;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::sys;

/// Messages come in pieces; a line is complete at its newline.
struct Pending {
    level: sys::ggml_log_level,
    text: String,
    last_error: Option<String>,
}

static PENDING: Mutex<Pending> =
    Mutex::new(Pending { level: sys::GGML_LOG_LEVEL_INFO, text: String::new(), last_error: None });

/// A message without an end is cut here: a hostile model file can put its own strings into the log.
const MAX_LINE_BYTES: usize = 8 << 10;

/// Routes every message through [`on_message`]. Called once, before llama.cpp is used.
pub(crate) fn install() {
    // SAFETY: `on_message` is a C function for the life of the program and ignores its user data.
    unsafe { sys::llama_log_set(Some(on_message), std::ptr::null_mut()) };
    // SAFETY: sets one integer before any other thread can be inside the common library.
    unsafe { sys::mnv_quiet() };
}

/// Set in a process that may be about to crash: its last words must be out before it does.
static ERRORS_TO_STDERR: AtomicBool = AtomicBool::new(false);

/// Writes error lines to stderr too, at once.
pub(crate) fn echo_errors() {
    ERRORS_TO_STDERR.store(true, Ordering::Relaxed);
}

/// The last error line since the last call, to say why a C function returned nothing.
pub(crate) fn take_last_error() -> Option<String> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner).last_error.take()
}

unsafe extern "C" fn on_message(level: sys::ggml_log_level, text: *const c_char, _user_data: *mut c_void) {
    if text.is_null() {
        return;
    }
    // SAFETY: llama.cpp passes a NUL-terminated string that lives through the call.
    let text = unsafe { CStr::from_ptr(text) };
    // A panic must not unwind into C; a lost log line is the lesser evil.
    let _ = catch_unwind(|| append(level, &text.to_string_lossy()));
}

fn append(level: sys::ggml_log_level, text: &str) {
    let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
    if level != sys::GGML_LOG_LEVEL_CONT {
        pending.level = level;
    }
    for piece in text.split_inclusive('\n') {
        pending.text.push_str(piece);
        if piece.ends_with('\n') || pending.text.len() > MAX_LINE_BYTES {
            let line = std::mem::take(&mut pending.text);
            emit(&mut pending, line.trim_end());
        }
    }
}

fn emit(pending: &mut Pending, line: &str) {
    if let Some((backend, path)) = loaded_module(line) {
        // Under our own target, since llama.cpp's lines are seldom shown and this one says how fast the program can be.
        let module = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
        tracing::info!("{backend} module: {module}");
    }
    match pending.level {
        _ if line.is_empty() => {}
        sys::GGML_LOG_LEVEL_ERROR => {
            tracing::error!(target: "llama.cpp", "{line}");
            if ERRORS_TO_STDERR.load(Ordering::Relaxed) {
                let _ = writeln!(std::io::stderr(), "{line}");
            }
            // llama.cpp ends a failed load with a line that says no more than that; the one before it has the reason.
            if pending.last_error.is_none() || !line.ends_with("failed to load model") {
                pending.last_error = Some(line.to_owned());
            }
        }
        // Of the load that only checks a plan (`simulation.rs`): the model itself has its tokens.
        sys::GGML_LOG_LEVEL_WARN if line.ends_with(" dummy tokens") => tracing::debug!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_WARN => tracing::warn!(target: "llama.cpp", "{line}"),
        sys::GGML_LOG_LEVEL_INFO => tracing::info!(target: "llama.cpp", "{line}"),
        _ => tracing::debug!(target: "llama.cpp", "{line}"),
    }
}

/// Backend and file of a line in which ggml says that it loaded a module.
fn loaded_module(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("load_backend: loaded ")?.split_once(" backend from ")
}
