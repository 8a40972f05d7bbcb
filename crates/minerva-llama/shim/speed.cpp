// How fast a device reads weights, and how long a vector takes to it and back (src/speed.rs).

#include "guard.h"
#include "owned.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace {

// A large layer's rows; so many of them that they fit into few caches.
constexpr int64_t COLUMNS      = 4096;
constexpr size_t  WEIGHT_BYTES = 64u << 20;

// The best run counts, since others use the machine and the network too.
constexpr int    RUNS         = 32;
constexpr double MOST_SECONDS = 0.1;

double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Run> double least_seconds(Run run) {
    const double begin = seconds_now();
    double       least = 1e9;
    for (int i = 0; i < RUNS; i++) {
        const double start = seconds_now();
        run();
        const double end = seconds_now();
        least            = std::min(least, end - start);
        if (end - begin > MOST_SECONDS) {
            break;
        }
    }
    return least;
}

void set_threads(ggml_backend_dev_t device, ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device);
    auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
    if (set) {
        set(backend, n_threads);
    }
}

} // namespace

int mnv_speed_measure(ggml_backend_dev_t device, int n_threads, mnv_speed * out, mnv_error * error) {
    return mnv_guard(error, [&] {
        backend_ptr backend(ggml_backend_dev_init(device, nullptr), ggml_backend_free);
        if (!backend) {
            mnv_set_error(error, "the backend cannot be initialised");
            return MNV_NULL;
        }
        set_threads(device, backend.get(), n_threads);

        context_ptr    owner   = mnv_new_context();
        ggml_context * context = owner.get();
        const int64_t  rows    = static_cast<int64_t>(WEIGHT_BYTES / ggml_row_size(GGML_TYPE_Q4_0, COLUMNS));
        ggml_tensor *  weights = ggml_new_tensor_2d(context, GGML_TYPE_Q4_0, COLUMNS, rows);
        ggml_tensor *  state   = ggml_new_tensor_1d(context, GGML_TYPE_F32, COLUMNS);
        ggml_tensor *  product = ggml_mul_mat(context, weights, state);
        ggml_tensor *  small   = ggml_scale(context, state, 2.0f);
        if (!ggml_backend_dev_supports_op(device, product) || !ggml_backend_dev_supports_op(device, small)) {
            mnv_set_error(error, "the device does not compute matrix products");
            return MNV_NULL;
        }
        buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(context, backend.get()), ggml_backend_buffer_free);
        if (!buffer) {
            mnv_set_error(error, "64 MiB of its memory cannot be allocated");
            return MNV_NULL;
        }
        // Pages that nobody wrote are one page. As numbers, these bytes are small and finite.
        ggml_backend_buffer_clear(buffer.get(), 0x11);

        const std::vector<float> input(COLUMNS, 0.5f);
        std::vector<float>       output(COLUMNS);
        ggml_status              status = GGML_STATUS_SUCCESS;
        const auto trip = [&](ggml_tensor * result, size_t result_bytes) {
            context_ptr   graph_owner = mnv_new_context();
            ggml_cgraph * graph       = ggml_new_graph_custom(graph_owner.get(), 16, false);
            ggml_build_forward_expand(graph, result);
            return least_seconds([&, graph] {
                ggml_backend_tensor_set(state, input.data(), 0, ggml_nbytes(state));
                const ggml_status now = ggml_backend_graph_compute(backend.get(), graph);
                status                = status == GGML_STATUS_SUCCESS ? now : status;
                ggml_backend_tensor_get(result, output.data(), 0, result_bytes);
            });
        };
        out->round_trip_seconds = trip(small, ggml_nbytes(small));
        // On a busy machine the two are not from the same moment.
        const double with_trip       = trip(product, sizeof(float));
        const double product_seconds = std::max(with_trip - out->round_trip_seconds, with_trip / 2);
        out->bytes_per_second        = static_cast<double>(ggml_nbytes(weights)) / std::max(product_seconds, 1e-9);
        if (status != GGML_STATUS_SUCCESS) {
            mnv_set_error(error, ggml_status_to_string(status));
            return MNV_NULL;
        }
        return MNV_OK;
    });
}
