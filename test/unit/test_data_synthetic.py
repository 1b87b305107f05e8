"""Synthetic faces: the same for the same seed, other people for verification, written whole or not at all."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from data import open_dataset, synthetic
from data.faces import draw_face, draw_identity
from data.pairs import find_pair_sets, load_pairs, read_bin
from runtime.errors import DataError

pytestmark = pytest.mark.core

SMALL = dict(identities=3, images_per_identity=4, verify_identities=3, verify_images=2, pairs=40)
NAMES = ("train.rec", "train.idx", "property", "synthetic.bin")


def _contents(folder) -> dict:
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    assert synthetic.generate(folder, **SMALL)
    return folder


def test_layout(made):
    dataset = open_dataset(made)
    assert dataset.num_classes == 3 and dataset.labels.tolist() == np.repeat(range(3), 4).tolist()
    assert [dataset[index][1] for index in range(12)] == dataset.labels.tolist()
    images, issame = load_pairs(made / "synthetic.bin")
    assert len(images) == 80 and images[:].shape == (80, 112, 112, 3)
    np.testing.assert_array_equal(issame, [True, True, False, False] * 10)  # every fold of 4


def test_pairs_are_two_images_of_one_person_or_of_two(made):
    encoded, issame = read_bin(made / "synthetic.bin")
    people = {
        synthetic._jpeg(synthetic._person(0, 1, number), 0, 1, number, image, 112): number
        for number in range(3)
        for image in range(2)
    }
    for pair, same in enumerate(issame):
        first, second = encoded[2 * pair : 2 * pair + 2]
        assert first != second and (people[first] == people[second]) == same


def test_verification_shows_other_people(made):
    train = {bytes(open_dataset(made).encoded(index)[0]) for index in range(12)}
    assert not train & set(read_bin(made / "synthetic.bin")[0])
    trained = [synthetic._person(0, synthetic._TRAIN, number) for number in range(40)]
    for number in range(40):
        person = synthetic._person(0, synthetic._VERIFY, number)
        assert all((person.skin != other.skin).any() for other in trained)


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    synthetic.generate(tmp_path / "again", **SMALL)
    assert _contents(tmp_path / "again") == _contents(made)
    synthetic.generate(tmp_path / "other", **SMALL, seed=1)
    assert _contents(tmp_path / "other") != _contents(made)


def test_images_of_a_person_vary_and_people_differ():
    random = np.random.RandomState(0)
    person, other = draw_identity(random), draw_identity(random)
    one, two = (np.asarray(draw_face(person, np.random.RandomState(seed))) for seed in (1, 2))
    assert one.shape == (112, 112, 3) and one.dtype == np.uint8
    assert np.abs(one.astype(int) - two).mean() > 5
    three = np.asarray(draw_face(other, np.random.RandomState(1)))
    assert np.abs(one.astype(int) - three).mean() > 5
    np.testing.assert_array_equal(one, np.asarray(draw_face(person, np.random.RandomState(1))))
    assert draw_face(person, random, size=64).size == (64, 64)


def test_a_second_run_does_nothing_and_other_arguments_start_anew(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    assert synthetic.generate(folder, **SMALL)
    before = _contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "draw_face", None)  # calling it fails
        assert not synthetic.generate(folder, **SMALL)
    assert synthetic.generate(folder, **{**SMALL, "identities": 2})
    assert _contents(folder) != before and open_dataset(folder).num_classes == 2


def test_an_interrupted_run_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "set"
    synthetic.generate(folder, **SMALL)
    before = _contents(folder)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.generate(folder, **{**SMALL, "identities": 2}, tick=stop)
    assert _contents(folder) == before and not synthetic.generate(folder, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        synthetic.generate(tmp_path / "new", **SMALL, tick=stop)
    assert not (tmp_path / "new").exists()
    assert synthetic.generate(tmp_path / "new", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "set"]


def test_interrupted_while_moving_in(tmp_path):
    folder = tmp_path / "set"
    synthetic.generate(folder, **SMALL)
    before = _contents(folder)
    (folder / "train.rec").write_bytes(b"half")
    (folder / "synthetic.json").write_text(json.dumps({"unfinished": True}))
    assert synthetic.generate(folder, **SMALL)
    assert _contents(folder) == before


def test_someone_elses_data_is_not_overwritten(tmp_path):
    (tmp_path / "synthetic.bin").write_bytes(b"precious")
    with pytest.raises(DataError, match="holds a data set which was not made here"):
        synthetic.generate(tmp_path, **SMALL)
    assert (tmp_path / "synthetic.bin").read_bytes() == b"precious"


def test_impossible_wishes(tmp_path):
    for wish in (
        {"identities": 1},
        {"verify_identities": 1},
        {"verify_images": 1},
        {"pairs": 10},
        {"images_per_identity": 0},
    ):
        with pytest.raises(DataError, match="a synthetic set needs at least"):
            synthetic.generate(tmp_path / "set", **{**SMALL, **wish})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        synthetic.generate(tmp_path / "file" / "set", **SMALL)


def test_command_line(tmp_path, monkeypatch, capsys):
    arguments = ["synthetic", "--output", str(tmp_path / "set"), *(f"--{key}={value}" for key, value in SMALL.items())]
    for expected in ("written", "already there, nothing to do"):
        monkeypatch.setattr(sys, "argv", arguments)
        synthetic.main()
        assert expected in capsys.readouterr().out
    for wrong, words in (("--identities=0", "a synthetic set needs"), ("--output=", "--output is empty")):
        monkeypatch.setattr(sys, "argv", [*arguments, wrong])
        with pytest.raises(DataError, match=f"^{words}"):
            synthetic.main()


def test_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert synthetic.generate(".", **SMALL) and (tmp_path / "synthetic.bin").is_file()
    for wish in ({"seed": -1}, {"seed": 2**32}, {"identities": 10**9}, {"pairs": 10**12}):
        with pytest.raises(DataError, match="--seed|choose a smaller one"):
            synthetic.generate(tmp_path / "set", **{**SMALL, **wish})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: cannot be written"):
        synthetic.generate(tmp_path / "pipe", **SMALL)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "synthetic.json").write_text("{}")  # somebody's, no stamp of ours
    with pytest.raises(DataError, match="not made here"):
        synthetic.generate(tmp_path / "other", **SMALL)


def test_what_an_older_version_called_lfw_goes(tmp_path):
    for name in ("train.rec", "train.idx", "property", "lfw.bin"):
        (tmp_path / name).write_text("")
    (tmp_path / "synthetic.json").write_text(json.dumps({"generator": 1}))
    assert synthetic.generate(tmp_path, **SMALL)
    assert sorted(find_pair_sets(tmp_path)) == ["synthetic"]
