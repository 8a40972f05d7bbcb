// Mends `_tile_loadconfig` of older GCCs. Included ahead of every C++ file of llama.cpp (build/llama-project.cmake).
//
// The instruction `ldtilecfg` reads 64 bytes: the shape of the eight AMX tiles. GCC's inline function tells the optimiser
// that it reads one pointer, 8 bytes. Code that fills a local configuration and loads it, as ggml_tile_config_init in
// ggml-cpu/amx/mmq.cpp does, then loses its stores beyond those 8 bytes as dead: `ldtilecfg` reads what lay on the stack and
// faults, on the first prompt. GCC's bug is PR target/114098; release 14 is right, and so are late 11, 12 and 13 releases.
// The macro below is the same instruction with an operand of all 64 bytes, so it costs nothing where the bug is mended.
// `cargo xtask test --only amx` compiles the failing pattern with and without it.
#pragma once

#if defined(__AMX_TILE__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 14

#include <immintrin.h> // first, so that the macro replaces calls and not the function's own definition

#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const unsigned char(*)[64])(config)))

#endif
