#!/usr/bin/env bash
# Full training on one device: bash test/train_full_1p.sh --data_path=./data/faces_emore/
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch train.py 1 full_1p 256 "$@"
