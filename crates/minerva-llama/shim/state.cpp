// What a sequence holds, out of a context and back into it.

#include "guard.h"

#include "llama-context.h"

// A copy between streams is only noted down until the next step. Before it is made, what its target holds is not there to be saved,
// and what is restored into its source would be copied in the place of what was there.
static void mnv_apply_copies(llama_context * ctx) {
    ctx->memory_update(/*optimize=*/false);
}

static llama_state_seq_flags mnv_state_flags(bool part) {
    return part ? LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY : LLAMA_STATE_SEQ_FLAGS_NONE;
}

int mnv_state_seq_get(llama_context * ctx, llama_seq_id seq, bool part, uint8_t * dst, size_t * n, mnv_error * error) {
    return mnv_guard(error, [&] {
        mnv_apply_copies(ctx);
        const size_t needed = llama_state_seq_get_size_ext(ctx, seq, mnv_state_flags(part));
        if (!dst || *n < needed) {
            *n = needed;
            return MNV_TOO_SMALL;
        }
        *n = llama_state_seq_get_data_ext(ctx, dst, *n, seq, mnv_state_flags(part));
        return MNV_OK;
    });
}

int mnv_state_seq_set(llama_context * ctx, llama_seq_id seq, bool part, const uint8_t * src, size_t n, bool * restored, mnv_error * error) {
    return mnv_guard(error, [&] {
        mnv_apply_copies(ctx);
        *restored = llama_state_seq_set_data_ext(ctx, src, n, seq, mnv_state_flags(part)) != 0;
        return MNV_OK;
    });
}
