// Bytes per device of a context, also of one that allocated nothing.

#include "guard.h"

#include "llama-ext.h"

mnv_device_bytes * mnv_device_list::of(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t device  = ggml_backend_buft_get_device(type);
    const bool         on_host = ggml_backend_buft_is_host(type) || !device ||
                         ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    const char * name = on_host ? "Host" : ggml_backend_dev_name(device);
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
    std::snprintf(out[used - 1].name, sizeof(out[used - 1].name), "%s", name);
    return &out[used - 1];
}

int mnv_context_memory(const llama_context * ctx, mnv_device_bytes * out, size_t * n, mnv_error * error) {
    return mnv_guard(error, [&] {
        mnv_device_list list(out, *n);
        for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
            if (mnv_device_bytes * entry = list.of(type)) {
                entry->model_bytes   += bytes.model;
                entry->context_bytes += bytes.context;
                entry->compute_bytes += bytes.compute;
            }
        }
        return list.finish(n);
    });
}
