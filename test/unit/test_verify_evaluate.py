"""evaluate.py: weights and sets in, table, JSON, ROC and metrics out."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from workers_verify import CPU, evaluated

import config as options
import evaluate
import report
from checkpoint import store
from data import pairs, transforms
from model import create_model
from runtime.dist import ALONE
from runtime.errors import DataError, UserError
from verify import embed
from verify.embed import verify

pytestmark = pytest.mark.core

PAIRS = 11
NET = {"net_mode": "mobilefacenet", "net_depth": None, "embedding_size": 32}


def jpeg(rng):
    rough = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((112, 112), Image.BICUBIC)
    file = io.BytesIO()
    rough.save(file, "JPEG")
    return file.getvalue()


def untrained_net():
    torch.manual_seed(0)
    return create_model(**NET).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with lfw.bin, a pair folder cfp_fp/, weights with this project's meta, and an upstream project's."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    answers = [i % 2 == 0 for i in range(PAIRS)]
    pairs.write_bin(folder / "lfw.bin", [jpeg(rng) for _ in range(2 * PAIRS)], answers)
    for i in range(10):
        (folder / "cfp_fp" / str(i)).mkdir(parents=True)
        for name in "ab":
            (folder / "cfp_fp" / str(i) / f"{name}.jpg").write_bytes(jpeg(rng))
    (folder / "cfp_fp" / "label.txt").write_text("".join(f"{i} {i % 2 == 0}\n" for i in range(10)))
    weights = untrained_net().state_dict()
    store.save_pth(folder / "ours.pth", {"model": weights, "meta": {**NET, "channel_order": "rgb", "threshold": None}})
    store.save_pth(folder / "bare.pth", weights)
    return folder


def arguments(folder, weights="ours.pth", *more, exact=True):
    """exact: as `directly` computes, whatever is quickest here."""
    words = [f"--pth_path={folder / weights}", f"--data_path={folder}", "--device_type=cpu", "--eval_batch_size=8"]
    words += ["--opt_level=O0"] if exact else []
    return options.parse_arguments([*words, *more], training=False)


def run(config):
    return evaluate.evaluate(config, evaluate.find_sets(config), CPU, ALONE)


def directly(folder, channel_order="rgb", **more):
    def to_input(images_BHWC):
        return transforms.to_input(images_BHWC, channel_order=channel_order)

    sets = {"lfw": pairs.load_pairs(folder / "lfw.bin")}
    return verify(untrained_net(), sets, CPU, batch_size=8, to_input=to_input, **more)["lfw"]


def test_all_sets_of_the_folder_are_evaluated_and_written_down(folder, tmp_path, capsys):
    results = run(arguments(folder, "ours.pth", f"--output={tmp_path}"))
    assert list(results) == ["lfw", "cfp_fp"]
    assert results["lfw"].accuracy == directly(folder).accuracy
    printed = capsys.readouterr().out
    assert re.search(rf"^lfw +trained +{PAIRS} +{results['lfw'].accuracy:.4f} ± ", printed, re.MULTILINE)
    assert "cfp_fp: TAR at FAR 0.001 needs 1000 different pairs, the set has 5" in printed
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["sets"]["lfw"]["accuracy"] == results["lfw"].accuracy
    assert numbers["network"] == "mobilefacenet" and numbers["channel_order"] == "rgb" and numbers["opt_level"] == "O0"
    lines = report.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["run", "verify", "verify", "end"]
    numbers = report.write_report(tmp_path, tmp_path, "eval")
    assert numbers["accuracy"] == results["lfw"].accuracy and numbers["accuracy_is"] == "verification on lfw"


def test_the_default_is_the_quickest_way_of_the_device(folder, tmp_path, monkeypatch):
    """bf16 on a CPU that multiplies it."""
    config, seen = arguments(folder, "ours.pth", f"--output={tmp_path}", "--val_targets=lfw", exact=False), []
    monkeypatch.setattr(embed, "verify", lambda model, sets, **how: seen.append(how) or verify(model, sets, **how))
    result = run(config)["lfw"]
    with seen[0]["autocast"]():
        computed = torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype
    policy = CPU.embedding_policy()
    assert computed == (torch.bfloat16 if policy == "bf16" else torch.float32)
    assert json.loads((tmp_path / "evaluation.json").read_text())["opt_level"] == policy
    assert abs(result.accuracy - directly(folder).accuracy) <= 2 / PAIRS  # of a net that has learnt nothing


def test_the_roc_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    run(arguments(folder, "ours.pth", f"--output={tmp_path}", "--val_targets=lfw"))
    assert Image.open(tmp_path / "roc.png").size == (900, 540)


def test_others_weights_are_recognised_and_keep_their_channel_order(folder, tmp_path):
    results = run(
        arguments(folder, "bare.pth", f"--output={tmp_path}", "--val_targets=lfw", "--weights_channel_order=bgr")
    )
    expected = directly(folder, channel_order="bgr")
    np.testing.assert_array_equal(results["lfw"].roc.tpr, expected.roc.tpr)
    assert json.loads((tmp_path / "evaluation.json").read_text())["channel_order"] == "bgr"
    assert not np.array_equal(expected.roc.tpr, directly(folder).roc.tpr)  # or the order would not matter here


def test_the_launchers_run_dir_and_a_users_output_may_differ(folder, tmp_path):
    run(arguments(folder, "ours.pth", f"--output={tmp_path / 'a'}", f"--run_dir={tmp_path / 'b'}", "--val_targets=lfw"))
    assert (tmp_path / "a" / "evaluation.json").is_file() and not (tmp_path / "a" / "metrics.jsonl").exists()
    assert report.write_report(tmp_path / "b", tmp_path / "b")["task"] == "evaluate"


def test_flip_sum_reaches_the_embeddings(folder, tmp_path):
    results = run(arguments(folder, "ours.pth", f"--output={tmp_path}", "--val_targets=lfw", "--flip_sum"))
    np.testing.assert_array_equal(results["lfw"].roc.tpr, directly(folder, flip_sum=True).roc.tpr)


def test_two_ranks_find_what_one_finds(folder, tmp_path):
    alone = run(arguments(folder, "ours.pth", f"--output={tmp_path / 'alone'}", "--val_targets=lfw"))
    config = arguments(folder, "ours.pth", f"--output={tmp_path / 'both'}", "--val_targets=lfw")
    expected = {name: result.accuracy for name, result in alone.items()}
    assert run_ranks(evaluated, 2, config) == [expected, expected]
    assert json.loads((tmp_path / "both" / "evaluation.json").read_text())["ranks"] == 2


def test_a_set_of_ten_pairs_of_one_kind(folder, tmp_path, shared, caplog):
    path = shared / "real" / "tipc" / "small_lfw.bin"
    config = arguments(folder, "ours.pth", f"--output={tmp_path}", f"--data_path={path}")
    assert run(config)["small_lfw"].pairs == 10
    assert "small_lfw: all 10 pairs show one person: accuracy, threshold and ROC cannot be evaluated" in caplog.text
    assert report.write_report(tmp_path, tmp_path)["verification"][0]["trained"]["same"] == 10


def test_where_sets_are_looked_for(folder, tmp_path):
    def found(*more):
        return evaluate.find_sets(options.parse_arguments(["--pth_path=x", *more], training=False))

    assert found(f"--data_path={folder}") == {"lfw": folder / "lfw.bin", "cfp_fp": folder / "cfp_fp"}
    assert found(f"--data_path={folder}", "--val_targets=cfp_fp") == {"cfp_fp": folder / "cfp_fp"}
    assert found(f"--data_path={folder / 'lfw.bin'}", "--val_targets=agedb_30") == {"lfw": folder / "lfw.bin"}
    assert found(f"--data_path={folder / 'cfp_fp'}") == {"cfp_fp": folder / "cfp_fp"}
    assert options.Config().data_path == "./data/faces_emore"
    with pytest.raises(DataError, match="holds no verification set agedb_30: looked for"):
        found(f"--data_path={folder}", "--val_targets=lfw,agedb_30")
    with pytest.raises(DataError, match="holds no verification set .*give --data_path"):
        found(f"--data_path={tmp_path}")


@pytest.mark.parametrize("words, message", [
    (["--data_path=."], "--pth_path is missing"),
    (["--pth_path=missing.pth", "--data_path=nowhere"], "nowhere holds no verification set"),
    (["--pth_path=lfw.bin"], r"lfw\.bin: .*checkpoint"),
    (["--pth_path=ours.pth", "--device_type=tpu"], "device 'tpu': choose from"),
    (["--pth_paht=ours.pth"], "unknown option --pth_paht: did you mean --pth_path"),
])  # fmt: skip
def test_what_a_user_can_cause_is_one_line(folder, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(evaluate.log, "setup_logging", lambda *ranks: None)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"--output={tmp_path}", f"--data_path={folder}", *words])
    with pytest.raises((UserError, OSError), match=message) as error:
        evaluate.main()
    assert "\n" not in str(error.value)


def test_the_command(root, folder, tmp_path):
    def command(*words):
        env = {**os.environ, "PYTHONPATH": str(root)}
        program = [sys.executable, str(root / "evaluate.py"), f"--output={tmp_path}", "--device-type=cpu", *words]
        return subprocess.run(program, cwd=folder, env=env, capture_output=True, text=True, timeout=900)

    done = command("--pth_path=ours.pth", "--data_path=lfw.bin")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set  net      pairs  accuracy")
    done = command("--pth_path=missing.pth", "--data_path=lfw.bin")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: missing\.pth: no such checkpoint.*\n", done.stderr)
