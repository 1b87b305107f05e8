"""Speeds out of many runs' logs: python tools/extract_perf_logs.py --log_dir=logs --output_dir=./logs/

Reads <log_dir>/<run>/workerlog.0, whose folder names say the rest, as
arcface_paddle_r50_static_fp16_r0.1_bz128_1n8g_id1, and writes arcface_paddle_result.json.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime.errors import DataError
from runtime.files import write_json
from runtime.log import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log_dir", required=True)
    parser.add_argument("--output_dir", default="./logs/")
    parser.add_argument("--warmup_batches", type=int, default=50)
    parser.add_argument("--train_batches", type=int, default=150)
    options = parser.parse_args()
    result = extract(Path(options.log_dir), options.warmup_batches, options.train_batches)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(options.output_dir) / "arcface_paddle_result.json", result)
    print(json.dumps(result, indent=2))


def extract(folder: Path, warmup: int, stop: int) -> dict:
    """{mode: {model: {run: {precision: {batch: {average_speed, median_speed, speedup over 1n1g}}}}}}."""
    logs = sorted(folder.glob("*/workerlog.0"))
    if not logs:
        raise DataError(f"{folder}: holds no <run>/workerlog.0")
    result: dict = {}
    for log in logs:
        fields = log.parent.name.split("_")
        if len(fields) < 8:
            raise DataError(f"{log.parent}: its name does not say model, mode, precision, batch and GPUs, as {EXAMPLE}")
        model, mode, precision, batch, run = fields[2], fields[3], fields[4], fields[6], fields[7]
        text = log.read_text(encoding="utf-8", errors="replace")
        speeds = [float(number) for number in re.findall(r"(?:throughput|ips): ([0-9.]+)", text)][warmup:stop]
        if not speeds:
            raise DataError(f"{log}: holds no throughput after {warmup} lines: lower --warmup_batches")
        place = result.setdefault(mode, {}).setdefault(model, {}).setdefault(run, {}).setdefault(precision, {})
        place[batch] = {"average_speed": statistics.mean(speeds), "median_speed": statistics.median(speeds)}
    for models in result.values():
        for runs in models.values():
            for precisions in runs.values():
                for precision, batches in precisions.items():
                    for batch, one in batches.items():
                        alone = runs.get("1n1g", {}).get(precision, {}).get(batch)
                        one["speedup"] = one["median_speed"] / alone["median_speed"] if alone else None
    return result


EXAMPLE = "arcface_paddle_r50_static_fp16_r0.1_bz128_1n8g_id1"

if __name__ == "__main__":
    run_command(main)
