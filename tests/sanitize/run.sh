#!/usr/bin/env bash
# run.sh BIN [PYTEST_ARGS]: the CPU kernels under g++'s sanitizers, in the virtual environment of BIN.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=$1
shift
rm -rf build
FORCE_PYTHON=1 "$bin/python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
package=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
torch=$package/torch

# compile OUTPUT FLAGS SOURCES
compile() {
  g++ -std=c++20 -O1 -g -fno-omit-frame-pointer -fopenmp-simd -ffp-contract=fast \
    -DTORCH_TARGET_VERSION=0x020C000000000000 -isystem "$torch/include" "${@:2}" -o "$1" \
    -L"$torch/lib" -Wl,-rpath,"$torch/lib" -Wl,--no-as-needed -ltorch_cpu -lc10
}
mkdir -p build
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
compile "$package/ncmi_kernels/_C.abi3.so" -fPIC -shared -fsanitize=address,undefined,float-cast-overflow \
  -fno-sanitize-recover=all csrc/cpu/*.cpp &
compile build/threads -pthread -fsanitize=thread tests/sanitize/threads.cpp csrc/cpu/kernels_*.cpp
wait $!

# ThreadSanitizer needs addresses that are not randomised, and has to find the race that is there.
export TSAN_OPTIONS=halt_on_error=1
setarch -R build/threads
status=0
setarch -R build/threads overlap 2> build/race.log || status=$?
grep -q 'ThreadSanitizer: data race' build/race.log && [ $status = 66 ] || {
  echo "sanitize: ThreadSanitizer did not report a deliberate race (exit status $status)" >&2
  exit 1
}

# The interpreter is not instrumented: the run times are loaded before it. libstdc++ with them, else the run time of
# addresses does not find __cxa_throw. Python frees little when it ends, so no search for leaks. Memory that is not there
# is reported as without the sanitizer: a test wants it so.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
cd build  # child processes import from where they start: not the sources
# What ends the process is not captured, and a fault of memory is the sanitizer's to report.
"$bin/pytest" -q --capture=sys -p no:faulthandler -k 'not triton' \
  ../tests/test_{operators,extremes,kernels,accuracy,batches,errors,backends,optim,optim_state,focus,focus_operators,transforms,compile,steps}.py "$@"
