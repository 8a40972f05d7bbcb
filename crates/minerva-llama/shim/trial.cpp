// One small matrix product on one device, and the score of a module: what a probe tries before the server does (src/trial.rs).
// Nothing here guards against a device that crashes or hangs: it is meant to run in a process that may.

#include "guard.h"
#include "owned.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <dlfcn.h>
#endif

int mnv_module_score(const char * path, int * score, mnv_error * error) {
    return mnv_guard(error, [&] {
#ifdef _WIN32
        HMODULE module = LoadLibraryA(path);
        if (!module) {
            mnv_set_error(error, "LoadLibrary failed");
            return MNV_NULL;
        }
        void * symbol = reinterpret_cast<void *>(GetProcAddress(module, "ggml_backend_score"));
#else
        void * module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (!module) {
            const char * reason = dlerror();
            mnv_set_error(error, reason ? reason : "dlopen failed");
            return MNV_NULL;
        }
        void * symbol = dlsym(module, "ggml_backend_score");
#endif
        *score = symbol ? reinterpret_cast<int (*)()>(symbol)() : -1;
#ifdef _WIN32
        FreeLibrary(module);
#else
        dlclose(module);
#endif
        return MNV_OK;
    });
}

namespace {

// Rows that AMX and the other repacked layouts take: a multiple of 32, whole blocks of q4_0.
constexpr int64_t COLUMNS = 256;
constexpr int64_t ROWS    = 64;
constexpr int64_t TOKENS  = 16;

// Values between -1 and 1 that repeat on every machine.
std::vector<float> values(size_t n, uint32_t state) {
    std::vector<float> out(n);
    for (float & value : out) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
    }
    return out;
}

ggml_backend_buffer_type_t repacked_type(ggml_backend_dev_t device) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device);
    auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
    ggml_backend_buffer_type_t * types = get ? get(device) : nullptr;
    return types ? types[0] : nullptr;
}

} // namespace

// Fields go in reverse order: buffers before the backend.
struct mnv_trial {
    backend_ptr         backend{ nullptr, ggml_backend_free };
    context_ptr         weights_context{ nullptr, ggml_free };
    context_ptr         context{ nullptr, ggml_free };
    buffer_ptr          weights_buffer{ nullptr, ggml_backend_buffer_free };
    buffer_ptr          buffer{ nullptr, ggml_backend_buffer_free };
    ggml_tensor *       product = nullptr;
    std::vector<double> expected;
};

int mnv_trial_new(ggml_backend_dev_t device, bool repacked, mnv_trial ** out, mnv_error * error) {
    return mnv_guard(error, [&] {
        *out = nullptr;
        ggml_backend_buffer_type_t weights_type = repacked ? repacked_type(device) : ggml_backend_dev_buffer_type(device);
        if (!weights_type) {
            return MNV_OK;
        }
        auto trial = std::make_unique<mnv_trial>();
        trial->backend.reset(ggml_backend_dev_init(device, nullptr));
        if (!trial->backend) {
            mnv_set_error(error, "the backend cannot be initialised");
            return MNV_NULL;
        }
        trial->weights_context = mnv_new_context(8);
        trial->context         = mnv_new_context(8);
        ggml_context * context = trial->context.get();

        ggml_tensor * weights = ggml_new_tensor_2d(trial->weights_context.get(), GGML_TYPE_Q4_0, COLUMNS, ROWS);
        ggml_tensor * tokens  = ggml_new_tensor_2d(context, GGML_TYPE_F32, COLUMNS, TOKENS);
        trial->product        = ggml_mul_mat(context, weights, tokens);
        trial->weights_buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(trial->weights_context.get(), weights_type));
        trial->buffer.reset(ggml_backend_alloc_ctx_tensors(context, trial->backend.get()));
        if (!trial->weights_buffer || !trial->buffer) {
            mnv_set_error(error, "a few kilobytes of its memory cannot be allocated");
            return MNV_NULL;
        }
        if (!ggml_backend_dev_supports_op(device, trial->product)) {
            return MNV_OK;
        }

        const std::vector<float> plain = values(COLUMNS * ROWS, 1);
        std::vector<uint8_t>     packed(ggml_row_size(GGML_TYPE_Q4_0, COLUMNS) * ROWS);
        ggml_quantize_chunk(GGML_TYPE_Q4_0, plain.data(), packed.data(), 0, ROWS, COLUMNS, nullptr);
        std::vector<float> rounded(plain.size());
        ggml_get_type_traits(GGML_TYPE_Q4_0)->to_float(packed.data(), rounded.data(), COLUMNS * ROWS);
        const std::vector<float> inputs = values(COLUMNS * TOKENS, 2);
        ggml_backend_tensor_set(weights, packed.data(), 0, packed.size());
        ggml_backend_tensor_set(tokens, inputs.data(), 0, inputs.size() * sizeof(float));
        // Memory that another device's trial has freed still holds the right answer: a device that computes nothing would pass.
        const std::vector<float> nothing(ROWS * TOKENS, NAN);
        ggml_backend_tensor_set(trial->product, nothing.data(), 0, nothing.size() * sizeof(float));

        trial->expected.assign(ROWS * TOKENS, 0.0);
        for (int64_t token = 0; token < TOKENS; token++) {
            for (int64_t row = 0; row < ROWS; row++) {
                double sum = 0.0;
                for (int64_t column = 0; column < COLUMNS; column++) {
                    sum += static_cast<double>(rounded[row * COLUMNS + column]) * inputs[token * COLUMNS + column];
                }
                trial->expected[token * ROWS + row] = sum;
            }
        }
        *out = trial.release();
        return MNV_OK;
    });
}

int mnv_trial_run(mnv_trial * trial, double * distance, mnv_error * error) {
    return mnv_guard(error, [&] {
        ggml_cgraph * graph = ggml_new_graph_custom(trial->context.get(), 16, false);
        ggml_build_forward_expand(graph, trial->product);
        const ggml_status status = ggml_backend_graph_compute(trial->backend.get(), graph);
        if (status != GGML_STATUS_SUCCESS) {
            mnv_set_error(error, ggml_status_to_string(status));
            return MNV_NULL;
        }
        std::vector<float> product(trial->expected.size());
        ggml_backend_tensor_get(trial->product, product.data(), 0, product.size() * sizeof(float));
        double apart = 0.0;
        double size  = 0.0;
        for (size_t i = 0; i < product.size(); i++) {
            const double difference = product[i] - trial->expected[i];
            apart += difference * difference;
            size += trial->expected[i] * trial->expected[i];
        }
        *distance = apart / size;
        return MNV_OK;
    });
}

void mnv_trial_free(mnv_trial * trial) {
    delete trial;
}
