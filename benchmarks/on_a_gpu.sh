#!/usr/bin/env bash
# What only a GPU can tell, for whoever has one for a quarter of an hour: two halves of at most six minutes each.
#
#     benchmarks/on_a_gpu.sh right        Does it compute the right numbers?
#     benchmarks/on_a_gpu.sh fast         How fast is it?
#     benchmarks/on_a_gpu.sh PART ...     parts alone; LIMIT is the seconds that each may take
#
# Parts run in the order of their worth, each until its time limit; one that fails stops no other. Logs, and results as
# they come, go to the folder OUT (else on-a-gpu). A summary of all that ran there comes last, and again by
# `python -m benchmarks.summary OUT`.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${OUT:=on-a-gpu}" && cd "$OUT" && pwd)
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
options=(--device "$device" --seconds "${SECONDS_A_ROW:-0.4}")
[ "$device" = cuda ] || options+=(--tiny)
# Each process takes half a gigabyte of the GPU.
workers=(--numprocesses "${WORKERS:-auto}" --maxprocesses 16)
pytest=("$python" -m pytest -v --tb=short "${workers[@]}" --failed-first -o "cache_dir=$out/pytest")
smoke=("$python" -m benchmarks.smoke "${options[@]}")
export PYTHONUNBUFFERED=1

# part NAME SECONDS COMMAND ...
part() {
    local name=$1 limit=${LIMIT:-$2} started=$SECONDS status=0
    shift 2
    sed -i "/^$name: /d" "$out/parts.txt" # of an earlier run
    timeout --signal INT --kill-after 10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    printf '%s: exit %d after %d s: %s\n' "$name" "$status" $((SECONDS - started)) "$(tail -n 1 "$out/$name.log")" |
        tee -a "$out/parts.txt"
}

run() {
    local each name=$1 output=(--output "$out/$1.json")
    case $name in
        right) for each in smoke gpu_tests properties memcheck racecheck calibration; do run "$each"; done ;;
        fast) for each in targets sampling; do run "$each"; done ;;
        smoke) part "$name" 60 "${smoke[@]}" "${output[@]}" ;; # compiles every program, one after the other
        gpu_tests) part "$name" 70 "${pytest[@]}" -m gpu ;;
        properties) # as many as there is time for
            part "$name" 75 "${pytest[@]}" --device "$device" \
                tests/test_{primitive,derivatives,layer,bounded,compile,flop_counter,steps}.py
            ;;
        memcheck | racecheck) # each allocation by itself, so that what lies beyond it is seen
            part "$name" 45 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
                compute-sanitizer --tool "$name" --report-api-errors no --error-exitcode 1 "${smoke[@]}"
            ;;
        calibration) part "$name" 30 "$python" -m benchmarks.calibration "${options[@]}" "${output[@]}" ;;
        targets) part "$name" 180 "$python" -m benchmarks.layer "${options[@]}" "${output[@]}" ;;
        sampling) part "$name" 150 "$python" -m benchmarks.sampling "${options[@]}" "${output[@]}" ;;
        *) echo "$name is no part" >&2 && exit 2 ;;
    esac
}

[ $# -gt 0 ] || set -- right fast
touch "$out/parts.txt"
for name; do run "$name"; done
"$python" -m benchmarks.summary "$out" | tee "$out/summary.txt"
