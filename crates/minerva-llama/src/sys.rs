//! The raw layer: llama.cpp's C API and the functions of `shim/shim.h`. Nothing else in Minerva names them.

#![allow(missing_docs, non_camel_case_types, reason = "C names, documented in llama.h and shim/shim.h")]

use std::ffi::{c_char, c_int, c_void};

pub use llama_cpp_sys_2::*;

/// The most threads of a pool: a macro of ggml.h that bindgen leaves out.
pub const GGML_MAX_N_THREADS: u32 = 512;

pub const MNV_OK: c_int = 0;
pub const MNV_NULL: c_int = 1;
pub const MNV_NO_MEMORY: c_int = 3;
pub const MNV_TOO_SMALL: c_int = 4;

#[repr(C)]
pub struct mnv_error {
    pub text: [c_char; 512],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct mnv_device_bytes {
    pub name: [c_char; 64],
    pub model_bytes: usize,
    pub context_bytes: usize,
    pub compute_bytes: usize,
}

#[repr(C)]
pub struct mnv_chat {
    _opaque: [u8; 0],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct mnv_speed {
    pub bytes_per_second: f64,
    pub round_trip_seconds: f64,
}

#[repr(C)]
pub struct mnv_trial {
    _opaque: [u8; 0],
}

unsafe extern "C" {
    pub fn mnv_quiet();
    pub fn mnv_leave_untouched();
    pub fn mnv_model_load(
        path: *const c_char,
        params: *const llama_model_params,
        out: *mut *mut llama_model,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_context_new(
        model: *mut llama_model,
        params: *const llama_context_params,
        out: *mut *mut llama_context,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_keep_hidden(ctx: *mut llama_context, error: *mut mnv_error) -> c_int;
    pub fn mnv_hidden(ctx: *mut llama_context, out: *mut *const f32, error: *mut mnv_error) -> c_int;
    pub fn mnv_decode(
        ctx: *mut llama_context,
        batch: *const llama_batch,
        code: *mut i32,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_synchronize(ctx: *mut llama_context, error: *mut mnv_error) -> c_int;
    pub fn mnv_tokenize(
        vocab: *const llama_vocab,
        text: *const c_char,
        text_len: i32,
        tokens: *mut llama_token,
        n: *mut i32,
        add_special: bool,
        parse_special: bool,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_token_to_piece(
        vocab: *const llama_vocab,
        token: llama_token,
        buf: *mut c_char,
        n: *mut i32,
        special: bool,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_seq_rm(
        ctx: *mut llama_context,
        seq: llama_seq_id,
        p0: llama_pos,
        p1: llama_pos,
        removed: *mut bool,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_seq_cp(
        ctx: *mut llama_context,
        src: llama_seq_id,
        dst: llama_seq_id,
        p0: llama_pos,
        p1: llama_pos,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_state_seq_get(
        ctx: *mut llama_context,
        seq: llama_seq_id,
        part: bool,
        dst: *mut u8,
        n: *mut usize,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_state_seq_set(
        ctx: *mut llama_context,
        seq: llama_seq_id,
        part: bool,
        src: *const u8,
        n: usize,
        restored: *mut bool,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_window_begin(ctx: *const llama_context, pos: llama_pos) -> llama_pos;
    pub fn mnv_context_memory(
        ctx: *const llama_context,
        out: *mut mnv_device_bytes,
        n: *mut usize,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_adapter_load(
        model: *mut llama_model,
        path: *const c_char,
        out: *mut *mut llama_adapter_lora,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_adapter_memory(
        adapter: *const llama_adapter_lora,
        out: *mut mnv_device_bytes,
        n: *mut usize,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_adapter_give_back(adapter: *mut llama_adapter_lora, error: *mut mnv_error) -> c_int;
    pub fn mnv_adapters_use(
        ctx: *mut llama_context,
        adapters: *mut *mut llama_adapter_lora,
        scales: *const f32,
        n: usize,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_chat_new(
        model: *const llama_model,
        template_override: *const c_char,
        out: *mut *mut mnv_chat,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_chat_free(chat: *mut mnv_chat);
    pub fn mnv_chat_apply(
        chat: *const mnv_chat,
        request: *const c_char,
        out: *mut *mut c_char,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_chat_parse(
        syntax: *const c_char,
        text: *const c_char,
        is_partial: bool,
        out: *mut *mut c_char,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_rpc_add(
        add_server: *mut c_void,
        endpoint: *const c_char,
        out: *mut ggml_backend_reg_t,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_rpc_serve(
        start_server: *mut c_void,
        endpoint: *const c_char,
        n_threads: usize,
        n_devices: usize,
        devices: *mut ggml_backend_dev_t,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_module_score(path: *const c_char, score: *mut c_int, error: *mut mnv_error) -> c_int;
    pub fn mnv_trial_new(
        device: ggml_backend_dev_t,
        repacked: bool,
        out: *mut *mut mnv_trial,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_trial_run(trial: *mut mnv_trial, distance: *mut f64, error: *mut mnv_error) -> c_int;
    pub fn mnv_trial_free(trial: *mut mnv_trial);
    pub fn mnv_speed_measure(
        device: ggml_backend_dev_t,
        host: ggml_backend_dev_t,
        n_threads: c_int,
        out: *mut mnv_speed,
        error: *mut mnv_error,
    ) -> c_int;
    pub fn mnv_string_free(string: *mut c_char);
}
