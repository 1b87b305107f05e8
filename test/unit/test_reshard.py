"""Sharded checkpoints on disk: cut anew for other ranks, exported as `.pth`, and damaged or hostile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workers_checkpoint as workers
from tiny_set import make_tiny_set

from checkpoint import layout, reshard, sharded, store
from config import parse_arguments
from learner import Learner
from plsc.utils import process_distfc_parameter
from runtime.dist import ALONE, World
from runtime.errors import CheckpointError, DamagedCheckpoint
from runtime.files import checksum
from runtime.shard import RowShard

needs_sharded = pytest.mark.skipif(
    not sharded.available(), reason=f"no sharded checkpoints on torch {torch.__version__}"
)


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A checkpoint of one rank, in pieces of a few rows."""
    monkeypatch.setattr(layout, "PIECE_BYTES", 1000)
    workers.save_one(ALONE, tmp_path / "saved", 7, False, 1000)
    return layout.newest(tmp_path / "saved")


# --- for other ranks -------------------------------------------------------------------------------------------------


@needs_sharded
def test_cut_for_any_number_of_ranks_and_back_it_is_the_same(saved, tmp_path):
    for ranks in (2, 3, 4):
        path = reshard.convert(saved, tmp_path / str(ranks), ranks)
        assert path.name == "000001-step_7" and len(list(path.glob("rank_*.bin"))) == ranks
        index = layout.read_index(path)
        for rank in range(ranks):
            shard = RowShard.of(workers.CLASSES, rank, ranks)
            for name in ("rows.weight", "rows.momentum"):
                own = [p for p in index.tensors[name].pieces if p.file == f"rank_{rank:05d}.bin"]
                assert (own[0].row, own[-1].row + own[-1].rows) == (shard.start, shard.stop)
        assert workers.load_one(ALONE, path, 7) == (True, 0)
        assert layout.decode(index.local[1], {}) is None
        back = reshard.convert(path, tmp_path / "back", 1)
        assert workers.load_one(ALONE, back, 7) == (True, 0)


@needs_sharded
def test_local_states_of_ranks_that_go_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "PIECE_BYTES", 1000)
    folder, _final = layout.begin(tmp_path / "in", "two")
    with layout.RankFile(folder, 0) as file:
        pieces = {name: [file.append(0, torch.zeros(4))] for name in ("rank0.a", "rank1.a", "rows.weight")}
    tensors = {name: layout.Stored("float32", (4,), pieces[name]) for name in pieces}
    layout.write_index(folder, layout.Index(2, 3, [{"tensor": "rank0.a"}, {"tensor": "rank1.a"}], tensors))
    index = layout.read_index(reshard.convert(folder, tmp_path / "out", 1))
    assert set(index.tensors) == {"rank0.a", "rows.weight"} and index.local == [{"tensor": "rank0.a"}]


