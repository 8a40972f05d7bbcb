// What a sequence holds, out of a context and back into it.

#include "guard.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>

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

// The inverse of `llama_hparams::is_masked_swa`, which no API has.
llama_pos mnv_window_begin(const llama_context * ctx, llama_pos pos) {
    const llama_hparams & hparams = ctx->get_model().hparams;
    const llama_pos       n       = (llama_pos) hparams.n_swa;
    if (n <= 0) {
        return 0;
    }
    switch (hparams.swa_type) {
        case LLAMA_SWA_TYPE_NONE:      return 0;
        case LLAMA_SWA_TYPE_STANDARD:  return std::max(0, pos + 1 - n);
        case LLAMA_SWA_TYPE_CHUNKED:   return pos / n * n;
        case LLAMA_SWA_TYPE_SYMMETRIC: return std::max(0, pos - n / 2);
    }
    return 0;
}
