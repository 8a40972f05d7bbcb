// Hidden states out of a context, for a head that predicts further tokens from them.

#include "guard.h"

#include "llama-context.h"
#include "llama-ext.h"

int mnv_keep_hidden(llama_context * ctx, mnv_error * error) {
    return mnv_guard(error, [&] {
        llama_set_embeddings_nextn(ctx, true, /*masked=*/false);
        // Switches nothing on, but says that the step has to be laid out anew: here, where a failure is one of the load.
        llama_set_embeddings_layer_inp(ctx, 0, false);
        ctx->sched_reserve();
        return MNV_OK;
    });
}

int mnv_hidden(llama_context * ctx, const float ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        *out = llama_get_embeddings_nextn(ctx);
        return MNV_OK;
    });
}
