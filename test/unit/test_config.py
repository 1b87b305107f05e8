from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest

import config
from configs import RECIPES

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argv", [["--batch_size=32"], ["--batch-size=32"], ["--batch_size", "32"], ["--batch-size", "32"]]
)
def test_either_spelling(argv):
    assert config.parse_arguments(argv).batch_size == 32


@pytest.mark.parametrize("argv", [["--milestones", "4", "6"], ["--milestones=4,6"], ["--milestones", "4 6"]])
def test_lists(argv):
    assert config.parse_arguments(argv).milestones == (4, 6)


@pytest.mark.parametrize("text,value", [("1", True), ("true", True), ("False", False), ("0", False)])
def test_booleans(text, value):
    assert config.parse_arguments(["--use_amp", text]).use_amp is value
    assert config.parse_arguments(["--strict_data"]).strict_data is True


@pytest.mark.parametrize(
    "argv,says",
    [
        (["--batchsize=3"], "did you mean --batch_size"),
        (["--lr=-1"], "--lr '-1.0': must be a finite number, at least 0"),
        (["--momentum=2"], "below 1"),
        (["--data_path="], "--data_path '': must be a folder's name, and is empty"),
        (["--case=a b"], "letters, digits and"),
        (["--num_workers=1000000"], "at least -1 and at most 512"),
        (["--seed=" + "9" * 25], "at most 2147483647"),
        (["--milestones=-1,2"], "a whole number, at least 0"),
        (["--combined_margin=1,2,3", "--loss_type=arcface"], "--combined_margin is for --loss_type=combined"),
        (["--output=a", "--work_path=b"], "--output and --work_path name the same folder"),
        (["--is_finetune", "--resume=x.pth"], "takes its weights from --pth_path"),
        (["--loss_scale=much"], "a positive number such as 128.0, or dynamic"),
        (["--loss_scale=nan"], "a positive number"),
        (["--plugin=no_such_file.py"], "no such file"),
        (["--plugin=no.such.module"], "No module named 'no'"),
        (["--network=r50"], "--net_mode=iresnet --net_depth=100"),
        (["--gradient-acc", "2"], "here it is --accumulate"),
        (["configs/ms1mv3_r50_onegpu"], "--config=configs/ms1mv3_r50_onegpu reads it"),
        (["wf42m_pfc02_r100.py"], "is a config of arcface_torch"),
        (["--fs_name=file:///x", "--fs_checkpoint_dir=../y"], "leads out of the store"),
        (["--lr=x"], "^--lr 'x': must be a number"),
        (["--net_mode=irse"], "choose from ir, ir_se"),
        (["--use_amp=maybe"], "neither true nor false"),
        (["--milestones=a"], "--milestones a"),
        (["extra"], "not an option"),
        (["--recipe=full_9p"], "choose from full_1p"),
        (["--batch_size=0"], "at least 1"),
        (["--sample_rate=0"], "above 0"),
        (["--max_iter=0"], "-1 for the whole set"),
        (["--combined_margin=1,2"], "three numbers"),
        (["--opt_level=O5"], "choose from auto, O0, O1, O2"),
    ],
)
def test_a_bad_option_is_one_line(argv, says):
    with pytest.raises(config.ConfigError, match=says) as caught:
        config.parse_arguments(argv, recipes=RECIPES)
    assert "\n" not in str(caught.value)


NUMBERS = [f for f in dataclasses.fields(config.Config) if config._types()[f.name] in (int, float, Optional[float])]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_bounds(field):
    """No nan, no infinity, and nothing beyond the bounds that its own line says."""
    rules, kind = field.metadata, int if config._types()[field.name] is int else float
    beyond = [math.nan, math.inf, -math.inf, 10**400, True, "1"]
    beyond += [rules[name] + add for name, add in (("low", -1), ("high", 1)) if rules[name] is not None]
    beyond += [rules[name] for name in ("above", "below") if rules[name] is not None]
    for value in beyond:
        with pytest.raises(config.ConfigError, match=f"--{field.name} "):
            config.replace(config.Config(), **{field.name: value}).check()
    for name in ("low", "high"):
        if rules[name] is not None:
            config.replace(config.Config(), **{field.name: kind(rules[name])}).check()


