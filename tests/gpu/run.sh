#!/usr/bin/env bash
# Validates the project on a CUDA machine in under 8 minutes: bash tests/gpu/run.sh [OUT]. See tests/gpu/README.md.
# The exit status is that of the correctness parts. Without a GPU, what needs one is skipped by name.
set -uo pipefail
unset CDPATH
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:-gpu-check}
longest=470 # seconds in all; a part gets no more than what is left

fail() {
    echo "$1" >&2
    exit 2
}

mkdir -p "$out" && out=$(cd "$out" && pwd) && : >>"$out/log.txt" || fail "$out: expected a folder that can be written to"
python=$(command -v "${PYTHON:-python3}") || fail "PYTHON=${PYTHON:-python3}: no such program; see tests/gpu/README.md"
python=$(realpath --no-symlinks "$python") # a relative path would end at the next cd
work=$(mktemp -d) || fail "TMPDIR=${TMPDIR:-/tmp}: no temporary folder can be made there"
trap 'rm -rf "$work"' EXIT
mkdir "$work/parts" "$work/tmp"

# The project is used as it lies here; what the machine's Python lacks comes from the folder of wheels.
"$python" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --find-links "$root/tests/gpu/wheels" --target "$work/site" \
    hydra-core omegaconf antlr4-python3-runtime crc32c torchao schedulefree prodigyopt ||
    fail "$("$python" --version): not installed from tests/gpu/wheels, as pip says above; see tests/gpu/README.md"
rm -f "$out"/{report.json,report.md,failures.log,log.txt}
export PYTHONPATH="$root:$work/site" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
cd "$root" || exit 2

# Kills what a part has left running: every process that inherited its TMPDIR.
kill_leftovers() {
    local file pid
    for file in $(grep -lszF "TMPDIR=$work/tmp/$1" /proc/[0-9]*/environ); do
        pid=${file//[!0-9]/}
        kill -9 "$pid" 2>/dev/null && timeout 5 tail --pid="$pid" -f /dev/null # until its memory is free
    done
}

# part NAME SECONDS COMMAND...: a part that exceeds its time is killed, with all that it has started.
part() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    limit=$((limit < longest - SECONDS ? limit : longest - SECONDS))
    echo "== $name, at most $limit s: $*" | tee -a "$out/log.txt"
    mkdir "$work/tmp/$name"
    TMPDIR=$work/tmp/$name timeout --kill-after=2 "$((limit > 1 ? limit : 1))" "$@" >"$work/$name.txt" 2>&1 &
    wait $! || status=$?
    kill_leftovers "$name"
    cat "$work/$name.txt" >>"$out/log.txt"
    tail -c 4000 "$work/$name.txt" >"$work/parts/tail-$name.txt"
    echo "$name $status $((SECONDS - began))" >>"$work/parts/parts.txt"
    echo "   $name: status $status after $((SECONDS - began)) s"
}

# correctness NAME SECONDS ARGUMENTS...: the tests marked gpu; the setting makes cuBLAS repeat its results.
correctness() {
    local name=$1 limit=$2
    shift 2
    part "correctness-$name" "$limit" \
        env CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 \
        GPU_CHECK_OUTCOMES="$work/parts/outcomes-$name.jsonl" \
        "$python" -m pytest -p pytest_timeout -p _hypothesis_pytestplugin -p tests.gpu.record -p no:cacheprovider \
        -m gpu -q -ra --timeout 50 "$@"
}

report() {
    "$python" tests/gpu/report.py "$work/parts" "$out" "$SECONDS"
}

interrupt() {
    trap - INT TERM HUP
    kill_leftovers ""
    wait
    report >/dev/null
    exit 130
}
trap interrupt INT TERM HUP

figures=$work/parts/figures
part machine 90 "$python" tests/gpu/machine.py "$work/parts/machine.json"
# Both at once: the one waits for processes most of the time.
correctness blocks 150 tests/gpu/test_gpu_blocks.py tests/utils &
blocks=$!
correctness runs 150 tests/gpu/test_gpu_runs.py
wait $blocks
report >/dev/null
part memory 165 "$python" tests/benchmarks/memory.py --json "$figures-memory.json" --budget 155
report >/dev/null
part speed 75 "$python" tests/benchmarks/default_run.py --json "$figures-speed.json" --budget 65
report >/dev/null
part copies 25 "$python" tests/benchmarks/copies.py --json "$figures-copies.json" --budget 12
part saves 60 "$python" tests/benchmarks/saves.py 1 8 --device cuda --held-only --json "$figures-saves.json" --budget 52
report
