"""The global shuffle of base64 lists: what comes out, in how much memory, and what bad input leaves behind."""

from __future__ import annotations

import base64
import collections
import random
import subprocess
import sys
from pathlib import Path

import pytest

from data import base64_shuffle
from data.base64_shuffle import shuffle
from runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


def make_list(folder, lines: int, parts: int = 3, size: int = 60, label_first: bool = False):
    source, every = random.Random(1), []
    for number in range(lines):
        image = base64.b64encode(source.randbytes(source.randint(1, 2 * size))).decode()
        every.append(f"{number}\t{image}" if label_first else f"{image}\t{number}")
    for part in range(parts):
        (folder / f"part{part}").write_text("".join(line + "\n" for line in every[part::parts]))
    (folder / "file_list.txt").write_text("".join(f"part{part}\n" for part in range(parts)))
    return [line if not label_first else "\t".join(reversed(line.split("\t"))) for line in every]


def output(folder):
    return [(folder / name).read_text().splitlines() for name in (folder / "file_list.txt").read_text().split()]


@pytest.mark.parametrize("label_first", [False, True])
@pytest.mark.parametrize("lines,ranks", [(100, 1), (101, 8), (3, 8), (64, 4)])
def test_every_line_once_in_equal_parts_and_the_shortfall_from_the_set(tmp_path, lines, ranks, label_first):
    before = make_list(tmp_path, lines, label_first=label_first)
    shuffle(tmp_path, "file_list.txt", ranks, memory=2000, workers=1)
    parts = output(tmp_path)
    assert [len(part) for part in parts] == [-(-lines // ranks)] * ranks
    count = collections.Counter(line for part in parts for line in part)
    extra = count - collections.Counter(before)
    assert set(count) == set(before) and sum(extra.values()) == -(-lines // ranks) * ranks - lines
    assert {"part0", "part1", "part2", "file_list.txt.before"} <= {path.name for path in tmp_path.iterdir()}
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_the_order_is_random_and_the_seed_s_alone(tmp_path):
    orders = []
    for seed, memory, workers in ((0, 1 << 20, 1), (0, 3000, 1), (0, 5000, 2), (1, 3000, 1)):
        folder = tmp_path / f"{seed}_{memory}"
        folder.mkdir()
        before = make_list(folder, 400)
        shuffle(folder, "file_list.txt", 4, seed, memory, workers)
        orders.append([line for part in output(folder) for line in part])
    assert orders[0] == orders[1] == orders[2] and orders[0] != orders[3]
    places = {line: place for place, line in enumerate(before)}
    moved = [places[line] for line in orders[0]]
    # neighbours of a shuffled list follow each other as often as not; the spread of that count is sqrt(n / 12)
    rises = sum(b > a for a, b in zip(moved, moved[1:]))
    assert abs(rises - 199.5) < 5 * (400 / 12) ** 0.5
    # and no quarter keeps a quarter: 25 of 100 lines, hypergeometric with a spread of 3.75
    for quarter in range(4):
        kept = sum(place // 100 == quarter for place in moved[100 * quarter : 100 * quarter + 100])
        assert abs(kept - 25) < 5 * 3.75


def test_twenty_times_the_memory(tmp_path):
    limit = 1 << 20
    make_list(tmp_path, 5600, size=3000)
    assert sum((tmp_path / f"part{part}").stat().st_size for part in range(3)) > 20 * limit
    code = """if 1:
        import sys, tracemalloc
        from data.base64_shuffle import shuffle
        tracemalloc.start()
        shuffle(sys.argv[1], "file_list.txt", 4, memory=int(sys.argv[2]), workers=1)
        print(tracemalloc.get_traced_memory()[1])
    """
    command = [sys.executable, "-c", code, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 2 * limit  # and what Python imports on the way
    assert sum(map(len, output(tmp_path))) == 5600


def test_its_own_output_goes_in_again(tmp_path):
    before = make_list(tmp_path, 40)
    shuffle(tmp_path, "file_list.txt", 4, workers=1)
    first = output(tmp_path)
    shuffle(tmp_path, "file_list.txt", 2, seed=1, workers=1)
    assert sorted(line for part in output(tmp_path) for line in part) == sorted(before)
    assert [(tmp_path / f"base64_rank_{rank}").read_text().splitlines() for rank in range(4)] == first


@pytest.mark.parametrize(
    "line,says",
    [
        ("abc", "line 8: has no tab"),
        ("ab*d\t1", "line 8: its image is not base64"),
        ("abcde\t1", "line 8: its image is not base64"),
        ("ab==cdef\t1", "line 8: its image is not base64"),
        ("====\t1", "line 8: its image is not base64"),
        ("\t1", "line 8: its image is not base64"),
        ("abcd\tone", "line 8: its label 'one' is no number"),
        ("abcd\t-1", "line 8: its label '-1' is no number"),
        ("abcd\t1\t2", "line 8: its label"),
        ("1\tabcd", "line 8: its label"),
        ("abcd\t99999999999999999999", "line 8: its label"),
    ],
)
@pytest.mark.parametrize("memory", [1 << 20, 500])
def test_a_bad_line_is_named_and_all_stays_as_it_was(tmp_path, line, says, memory):
    make_list(tmp_path, 20, parts=1)
    lines = (tmp_path / "part0").read_text().splitlines()
    lines[7] = line
    (tmp_path / "part0").write_text("\n".join(lines) + "\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match=says):
        shuffle(tmp_path, "file_list.txt", 2, memory=memory, workers=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tab_too_many_behind_a_label(tmp_path):
    make_list(tmp_path, 5, parts=1, label_first=True)
    with open(tmp_path / "part0", "a") as file:
        file.write("3\tabc\tabcd\n")
    with pytest.raises(DataError, match="line 6: its image is not base64"):
        shuffle(tmp_path, "file_list.txt", 2, workers=1)


def test_blank_lines_and_carriage_returns_are_no_lines_of_their_own(tmp_path):
    (tmp_path / "a").write_bytes(b"abcd\t1\r\n\r\nabce\t007\n\n")
    (tmp_path / "list").write_text("a\n")
    shuffle(tmp_path, "list", 1, workers=1)
    assert sorted((tmp_path / "base64_rank_0").read_bytes().split(b"\n")) == [b"", b"abcd\t1", b"abce\t7"]


def test_what_else_is_refused(tmp_path, monkeypatch):
    make_list(tmp_path, 20)
    for ranks in (0, -1):
        with pytest.raises(DataError, match="from 1 to"):
            shuffle(tmp_path, "file_list.txt", ranks)
    with pytest.raises(DataError, match="cannot be read"):
        shuffle(tmp_path, "nothing.txt", 1)
    with pytest.raises(DataError, match="without a folder"):
        shuffle(tmp_path, "../file_list.txt", 1)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="names no part file"):
        shuffle(tmp_path, "empty", 1)
    (tmp_path / "gone").write_text("part0\npart9\n")
    with pytest.raises(DataError, match="there is no part file"):
        shuffle(tmp_path, "gone", 1)
    usage = collections.namedtuple("usage", "free")(10)
    monkeypatch.setattr(base64_shuffle.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="twice as much of the disk"):
        shuffle(tmp_path, "file_list.txt", 1)
    assert not any(path.name.startswith("base64_rank") for path in tmp_path.iterdir())


def test_an_interrupted_run_leaves_the_input_and_the_next_one_starts_afresh(tmp_path, monkeypatch):
    before = make_list(tmp_path, 30)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(base64_shuffle, "_place", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shuffle(tmp_path, "file_list.txt", 2, memory=1000, workers=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / ".process_base64_files").mkdir()  # of a run that was killed
    (tmp_path / ".process_base64_files" / "bucket_0").write_text("torn")
    shuffle(tmp_path, "file_list.txt", 2, workers=1)
    assert sorted(line for part in output(tmp_path) for line in part) == sorted(before)
