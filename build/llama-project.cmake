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

# 3. `dynamic-backends`, so bundles (docs/packaging.md): each library finds its neighbours wherever it is unpacked, and holds
#    no path of the machine that built it. llama-cpp-sys-2 has ggml compile in the folder of its modules, which Minerva does
#    not use: it names the folder when it loads them.
if(GGML_BACKEND_DL AND NOT MSVC)
    # llama.cpp's common library would need OpenSSL for downloads, which Minerva does not ask of it.
    set(LLAMA_OPENSSL OFF CACHE BOOL "" FORCE)
    add_compile_options("-ffile-prefix-map=${CMAKE_SOURCE_DIR}=llama.cpp")
    set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
    if(APPLE)
        set(CMAKE_INSTALL_RPATH "@loader_path;@loader_path/..")
    else()
        set(CMAKE_INSTALL_RPATH "$ORIGIN;$ORIGIN/..")
    endif()

    function(minerva_forget_module_folder)
        foreach(property COMPILE_DEFINITIONS INTERFACE_COMPILE_DEFINITIONS)
            get_target_property(definitions ggml ${property})
            list(FILTER definitions EXCLUDE REGEX "^GGML_BACKEND_DIR=")
            set_target_properties(ggml PROPERTIES ${property} "${definitions}")
        endforeach()
    endfunction()
    cmake_language(DEFER CALL minerva_forget_module_folder)
endif()
