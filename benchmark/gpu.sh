#!/usr/bin/env bash
# What to measure on the first day with a GPU, in the order of its value:
#
#   bash benchmark/gpu.sh [--minutes=9] [--part=numerics,head,step,scale,loader] [--baseline=FOLDER_OF_ARCFACE_TORCH]
#
# Each part has a time limit of its own, writes its record as it goes, and can be asked for alone. --device=cpu --tiny runs
# all of it small, to see that nothing trivial is broken.
[ "${BASH##*/}" = bash ] || exec bash "$0" "$@"
cd "$(dirname "${BASH_SOURCE[0]}")/.." && exec "${PYTHON:-python3}" -W ignore -m benchmark.gpu "$@"
