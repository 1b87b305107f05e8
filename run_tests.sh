#!/usr/bin/env bash
# Makes the environment if it is missing and runs the tests.
#
#   bash run_tests.sh             everything that this machine can run
#   bash run_tests.sh --quick     what needs no process of its own, for every edit: under two minutes
#   bash run_tests.sh --all       and the pinned PyTorch 2.13 beside it (so does CI=true)
#   bash run_tests.sh -k margin   arguments go to pytest: one narrow run of the tests that they choose
#
# PYTHON=... chooses the interpreter for a new .venv, TEST_WORKERS=... the number of test processes (2).
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh run_tests.sh
set -u
cd "$(dirname "$0")" || exit 1
source scripts/environment.sh

all=${CI:-false}
if [ "${1:-}" = --all ]; then
    all=true
    shift
fi

use_environment requirements.txt requirements-dev.txt requirements-serve.txt || exit 1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# An installed torch_npu without CANN must not break `import torch`; the tests load what they need themselves.
export TORCH_DEVICE_BACKEND_AUTOLOAD=0
workers=${TEST_WORKERS:-2}
logs=build/test_logs
mkdir -p "$logs"

# The emulated NPU claims the process's one out-of-tree device, so its tests run in processes of their own. The tests
# across versions come last, when all environments are there.
main_tests() { "$1" -m pytest -n "$workers" --ignore=test/npu --ignore=test/versions "${@:2}"; }
npu_tests() { "$1" -m pytest -n "$workers" --dist=loadfile "${@:2}"; }

if [ "${1:-}" = --quick ]; then
    "$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && main_tests "$PYTHON" -q test/unit "$@"
    exit
fi
if [ $# -gt 0 ]; then
    case "$*" in
    *test/npu*) npu_tests "$PYTHON" "$@" ;;
    *test/versions*) "$PYTHON" -m pytest "$@" ;;
    *) main_tests "$PYTHON" "$@" ;;
    esac
    exit
fi

summary=()
failed=0
part() {  # part NAME COMMAND...: runs it, keeps its output in a log, and notes how it ended
    local name=$1 status began=$SECONDS log=$logs/$1.log
    shift
    printf '\n== %s\n' "$name"
    "$@" </dev/null 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || failed=1
    summary+=("$(printf '%-12s %-8s %5d s  %s' "$name" "$([ "$status" -eq 0 ] && echo passed || echo "FAILED")" \
        $((SECONDS - began)) "$(tail -n 1 "$log")")")
}

# Between the old end and the new one: what computes in this process, and what ranks do together.
tests_213() {
    main_tests .venv-2.13/bin/python -q -m core --quick test/unit && main_tests .venv-2.13/bin/python -m core test/distributed
}

environment_213() {
    local python
    python=$(find_python 11 11) || { echo "error: PyTorch 2.13 is tested with python3.11: none found"; return 1; }
    # No torchvision: none loads beside this build, and the project has to do without.
    { echo "torch==2.13.0"; grep -v '^torch' requirements.txt; } >build/torch_2.13.txt
    make_environment .venv-2.13 "$python" build/torch_2.13.txt requirements-dev.txt && echo ".venv-2.13 is ready"
}

part ruff "$PYTHON" -m ruff check .
part format "$PYTHON" -m ruff format --check .
part main main_tests "$PYTHON"
part fuzz "$PYTHON" test/fuzz/run.py all --cases=2000
part npu npu_tests "$PYTHON" test/npu
part 1.8_legacy bash test/legacy.sh
if [ "$all" = true ]; then
    part 2.13_install environment_213
    part 2.13_core tests_213
    # What depends on torch's version: the emulated device itself, and what computes on it.
    part 2.13_npu npu_tests .venv-2.13/bin/python test/npu/test_npu_{sim,device,head,distributed,training}.py
fi
part versions "$PYTHON" -m pytest test/versions

printf '\n== summary (logs in %s)\n' "$logs"
printf '%s\n' "${summary[@]}"
exit $failed
