#!/bin/sh
# Embeds aligned faces by the exported ONNX file: embeddings to embeddings.npy, similarities to the console.
cd "$(dirname "$0")/.." || exit 1
[ -n "$PYTHON" ] || [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python
: "${PYTHON:=python3}"

exec "$PYTHON" tools/inference.py \
    --export_type onnx \
    --onnx_file MS1M_v3_arcface_static_128_fp16_0.1/FresResNet50/exported_model/FresResNet50.onnx \
    --image_path MS1M_v3/images/00000001.jpg "$@"
