#!/bin/sh
# Everything that must pass: `make test` calls this, and so does .ci/run.
#   sh tests/run.sh          all of it; ONLY=torch runs one backend
#   sh tests/run.sh quick    lint, types and the fast tests on torch
#   sh tests/run.sh long     all of it, with the tests marked `long`, and long fuzzing
# BIN is the virtual environment's folder of programs.
set -eu
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
how=${1:-all}
# Two test processes share the cores; threads inside each would fight over them.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2
export MPLBACKEND=Agg
# Programs that jax has compiled once are there for the other tests, processes and runs. They hold
# this processor's instructions.
flags=$(grep -m 1 '^flags' /proc/cpuinfo 2>/dev/null | cksum | cut -d ' ' -f 1)
export JAX_COMPILATION_CACHE_DIR="$PWD/.pytest_cache/jax-$flags"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=$(( cores < 2 ? 1 : cores > 4 ? 4 : cores ))

tests_on() { # BACKEND [options of pytest]
    echo "== tests on $1"
    backend=$1
    shift
    # No second life for a process that dies: pytest-xdist waits for ever for the rest of its file.
    KERAS_BACKEND=$backend "$BIN/python" -m pytest -q -n "$workers" --dist loadfile \
        --no-loadscope-reorder --max-worker-restart 0 --memory-limit "$memory" tests "$@"
}

echo "== ruff"
"$BIN/ruff" check .
"$BIN/ruff" format --check .

echo "== mypy, and doctests beside it"
"$BIN/mypy" &
if [ "$how" != quick ]; then
    KERAS_BACKEND=torch "$BIN/python" -m pytest -q --doctest-modules keras_resnet
fi
wait $!

memory=3.5  # GB of a test process; 2.7 is usual, and AlexNets add to what others left
if [ "$how" = quick ]; then
    # Rooms whose tests train, export or draw are left to `make test`.
    tests_on torch -m "not slow" --ignore tests/training --ignore tests/runtimes \
        --ignore tests/inference --ignore tests/reports
    exit
fi
if [ "$how" = long ]; then
    export KERAS_RESNET_LONG=1 KERAS_RESNET_KILLS=30
    memory=5
fi

for backend in ${ONLY:-torch tensorflow jax}; do
    tests_on "$backend"
done

if [ "$how" = long ]; then
    echo "== fuzzing"
    for seed in 0 1; do
        (ulimit -v 8000000 && "$BIN/python" tests/weights/fuzz_checkpoint.py --minutes 5 --seed $seed)
        (ulimit -v 8000000 &&
            "$BIN/python" tests/weights/fuzz_checkpoint.py --minutes 2 --seed $seed --read-with torch)
        (ulimit -v 8000000 && "$BIN/python" tests/models/fuzz_keras.py --minutes 5 --seed $seed)
        (ulimit -v 8000000 && "$BIN/python" tests/data/fuzz_images.py --minutes 2 --seed $seed)
    done
    echo "== sixty epochs in one process"
    for backend in ${ONLY:-torch tensorflow jax}; do
        KERAS_BACKEND=$backend "$BIN/python" tests/training/soak_train.py
    done
    echo "== soak of the server"
    KERAS_BACKEND=torch "$BIN/python" tests/inference/soak_serve.py --requests 5000 --at-once 16
fi
