#!/bin/sh
# Everything that must pass: `make test` calls this, and so does .ci/run.
# BIN is the virtual environment's folder of programs; ONLY=torch runs one backend.
set -eu
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
# Two test processes share the cores; threads inside each would fight over them.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2
export MPLBACKEND=Agg
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=$(( cores < 2 ? 1 : cores > 4 ? 4 : cores ))

echo "== ruff"
"$BIN/ruff" check .
"$BIN/ruff" format --check .

for backend in ${ONLY:-torch tensorflow jax}; do
    echo "== tests on $backend"
    # No second life for a process that dies: pytest-xdist waits for ever for the rest of its file.
    KERAS_BACKEND=$backend "$BIN/python" -m pytest -q -n "$workers" --dist loadfile \
        --max-worker-restart 0 tests
done

echo "== doctests"
KERAS_BACKEND=torch "$BIN/python" -m pytest -q --doctest-modules keras_resnet
