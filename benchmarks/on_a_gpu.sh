#!/usr/bin/env bash
# Everything that only a GPU can tell: the tests that need one, the properties on CUDA tensors, and the benchmarks.
#
#     benchmarks/on_a_gpu.sh FOLDER [STAGE ...]     writes a log and the results of each stage to FOLDER
#
# Stages: tests properties layer sampling; all by default. A stage that fails does not stop the others. LIMIT is the
# seconds a stage may take, SECONDS_A_ROW those of measurement for each row of a table.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
python=${PYTHON:-python3}
workers=${WORKERS:-8}
export PYTHONUNBUFFERED=1

stage() {
    local name=$1 started=$SECONDS status=0
    shift
    timeout --signal INT --kill-after 20 "${LIMIT:-600}" "$@" >"$folder/$name.log" 2>&1 || status=$?
    printf '%s: exit %d after %d s: %s\n' "$name" "$status" $((SECONDS - started)) "$(tail -n 1 "$folder/$name.log")"
}

[ $# -gt 0 ] || set -- tests properties layer sampling
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$python" -m nflows_kconv
for name; do
    case $name in
        tests) stage "$name" "$python" -m pytest -v --tb=short -m gpu --numprocesses "$workers" -p no:cacheprovider ;;
        properties)
            stage "$name" "$python" -m pytest -v --tb=short --device cuda --numprocesses "$workers" -p no:cacheprovider \
                tests/test_{primitive,derivatives,layer,bounded,compile,flop_counter,step}.py
            ;;
        layer | sampling)
            stage "$name" "$python" "benchmarks/$name.py" --device cuda --seconds "${SECONDS_A_ROW:-2}" \
                --output "$folder/$name.json"
            ;;
        *) echo "$name is no stage" >&2 && exit 2 ;;
    esac
done
