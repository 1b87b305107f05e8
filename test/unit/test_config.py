from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
        (["--lr=-1"], "--lr -1.0: must be a number of at least 0"),
        (["--lr=nan"], "--lr nan: must be a number of at least 0"),
        (["--momentum=2"], "must be below 1"),
        (["--data_path="], "--data_path is empty"),
        (["--fs_name=file:///x", "--fs_checkpoint_dir=../y"], "leads out of the store"),
        (["--lr=x"], "invalid float"),
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