@needs_sharded
def test_damage_is_found_and_nothing_is_left(saved, tmp_path):
    last = layout.read_index(saved).tensors["rows.weight"].pieces[-1]
    with open(saved / last.file, "r+b") as file:
        file.seek(last.start + last.bytes - 1)
        file.write(b"?")
    with pytest.raises(DamagedCheckpoint, match="damaged at byte"):
        reshard.convert(saved, tmp_path / "out", 2)
    assert list((tmp_path / "out").iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


@needs_sharded
def test_the_command_takes_the_seeds_options(saved, tmp_path, root):
    command = [
        sys.executable,
        "-m",
        "plsc.utils.process_distfc_parameter",
        "--name_feature=@rank@",
        "--pretrain_nranks=1",
        "--nranks=3",
        f"--num_classes={workers.CLASSES}",
        f"--emb_dim={workers.WIDTH}",
        f"--pretrained_model_dir={saved.parent}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert layout.read_index(layout.newest(tmp_path / "out")).world_size == 3
    for wrong, held in [("emb_dim=512", workers.WIDTH), ("num_classes=9", workers.CLASSES), ("pretrain_nranks=4", 1)]:
        with pytest.raises(CheckpointError, match=f"--{wrong}, but the checkpoint has {held}"):
            process_distfc_parameter.main([*command[3:], f"--{wrong}"])


@needs_sharded
def test_the_command_cuts_one_table_alone(saved, tmp_path):
    common = [f"--pretrained_model_dir={saved}", f"--output_dir={tmp_path / 'out'}"]
    process_distfc_parameter.main([*common, "--nranks=2", "--name_feature=momentum"])
    path = layout.newest(tmp_path / "out")
    tensors = layout.read_index(path).tensors
    assert len({piece.file for piece in tensors["rows.momentum"].pieces}) == 2
    assert len({piece.file for piece in tensors["rows.weight"].pieces}) == 1
    assert workers.load_one(ALONE, path, 7) == (True, 0)
    process_distfc_parameter.main([*common, "--nranks=1"])
    assert len(list((tmp_path / "out").iterdir())) == 1, "for as many ranks as it has there is nothing to do"
    with pytest.raises(CheckpointError, match="no row table with 'bias'"):
        process_distfc_parameter.main([*common, "--nranks=2", "--name_feature=bias"])


def test_the_command_names_what_is_missing(tmp_path):
    common = [f"--output_dir={tmp_path / 'out'}", "--nranks=2"]
    with pytest.raises(CheckpointError, match="no such folder"):
        process_distfc_parameter.main([f"--pretrained_model_dir={tmp_path / 'missing'}", *common])
    with pytest.raises(CheckpointError, match="no whole sharded checkpoint"):
        process_distfc_parameter.main([f"--pretrained_model_dir={tmp_path}", *common])


# --- as .pth ---------------------------------------------------------------------------------------------------------


@needs_sharded
def test_what_the_command_is_given_by_an_unset_variable(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)  # an empty path is not the folder that the caller stands in
    for arguments, what in (["", "a.pth"], "sharded checkpoint is empty"), ([str(saved), ""], ".pth to write is empty"):
        with pytest.raises(CheckpointError, match=what):
            reshard.main(arguments)
    for ranks in (0, 10**6, 10**30):
        with pytest.raises(CheckpointError, match=f"{ranks} ranks: give 1 to 99999"):
            reshard.convert(saved, tmp_path / "out", ranks)


@needs_sharded
def test_export_as_pth(saved, tmp_path):
    reshard.to_pth(saved, tmp_path / "a.pth")
    state = store.load_pth(tmp_path / "a.pth")
    kernel_DC = state.pop("head")["kernel"]
    assert torch.equal(kernel_DC, workers.table(7).float().t())
    assert workers.same(state, workers.state_of(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "saved"]


@needs_sharded
def test_export_turns_half_centers_into_float32_and_parts_the_bias_from_them(tmp_path):
    table_CW = torch.arange(12.0).reshape(4, 3)
    shard = RowShard.of(4)
    state = {"meta": {"embedding_size": 2}, "head": {"draws": 5}, "training": {"step": 9}}
    with sharded.Saver(tmp_path / "saved") as saver:
        saver.save(
            "half",
            state,
            {"weight": (table_CW.bfloat16(), shard), "momentum": (-table_CW, shard)},
            local={"rng": {"torch": torch.ones(2)}},
        )
    reshard.main([str(tmp_path / "saved"), str(tmp_path / "a.pth")])
    state = store.load_pth(tmp_path / "a.pth")
    assert torch.equal(state["head"]["kernel"], table_CW[:, :2].t())
    training = state["training"]
    assert training["step"] == 9 and training["head"]["draws"] == 5
    assert torch.equal(training["head"]["bias"], table_CW[:, 2:].t())
    assert torch.equal(training["head"]["momentum"], -table_CW.t())
    assert torch.equal(training["rng"][0]["torch"], torch.ones(2))


@needs_sharded
def test_export_needs_class_centers(tmp_path):
    with sharded.Saver(tmp_path) as saver:
        saver.save("none", {}, {})
    with pytest.raises(CheckpointError, match="no class centers"):
        reshard.to_pth(layout.newest(tmp_path), tmp_path / "a.pth")
    for state in ([], {"meta": 3}, {"training": 3, "head": {}}, {"training": {}, "head": 3}):
        with sharded.Saver(tmp_path) as saver:
            saver.save("odd", state, {"weight": (torch.ones(2, 2), RowShard.of(2))})
        with pytest.raises(CheckpointError, match="no checkpoint of this project"):
            reshard.to_pth(layout.newest(tmp_path), tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists() and not list(tmp_path.glob(".*"))


@needs_sharded
def test_export_to_where_nothing_can_be_written(saved, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CheckpointError, match="a.pth: not written .No space left on device"):
        reshard.to_pth(saved, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="not written .No such file or directory"):
        reshard.to_pth(saved, tmp_path / "missing" / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@needs_sharded
@pytest.mark.parametrize("options", [(), ("--loss_type=softmax", "--sample_rate=0.5")])
def test_training_goes_on_from_the_export_as_from_the_checkpoint(tmp_path, options):
    data_path = make_tiny_set(tmp_path / "set")
    common = [
        f"--data_path={data_path}",
        "--device_type=cpu",
        "--net_mode=mobilefacenet",
        "--batch_size=4",
        "--epochs=1",
        "--num_workers=0",
        "--tensorboard=false",
        "--with_test=false",
        "--log_every=1",
        *options,
    ]

    def losses(name, *more):
        learner = Learner.from_config(parse_arguments([*common, f"--work_path={tmp_path / name}", *more]))
        learner.train()
        lines = map(json.loads, (tmp_path / name / "log" / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}

    whole = losses("first", "--checkpoint=sharded", "--save_every=3", "--keep=5")
    saved = tmp_path / "first" / "sharded" / "000001-step_3"
    reshard.to_pth(saved, tmp_path / "a.pth")
    rest = {step: loss for step, loss in whole.items() if step > 3}
    assert rest and losses("sharded", f"--resume={saved}") == rest == losses("pth", f"--resume={tmp_path / 'a.pth'}")


# --- damaged and hostile ---------------------------------------------------------------------------------------------


def damage(saved, change) -> str:
    """As somebody would who means harm: with a checksum that is right."""
    content = json.loads((saved / layout.INDEX).read_text())["index"]
    change(content)
    text = json.dumps(content)
    (saved / layout.INDEX).write_text(f'{{"sha256": "{checksum(text.encode())}", "index": {text}}}')
    with pytest.raises(DamagedCheckpoint) as caught:
        layout.read_index(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def change_piece(position, value):
    def change(content):
        content["tensors"]["rows.weight"]["pieces"][0][position] = value

    return change


def change_tensor(**entries):
    def change(content):
        content["tensors"]["rows.weight"].update(entries)

    return change


HOSTILE = {
    "a file outside": change_piece(2, "../../../etc/passwd"),
    "an absolute file": change_piece(2, "/etc/passwd"),
    "a file that is missing": change_piece(2, "rank_00009.bin"),
    "a gap between rows": change_piece(0, 1),
    "more rows than bytes": change_piece(1, 10**12),
    "bytes behind the end": change_piece(3, 10**12),
    "bytes before the start": change_piece(3, -8),
    "bytes of another piece": change_piece(3, 8),
    "a checksum that is none": change_piece(5, "x"),
    "a row that is a fraction": change_piece(0, 0.0),
    "a huge shape": change_tensor(shape=[10**15, 6]),
    "no shape": change_tensor(shape=None),
    "the shape of one number": change_tensor(shape=[]),
    "an unknown dtype": change_tensor(dtype="object"),
    "a dtype that is a list": change_tensor(dtype=[]),
    "half the pieces": change_tensor(pieces=[]),
    "another format": lambda content: content.update(format="other"),
    "a tensor that is not there": lambda content: content.update(values={"tensor": "x"}),
    "an unknown kind of value": lambda content: content.update(values={"call": "x"}),
    "a key that is a list": lambda content: content.update(values={"dict": [[[1], 2]]}),
    "a big tensor as a number": lambda content: content.update(values={"scalar": "rows.weight"}),
    "too few local states": lambda content: content.update(world_size=5),
    "a tensor of nobody": lambda content: content["tensors"].update(rankx=content["tensors"]["rows.weight"]),
    "no tensors": lambda content: content.pop("tensors"),
}


@needs_sharded
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_index_is_one_line(saved, what):
    assert layout.read_index(saved).world_size == 1
    damage(saved, HOSTILE[what])


@needs_sharded
@pytest.mark.slow
def test_no_flipped_bit_of_the_index_loads(saved):
    path = saved / layout.INDEX
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in range(8) if position < 100 or position % 7 == 0 else (position % 8,):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
            with pytest.raises(DamagedCheckpoint):
                layout.read_index(saved)


@needs_sharded
def test_an_index_that_is_no_json_is_one_line(saved):
    for content in [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[]", b"null"]:
        (saved / layout.INDEX).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            layout.read_index(saved)


@needs_sharded
def test_a_link_in_place_of_a_rank_file_is_refused(saved, tmp_path):
    outside = tmp_path / "outside"
    (saved / "rank_00000.bin").rename(outside)
    (saved / "rank_00000.bin").symlink_to(outside)
    with pytest.raises(CheckpointError, match="not a plain file"):
        layout.read_index(saved)


@needs_sharded
def test_a_file_cut_off_after_it_was_checked_is_one_line(saved):
    piece = layout.read_index(saved).tensors["rows.weight"].pieces[-1]
    with layout.PieceReader(saved) as reader:
        reader.read(piece)
        with open(saved / piece.file, "r+b") as file:
            file.truncate(piece.start + 1)
        with pytest.raises(CheckpointError, match="damaged at byte"):
            reader.read(piece)


# --- saving ----------------------------------------------------------------------------------------------------------


@needs_sharded
def test_what_a_killed_run_left_is_cleared_away_and_numbers_go_on(tmp_path):
    (tmp_path / ".000009-step_9.0123456789ab.tmp").mkdir(parents=True)
    (tmp_path / ".somebody's.tmp").mkdir()
    (tmp_path / "000000-of_another_run").mkdir()
    (tmp_path / "notes").mkdir()
    with sharded.Saver(tmp_path, keep=2) as saver:
        for step in (5, 6, 2):  # the run went back to an older checkpoint: the newest is what was saved last
            saver.save(f"step_{step}", {"step": step}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".somebody's.tmp", "000000-of_another_run", "000002-step_6", "000003-step_2", "notes",
    ]  # fmt: skip
    assert sharded.load_newest(tmp_path, {}) == (tmp_path / "000003-step_2", {"step": 2}, None)
    assert sharded.load_newest(tmp_path / "notes", {}) is None


@needs_sharded
@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path, monkeypatch, background):
    saver = sharded.Saver(tmp_path, background=background)
    with monkeypatch.context() as patch:

        def refuse(*_args):
            raise OSError(28, "No space left on device")

        patch.setattr(layout.RankFile, "append", refuse)
        with pytest.raises(CheckpointError, match="step_1 not saved.*No space left on device"):
            saver.save("step_1", {"step": torch.ones(1)}, {})
            saver.wait()
    assert list(tmp_path.iterdir()) == []
    saver.save("step_2", {"step": 2}, {})
    saver.wait()
    assert sharded.newest(tmp_path).name == "000001-step_2"


@needs_sharded
def test_torchs_own_tools_read_it(tmp_path):
    """dcp_to_torch_save on a directory gives the state."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = {
        "model": {"a.weight": torch.randn(7, 3), "steps": torch.tensor(5), "half": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": [{"momentum": torch.randn(4, 2)}, {"empty": torch.empty(0, 2), "nesterov": False}],
        "config": {"lr": 0.1, "milestones": [1, 2], "name": None},
        "epoch": 3,
    }
    rows = torch.arange(1000, dtype=torch.float32)[:, None].expand(1000, 50_000 // 250).contiguous()
    with pytest.MonkeyPatch.context() as patch, sharded.Saver(tmp_path) as saver:
        patch.setattr(layout, "PIECE_BYTES", 1 << 16)
        saver.save("a", state, {"weight": (rows, RowShard.of(1000))}, local={"rng": torch.arange(3)})
    path = sharded.newest(tmp_path)
    assert len(layout.read_index(path).tensors["rows.weight"].pieces) > 10
    dcp_to_torch_save(path, tmp_path / "all.pth")
    found = store.load_pth(tmp_path / "all.pth")
    assert workers.same(found["state"], state)
    assert torch.equal(found["rows"]["weight"], rows) and torch.equal(found["rank0"]["rng"], torch.arange(3))


@needs_sharded
def test_directories_of_the_first_format_load(root):
    """Written by this project before its files were those of torch.distributed.checkpoint too."""
    path = root / "test" / "golden" / "sharded_1" / "000001-step_7"
    assert workers.load_one(ALONE, path, 7) == (True, 0)


@needs_sharded
def test_a_checkpoint_that_does_not_fit_this_run_is_not_passed_over(tmp_path):
    """A mismatch refuses, damage alone is skipped, and where all is damaged the run stops."""
    with sharded.Saver(tmp_path) as saver:
        saver.save("a", {}, {"weight": (torch.ones(5, 2), RowShard.of(5))})
    with pytest.raises(CheckpointError, match=r"is \[5, 2\], this run wants \[6, 2\]"):
        sharded.load_newest(tmp_path, {"weight": (torch.zeros(6, 2), RowShard.of(6))})
    (tmp_path / "000001-a" / "index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 1 checkpoint\(s\), and every one is damaged"):
        sharded.load_newest(tmp_path, {})


@needs_sharded
def test_damage_is_found_before_a_row_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "PIECE_BYTES", 64)
    with sharded.Saver(tmp_path) as saver:
        saver.save("a", {"model": torch.ones(3)}, {"weight": (torch.ones(100, 2), RowShard.of(100))})
    path = tmp_path / "000001-a"
    last = layout.read_index(path).tensors["rows.weight"].pieces[-1]
    data = bytearray((path / last.file).read_bytes())
    data[last.start] ^= 1
    (path / last.file).write_bytes(data)
    rows = torch.zeros(100, 2)
    with pytest.raises(DamagedCheckpoint, match="damaged at byte"):
        sharded.load(path, {"weight": (rows, RowShard.of(100))})
    assert not rows.any()


@needs_sharded
def test_a_copy_that_does_not_fit_is_written_while_the_training_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("runtime.host.memory_left", lambda: 100)
    caplog.set_level("INFO")
    saver = sharded.Saver(tmp_path)
    saver.save("a", {"step": 1}, {"weight": (torch.ones(100, 2), RowShard.of(100))})
    assert sharded.newest(tmp_path).name == "000001-a" and "does not fit" in caplog.text


@needs_sharded
def test_published_hears_of_every_checkpoint(tmp_path):
    heard = []
    with sharded.Saver(tmp_path, published=lambda path: heard.append((path.name, (path / "index.json").exists()))) as s:
        s.save("a", {}, {})
        s.save("b", {}, {})
    assert heard == [("000001-a", True), ("000002-b", True)]


@needs_sharded
@pytest.mark.parametrize(
    "state, words",
    [
        ({"a": [1, {"b": Path("x")}]}, "state.a.1.b: a PosixPath"),
        ({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, "state.a.b.c: two tensors"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "state.a: torch.complex64"),
    ],
)
def test_only_tensors_and_plain_values_are_saved(tmp_path, state, words):
    with pytest.raises(CheckpointError) as caught:
        sharded.Saver(tmp_path).save("a", state, {})
    assert words in str(caught.value)


@needs_sharded
def test_names_stay_inside_the_folder(tmp_path):
    for name in ("../x", "a/b", "", "a b"):
        with pytest.raises(CheckpointError, match="letters, digits"):
            sharded.Saver(tmp_path / "in", background=False).save(name, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.core
def test_old_torch_is_told_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.2.1")
    for use in (lambda: sharded.Saver(tmp_path), lambda: sharded.load(tmp_path, {}, World())):
        with pytest.raises(CheckpointError, match=r"need torch 2\.3 or newer.*\.pth"):
            use()
