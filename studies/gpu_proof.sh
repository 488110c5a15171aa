#!/usr/bin/env bash
# The comparison of one net with many, on one GPU, in twelve minutes: studies/gpu_proof.sh DATA [FOLDER]
#
# DATA is the whole of CIFAR-10, as folder:/path/to/cifar10. FOLDER gets everything; by default runs/gpu_proof:
#   train_step.json       images/s of training ResNet-50 at 224, from batches on the device
#   input_pipeline.json   images/s of the input pipeline alone
#   F_seed0.csv ...       ResNet-20 (study F): a row for each instance, as soon as its net is swept
#   J_seed0.csv ...       ResNet-18 (study J)
#   F.csv, J.csv          the rows of all seeds, for studies/report.py F --results=FOLDER/F.csv
# The same command resumes where the time ran out. A net this small leaves a large GPU idle, so the seeds train at the
# same time, each in a process of its own.
#
# Environment: PYTHON; MINUTES, 12; SEEDS, "0 1 2"; EPOCHS, the studies' 40; WORKERS, processes that read images for each
# seed, 1; PARTS, a study and its recipes each, in order; WHEELS, a folder of wheels to install first, for a machine
# without a network; BENCHMARKS, empty for none. A rehearsal on a CPU, at a hundredth of the length:
#   EPOCHS=0.4 SEEDS=0 WORKERS=0 MINUTES=60 PEAK=resnet50:64:8 DTYPE=float32 studies/gpu_proof.sh DATA
set -u
data=${1:?"usage: studies/gpu_proof.sh DATA [FOLDER], as studies/gpu_proof.sh folder:/path/to/cifar10"}
case $data in folder:/*) ;; folder:*) data=folder:$(realpath "${data#folder:}") ;; esac
results=$(mkdir -p "${2:-runs/gpu_proof}" && realpath "${2:-runs/gpu_proof}")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} seeds=${SEEDS:-0 1 2} end=$((SECONDS + 60 * ${MINUTES:-12}))
parts=${PARTS-F:plain,sdpoint J:plain,sdpoint F:plain_24,plain_w8,plain_20,plain_w12}

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$results/packages" "$WHEELS"/*.whl || exit
    export PYTHONPATH=$results/packages
fi
# Read by the three processes, and by the next start: a program is compiled once.
export JAX_COMPILATION_CACHE_DIR=$results/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2

# Alone on the machine, before any training starts. Each at most once, in at most a sixth of the time.
for benchmark in ${BENCHMARKS-train_step input_pipeline}; do
    [ -s "$results/$benchmark.json" ] && continue
    case $benchmark in
        train_step) flags=(--nets="${PEAK:-resnet50:224:256}" --dtype="${DTYPE:-bfloat16}" --peers= --rounds=5 --steps=10) ;;
        input_pipeline) flags=(--rate=4500 --rounds=3 --seconds=0.5) ;;
    esac
    echo "== $benchmark"
    timeout $(((end - SECONDS) / 6)) "$python" "benchmarks/$benchmark.py" "${flags[@]}" --json="$results/$benchmark.json" ||
        echo "$benchmark ended with code $?"
done

# SIGTERM saves a checkpoint. Of a sweep, whose instances are few seconds each, the finished ones are cached.
# In the foreground, timeout spares the processes that read images, which a training needs until it has saved.
run_seed() {
    for part in $parts; do
        [ $((end - SECONDS)) -gt 0 ] || return 75
        timeout --foreground --kill-after=20 $((end - SECONDS)) "$python" studies/run.py "${part%:*}" \
            --cells="${part#*:}" --seeds="$1" --data="$data" --num-workers="${WORKERS:-1}" ${EPOCHS:+--epochs="$EPOCHS"} \
            --out="$results/runs_seed$1" --results="$results/${part%:*}_seed$1.csv" || return
    done
}
read -ra all <<<"$seeds"
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.$((90 / ${#all[@]}))
echo "== $parts; seeds $seeds"
pids=() code=0
for seed in $seeds; do
    run_seed "$seed" >>"$results/seed$seed.log" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done

tail -qn 1 "$results"/seed*.log
for study in F J; do
    rows=("$results/$study"_seed*.csv)
    [ -s "${rows[0]}" ] || continue
    { head -qn 1 "${rows[0]}" && tail -qn +2 "${rows[@]}"; } >"$results/$study.csv"
    echo "$results/$study.csv: $(($(wc -l <"$results/$study.csv") - 1)) rows"
done
exit $code
