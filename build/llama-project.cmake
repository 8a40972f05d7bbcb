# Read by cmake at the end of llama.cpp's `project()`: .cargo/config.toml sets CMAKE_PROJECT_INCLUDE, and llama-cpp-sys-2
# hands every CMAKE_* variable on. It changes how llama.cpp is compiled, never what is compiled.
#
# Cargo does not watch this file: raise GGML_MINERVA_BUILD in .cargo/config.toml with every change here or in the header
# beside it, and llama.cpp is built again where it must be.

# ggml has a `project()` of its own and inherits what is set here.
if(NOT PROJECT_SOURCE_DIR STREQUAL CMAKE_SOURCE_DIR)
    return()
endif()

# 1. The AMX cure. The header asks the compiler's version and target itself, so that it also holds for each of the CPU
#    modules of `dynamic-backends`; outside files that are compiled for AMX it is empty.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include \"${CMAKE_CURRENT_LIST_DIR}/gcc-amx-tile-config.h\">")
endif()

# 2. The compiler cache: the dev and release profiles of cargo, and another clone on this machine, share objects.
#    Its directory and limits are in target/setup.toml, written by `cargo xtask setup`.
if(NOT CMAKE_C_COMPILER_LAUNCHER AND NOT CMAKE_CXX_COMPILER_LAUNCHER AND NOT MSVC)
    find_program(MINERVA_CCACHE ccache HINTS "${CMAKE_CURRENT_LIST_DIR}/../target/tools/bin")
    if(MINERVA_CCACHE)
        foreach(language C CXX CUDA OBJC OBJCXX)
            set(CMAKE_${language}_COMPILER_LAUNCHER "${MINERVA_CCACHE}")
        endforeach()
    endif()
endif()
