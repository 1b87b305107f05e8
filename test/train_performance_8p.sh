#!/usr/bin/env bash
# Speed on eight devices, or RANK_SIZE, without a data set: bash test/train_performance_8p.sh --data_mode=synthetic
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch train.py 8 performance_8p 320 "$@"
