"""Verification sets in their three formats, and pickles that mean harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from tiny_set import jpeg
from workers_data import encode, picture, with_claimed_size

from data import safe_pickle
from data.images import decode_image
from data.pairs import VERIFICATION_SETS, find_pair_sets, load_pairs, read_bin, write_bin, write_folder
from runtime.errors import DataError

pytestmark = pytest.mark.core

IMAGES = [jpeg(number // 2, number) for number in range(6)]
ISSAME = [True, False, True]


def _fails(match: str, path, **options) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load_pairs(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def _check(images, issame) -> None:
    assert len(images) == 6 and issame.dtype == bool and issame.tolist() == ISSAME
    expected_BHWC = np.stack([decode_image(data) for data in IMAGES])
    np.testing.assert_array_equal(images[:], expected_BHWC)
    np.testing.assert_array_equal(images[2:5], expected_BHWC[2:5])
    np.testing.assert_array_equal(images[1::3], expected_BHWC[1::3])
    np.testing.assert_array_equal(images[-1], expected_BHWC[-1])
    assert images[6:].shape == (0, 112, 112, 3)
    with pytest.raises(IndexError):
        images[6]


def test_written_bin(tmp_path):
    write_bin(tmp_path / "lfw.bin", IMAGES, ISSAME)
    _check(*load_pairs(tmp_path / "lfw.bin"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "flat array", "column array", "numpy bools"])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_what_the_original_tools_write(tmp_path, protocol, kind, core):
    images = {
        "flat array": [np.frombuffer(data, np.uint8) for data in IMAGES],
        "column array": [np.frombuffer(data, np.uint8).reshape(-1, 1) for data in IMAGES],
    }.get(kind, IMAGES)
    issame = np.array(ISSAME) if kind == "numpy bools" else ISSAME
    if kind == "numpy bools" and protocol > 2:
        issame = list(issame)
    data = pickle.dumps((images, issame), protocol)
    if protocol < 4:  # names are plain text: numpy 1 and numpy 2 differ only there
        data = data.replace(b"numpy.core", b"numpy._core").replace(b"numpy._core", core)
    (tmp_path / "x.bin").write_bytes(data)
    _check(*load_pairs(tmp_path / "x.bin"))


def test_python_2_strings(tmp_path):
    out = io.BytesIO()
    out.write(b"\x80\x02(]q\x00(")
    for data in IMAGES:
        out.write(b"T" + struct.pack("<I", len(data)) + data)  # BINSTRING
    out.write(b"e]q\x01(" + b"".join(b"\x88" if same else b"\x89" for same in ISSAME) + b"et.")
    (tmp_path / "py2.bin").write_bytes(out.getvalue())
    _check(*load_pairs(tmp_path / "py2.bin"))


def test_images_are_decoded_when_they_are_asked_for(tmp_path):
    write_bin(tmp_path / "x.bin", [IMAGES[0], b"no image", *IMAGES[2:]], ISSAME)
    images, _ = load_pairs(tmp_path / "x.bin")
    assert images[2:4].shape == (2, 112, 112, 3)
    with pytest.raises(DataError, match=r"x.bin image 1 \(pair 0\): not an image"):
        images[0:2]


def test_channel_order_of_a_bin(tmp_path):
    write_bin(tmp_path / "x.bin", IMAGES, ISSAME)
    plain, swapped = load_pairs(tmp_path / "x.bin")[0], load_pairs(tmp_path / "x.bin", "bgr")[0]
    np.testing.assert_array_equal(plain[:], swapped[:][..., ::-1])
    with pytest.raises(DataError, match="choose from rgb, bgr"):
        load_pairs(tmp_path / "x.bin", "gbr")


class _Runs:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def _global(module: str, name: str, arguments: bytes = b"(t") -> bytes:
    return f"c{module}\n{name}\n".encode() + arguments + b"R."


_LITTLE_ARRAY = pickle.dumps(np.zeros(8, np.uint8), 2)
HOSTILE = {  # bytes, and why they are refused
    "a call": (pickle.dumps(_Runs(), 2), "holds posix.system"),
    "a call in protocol 4": (pickle.dumps(([_Runs()], []), 4), "holds posix.system"),
    "eval": (_global("builtins", "eval", b"(U\x011t"), "holds builtins.eval"),
    "python 2 eval": (_global("__builtin__", "eval", b"(U\x011t"), "holds __builtin__.eval"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0cf2py.os.path\x93.", "holds numpy.f2py.os.path"),
    "numpy load": (_global("numpy", "load"), "holds numpy.load"),
    "numpy's own function": (_global("numpy.core.multiarray", "fromfile"), "holds numpy.core.multiarray.fromfile"),
    "codecs": (_global("_codecs", "lookup"), "holds _codecs.lookup"),
    "other text": (_global("_codecs", "encode", b"(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibt"), "other than as latin1"),
    "instance": (b"(ios\nsystem\n.", "instruction INST"),
    "persistent id": (b"Pname\n.", "instruction PERSID"),
    "extension": (b"\x82\x01.", "instruction EXT1"),
    "new object": (b"\x80\x02cnumpy\ndtype\n)\x81.", "instruction NEWOBJ"),
    "object array": (pickle.dumps(np.array([_Runs()], dtype=object), 2), "posix.system|an array of 'O8'"),
    "structured array": (pickle.dumps(np.zeros(2, [("a", "u1")]), 2), "an array of 'V1'"),
    "text array": (pickle.dumps(np.array(["a"]), 2), "an array of 'U1'"),
    "changed function": (b"\x80\x02c_codecs\nencode\n]b.", "an attempt to change a function"),
    "changed class": (b"\x80\x02cnumpy\ndtype\n]b.", "an attempt to change a function"),
    "array without numbers": (b"\x80\x02cnumpy.core.multiarray\nscalar\nK\x01K\x02\x86R.", "without numbers"),
    "large array of few bytes": (_LITTLE_ARRAY.replace(b"K\x08\x85", b"J\x00\x00\x00\x7f\x85"), "made of 8 bytes"),
    "negative array": (_LITTLE_ARRAY.replace(b"K\x08\x85", b"J\xf8\xff\xff\xff\x85"), "made of 8 bytes"),
    "twice negative array": (
        _LITTLE_ARRAY.replace(b"K\x08\x85", b"J\xf8\xff\xff\xffJ\xff\xff\xff\xff\x86"),
        "made of 8 bytes",
    ),
    "memo bomb": (b"\x80\x02Nr\xff\xff\xff\x7f.", "is not a verification set"),
    "length bomb": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "not a whole pickle"),
    "set": (pickle.dumps({1, 2}, 4), "instruction EMPTY_SET"),
    "stack underflow": (b"\x80\x020.", "not a whole pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    data, reason = HOSTILE[name]
    (tmp_path / "x.bin").write_bytes(data)
    _fails(reason, tmp_path / "x.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_memo_and_length_bombs_allocate_nothing():
    tracemalloc.start()
    assert safe_pickle.load(HOSTILE["memo bomb"][0], "x") is None  # the slot is a key, not a place
    with pytest.raises(DataError):
        safe_pickle.load(HOSTILE["length bomb"][0], "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_plain_data_is_read():
    value = ([b"x", (1, 2.5, True, None, "é"), -(2**70)], [], ())
    for protocol in range(2, 6):
        assert safe_pickle.load(pickle.dumps(value, protocol), "x") == value
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    read = safe_pickle.as_array(safe_pickle.load(pickle.dumps(array, 2), "x"))
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    "value, match",
    [
        ((IMAGES[:5], ISSAME), "5 images for 3 pairs, where 6 are needed"),
        ((IMAGES, ISSAME[:2]), "6 images for 2 pairs"),
        (([], []), "holds no pair"),
        ([1, 2, 3], "not a verification set"),
        (IMAGES, "not a verification set"),
        (7, "not a verification set"),
        (([1, 2], [True]), "image 0 is neither bytes nor a uint8 array"),
        (([np.zeros(3), b"x"], [True]), "image 0 is neither"),
        ((IMAGES, 5), "does not hold booleans"),
    ],
)
def test_bins_of_the_wrong_content(tmp_path, value, match):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(value, 2))
    _fails(match, tmp_path / "x.bin")


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -40])
def test_cut_off_bin(tmp_path, keep):
    write_bin(tmp_path / "x.bin", IMAGES, ISSAME)
    data = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(data[:keep])
    _fails("not a whole pickle", tmp_path / "x.bin")


def test_missing_and_foreign_sets(tmp_path):
    _fails("no such verification set", tmp_path / "lfw.bin")
    _fails("neither a bcolz array .* nor a pair folder", tmp_path)


@pytest.mark.parametrize("bad", [with_claimed_size(IMAGES[0], 65000, 65000), encode(picture(0, 64))])
def test_images_of_another_size(tmp_path, bad):
    write_bin(tmp_path / "x.bin", [IMAGES[0], bad], [True])
    with pytest.raises(DataError, match=r"image 1 \(pair 0\): is (65000x65000|64x64) where 112x112 is needed|exceeds"):
        load_pairs(tmp_path / "x.bin")[0][:]


# bcolz


@pytest.fixture
def bcolz_set(tmp_path):
    """A set as InsightFace_Pytorch writes it: BGR, and nothing recorded."""
    bcolz = pytest.importorskip("bcolz")
    array = bcolz.fill((6, 3, 112, 112), dtype=np.float32, rootdir=str(tmp_path / "lfw"), mode="w")
    for row, data in enumerate(IMAGES):
        array[row] = ((decode_image(data)[:, :, ::-1].transpose(2, 0, 1) / 255) - 0.5) / 0.5
    array.flush()
    np.save(tmp_path / "lfw_list", np.array(ISSAME))
    return tmp_path / "lfw"


def test_bcolz_is_bgr_unless_recorded_or_told(bcolz_set):
    _check(*load_pairs(bcolz_set))
    np.testing.assert_array_equal(load_pairs(bcolz_set, "rgb")[0][:], load_pairs(bcolz_set)[0][:][..., ::-1])
    (bcolz_set.parent / "lfw_channel_order.txt").write_text("rgb")
    np.testing.assert_array_equal(load_pairs(bcolz_set)[0][:], load_pairs(bcolz_set, "rgb")[0][:])


def _change_meta(folder, name: str, **values) -> None:
    path = folder / "meta" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "name, values, match",
    [
        ("storage", {"dtype": "object"}, "holds object"),
        ("storage", {"dtype": "float64"}, "holds float64"),
        ("storage", {"chunklen": 10**9}, "chunks of 1000000000 images"),
        ("storage", {"chunklen": 0}, "chunks of 0"),
        ("storage", {"chunklen": "1"}, "holds float32"),
        ("sizes", {"shape": [6, 3, 64, 64]}, "where float32"),
        ("sizes", {"shape": 5}, "where float32"),
        ("sizes", {"shape": [10**9, 3, 112, 112]}, "missing or cut off|not fit"),
        ("sizes", {"shape": ["6", 3, 112, 112]}, "where float32"),
    ],
)
def test_bcolz_meta_is_checked_before_bcolz_sees_it(bcolz_set, monkeypatch, name, values, match):
    import bcolz

    monkeypatch.setattr(bcolz, "carray", None)  # calling it fails
    _change_meta(bcolz_set, name, **values)
    with pytest.raises(DataError, match=match):
        load_pairs(bcolz_set)


def test_damaged_bcolz(bcolz_set):
    chunk = sorted((bcolz_set / "data").iterdir())[0]
    data = chunk.read_bytes()
    for bad in (data[:-5], data[:10], data + b"x", b"junk" + data[4:], data[:20] + b"\xff\xff" + data[22:]):
        chunk.write_bytes(bad)
        with pytest.raises(DataError, match="blp: (missing or cut off|its header does not fit)"):
            load_pairs(bcolz_set)
    chunk.unlink()
    with pytest.raises(DataError, match="blp: missing"):
        load_pairs(bcolz_set)


def test_bcolz_answers(bcolz_set):
    answers = bcolz_set.parent / "lfw_list.npy"
    np.save(answers, np.array([True, False]))
    _fails("6 images for 2 pairs", bcolz_set)
    np.save(answers, np.array([_Runs()] * 3, dtype=object), allow_pickle=True)
    _fails("cannot be opened with lfw_list.npy", bcolz_set)
    answers.unlink()
    _fails("cannot be opened with lfw_list.npy", bcolz_set)
    (bcolz_set / "meta" / "storage").write_text("{")
    _fails("its meta files cannot be read", bcolz_set)


def test_without_bcolz_one_line_says_what_to_install(bcolz_set, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bcolz", None)
    _fails("needs the package bcolz-zipline", bcolz_set)


# Folders


@pytest.fixture
def pair_folder(tmp_path):
    folder = tmp_path / "lfw"
    for pair in range(3):
        (folder / f"pair {pair}").mkdir(parents=True)
        for side, name in enumerate(("a.jpg", "b.PNG")):
            data = IMAGES[2 * pair + side]
            (folder / f"pair {pair}" / name).write_bytes(data if side == 0 else encode(decode_image(data), "PNG"))
    (folder / "label.txt").write_text("pair 0 True\n\npair 1\tFalse\npair 2 true\n")
    return folder


def test_pair_folder(pair_folder):
    _check(*load_pairs(pair_folder))


def test_written_pair_folder(tmp_path):
    write_folder(tmp_path / "set", IMAGES, ISSAME)
    _check(*load_pairs(tmp_path / "set"))


@pytest.mark.parametrize(
    "line, match",
    [
        ("pair 0 maybe", "line 5: 'pair 0 maybe' is not"),
        ("True", "line 5"),
        ("../lfw True", "line 5: path"),
        ("absent True", "line 5: .*absent cannot be read"),
    ],
)
def test_bad_pair_lines(pair_folder, line, match):
    with open(pair_folder / "label.txt", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=match):
        load_pairs(pair_folder)


def test_bad_pair_folders(pair_folder):
    (pair_folder / "pair 1" / "c.jpg").write_bytes(IMAGES[0])
    with pytest.raises(DataError, match="line 3: .*pair 1 holds 3 images, a pair is exactly two"):
        load_pairs(pair_folder)
    (pair_folder / "pair 1" / "c.jpg").unlink()
    images, _ = load_pairs(pair_folder)
    (pair_folder / "pair 1" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="pair 1/a.jpg: not an image"):
        images[2]
    (pair_folder / "label.txt").write_text("")
    _fails("holds no pair", pair_folder)


def test_find_pair_sets(tmp_path, pair_folder):
    assert VERIFICATION_SETS == ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw", "vgg2_fp", "synthetic")
    assert find_pair_sets(tmp_path) == {"lfw": pair_folder}
    write_bin(tmp_path / "cfp_fp.bin", IMAGES, ISSAME)
    write_bin(tmp_path / "own.bin", IMAGES, ISSAME)
    (tmp_path / "calfw").mkdir()  # holds nothing
    assert find_pair_sets(tmp_path) == {"lfw": pair_folder, "cfp_fp": tmp_path / "cfp_fp.bin"}
    write_bin(tmp_path / "lfw.bin", IMAGES, ISSAME)
    assert find_pair_sets(tmp_path, ["own", "lfw"]) == {"own": tmp_path / "own.bin", "lfw": tmp_path / "lfw.bin"}
    assert find_pair_sets(tmp_path / "own.bin") == {"own": tmp_path / "own.bin"}
    assert find_pair_sets(tmp_path / "nowhere") == {}


def _array(shape: bytes, data: bytes = b"\0") -> bytes:
    """A pickle of ([array], [True]) of a shape given as opcodes."""
    of = lambda name: b"cnumpy.core.multiarray\n" + name + b"\n"  # noqa: E731
    dtype = b"cnumpy\ndtype\n(X\x02\0\0\0u1K\0K\1tR"
    made = of(b"_reconstruct") + b"(cnumpy\nndarray\n(K\0tC\1btR(K\1" + shape + dtype + b"\x89"
    return b"\x80\x03(]" + made + b"B" + struct.pack("<I", len(data)) + data + b"tb"


def test_pickles_that_claim_much_are_refused_at_once(tmp_path):
    huge = b"\x8a\xff" + b"\x7f" * 255  # a whole number of 255 bytes
    for shape in (b"(" + huge * 10_000 + b"t", b"(" + b"K\1" * 10_000 + b"t", b"(J\xff\xff\xff\x7fK\0t", b"(I01\nt"):
        (tmp_path / "lfw.bin").write_bytes(_array(shape) + b"a]\x88at.")
        with pytest.raises(DataError, match="lfw.bin: (refused|not a whole pickle)"):
            load_pairs(tmp_path / "lfw.bin")
    text = (
        b"\x80\x02X"
        + struct.pack("<I", 1 << 16)
        + b"x" * (1 << 16)
        + b"q\0]"
        + (b"c_codecs\nencode\nh\0X\x06\0\0\0latin1\x86Ra" * 100)
    )
    with pytest.raises(DataError, match="one text encoded many times"):
        safe_pickle.load(text + b".", "it")


def test_one_array_named_many_times_is_held_once(tmp_path):
    (tmp_path / "lfw.bin").write_bytes(_array(b"(K\1t") + b"q\1a" + b"h\1a" * 499 + b"]" + b"\x88a" * 250 + b"t.")
    images, issame = read_bin(tmp_path / "lfw.bin")
    assert len(images) == 500 and len(issame) == 250
    assert len({id(image.obj) for image in images}) == 1  # views, no copies


def test_files_far_too_long_and_answers_that_are_none(tmp_path, bcolz_set):
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(DataError, match="big.bin: is 6442450944 bytes long; at most"):
        load_pairs(tmp_path / "big.bin")
    answers = bcolz_set.with_name(bcolz_set.name + "_list.npy")
    with open(answers, "wb") as file:
        np.savez(file, x=np.ones(2))
    with pytest.raises(DataError, match="cannot be opened with .*: prepare the set again"):
        load_pairs(bcolz_set)
    (bcolz_set / "meta" / "sizes").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match="its meta files cannot be read"):
        load_pairs(bcolz_set)
    write_bin(tmp_path / "own.bin", IMAGES, ISSAME)
    for odd in ([2, True], [np.zeros(2), True], [None, True], ["False", True]):
        (tmp_path / "own.bin").write_bytes(pickle.dumps((IMAGES[:4], odd), 2))
        with pytest.raises(DataError, match="own.bin"):
            load_pairs(tmp_path / "own.bin")
