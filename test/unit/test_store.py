"""`.pth` files: whole or not there, and read as if nobody could be trusted."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import subprocess
import zipfile
from collections import OrderedDict
from inspect import signature
from pathlib import Path

import easydict
import pytest
import torch

from checkpoint import content, safe_pickle, store
from runtime.errors import CheckpointError
from runtime.files import atomic_file

pytestmark = pytest.mark.core


def small_state() -> dict:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": net.state_dict(),
        "head": {"kernel": torch.randn(7, 4).t()},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "config": {"lr": 0.1, "milestones": [12, 15], "pair": (1, None), "name": "ir_se", "big": 2**70},
        "kinds": [torch.ones(2, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.uint8, torch.bool)],
        "odd": {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)},
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def error_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        store.load_pth(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    state = small_state()
    store.save_pth(tmp_path / "a.pth", state)
    loaded = store.load_pth(tmp_path / "a.pth")
    assert same(loaded, state)
    assert loaded["model"]._metadata == state["model"]._metadata
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_file_is_for_torchs_safe_loader(tmp_path):
    if "weights_only" not in signature(torch.load).parameters:
        pytest.skip("torch before 1.13 has no weights_only")
    state = small_state()
    store.save_pth(tmp_path / "a.pth", state)
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert len(loaded.pop("sha256")) == 64 and same(loaded, state)


def test_files_from_before_torch_1_6_load(tmp_path):
    state = small_state()
    state["view"] = torch.arange(12.0)[3:7]
    state["config"].update(raw=b"\0\xff", dtype=torch.bfloat16, size=torch.Size([2, 3]))
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(store.load_pth(tmp_path / "old.pth"), state)


@pytest.mark.parametrize(
    "value, words",
    [
        ({"a": [1, {"b": Path("x")}]}, "a[1].b: pathlib"),
        ({"net": torch.nn.Linear(2, 2)}, "net: torch.nn"),
        ({"config": easydict.EasyDict(a=1)}, "config: easydict"),
        ({"a": {(1, 2): 3}}, "a: key (1, 2)"),
        ({"raw": b"not every safe loader takes bytes"}, "raw: builtins.bytes"),
        ({"big": torch.zeros(1).expand(10**9)}, "big: an expanded tensor"),
    ],
)
def test_only_tensors_and_plain_values_are_saved(tmp_path, value, words):
    with pytest.raises(CheckpointError) as caught:
        store.save_pth(tmp_path / "a.pth", value)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_the_last_good_file(tmp_path):
    path = tmp_path / "a.pth"
    store.save_pth(path, {"epoch": 1, "w": torch.ones(100)})
    _soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the disk takes no more than this of any file
    try:
        with pytest.raises(CheckpointError) as caught:
            store.save_pth(path, {"epoch": 2, "w": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_soft, hard))
    message = str(caught.value)
    assert str(path) in message and "File too large" in message and "\n" not in message
    assert os.listdir(tmp_path) == ["a.pth"] and store.load_pth(path)["epoch"] == 1


def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        store.save_pth(disk / "a.pth", {"epoch": 1, "w": torch.ones(10_000)})
        with pytest.raises(CheckpointError, match="No space left on device.*free space"):
            store.save_pth(disk / "a.pth", {"epoch": 2, "w": torch.ones(60_000)})
        assert os.listdir(disk) == ["a.pth"] and store.load_pth(disk / "a.pth")["epoch"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_file(tmp_path / "a.pth") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        store.save_pth(tmp_path / "missing" / "a.pth", {})


# --- files that are not whole ----------------------------------------------------------------------------------------


def test_missing_empty_folder_and_foreign_files(tmp_path):
    assert "no such checkpoint" in error_of(tmp_path / "missing.pth")
    assert "is a folder" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")  # nobody writes to it: opening it would wait for ever
    assert "no plain file" in error_of(tmp_path / "pipe.pth")
    for data, words in [(b"", "cut off"), (b"hello, world", "no file of torch"), (b"\x80\x02K\x01.", "not torch's")]:
        (tmp_path / "a.pth").write_bytes(data)
        assert words in error_of(tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not torch's" in error_of(tmp_path / "b.pth")


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_file_cut_off_anywhere_is_one_line(tmp_path, as_zip):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    for length in [*range(4, len(content), max(1, len(content) // 60)), len(content) - 1]:
        path.write_bytes(content[:length])
        assert "cut off" in error_of(path) or not as_zip


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_damaged_file_is_one_line_or_the_same_kind_of_data(tmp_path, as_zip):
    path = tmp_path / "a.pth"
    state = small_state()
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    content = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _round in range(150):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = store.load_pth(path)
        except CheckpointError:
            refused += 1
        else:  # padding of the zip, or a number in a format that has no checksums
            assert not as_zip or same(loaded, state)
    assert refused > 30


def test_no_flipped_bit_in_the_zips_headers_changes_a_number(tmp_path):
    # torch 1.8 takes a record that is marked as a folder for one without content, and hands out memory as it was
    path, state = tmp_path / "a.pth", {"w": torch.arange(16.0)}
    torch.save(state, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spots = list(range(archive.start_dir, len(content)))
        for entry in archive.infolist():
            spots += range(entry.header_offset, entry.header_offset + 30 + len(entry.filename) + 8)
    chance, refused = random.Random(0), 0
    for spot in spots:
        damaged = bytearray(content)
        damaged[spot] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(store.load_pth(path), state)
        except CheckpointError:
            refused += 1
    assert refused > len(spots) / 3


def test_no_flipped_bit_at_all_changes_what_is_loaded(tmp_path):
    """One bit of every byte of the directory, the pickle and the numbers; the padding between holds nothing."""
    path, state = tmp_path / "a.pth", {"w": torch.arange(3.0).half(), "n": {"lr": 0.5, "name": "ir", "k": (1, None)}}
    store.save_pth(path, state)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickle_ = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        spots = {*range(pickle_.header_offset + 130 + pickle_.file_size), *range(archive.start_dir, len(whole))}
    at, refused = whole.index(state["w"].numpy().tobytes()), 0
    for spot in sorted({*spots, *range(at, at + 6)}):
        damaged = bytearray(whole)
        damaged[spot] ^= 1 << spot % 8
        path.write_bytes(damaged)
        try:
            assert same(store.load_pth(path), state), spot
        except CheckpointError:
            refused += 1
    assert refused > pickle_.file_size


@pytest.mark.parametrize("inside, other", [(b"\0\x3c", b"\0\x3d"), (b"name", b"mane")])
def test_what_was_changed_with_its_zip_checksum_is_found(tmp_path, inside, other):
    state = {"w": torch.ones(2, dtype=torch.half), "config": {"name": "ir"}}
    store.save_pth(tmp_path / "a.pth", state)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive, zipfile.ZipFile(tmp_path / "b.pth", "w") as changed:
        for entry in archive.infolist():
            changed.writestr(entry.filename, archive.read(entry).replace(inside, other))
    assert "not what was saved" in error_of(tmp_path / "b.pth")


def test_the_checksum_is_of_numbers_names_and_kinds_not_of_their_place(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1j)}
    whole = content.checksum(state)
    assert whole == content.checksum({"a": state["a"].repeat(2, 1)[:2], "b": state["b"].clone(), "c": state["c"]})
    others = [{"a": state["a"].t()}, {"a": state["a"] + 0 * 1e-30}, {"A": state["a"]}, {"a": state["a"].double()}]
    others += [{"a": state["a"].reshape(3, 2)}, {"a": [1]}, {"a": (1,)}, {"a": True}, {"a": 1}, {"a": "1"}]
    assert len({content.checksum(other) for other in others}) == len(others)
    wide = torch.arange(float(3 << 22)).reshape(3, 1 << 22)  # more than one block
    changed = wide.clone()
    changed[2, -1] += 1
    assert content.checksum(wide.t()) != content.checksum(changed.t()) == content.checksum(changed.clone().t())


def test_a_record_marked_as_a_folder_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled({"w": tensor(4, (4,))}, False))
        folder = zipfile.ZipInfo("a/data/0")
        folder.external_attr = 0x10
        archive.writestr(folder, torch.ones(4).numpy().tobytes())
    assert "odd attributes" in error_of(path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    path = tmp_path / "a.pth"
    store.save_pth(path, {"w": torch.full((1000,), 3.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 3.0).numpy().tobytes()) + 200] ^= 1
    path.write_bytes(content)
    assert "checksum" in error_of(path) or "CRC" in error_of(path)


# --- hostile files ---------------------------------------------------------------------------------------------------


class Runs:
    """Pickled, an order to run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {}, "config": [x]}, lambda x: OrderedDict(w=x)])
