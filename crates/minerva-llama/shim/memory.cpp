// Bytes per device of a context, also of one that allocated nothing.

#include "guard.h"

#include "llama-ext.h"

static void set_name(mnv_device_bytes & entry, const char * name) {
    std::snprintf(entry.name, sizeof(entry.name), "%s", name);
}

int mnv_context_memory(const llama_context * ctx, mnv_device_bytes * out, size_t * n, mnv_error * error) {
    return mnv_guard(error, [&] {
        const size_t room = *n;
        size_t       used = 0;

        auto entry_of = [&](const char * name) -> mnv_device_bytes * {
            for (size_t i = 0; i < used && i < room; i++) {
                if (std::strncmp(out[i].name, name, sizeof(out[i].name)) == 0) {
                    return &out[i];
                }
            }
            used++;
            if (used > room) {
                return nullptr;
            }
            out[used - 1] = {};
            set_name(out[used - 1], name);
            return &out[used - 1];
        };

        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            ggml_backend_dev_t device  = ggml_backend_buft_get_device(type);
            const bool         on_host = ggml_backend_buft_is_host(type) || !device ||
                                 ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
            if (mnv_device_bytes * entry = entry_of(on_host ? "Host" : ggml_backend_dev_name(device))) {
                entry->model_bytes   += bytes.model;
                entry->context_bytes += bytes.context;
                entry->compute_bytes += bytes.compute;
            }
        }
        *n = used;
        return used > room ? MNV_TOO_SMALL : MNV_OK;
    });
}
