"""Opening a large .rec: seconds and memory, in a process of its own.

    python -m benchmark.open_recordio [--records 5200000] [--output benchmark/results]

The set is generated in InsightFace's layout, every record and its labels in their places; only the images are 8 bytes
each, with a hole of the size that real ones would take before them, so that the .rec has its full length and offsets
and takes little disk. Measured is a fresh process from before the package `data` is imported to a data set with its
length and class count, and then to the labels of all images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmark.record import write_record
from data.recordio import MAGIC
from runtime.device import Device

_IMAGE_BYTES = 2900  # of faces_emore, about
_RECORD = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),
        ("flag", "<u4"),
        ("label", "<f4"),
        ("id", "<u8"),
        ("id2", "<u8"),
        ("labels", "<f4", 2),
        ("image", "S8"),
    ]
)
_OPEN = """
import json, sys, time
def peak_mb():  # of this program alone: getrusage would count the process it was forked from
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
alone = peak_mb()
begin, cpu = time.perf_counter(), time.process_time()
from data import open_dataset
imported = time.perf_counter()
dataset = open_dataset(sys.argv[1])
opened, cpu, peak = time.perf_counter(), time.process_time() - cpu, peak_mb()
labels = dataset.labels
print(json.dumps({"images": len(dataset), "classes": dataset.num_classes, "seconds": opened - begin,
                  "seconds_of_it_importing": imported - begin, "cpu_seconds": cpu, "peak_mb": peak,
                  "seconds_labels": time.perf_counter() - opened, "peak_mb_with_labels": peak_mb(),
                  "python_alone_mb": alone, "last_label": int(labels[-1])}))
"""


def generate(folder: Path, records: int, identities: int) -> None:
    """train.rec, train.idx and property with `records` images of `identities` people."""
    bounds = np.linspace(1, records + 1, identities + 1).astype(np.int64)  # first image key of each, and the end
    images = np.zeros(records, _RECORD)
    images["magic"], images["length"], images["flag"] = MAGIC, _RECORD.itemsize - 8, 2
    images["id"] = np.arange(1, records + 1)
    images["labels"][:, 0] = np.repeat(np.arange(identities), np.diff(bounds))
    images["image"] = b"no image"
    people = np.zeros(identities + 1, _RECORD)  # the header is one of them, and stands first
    people["magic"], people["length"], people["flag"] = MAGIC, _RECORD.itemsize - 16, 2
    people["labels"] = np.stack(
        [np.append(records + 1, bounds[:-1]), np.append(records + 1 + identities, bounds[1:])], 1
    )
    people = np.frombuffer(people.tobytes(), np.uint8).reshape(len(people), _RECORD.itemsize)[:, :-8]  # no image
    with open(folder / "train.rec", "wb") as file:
        file.write(people[0].tobytes())
        images_at = file.seek(records * _IMAGE_BYTES // 4 * 4)
        file.write(images.tobytes())
        people_at = file.tell()
        file.write(people[1:].tobytes())
    offsets = np.concatenate(
        [[0], images_at + np.arange(records) * _RECORD.itemsize, people_at + np.arange(identities) * people.shape[1]]
    )
    with open(folder / "train.idx", "w", encoding="ascii") as file:
        for begin in range(0, len(offsets), 1 << 18):
            file.write(
                "".join(
                    f"{begin + row}\t{offset}\n"
                    for row, offset in enumerate(offsets[begin : begin + (1 << 18)].tolist())
                )
            )
    (folder / "property").write_text(f"{identities},112,112")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=5_200_000)
    parser.add_argument("--identities", type=int, default=85_742)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch), options.records, options.identities)
        sizes = {name: (Path(scratch) / name).stat().st_size for name in ("train.rec", "train.idx")}
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", _OPEN, scratch],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=Path(__file__).parent.parent,
                ).stdout
            )
            for _ in range(options.repeats)
        ]
    best = min(runs, key=lambda run: run["seconds"])
    assert best["images"] == options.records and best["last_label"] == options.identities - 1
    record = {
        "bytes": sizes,
        "runs": [{key: round(value, 3) for key, value in run.items()} for run in runs],
    }
    print(json.dumps(record, indent=2))
    write_record("open_recordio", record, Device("cpu"), options.output)


if __name__ == "__main__":
    main()
