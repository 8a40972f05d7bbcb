// Low-rank adapters: loaded into a model, switched on in a context, and their bytes.

#include "guard.h"

#include "llama-adapter.h"
#include "llama-context.h"

#include <stdexcept>
#include <vector>

int mnv_adapter_load(llama_model * model, const char * path, llama_adapter_lora ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        *out = llama_adapter_lora_init(model, path);
        return *out ? MNV_OK : MNV_NULL;
    });
}

int mnv_adapter_memory(const llama_adapter_lora * adapter, mnv_device_bytes * out, size_t * n, mnv_error * error) {
    return mnv_guard(error, [&] {
        mnv_device_list list(out, *n);
        for (const auto & buffer : adapter->bufs) {
            if (mnv_device_bytes * entry = list.of(ggml_backend_buffer_get_type(buffer.get()))) {
                entry->model_bytes += ggml_backend_buffer_get_size(buffer.get());
            }
        }
        return list.finish(n);
    });
}

int mnv_adapter_give_back(llama_adapter_lora * adapter, mnv_error * error) {
    return mnv_guard(error, [&] {
        std::vector<ggml_backend_buffer_ptr> empty;
        for (const auto & ctx : adapter->ctxs) {
            ggml_tensor * first = ggml_get_first_tensor(ctx.get());
            if (!first) {
                continue;
            }
            empty.emplace_back(ggml_backend_buft_alloc_buffer(ggml_backend_buffer_get_type(first->buffer), 0));
            if (!empty.back()) {
                throw std::runtime_error("no empty buffer for an adapter");
            }
            for (ggml_tensor * tensor = first; tensor; tensor = ggml_get_next_tensor(ctx.get(), tensor)) {
                tensor->buffer = empty.back().get();
                tensor->data   = nullptr;
            }
        }
        adapter->bufs.swap(empty);
        return MNV_OK;
    });
}

int mnv_adapters_use(llama_context * ctx, llama_adapter_lora ** adapters, const float * scales, size_t n, mnv_error * error) {
    return mnv_guard(error, [&] {
        std::vector<float> copy(scales, scales + n); // the API's pointer is not const
        llama_set_adapters_lora(ctx, adapters, n, copy.data());
        // The step has more products now: room for it is made here, where a failure is one of the load.
        ctx->sched_reserve();
        return MNV_OK;
    });
}
