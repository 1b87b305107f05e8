#!/usr/bin/env bash
# The first ten minutes on a new Ascend machine: bash test/npu_check.sh [--quick] [--output=FOLDER]
# Checks versions, operators, overflow, collectives and training against the CPU, and leaves npu_check.html for a bug report.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
source test/env_npu.sh 2>/dev/null  # where there is no CANN the program says so
exec "${PYTHON:-python3}" test/npu/check.py "$@"
