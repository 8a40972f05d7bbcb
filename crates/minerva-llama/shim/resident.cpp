// Host memory that holds nothing yet is not written to, so that it takes no memory: a page that was never touched reads as zeros.
//
// llama.cpp writes zeros over a new cache, and between streams of cells it copies whole streams; both make every page resident.
// The host's buffer type gets buffers whose `clear` gives pages back and which do not write zeros over zeros.

#include "guard.h"

#include "ggml-backend-impl.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>

// ggml's interfaces are internal: look at ggml-backend-impl.h again before raising this.
static_assert(GGML_BACKEND_API_VERSION == 3, "ggml's interface for buffers has changed");

static decltype(ggml_backend_buffer_type_i::alloc_buffer) plain_alloc = nullptr;
static decltype(ggml_backend_buffer_i::clear)             plain_clear = nullptr;
static decltype(ggml_backend_buffer_i::set_tensor)        plain_set   = nullptr;

static size_t page_bytes() {
    static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
}

static uintptr_t page_after(uintptr_t address) {
    return (address + page_bytes() - 1) / page_bytes() * page_bytes();
}

// Makes whole pages read as zeros without their taking memory. Only pages of private anonymous memory do that, which is what
// malloc gives unless somebody replaced it: a byte that is not zero before has to be zero after.
static bool give_back(char * begin, size_t n) {
    volatile char * sample = begin;
    *sample                = 1;
    return madvise(begin, n, MADV_DONTNEED) == 0 && *sample == 0;
}

static void lazy_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    const uintptr_t base  = reinterpret_cast<uintptr_t>(buffer->iface.get_base(buffer));
    const uintptr_t end   = base + buffer->size;
    const uintptr_t first = page_after(base);
    const uintptr_t last  = end / page_bytes() * page_bytes();
    if (value != 0 || first >= last || !give_back(reinterpret_cast<char *>(first), last - first)) {
        plain_clear(buffer, value);
        return;
    }
    std::memset(reinterpret_cast<char *>(base), 0, first - base);
    std::memset(reinterpret_cast<char *>(last), 0, end - last);
}

static bool is_zero(const char * bytes, size_t n) {
    return n == 0 || (bytes[0] == 0 && std::memcmp(bytes, bytes + 1, n - 1) == 0);
}

// Copies between tensors of the host arrive here as well. Bytes other than zeros, which is nearly all, cost one comparison a page.
static void lazy_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const char *    from  = static_cast<const char *>(data);
    char *          to    = static_cast<char *>(tensor->data) + offset;
    const uintptr_t start = reinterpret_cast<uintptr_t>(to);
    for (size_t at = 0; at < size;) {
        const size_t n = std::min<size_t>(size, page_after(start + at + 1) - start) - at;
        if (!is_zero(from + at, n) || !is_zero(to + at, n)) {
            std::memcpy(to + at, from + at, n);
        }
        at += n;
    }
}

static ggml_backend_buffer_t lazy_alloc(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = plain_alloc(type, size);
    if (buffer && buffer->iface.clear == plain_clear && buffer->iface.set_tensor == plain_set) {
        buffer->iface.clear      = lazy_clear;
        buffer->iface.set_tensor = lazy_set;
    }
    return buffer;
}

void mnv_leave_untouched(void) {
    ggml_backend_buffer_type_t type  = ggml_backend_cpu_buffer_type();
    ggml_backend_buffer_t      plain = ggml_backend_buft_alloc_buffer(type, page_bytes());
    if (!plain) {
        return; // no room for a page: what comes next will say so
    }
    plain_clear = plain->iface.clear;
    plain_set   = plain->iface.set_tensor;
    ggml_backend_buffer_free(plain);
    plain_alloc              = type->iface.alloc_buffer;
    type->iface.alloc_buffer = lazy_alloc;
}
#else
void mnv_leave_untouched(void) {}
#endif
