#!/usr/bin/env bash
# Runs the benchmarks on a GPU, in under ten minutes, and first whether it computes what it should:
# benchmarks/run_gpu.sh [FOLDER FOR THE RESULTS] [BENCHMARK ...]
# Programs compiled by one benchmark are read from the persistent cache by those after it. A benchmark that outlasts
# its share of the time is stopped; what it has measured by then is in its file.
set -u
cd "$(dirname "$0")/.."
results=${1:-benchmark_results}
[ $# -gt 0 ] && shift
mkdir -p "$results"
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 XLA_PYTHON_CLIENT_MEM_FRACTION=0.5
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2

declare -A share=([correct]=90 [compile]=140 [train_step]=180 [inference]=80 [dispatch]=40 [sweep]=40)
for benchmark in "${@:-correct compile train_step inference dispatch sweep}"; do
    for name in $benchmark; do
        extra=()
        [ "$name" = compile ] && extra=(--cache="$cache")
        echo "== $name"
        timeout "${share[$name]}" python3 "benchmarks/$name.py" --preset=gpu --json="$results/$name.json" "${extra[@]}" \
            || echo "$name ended with code $?"
    done
done
