#!/usr/bin/env bash
# Validates the project on a CUDA machine in under 8 minutes: bash tests/gpu/run.sh [OUT]. See tests/gpu/README.md.
# The exit status is that of the correctness parts. Without a GPU, what needs one is skipped by name.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-gpu-check}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
rm -f "$out"/{report.json,report.md,failures.log,log.txt}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
started=$SECONDS

# The project is used as it lies here; what the machine's Python lacks comes from the folder of wheels.
"$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --find-links "$root/tests/gpu/wheels" --target "$work/site" \
    hydra-core omegaconf antlr4-python3-runtime crc32c torchao schedulefree prodigyopt || {
    echo "tests/gpu/wheels lacks a package for $("$python" --version): see tests/gpu/README.md" >&2
    exit 2
}
mkdir "$work/parts" "$work/tmp"
export PYTHONPATH="$root:$work/site" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 TMPDIR="$work/tmp"
cd "$root" || exit 2

# Kills what a part has left running: every process that inherited this run's TMPDIR.
kill_leftovers() {
    local file pid
    for file in $(grep -lsz "^TMPDIR=$TMPDIR$" /proc/[0-9]*/environ); do
        pid=${file//[!0-9]/}
        kill -9 "$pid" 2>/dev/null
    done
}

report() {
    "$python" tests/gpu/report.py "$work/parts" "$out" $((SECONDS - started))
}

# part NAME SECONDS COMMAND...: a part that exceeds its time is killed; the report is written anew after each.
part() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    echo "== $name, at most $limit s: $*" | tee -a "$out/log.txt"
    timeout --kill-after=2 "$limit" "$@" >>"$out/log.txt" 2>&1 || status=$?
    kill_leftovers
    echo "$name $status $((SECONDS - began))" >>"$work/parts/parts.txt"
    echo "   status $status after $((SECONDS - began)) s"
    report >/dev/null
}

# correctness NAME SECONDS ARGUMENTS...: the tests marked gpu; the setting makes cuBLAS repeat its results.
correctness() {
    local name=$1 limit=$2
    shift 2
    part "correctness-$name" "$limit" \
        env CUBLAS_WORKSPACE_CONFIG=:4096:8 GPU_CHECK_OUTCOMES="$work/parts/outcomes-$name.jsonl" \
        "$python" -m pytest -p tests.gpu.record -p no:cacheprovider -m gpu -q -ra "$@"
}

figures=$work/parts/figures
part machine 30 "$python" tests/gpu/machine.py "$work/parts/machine.json"
correctness blocks 65 --timeout 40 tests/gpu/test_gpu_blocks.py tests/utils
correctness runs 115 --timeout 60 tests/gpu/test_gpu_runs.py
part memory 160 "$python" tests/benchmarks/memory.py --json "$figures-memory.json" --budget 150
part speed 60 "$python" tests/benchmarks/default_run.py --json "$figures-speed.json" --budget 50
part saves 45 "$python" tests/benchmarks/saves.py 1 8 --device cuda --held-only --json "$figures-saves.json" --budget 40
report
