#!/bin/sh
# Builds Minerva's CUDA backend for the GPUs of this machine and puts it where Minerva looks at its next start.
#
# Needs nvcc (CUDA 12 or newer), cmake (3.18 or newer) and a C++ compiler; neither cargo nor a network. One GPU model takes
# minutes on 16 cores. Variables:
#   CUDA_ARCHITECTURES   what to build for, such as `90` or `80;90`; the GPUs of this machine otherwise
#   CUDACXX              nvcc, when it is neither on PATH nor in /usr/local/cuda
#   JOBS                 compilers at once; as many as there are cores and 2 GB of free memory for each otherwise
#   BUILD_DIR            where to build; a temporary folder, removed at the end, otherwise
set -eu

fail() {
    echo "error: $*" >&2
    exit 1
}

here=$(cd "$(dirname "$0")" && pwd)
modules=$(cd "$here/../../lib/minerva" 2>/dev/null && pwd) || fail "this script belongs into the folder backends/cuda of a bundle"
[ -w "$modules" ] || fail "$modules is not writable: run this as its owner"

nvcc=${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
"$nvcc" --version >/dev/null 2>&1 || fail "no nvcc: install the CUDA toolkit, or say where it is with CUDACXX"
command -v cmake >/dev/null || fail "no cmake: install it (apt install cmake, or pip install cmake)"

architectures=${CUDA_ARCHITECTURES:-}
if [ -z "$architectures" ]; then
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) ||
        fail "nvidia-smi finds no GPU: name what to build for with CUDA_ARCHITECTURES"
    # `9.0` is 90; a machine with several kinds gets code for each.
    architectures=$(echo "$capabilities" | tr -d ' .' | sort -u | paste -sd ';' -)
fi

jobs=${JOBS:-}
if [ -z "$jobs" ]; then
    jobs=$(nproc)
    by_memory=$(awk '/^MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo)
    [ "$by_memory" -ge "$jobs" ] || jobs=$by_memory
    [ "$jobs" -ge 1 ] || jobs=1
fi

if [ -n "${BUILD_DIR:-}" ]; then
    build=$BUILD_DIR
else
    build=$(mktemp -d)
    trap 'rm -rf "$build"' EXIT
fi

echo "building for compute capability $architectures with $jobs jobs; nvcc is $nvcc"
generator=
if command -v ninja >/dev/null; then
    generator="-G Ninja"
fi
# shellcheck disable=SC2086 # no generator is no argument
cmake -S "$here" -B "$build" $generator -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_COMPILER="$nvcc" \
    -DCMAKE_CUDA_ARCHITECTURES="$architectures"
cmake --build "$build" --target ggml-cuda --parallel "$jobs"

# Renamed into place: a Minerva that starts meanwhile sees the old module or the new one.
cp -L "$build/bin/libggml-cuda.so" "$modules/.libggml-cuda.so.new"
mv "$modules/.libggml-cuda.so.new" "$modules/libggml-cuda.so"
echo "done: $modules/libggml-cuda.so"
"$here/../../bin/minerva" --gpu=debug || fail "the module was built, but Minerva does not start"
