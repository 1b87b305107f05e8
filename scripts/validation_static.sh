#!/bin/sh
# Verifies what scripts/train_static.sh trained, by the compiled graph.
cd "$(dirname "$0")/.." || exit 1
[ -n "$PYTHON" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
: "${PYTHON:=python3}"

exec "$PYTHON" tools/validation.py \
    --is_static True \
    --backbone FresResNet50 \
    --embedding_size 512 \
    --checkpoint_dir MS1M_v3_arcface_static_128_fp16_0.1/FresResNet50/24 \
    --data_dir MS1M_v3 \
    --val_targets lfw,cfp_fp,agedb_30 \
    --batch_size 128 "$@"
