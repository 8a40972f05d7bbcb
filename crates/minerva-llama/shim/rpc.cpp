// RPC devices and the RPC server. Both functions of ggml come from its registry, so that this file links with every build
// of llama.cpp, and works with modules that are loaded at run time.

#include "guard.h"

#include "ggml-rpc.h"

int mnv_rpc_add(void * add_server, const char * endpoint, ggml_backend_reg_t * out, mnv_error * error) {
    return mnv_guard(error, [&] {
        const auto         add      = reinterpret_cast<decltype(&ggml_backend_rpc_add_server)>(add_server);
        ggml_backend_reg_t registry = add(endpoint);
        // The handle is kept for good: while there is one, all devices of the server share its connection. Without it ggml
        // connects anew for each question, and ends the process when it cannot.
        if (registry && !ggml_backend_dev_init(ggml_backend_reg_dev_get(registry, 0), nullptr)) {
            registry = nullptr;
        }
        *out = registry;
        return MNV_OK;
    });
}

int mnv_rpc_serve(void * start_server, const char * endpoint, size_t n_threads, size_t n_devices, ggml_backend_dev_t * devices,
                  mnv_error * error) {
    return mnv_guard(error, [&] {
        const auto start = reinterpret_cast<decltype(&ggml_backend_rpc_start_server)>(start_server);
        start(endpoint, /* cache_dir = */ nullptr, n_threads, n_devices, devices);
        return MNV_OK;
    });
}
