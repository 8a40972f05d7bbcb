// Model, context and tokenizer calls with exceptions turned into codes.

#include "guard.h"

#include "log.h"

#include <climits>

void mnv_quiet(void) {
    common_log_set_verbosity_thold(INT_MIN);
}

int mnv_model_load(const char * path, const llama_model_params * params, llama_model ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        *out = llama_model_load_from_file(path, *params);
        return *out ? MNV_OK : MNV_NULL;
    });
}

int mnv_context_new(llama_model * model, const llama_context_params * params, llama_context ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        *out = llama_init_from_model(model, *params);
        return *out ? MNV_OK : MNV_NULL;
    });
}

int mnv_decode(llama_context * ctx, const llama_batch * batch, int32_t * code, mnv_error * error) {
    return mnv_guard(error, [&] {
        *code = llama_decode(ctx, *batch);
        return MNV_OK;
    });
}

int mnv_synchronize(llama_context * ctx, mnv_error * error) {
    return mnv_guard(error, [&] {
        llama_synchronize(ctx);
        return MNV_OK;
    });
}

int mnv_tokenize(const llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens, int32_t * n,
                 bool add_special, bool parse_special, mnv_error * error) {
    return mnv_guard(error, [&] {
        const int32_t room = *n;
        const int32_t got  = llama_tokenize(vocab, text, text_len, tokens, room, add_special, parse_special);
        if (got == INT32_MIN) {
            mnv_set_error(error, "more tokens than a 32-bit count can hold");
            return MNV_EXCEPTION;
        }
        *n = got < 0 ? -got : got;
        return got < 0 ? MNV_TOO_SMALL : MNV_OK;
    });
}

int mnv_token_to_piece(const llama_vocab * vocab, llama_token token, char * buf, int32_t * n, bool special, mnv_error * error) {
    return mnv_guard(error, [&] {
        const int32_t got = llama_token_to_piece(vocab, token, buf, *n, 0, special);
        *n                = got < 0 ? -got : got;
        return got < 0 ? MNV_TOO_SMALL : MNV_OK;
    });
}

int mnv_seq_rm(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool * removed, mnv_error * error) {
    return mnv_guard(error, [&] {
        *removed = llama_memory_seq_rm(llama_get_memory(ctx), seq, p0, p1);
        return MNV_OK;
    });
}

int mnv_seq_cp(llama_context * ctx, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1, mnv_error * error) {
    return mnv_guard(error, [&] {
        llama_memory_seq_cp(llama_get_memory(ctx), src, dst, p0, p1);
        return MNV_OK;
    });
}

void mnv_string_free(char * string) {
    std::free(string);
}
