#!/usr/bin/env bash
# Verification on eight devices, or RANK_SIZE, of the sets in a folder (./data/faces_emore if none is given) or of one
# set: bash test/train_eval_8p.sh --pth_path=model.pth --data_path=./data/faces_emore/lfw.bin
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch evaluate.py 8 "" "" "$@"
