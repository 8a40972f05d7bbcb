//! A pool of compute threads that outlives a step.

use std::ffi::c_void;
use std::mem;
use std::ptr::NonNull;

use crate::error::CallError;
use crate::{backend, sys};

/// Threads that wait for the next graph instead of being started anew for each: without a pool and without OpenMP, ggml
/// starts its threads for every step.
#[doc(alias = "ggml_threadpool")]
#[derive(Debug)]
pub struct ThreadPool {
    raw: NonNull<sys::ggml_threadpool>,
    n_threads: u32,
}

// SAFETY: the pool is an object of its own; the context that it is attached to uses it from one thread at a time.
unsafe impl Send for ThreadPool {}

impl ThreadPool {
    /// How long an idle thread spins before it sleeps, from 0 to 100: ggml's default.
    pub const DEFAULT_POLL: u32 = 50;

    /// Starts `n_threads - 1` threads; the calling thread of each step is the last one.
    ///
    /// # Errors
    /// [`CallError::Refused`] when the build has no CPU backend or the threads could not be started.
    #[doc(alias = "ggml_threadpool_new")]
    pub fn new(n_threads: u32, poll: u32) -> Result<Self, CallError> {
        backend::init();
        let function = backend::cpu_function(c"ggml_threadpool_new")
            .ok_or_else(|| CallError::Refused("this build has no CPU backend".into()))?;
        // SAFETY: ggml exports this name as a function of this type (ggml-cpu.h).
        let new = unsafe {
            mem::transmute::<
                *mut c_void,
                unsafe extern "C" fn(*mut sys::ggml_threadpool_params) -> *mut sys::ggml_threadpool,
            >(function)
        };
        let n = i32::try_from(n_threads.clamp(1, sys::GGML_MAX_N_THREADS)).unwrap_or(1);
        // SAFETY: returns a plain struct.
        let mut params = unsafe { sys::ggml_threadpool_params_default(n) };
        params.poll = poll;
        // SAFETY: live parameters; the pool copies them.
        let raw = unsafe { new(&raw mut params) };
        let raw = NonNull::new(raw).ok_or_else(|| CallError::Refused(format!("cannot start {n} compute threads")))?;
        Ok(Self { raw, n_threads: n.unsigned_abs() })
    }

    /// Threads of the pool, the caller's included.
    pub fn n_threads(&self) -> u32 {
        self.n_threads
    }

    pub(crate) fn raw(&self) -> *mut sys::ggml_threadpool {
        self.raw.as_ptr()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        let Some(function) = backend::cpu_function(c"ggml_threadpool_free") else { return };
        // SAFETY: ggml exports this name as a function of this type (ggml-cpu.h).
        let free = unsafe { mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut sys::ggml_threadpool)>(function) };
        // SAFETY: made by `ggml_threadpool_new`, freed only here, after its context.
        unsafe { free(self.raw.as_ptr()) };
    }
}
