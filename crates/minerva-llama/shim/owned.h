// ggml's handles with owners.
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <memory>

using backend_ptr = std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)>;
using context_ptr = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

// For so many tensors and a graph; the tensors' data is allocated elsewhere.
inline context_ptr mnv_new_context(size_t n_tensors) {
    const size_t size = n_tensors * ggml_tensor_overhead() + ggml_graph_overhead();
    return context_ptr(ggml_init({ size, nullptr, /* no_alloc = */ true }), ggml_free);
}
