// Runs C++ code for a C caller: exceptions become a status and a text.
#pragma once

#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>

inline void mnv_set_error(mnv_error * error, const char * text) {
    if (error) {
        std::snprintf(error->text, sizeof(error->text), "%s", text);
    }
}

template <typename F> int mnv_guard(mnv_error * error, F && body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        mnv_set_error(error, "out of host memory");
        return MNV_NO_MEMORY;
    } catch (const std::exception & e) {
        mnv_set_error(error, e.what());
        return MNV_EXCEPTION;
    } catch (...) {
        mnv_set_error(error, "unknown C++ exception");
        return MNV_EXCEPTION;
    }
}

inline char * mnv_string_new(const std::string & value) {
    char * copy = static_cast<char *>(std::malloc(value.size() + 1));
    if (!copy) {
        throw std::bad_alloc();
    }
    std::memcpy(copy, value.data(), value.size());
    copy[value.size()] = '\0';
    return copy;
}

// Fills a caller's array with one entry per device.
struct mnv_device_list {
    mnv_device_list(mnv_device_bytes * out, size_t room) : out(out), room(room) {}

    // The entry of the device that memory of this type belongs to, or null when there is no room for it.
    mnv_device_bytes * of(ggml_backend_buffer_type_t type);

    int finish(size_t * n) const {
        *n = used;
        return used > room ? MNV_TOO_SMALL : MNV_OK;
    }

  private:
    mnv_device_bytes * out;
    size_t             room;
    size_t             used = 0;
};
