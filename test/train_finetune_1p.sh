#!/usr/bin/env bash
# A new head on given weights: bash test/train_finetune_1p.sh --pth_path=model.pth --data_path=./data/my_faces/
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch train.py 1 finetune_1p 256 "$@"
