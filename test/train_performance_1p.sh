#!/usr/bin/env bash
# Speed on one device, without a data set: bash test/train_performance_1p.sh --data_mode=synthetic
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"  # as after: sh test/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch train.py 1 performance_1p 256 "$@"
