#!/bin/sh
# Exports what scripts/train_static.sh trained; --export_type torchscript or pth for other files.
cd "$(dirname "$0")/.." || exit 1
[ -n "$PYTHON" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
: "${PYTHON:=python3}"

exec "$PYTHON" tools/export.py \
    --is_static True \
    --export_type onnx \
    --backbone FresResNet50 \
    --embedding_size 512 \
    --checkpoint_dir MS1M_v3_arcface_static_128_fp16_0.1/FresResNet50/24 \
    --output_dir MS1M_v3_arcface_static_128_fp16_0.1/FresResNet50/exported_model "$@"
