#!/usr/bin/env bash
# PyTorch 1.8.1 on Python 3.9, the old end of what is supported: its environment (.venv-1.8), the tests that are marked
# `core`, and the launchers on a small set of synthetic faces. Without a python3.9 it says so and ends well.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source scripts/environment.sh

if ! python39=$(find_python 9 9); then
    echo "skipped: PyTorch 1.8 needs a python3.9, and none was found"
    exit 0
fi
make_environment .venv-1.8 "$python39" 1.8_requirements.txt requirements-dev.txt || exit 1
export PYTHON=$PWD/.venv-1.8/bin/python OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
failed=()

step() {  # step NAME COMMAND...
    local name=$1
    shift
    printf '\n-- %s\n' "$name"
    "$@" || failed+=("$name")
}

launch() {  # launch NAME LAUNCHER OPTION...: on the small set, into a folder of its own
    local name=$1 launcher=$2
    shift 2
    bash "test/$launcher.sh" --device_type=cpu --net_mode=mobilefacenet --data_path="$work/set" --batch_size=8 \
        --num_workers=0 --log_every=1 --work_path="$work/$name" --run_dir="$work/$name/log" "$@"
}

losses() {  # losses NAME: one a line
    "$PYTHON" -c '
import json, sys
for line in map(json.loads, open(sys.argv[1])):
    if line["kind"] == "step":
        print(line["loss"])' "$work/$1/log/metrics.jsonl"
}

same_losses() {  # the first half and what was resumed from it, against the whole
    losses whole >"$work/whole.txt"
    [ -s "$work/whole.txt" ] && { losses half; losses rest; } | diff "$work/whole.txt" -
}

step "core tests" "$PYTHON" -m pytest -m core -n "${TEST_WORKERS:-2}" --ignore=test/npu --ignore=test/versions
step "a synthetic set" "$PYTHON" -m data.synthetic --output "$work/set" --identities 4 --images_per_identity 8 \
    --verify_identities 10 --verify_images 2 --pairs 20
step "one rank" launch whole train_full_1p --epochs=2
step "one rank, half" launch half train_full_1p --epochs=1
step "one rank, resumed" launch rest train_full_1p --epochs=2 --resume="$(echo "$work"/half/models/*.pth)"
step "resuming changes nothing" same_losses
export RANK_SIZE=2
step "two ranks" launch two train_full_8p --epochs=1
step "verification on two ranks" launch eval train_eval_8p --val_targets=synthetic --pth_path="$(echo "$work"/half/models/*.pth)"

printf '\n'
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'PyTorch 1.8.1 failed in: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
echo "PyTorch 1.8.1: the core tests, training, resuming, two ranks and verification passed"