def test_code_in_a_file_does_not_run(tmp_path, as_zip, wrap):
    torch.save(wrap(Runs(tmp_path / "ran")), tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    assert "posix.system" in error_of(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_bare_pickle_does_not_run(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), protocol=2))
    assert "posix.system" in error_of(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_a_script_is_not_a_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    assert "TorchScript" in error_of(tmp_path / "a.pth")


class Call:
    """Pickled, a call of an admitted function with arguments of the attacker's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class StorageOf:
    def __init__(self, numel, key="0", kind=torch.FloatStorage, view=None):
        self.identity = ("storage", kind, key, "cpu", numel)
        self.view = view


def pickled(value, legacy: bool) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, StorageOf):
                return (*thing.identity, thing.view) if legacy else thing.identity
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write_zip(path, content: bytes, record: bytes = b"", compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", record)


def write_legacy(path, value, numel: int, record: bytes) -> None:
    parts = [pickle.dumps(part, protocol=2) for part in (safe_pickle.LEGACY_MAGIC, 1001, {"little_endian": True})]
    parts += [pickled(value, legacy=True), pickle.dumps(["0"], protocol=2), numel.to_bytes(8, "little"), record]
    Path(path).write_bytes(b"".join(parts))


def tensor(numel, size, stride=(1,), offset=0, view=None) -> Call:
    storage = StorageOf(numel, view=view)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


HUGE = 1 << 40
CLAIMS = {
    "a storage larger than its record": tensor(HUGE, (4,)),
    "a view larger than its storage": tensor(4, (HUGE,)),
    "an expanded view": tensor(4, (HUGE,), (0,)),
    "a view behind the end": tensor(4, (2,), offset=3),
    "a negative offset": tensor(4, (2,), offset=-2),
    "a negative stride": tensor(4, (2,), (-1,)),
    "a size that is no number": tensor(4, ("x",)),
    "sizes and strides of two lengths": tensor(4, (2, 2), (1,)),
    "thousands of dimensions": tensor(4, (1,) * 5000, (1,) * 5000),
    "a storage made by a call": Call(torch.FloatStorage, HUGE),
    "a tensor made by a call": Call(torch.FloatTensor, HUGE),
    "an unknown codec": Call(pickle.codecs.encode, "x", "rot13"),
    "a bytearray": Call(bytearray, HUGE),
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_gets_no_more_memory_than_it_holds(tmp_path, claim, legacy):
    path = tmp_path / "a.pth"
    record = torch.ones(4).numpy().tobytes()
    if legacy:
        write_legacy(path, {"w": CLAIMS[claim]}, 4, record)
    else:
        write_zip(path, pickled({"w": CLAIMS[claim]}, legacy), record)
    error_of(path)


def test_the_same_files_load_without_the_claims(tmp_path):
    record = torch.ones(4).numpy().tobytes()
    write_zip(tmp_path / "a.pth", pickled({"w": tensor(4, (4,))}, False), record)
    write_legacy(tmp_path / "b.pth", {"w": tensor(4, (4,))}, 4, record)
    write_legacy(tmp_path / "c.pth", {"w": tensor(4, (2,), view=("v", 1, 3))}, 4, record)
    assert store.load_pth(tmp_path / "a.pth")["w"].tolist() == [1.0] * 4
    assert store.load_pth(tmp_path / "b.pth")["w"].tolist() == [1.0] * 4
    assert store.load_pth(tmp_path / "c.pth")["w"].tolist() == [1.0] * 2


def test_legacy_views_and_keys_lie_within_the_file(tmp_path):
    path, record = tmp_path / "a.pth", torch.ones(4).numpy().tobytes()
    write_legacy(path, {"w": tensor(4, (2,), view=("v", 3, HUGE))}, 4, record)
    error_of(path)
    write_legacy(path, {}, 4, record)  # a storage that nothing asked for
    error_of(path)


def test_strings_and_bytes_do_not_multiply(tmp_path):
    path = tmp_path / "a.pth"
    # one long string, and a thousand orders of two bytes to make bytes of it: 100 kB claim 100 MB
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000 + b"q\x01"
    encode = b"c_codecs\nencode\nq\x00h\x01X\x06\x00\x00\x00latin1\x86R"
    write_zip(path, b"\x80\x02](" + text + b"0" + encode * 1000 + b"e.")
    error_of(path)
    write_zip(path, b"\x80\x02X\xff\xff\xff\x7fabc.")
    assert "longer than the file" in error_of(path)
    join = b"cpathlib\nPosixPath\nq\x00(" + b"h\x01" * 1000 + b"tR"
    write_zip(path, b"\x80\x02](" + text + b"0" + join + b"e.")
    error_of(path)


def test_zip_layouts_that_two_readers_read_differently(tmp_path):
    path, content = tmp_path / "a.pth", pickled({"epoch": 1}, False)
    write_zip(path, content, b"\0" * (1 << 20), zipfile.ZIP_DEFLATED)
    assert "compressed" in error_of(path)
    write_zip(path, content)
    assert store.load_pth(path) == {"epoch": 1}
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("a/data.pkl", content)
    assert "two records" in error_of(path)
    write_zip(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/Data.pkl", content)
    assert "two records" in error_of(path)
    write_zip(path, content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"more"
    assert "odd zip layout" in error_of(path)
    write_zip(path, content)
    path.write_bytes(b"PK\x03\x04 in front" + path.read_bytes())
    error_of(path)


# --- files of InsightFace_Pytorch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_zip", [True, False])
def test_an_upstream_config_object_becomes_plain(tmp_path, as_zip):
    config = easydict.EasyDict(net_depth=100, sizes=[112, 112], inner=easydict.EasyDict(x=1))
    config.work_path, config.root = Path("work_space/models"), Path("/data")
    config.device, config.ce_loss = torch.device("cpu"), torch.nn.CrossEntropyLoss()
    state = small_state()
    torch.save({**state, "config": config}, tmp_path / "a.pth", _use_new_zipfile_serialization=as_zip)
    loaded = store.load_pth(tmp_path / "a.pth")
    assert same({**loaded, "config": None}, {**state, "config": None})
    assert type(loaded["config"]) is dict
    assert loaded["config"] == {
        "net_depth": 100,
        "sizes": [112, 112],
        "inner": {"x": 1},
        "work_path": "work_space/models",
        "root": "/data",
        "device": torch.device("cpu"),
        "ce_loss": None,
    }


# --- what a checkpoint is of -----------------------------------------------------------------------------------------

META = {"architecture": {"net_mode": "ir_se", "net_depth": 100, "embedding_size": 512}, "num_classes": 40}


@pytest.mark.parametrize("meta", [META, {**META["architecture"], "num_classes": 40}])
def test_the_right_checkpoint_passes(meta):
    store.check_architecture(meta, {"net_mode": "ir_se", "net_depth": 100, "embedding_size": 512, "num_classes": 40})
    store.check_architecture(meta, {"net_mode": "ir_se", "num_classes": None})
    store.check_architecture({}, {"net_mode": "ir"})


@pytest.mark.parametrize(
    "wanted, words",
    [
        ({"net_mode": "mobilefacenet", "net_depth": 100}, ["ir_se", "mobilefacenet", "--net_mode=ir_se"]),
        ({"net_mode": "ir_se", "net_depth": 50}, ["net_depth 100", "net_depth 50", "--net_depth=100"]),
        ({"net_mode": "ir_se", "embedding_size": 128}, ["--embedding_size=512"]),
        ({"net_mode": "ir_se", "num_classes": 41}, ["40 classes", "41", "--is_finetune"]),
    ],
)
def test_another_net_or_class_count_is_one_line(wanted, words):
    with pytest.raises(CheckpointError) as caught:
        store.check_architecture(META, wanted, "a.pth")
    assert all(word in str(caught.value) for word in ["a.pth", *words]) and "\n" not in str(caught.value)


# --- the folder ------------------------------------------------------------------------------------------------------


def fill(folder, *saved) -> list:
    names = []
    for moment, (time, epoch, accuracy) in enumerate(saved):
        path = folder / store.checkpoint_name(time, epoch, accuracy)
        store.save_pth(path, {"epoch": epoch})
        os.utime(path, ns=(moment, moment))
        names.append(path.name)
    return names


def test_names_are_the_seeds():
    assert store.checkpoint_name("2026-11-20-16-05", 3, 0.998166) == "model_2026-11-20-16-05_epoch:3_0.99817.pth"


def test_the_best_the_newest_and_some_more_are_kept(tmp_path):
    saved = [
        ("2026-11-20-16-05", 0, 0.5),
        ("2026-11-20-16-05", 1, 0.9),
        ("2026-11-20-16-06", 2, 0.7),
        ("2026-11-21-00-00", 3, 0.8),
        ("2026-11-21-00-00", 4, 0.6),
    ]
    names = fill(tmp_path, *saved)
    (tmp_path / "other.pth").write_bytes(b"not ours to delete")
    assert [path.name for path in store.prune(tmp_path, keep=1)] == [names[0], names[2]]
    assert sorted(os.listdir(tmp_path)) == sorted(["other.pth", names[1], names[3], names[4]])
    store.prune(tmp_path, keep=0)
    assert sorted(os.listdir(tmp_path)) == sorted(["other.pth", names[1], names[4]])
    store.prune(tmp_path / "nothing", keep=0)


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (name,) = fill(tmp_path, ("2026-11-20-16-05", 0, 0.5))
    old, young = tmp_path / ".model_a.pth.0f3c.tmp", tmp_path / ".model_b.pth.1a2b.tmp"
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.prune(tmp_path, keep=5)
    assert sorted(os.listdir(tmp_path)) == sorted([young.name, name])


def test_the_newest_whole_one_is_found(tmp_path, caplog):
    assert store.newest(tmp_path) is None and store.newest(tmp_path / "missing") is None
    names = fill(tmp_path, ("2026-11-20-16-05", 1, 0.9), ("2026-11-20-16-05", 2, 0.8), ("2026-11-20-16-06", 3, 0.7))
    assert store.newest(tmp_path).name == names[2]
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-30])
    assert store.newest(tmp_path).name == names[1]
    assert names[2] in caplog.text
