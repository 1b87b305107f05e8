"""Shuffling a base64 list: data.base64_shuffle beside one SQLite table, a row at a time, as PLSC does it.

python -m benchmark.base64_shuffle --megabytes 1300 --memory_mib 64 --record NAME

A limit below twice the set's size makes it two passes over the disk; with a larger one it stays in memory. Both make
the same kind of output from the same random list, one after the other in one run. The peak of resident memory
is that of this process and of its largest worker, added up over the workers.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import resource
import sqlite3
import tempfile
import time
from pathlib import Path

from data import base64_shuffle
from data.parallel import cores


def make_list(folder: Path, megabytes: int, image_bytes: int, parts: int = 4) -> int:
    """A list of random "images" in `parts` files; how many lines."""
    source, lines = random.Random(0), 0
    names = [f"dataset.part{number}" for number in range(parts)]
    for name in names:
        with open(folder / name, "wb") as file:
            while file.tell() < megabytes * 1_000_000 // parts:
                data = source.randbytes(source.randint(image_bytes // 2, image_bytes * 3 // 2))
                file.write(base64.b64encode(data) + b"\t%d\n" % source.randrange(100_000))
                lines += 1
    (folder / "file_list.txt").write_text("".join(f"{name}\n" for name in names))
    return lines


def by_sqlite(folder: Path, ranks: int) -> None:
    """PLSC's way: an SQL statement with the image in it for each line, then a query for each line in random order."""
    with sqlite3.connect(folder / "all.db") as table:
        table.execute("CREATE TABLE images (id INT PRIMARY KEY NOT NULL, image TEXT NOT NULL, label INT NOT NULL)")
        count = 0
        for name in (folder / "file_list.txt").read_text().split():
            with open(folder / name) as file:
                for line in file:
                    image, label = line.strip().split("\t")
                    table.execute(f"INSERT INTO images (id, image, label) VALUES ({count}, '{image}', {int(label)});")
                    count += 1
        table.commit()
        order = list(range(count))
        random.Random(0).shuffle(order)
        length = -(-count // ranks)
        order += order[: length * ranks - count]
        for rank in range(ranks):
            with open(folder / f"sqlite_rank_{rank}", "w") as file:
                for row in order[rank * length : (rank + 1) * length]:
                    image, label = table.execute(f"SELECT image, label FROM images WHERE id={row};").fetchone()
                    file.write(f"{image}\t{label}\n")
    (folder / "all.db").unlink()


def processor_seconds() -> float:
    """Of this process and of its workers that have ended: what a busy machine changes least."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1300)
    parser.add_argument("--image_bytes", type=int, default=5000, help="of an image, on the average")
    parser.add_argument("--memory_mib", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turns; the quickest of each counts")
    parser.add_argument("--folder", default=None, help="where to work")
    parser.add_argument("--record", help="write benchmark/results/DATE_{this name}.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        lines = make_list(folder, options.megabytes, options.image_bytes)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ours, sqlite, cpu = [], [], {"ours": [], "sqlite": []}
        for _ in range(options.rounds):
            os.sync()
            begun, used = time.perf_counter(), processor_seconds()
            base64_shuffle.shuffle(folder, "file_list.txt", options.ranks, memory=options.memory_mib << 20)
            ours.append(time.perf_counter() - begun)
            cpu["ours"].append(processor_seconds() - used)
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            for part in folder.glob("base64_rank_*"):
                part.unlink()
            os.replace(folder / "file_list.txt.before", folder / "file_list.txt")
            os.sync()
            begun, used = time.perf_counter(), processor_seconds()
            by_sqlite(folder, options.ranks)
            sqlite.append(time.perf_counter() - begun)
            cpu["sqlite"].append(processor_seconds() - used)
            for part in folder.glob("sqlite_rank_*"):
                part.unlink()
    result = {
        "cores": cores(),
        "megabytes": options.megabytes,
        "lines": lines,
        "memory_limit_mib": options.memory_mib,
        "set_over_limit": round(options.megabytes * 1e6 / (options.memory_mib << 20), 1),
        "rss_mib": {
            "before": round(start / 1024),
            "main_process": round(own / 1024),
            "largest_worker": round(worker / 1024),
            "together": round((own + cores() * worker) / 1024),
        },
        "seconds": {"ours": [round(t, 2) for t in ours], "sqlite": [round(t, 2) for t in sqlite]},
        "processor_seconds": {name: [round(t, 2) for t in values] for name, values in cpu.items()},
        "times_as_fast": round(min(sqlite) / min(ours), 1),
    }
    print(json.dumps(result, indent=2))
    if options.record:
        from benchmark.record import write_record  # torch: above, its threads and memory would count
        from runtime.device import parse_device

        print(write_record(options.record, result, parse_device("cpu")))


if __name__ == "__main__":
    main()
