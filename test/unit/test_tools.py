"""The data tools: what they write is byte for byte what went in, twice is once, and bad input leaves nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_set import jpeg, make_tiny_set

from data import convert, inspection, kv_bin, open_dataset, pair_making
from data.pairs import load_pairs, read_bin, write_bin
from runtime.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "process_base64_files",
    "mx_recordio_2_images",
    "convert_image_bin",
    "lfw_style_bin_dataset_converter",
    "make_pairs",
    "images_2_recordio",
    "inspect_dataset",
)


def make_people(folder, people: int = 12, shots: int = 4):
    for person in range(people):
        (folder / f"p{person:02d}").mkdir(parents=True)
        for shot in range(shots):
            (folder / f"p{person:02d}" / f"p{person:02d}_{shot + 1:04d}.jpg").write_bytes(jpeg(person, shot))
    return folder


def run(tool, *arguments, cwd="/"):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments), "--workers=2"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_is_a_module_too():
    for tool in TOOLS:
        done = subprocess.run(
            [sys.executable, "-m", f"tools.{tool}", "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_recordio_to_images(tmp_path):
    source = make_tiny_set(tmp_path / "rec")
    done = run("mx_recordio_2_images", "--root_dir", source, "--output_dir", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = open_dataset(source), open_dataset(tmp_path / "out")
    assert len(after) == len(before) == 20 and after.num_classes == before.num_classes
    for row in range(20):
        assert bytes(before.encoded(row)[0]) == after.encoded(row)[0] and before[row][1] == after[row][1]
    assert (tmp_path / "out/label.txt").read_text().splitlines()[0] == "images/00000001.jpg\t0"
    assert (tmp_path / "out/lfw.bin").read_bytes() == (source / "lfw.bin").read_bytes()
    assert "num_image: 20\nnum_classes: 4\n" == (tmp_path / "out/README.md").read_text()
    (tmp_path / "out/images/00000003.jpg").unlink()  # as after an interruption
    held = files(tmp_path / "out")
    convert.recordio_to_list(source / "train.rec", tmp_path / "out", 1)
    assert files(tmp_path / "out").items() >= held.items() and len(files(tmp_path / "out")) == len(held) + 1
    (tmp_path / "out/images/00000003.jpg").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="holds something else"):
        convert.recordio_to_list(source / "train.rec", tmp_path / "out", 1)


def test_a_damaged_record_is_left_out_and_named(tmp_path):
    source = make_tiny_set(tmp_path / "rec")
    data = bytearray((source / "train.rec").read_bytes())
    offset = int((source / "train.idx").read_text().splitlines()[5].split("\t")[1])
    data[offset + 40 : offset + 400] = bytes(360)
    (source / "train.rec").write_bytes(data)
    images, classes, damaged = convert.recordio_to_list(source / "train.rec", tmp_path / "out", 1)
    assert (images, classes, len(damaged)) == (19, 4, 1) and "key 5" in damaged[0]


def test_image_bins_both_ways(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.JPG").write_bytes(jpeg(number, 0))
    (images / "label.txt").write_text("0.JPG 0\n")
    done = run("convert_image_bin", "--image_path", images, "--bin_path", tmp_path / "bins", "--mode=image2bin")
    assert done.stdout == "ok..\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "bins").iterdir()) == ["0.bin", "1.bin", "2.bin"]
    assert kv_bin.parse((tmp_path / "bins/1.bin").read_bytes()) == ("1.JPG", jpeg(1, 0))
    # the document gives the input first in both modes
    done = run("convert_image_bin", "--image_path", tmp_path / "bins", "--bin_path", tmp_path / "b", "--mode=bin2image")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "b") == {name: data for name, data in files(images).items() if name != "label.txt"}
    (images / "0.png").write_bytes(jpeg(5, 0))
    with pytest.raises(DataError, match="two images called 0"):
        convert.images_to_bins(images, tmp_path / "c", 1)
    with pytest.raises(DataError, match="no such folder"):
        convert.images_to_bins(tmp_path / "none", tmp_path / "c", 1)
    (tmp_path / "bins/1.bin").write_bytes(kv_bin.build("../../evil.sh", jpeg(1, 0)))
    convert.bins_to_images(tmp_path / "bins", tmp_path / "d", 1)
    assert sorted(files(tmp_path / "d")) == ["0.JPG", "1.jpg", "2.JPG"]
    assert not (tmp_path / "c").exists()


def test_pairs_to_png_keep_every_pixel(tmp_path):
    source = make_tiny_set(tmp_path / "set")
    arguments = ("--bin_path", source / "lfw.bin", "--out_dir", tmp_path / "out", "--flip_test")
    done = run("lfw_style_bin_dataset_converter", *arguments)
    assert done.returncode == 0, done.stderr
    images, issame = load_pairs(source / "lfw.bin")
    lines = [line.split("\t") for line in (tmp_path / "out/label.txt").read_text().splitlines()]
    assert len(lines) == 20 and [line[2] for line in lines] == [str(int(same)) for same in issame] * 2
    assert lines[10] == ["images/00000000_0_hflip.png", "images/00000000_1_hflip.png", "1"]
    first, mirrored = (np.asarray(Image.open(tmp_path / "out" / lines[row][1])) for row in (3, 13))
    assert (first == images[7]).all() and (mirrored == images[7][:, ::-1]).all()
    held = files(tmp_path / "out")
    assert convert.pairs_to_folder(source / "lfw.bin", tmp_path / "out", True, 1) == 20
    assert files(tmp_path / "out") == held


def test_pairs_of_people(tmp_path):
    people = make_people(tmp_path / "people", people=24)
    done = run("make_pairs", "--image_path", people, "--output", tmp_path / "a.bin", "--pairs=40", "--seed=3")
    assert done.returncode == 0, done.stderr
    images, issame = read_bin(tmp_path / "a.bin")
    assert len(images) == 80 and issame.sum() == 20
    names = {path.read_bytes(): path for path in people.rglob("*.jpg")}
    pairs = [(names[images[2 * row]], names[images[2 * row + 1]]) for row in range(40)]
    assert all((a.parent == b.parent) == same and a != b for (a, b), same in zip(pairs, issame))
    assert len({frozenset(pair) for pair in pairs}) == 40
    folds = [{path.parent.name for pair in pairs[at : at + 4] for path in pair} for at in range(0, 40, 4)]
    assert sum(map(len, folds)) == len(set.union(*folds))  # nobody is in two folds
    pair_making.write_pairs(tmp_path / "b.bin", pair_making.pairs_of_folder(people, 40, 3), 1)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    with pytest.raises(DataError, match="is there already"):
        pair_making.write_pairs(tmp_path / "b.bin", [], 1)
    with pytest.raises(DataError, match="must be even"):
        pair_making.pairs_of_folder(people, 41)
    with pytest.raises(DataError, match="lower --pairs"):
        pair_making.pairs_of_folder(people, 4000)


def test_pairs_of_a_list(tmp_path):
    people = make_people(tmp_path / "people", people=2)
    text = "1\t2\np00\t1\t2\np00\t1\tp01\t3\np00/p00_0001.jpg p01/p01_0001.jpg 0\n"
    (tmp_path / "pairs.txt").write_text(text)
    pairs = pair_making.pairs_of_list(tmp_path / "pairs.txt", people)
    assert [same for *_files, same in pairs] == [True, False, False]
    assert pairs[1][:2] == (people / "p00/p00_0001.jpg", people / "p01/p01_0003.jpg")
    for line, says in (
        ("p00 1 9", "line 1: there is no image"),
        ("p00/p00_0001.jpg ../x.jpg 1", "leaves the data set's folder"),
        ("p00/p00_0001.jpg /etc/passwd 1", "leaves the data set's folder"),
        ("nonsense", "is no pair"),
    ):
        (tmp_path / "pairs.txt").write_text(line + "\n")
        with pytest.raises(DataError, match=says):
            pair_making.pairs_of_list(tmp_path / "pairs.txt", people)


def test_images_to_recordio_with_people_apart(tmp_path):
    people = make_people(tmp_path / "people", people=24)
    arguments = ("--image_path", people, "--output_dir", tmp_path / "out", "--val_share=0.5", "--val_pairs=20")
    done = run("images_2_recordio", *arguments)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(tmp_path / "out")
    assert (len(dataset), dataset.num_classes) == (48, 12)
    assert (tmp_path / "out/property").read_text() == "12,112,112\n"
    names = {path.read_bytes(): path.parent.name for path in people.rglob("*.jpg")}
    trained = {}
    for row in range(48):
        data, label = dataset.encoded(row)
        trained.setdefault(names[bytes(data)], label)
        assert trained[names[bytes(data)]] == label == dataset.labels[row]
    apart = {names[data] for data in read_bin(tmp_path / "out/val.bin")[0]}
    assert len(trained) == 12 and not apart & set(trained)
    assert set((tmp_path / "out/val_people.txt").read_text().split()) == set(names.values()) - set(trained)
    few = ("--image_path", people, "--output_dir", tmp_path / "few", "--val_share=0.01")
    assert (
        "too few people" in run("images_2_recordio", *few, "--val_pairs=60").stderr and not (tmp_path / "few").exists()
    )
    assert run("images_2_recordio", *few).returncode == 0  # two people of four images
    assert len(read_bin(tmp_path / "few/val.bin")[0]) == 40
    assert run("images_2_recordio", *arguments).stderr.startswith("error: ")
    (people / "p03/p03_0001.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="p03_0001.jpg"):
        convert.folder_to_recordio(people, tmp_path / "other", workers=1)
    assert not files(tmp_path / "other")


def test_inspection_finds_what_is_there(tmp_path):
    people = make_people(tmp_path / "set/imgs", people=4)
    again = Image.open(people / "p00/p00_0001.jpg")
    again.save(people / "p01/again.jpg", quality=60)
    (people / "p02/copy.jpg").write_bytes((people / "p03/p03_0002.jpg").read_bytes())
    (people / "p03/p03_0004.jpg").write_bytes(jpeg(3, 3)[:900])
    buffer = io.BytesIO()
    Image.open(people / "p02/p02_0001.jpg").save(buffer, "JPEG", quality=70)
    write_bin(tmp_path / "set/lfw.bin", [(people / "p01/p01_0002.jpg").read_bytes(), buffer.getvalue()], [False])
    done = run("inspect_dataset", "--data_path", tmp_path / "set", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    shown = json.loads(done.stdout)
    assert (report["images"], report["classes"], shown["damaged"]) == (18, 4, 1)
    assert report["images_per_class"] == {"least": 4, "median": 4.5, "most": 5}

    def stems(pairs):
        return [tuple(sorted(Path(place).name for place in pair)) for pair in pairs]

    assert stems(report["exact_duplicates"]) == [("copy.jpg", "p03_0002.jpg")]
    assert ("again.jpg", "p00_0001.jpg") in stems(report["near_duplicates"])
    overlap = report["overlap"]["lfw"]
    assert [Path(pair[0]).name for pair in overlap["exact"]] == ["p01_0002.jpg"]
    assert "p02_0001.jpg" in [Path(pair[0]).name for pair in overlap["near"]]
    assert (tmp_path / "report/images_per_class.png").stat().st_size > 1000


def test_near_is_near_on_photographs(shared):
    dataset = open_dataset(shared / "real/lfw_small")

    def read(row):
        image_HWC = dataset[row % 200][0]
        if row < 200:
            return image_HWC
        buffer = io.BytesIO()
        Image.fromarray(image_HWC).save(buffer, "JPEG", quality=50)
        return np.asarray(Image.open(buffer))

    found = inspection.near_pairs(inspection.fingerprints(read, 400, 1))
    right = {(row, row + 200) for row in range(200)}
    assert len(right & set(found)) > 190  # the same photo, compressed once more
    assert len(set(found) - right) < 20  # two photos
