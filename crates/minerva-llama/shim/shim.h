// What Minerva needs of llama.cpp beyond its C API, as plain C.
//
// Two reasons to be here: a C++ exception must never cross into Rust (it would end the process), and some things exist
// only as C++ (exact memory of a simulated load, chat templates). Each function returns a mnv_status; on anything but
// MNV_OK the text in `error` says why. Strings that come back are freed with mnv_string_free.
#pragma once

#include "llama.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum mnv_status {
    MNV_OK        = 0,
    MNV_NULL      = 1, // llama.cpp returned no object; its log says why
    MNV_EXCEPTION = 2, // a C++ exception was caught
    MNV_NO_MEMORY = 3, // std::bad_alloc was caught
    MNV_TOO_SMALL = 4, // the caller's buffer is too small; the needed size was stored
};

struct mnv_error {
    char text[512];
};

// Ends the common library's own printing, so that messages reach only the log callback.
void mnv_quiet(void);

// From now on host memory that llama.cpp fills with zeros takes none until it is used. Once, before any other thread calls.
void mnv_leave_untouched(void);

int mnv_model_load(const char * path, const struct llama_model_params * params, struct llama_model ** out, struct mnv_error * error);
int mnv_context_new(struct llama_model * model, const struct llama_context_params * params, struct llama_context ** out, struct mnv_error * error);

// From now on each step keeps the hidden state after each of its tokens, and room is made for that.
int mnv_keep_hidden(struct llama_context * ctx, struct mnv_error * error);
// Those of the last step in the order of its batch, until the next one. Null when none are kept.
int mnv_hidden(struct llama_context * ctx, const float ** out, struct mnv_error * error);

// `code` receives what llama_decode returned; it is set only with MNV_OK.
int mnv_decode(struct llama_context * ctx, const struct llama_batch * batch, int32_t * code, struct mnv_error * error);
int mnv_synchronize(struct llama_context * ctx, struct mnv_error * error);

// `n` holds the room in `tokens` and receives the number of tokens, or the number needed with MNV_TOO_SMALL.
int mnv_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t * n,
                 bool add_special, bool parse_special, struct mnv_error * error);
int mnv_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buf, int32_t * n, bool special, struct mnv_error * error);

// Memory operations that may allocate or run a graph.
int mnv_seq_rm(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool * removed, struct mnv_error * error);
int mnv_seq_cp(struct llama_context * ctx, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1, struct mnv_error * error);
// With `part` only what does not stay in the cells of a sequence: recurrent state, and cells of layers with a window.
int mnv_state_seq_get(struct llama_context * ctx, llama_seq_id seq, bool part, uint8_t * dst, size_t * n, struct mnv_error * error);
int mnv_state_seq_set(struct llama_context * ctx, llama_seq_id seq, bool part, const uint8_t * src, size_t n, bool * restored, struct mnv_error * error);
// The first place that a token at `pos` attends to in layers with a window; 0 without such layers.
llama_pos mnv_window_begin(const struct llama_context * ctx, llama_pos pos);

struct mnv_device_bytes {
    char   name[64]; // llama.cpp's device name, "Host" for the system's memory
    size_t model_bytes;
    size_t context_bytes;
    size_t compute_bytes;
};

// What model and context take on each device. `n` holds the room in `out` and receives the number of entries.
int mnv_context_memory(const struct llama_context * ctx, struct mnv_device_bytes * out, size_t * n, struct mnv_error * error);

// Adapters live as long as their model, and are loaded before its first context is made.
int mnv_adapter_load(struct llama_model * model, const char * path, struct llama_adapter_lora ** out, struct mnv_error * error);
// As mnv_context_memory; only model_bytes are set.
int mnv_adapter_memory(const struct llama_adapter_lora * adapter, struct mnv_device_bytes * out, size_t * n, struct mnv_error * error);
// Frees the memory of an adapter that only sizes are asked of, as llama.cpp does with the weights of a load without allocation.
int mnv_adapter_give_back(struct llama_adapter_lora * adapter, struct mnv_error * error);
// Replaces the adapters of a context, and makes room for its steps anew.
int mnv_adapters_use(struct llama_context * ctx, struct llama_adapter_lora ** adapters, const float * scales, size_t n,
                     struct mnv_error * error);

struct mnv_chat;

// `template_override` may be null: the model's own template. MNV_NULL when there is none.
int  mnv_chat_new(const struct llama_model * model, const char * template_override, struct mnv_chat ** out, struct mnv_error * error);
void mnv_chat_free(struct mnv_chat * chat);

// `request` is a JSON object {"messages": [...], "tools": [...]?, "tool_choice": "..."?, "add_generation_prompt": bool?}
// in OpenAI's form. `out` receives JSON: {"prompt", "format", "parser", "grammar", "grammar_lazy", "generation_prompt",
// "additional_stops", "preserved_tokens"}.
int mnv_chat_apply(const struct mnv_chat * chat, const char * request, char ** out, struct mnv_error * error);

// Parses a model's answer. `syntax` is what mnv_chat_apply returned; `out` receives the message as OpenAI's JSON.
int mnv_chat_parse(const char * syntax, const char * text, bool is_partial, char ** out, struct mnv_error * error);

// `add_server` is ggml's function of this name. `out` receives the server's devices, or null when it has none. The connection
// stays open for good. A server that cannot be reached ends the process: connect to it first.
int mnv_rpc_add(void * add_server, const char * endpoint, ggml_backend_reg_t * out, struct mnv_error * error);

// `start_server` is ggml's function of this name. Returns when the server cannot listen or accept, or ran out of memory.
int mnv_rpc_serve(void * start_server, const char * endpoint, size_t n_threads, size_t n_devices, ggml_backend_dev_t * devices,
                  struct mnv_error * error);

// How well a backend module fits this machine: 0 does not run here, -1 has no opinion. Loads the file, so that whatever its
// constructors do happens here, and lets go of it. MNV_NULL when the system's loader refuses it; the text says why.
int mnv_module_score(const char * path, int * score, struct mnv_error * error);

struct mnv_trial;

// A small product on one device, in steps: whoever calls can say which of them was under way when the process ended. With
// `repacked` its weights lie in the first buffer type for repacked weights. `out` receives null when the device or the buffer
// type does not compute such a product.
int  mnv_trial_new(ggml_backend_dev_t device, bool repacked, struct mnv_trial ** out, struct mnv_error * error);
// `distance` receives the normalised mean squared distance to the product computed with doubles; NaN when a value is one.
int  mnv_trial_run(struct mnv_trial * trial, double * distance, struct mnv_error * error);
void mnv_trial_free(struct mnv_trial * trial);

// What a device does in a step of one token.
struct mnv_speed {
    double bytes_per_second;   // of quantised weights that a matrix-vector product reads
    double round_trip_seconds; // what it takes beyond the reading to go from the host to the device and back
};

// `host` is the CPU, with so many threads; null where the device is the CPU, to which there is no way. Takes 64 MiB of the memory
// of each meanwhile, and a few tenths of a second. MNV_NULL when one of them does not compute such products.
int mnv_speed_measure(ggml_backend_dev_t device, ggml_backend_dev_t host, int n_threads, struct mnv_speed * out,
                      struct mnv_error * error);

void mnv_string_free(char * string);

#ifdef __cplusplus
}
#endif