@pytest.mark.parametrize(
    "argv, expected",
    [
        (
            ["-net", "mobilefacenet", "-b", "96", "-w", "3", "-e", "8", "-lr", "0.1", "-d", "vgg", "-depth", "50"],
            dict(
                net_mode="mobilefacenet", batch_size=96, num_workers=3, epochs=8, lr=0.1, data_mode="vgg", net_depth=50
            ),
        ),
        (["--margin_list", "1.0,0.0,0.4"], dict(combined_margin=(1.0, 0.0, 0.4), loss_type="combined")),
        (["--num_epoch=3", "--warmup_epoch=1", "--frequent=5"], dict(epochs=3, warmup_epochs=1.0, log_every=5)),
        (["--eval_data_mode", "lfw", "--backend=gloo"], dict(val_targets=("lfw",), dist_backend="gloo")),
        (["--is_static=1", "--sample-ratio=0.1", "--data_dir=x"], dict(static=True, sample_rate=0.1, data_path="x")),
        (["--output=x"], dict(work_path="x", run_dir="")),
    ],
)
def test_old_names_of_the_same_meaning_work(argv, expected):
    got = config.parse_arguments(argv)
    assert {name: getattr(got, name) for name in expected} == expected


def test_no_name_means_two_things():
    names = [f.name for f in dataclasses.fields(config.Config)]
    old = [word for f in dataclasses.fields(config.Config) for word in f.metadata["old"]]
    words = names + [word.lstrip("-") for word in old if word != "-lr"] + list(config.ELSEWHERE)
    assert len(words) == len(set(words))
    named = re.findall(r"--(\w+)", " ".join(config.ELSEWHERE.values()))
    assert set(named) <= set(names)


def test_a_plugin_is_imported_and_its_names_are_left_to_it(tmp_path, monkeypatch):
    (tmp_path / "my_plugin_of_tests.py").write_text("LOADED = True\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    got = config.parse_arguments([f"--plugin={tmp_path / 'my_plugin_of_tests.py'}", "--net_mode=mine"])
    assert got.net_mode == "mine" and sys.modules.pop("my_plugin_of_tests").LOADED


def test_help_shows_choices_bounds_groups_and_examples(capsys):
    with pytest.raises(SystemExit):
        config.parse_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "one of ir, ir_se, mobilefacenet",
        "at least 0 and below 1",
        "one of sampled, all",
        *(f"{title}:" for title in config.GROUPS.values()),
        "examples: python train.py",
        "also -net",
    ):
        assert part in said


def test_recipes_derive_and_the_command_line_wins():
    eight = config.parse_arguments(["--recipe=full_8p", "--lr=0.5"], recipes=RECIPES)
    assert (eight.batch_size, eight.lr, eight.epochs, eight.milestones) == (2560, 0.5, 20, (12, 15, 18))
    one = config.parse_arguments(["--recipe=full_1p"], recipes=RECIPES)
    assert (one.net_mode, one.net_depth, one.batch_size, one.lr) == ("ir_se", 100, 256, 0.001)
    performance = RECIPES["performance_8p"]
    assert (performance.epochs, performance.max_iter) == (2, 1000)


def test_easydict_has_every_option():
    conf = config.get_config()
    assert conf.net_depth == 100 and conf.milestones == [12, 15, 18]
    assert tuple(config.get_config(training=False).val_targets) == config.VERIFICATION_SETS


def test_the_command_ends_with_one_line_and_a_status():
    done = subprocess.run([sys.executable, "train.py", "--batchsize=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    line = "error: unknown option --batchsize: did you mean --batch_size, --eval_batch_size?"
    assert done.stderr.splitlines() == [line]


def test_an_option_that_is_gone_says_why():
    with pytest.raises(
        config.ConfigError, match="--head_update is gone: the centers are always updated a chunk at a time"
    ) as e:
        config.parse_arguments(["--head_update=backward"])
    assert "\n" not in str(e.value)
