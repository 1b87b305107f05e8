#!/usr/bin/env bash
# Full training on eight devices, or RANK_SIZE: bash test/train_full_8p.sh --data_path=./data/faces_emore/
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch train.py 8 full_8p 320 "$@"
