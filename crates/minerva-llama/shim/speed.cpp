// How fast a device reads weights, and what it costs to alternate between it and the host (src/speed.rs).

#include "guard.h"
#include "owned.h"

#include <algorithm>
#include <chrono>
#include <vector>

namespace {

// A large layer's rows; so many of them that they fit into few caches.
constexpr int64_t COLUMNS      = 4096;
constexpr size_t  WEIGHT_BYTES = 64u << 20;

// Parts that are read in turns, each with as many operations behind it as a layer has: over RPC the graph itself travels.
constexpr int PARTS = 8;
constexpr int NODES = 24;

// The best run counts, since others use the machine and the network too.
constexpr int    RUNS         = 16;
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

// Weights on one device, and the products with them: the whole, and its parts.
class side {
  public:
    // Null, with the reason in `problem`, when the device cannot do it.
    static std::unique_ptr<side> make(ggml_backend_dev_t device, int n_threads, const char ** problem) {
        auto made = std::make_unique<side>();
        made->backend.reset(ggml_backend_dev_init(device, nullptr));
        if (!made->backend) {
            *problem = "the backend cannot be initialised";
            return nullptr;
        }
        auto set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
        if (set_n_threads) {
            set_n_threads(made->backend.get(), n_threads);
        }
        made->describe();
        if (!ggml_backend_dev_supports_op(device, made->whole) || !ggml_backend_dev_supports_op(device, made->parts[0])) {
            *problem = "the device does not compute matrix products";
            return nullptr;
        }
        made->buffer.reset(ggml_backend_alloc_ctx_tensors(made->owner.get(), made->backend.get()));
        if (!made->buffer) {
            *problem = "64 MiB of its memory cannot be allocated";
            return nullptr;
        }
        // Pages that nobody wrote are one page. As numbers, these bytes are small and finite.
        ggml_backend_buffer_clear(made->buffer.get(), 0x11);
        return made;
    }

    // The hidden state goes there, a product is computed, and so many of its bytes come back.
    void step(ggml_tensor * product, size_t result_bytes) {
        context_ptr   graph_owner = mnv_new_context(0);
        ggml_cgraph * graph       = ggml_new_graph(graph_owner.get());
        ggml_build_forward_expand(graph, product);
        ggml_backend_tensor_set(state, input.data(), 0, ggml_nbytes(state));
        const ggml_status now = ggml_backend_graph_compute(backend.get(), graph);
        status                = status == GGML_STATUS_SUCCESS ? now : status;
        ggml_backend_tensor_get(product, output.data(), 0, result_bytes);
    }

    double whole_seconds() {
        return least_seconds([this] { step(whole, sizeof(float)); });
    }

    ggml_tensor *              whole = nullptr;
    std::vector<ggml_tensor *> parts;
    ggml_status                status = GGML_STATUS_SUCCESS;

  private:
    void describe() {
        owner                  = mnv_new_context(PARTS * (NODES + 2) + 4);
        ggml_context * context = owner.get();
        const int64_t  rows    = static_cast<int64_t>(WEIGHT_BYTES / ggml_row_size(GGML_TYPE_Q4_0, COLUMNS)) / PARTS * PARTS;
        ggml_tensor *  weights = ggml_new_tensor_2d(context, GGML_TYPE_Q4_0, COLUMNS, rows);
        state                  = ggml_new_tensor_1d(context, GGML_TYPE_F32, COLUMNS);
        whole                  = ggml_mul_mat(context, weights, state);
        for (int part = 0; part < PARTS; part++) {
            const size_t  offset = part * (rows / PARTS) * weights->nb[1];
            ggml_tensor * view   = ggml_view_2d(context, weights, COLUMNS, rows / PARTS, weights->nb[1], offset);
            ggml_tensor * result = ggml_mul_mat(context, view, state);
            for (int node = 0; node < NODES; node++) {
                result = ggml_scale(context, result, 1.0f);
            }
            parts.push_back(result);
        }
        output.resize(rows);
    }

    // Fields go in reverse order: buffers before the backend.
    backend_ptr        backend{ nullptr, ggml_backend_free };
    context_ptr        owner{ nullptr, ggml_free };
    buffer_ptr         buffer{ nullptr, ggml_backend_buffer_free };
    ggml_tensor *      state = nullptr;
    std::vector<float> input = std::vector<float>(COLUMNS, 0.5f);
    std::vector<float> output;
};

// One after the other on each part; what that takes beyond the reading.
double alternation_seconds(side & device, side & host, double whole_seconds, double host_whole_seconds) {
    const double both = least_seconds([&] {
        for (int part = 0; part < PARTS; part++) {
            for (side * now : { &device, &host }) {
                now->step(now->parts[part], COLUMNS / 2 * sizeof(float));
            }
        }
    });
    return std::max(both - whole_seconds - host_whole_seconds, 0.0) / PARTS;
}

} // namespace

int mnv_speed_measure(ggml_backend_dev_t device, ggml_backend_dev_t host, int n_threads, mnv_speed * out, mnv_error * error) {
    return mnv_guard(error, [&] {
        const char * problem = nullptr;
        const auto   far     = side::make(device, n_threads, &problem);
        const auto   near    = far && host ? side::make(host, n_threads, &problem) : nullptr;
        if (problem) {
            mnv_set_error(error, problem);
            return MNV_NULL;
        }
        const double whole_seconds  = far->whole_seconds();
        out->bytes_per_second       = static_cast<double>(WEIGHT_BYTES) / std::max(whole_seconds, 1e-9);
        out->round_trip_seconds     = near ? alternation_seconds(*far, *near, whole_seconds, near->whole_seconds()) : 0.0;
        const ggml_status status = far->status != GGML_STATUS_SUCCESS || !near ? far->status : near->status;
        if (status != GGML_STATUS_SUCCESS) {
            mnv_set_error(error, ggml_status_to_string(status));
            return MNV_NULL;
        }
        return MNV_OK;
    });
}
