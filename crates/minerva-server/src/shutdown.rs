//! SIGTERM and SIGINT: the first asks the server to finish, a second ends the process at once.

/// The two ways out.
pub(crate) struct Signals {
    #[cfg(unix)]
    first: [tokio::signal::unix::Signal; 2],
}

impl Signals {
    /// Takes the signals over. Call it inside the runtime, before anything slow.
    #[cfg(unix)]
    pub(crate) fn new() -> std::io::Result<Self> {
        use std::sync::Arc;
        use std::sync::atomic::AtomicBool;

        use signal_hook::consts::{SIGINT, SIGTERM};
        use tokio::signal::unix::{SignalKind, signal};

        // Handlers run in this order. The second signal is dealt with inside the handler, so that it works even when every
        // thread of ours is stuck; `_exit` skips destructors, which is the point.
        let is_ending = Arc::new(AtomicBool::new(false));
        for number in [SIGTERM, SIGINT] {
            signal_hook::flag::register_conditional_shutdown(number, 128 + number, Arc::clone(&is_ending))?;
        }
        for number in [SIGTERM, SIGINT] {
            signal_hook::flag::register(number, Arc::clone(&is_ending))?;
        }
        Ok(Self { first: [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?] })
    }

    /// Resolves at the first signal.
    #[cfg(unix)]
    pub(crate) async fn received(mut self) {
        let [terminate, interrupt] = &mut self.first;
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "shutting down; a second signal ends the server at once");
    }

    /// Ctrl-C is all there is.
    #[cfg(not(unix))]
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    /// Resolves at the first Ctrl-C.
    #[cfg(not(unix))]
    pub(crate) async fn received(self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::spawn(async {
            let _ = tokio::signal::ctrl_c().await;
            std::process::exit(130);
        });
    }
}

/// Ends the process without destructors: for when a thread of llama.cpp's may still be computing.
pub(crate) fn end_now(code: i32) -> ! {
    #[cfg(unix)]
    signal_hook::low_level::exit(code);
    #[cfg(not(unix))]
    std::process::exit(code);
}
