"""Recipes, and config files of arcface_torch read as values."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

import config as options
import configs
import model
import optim
from configs.foreign import read_config
from runtime.errors import ConfigError

pytestmark = pytest.mark.core
ROOT = Path(__file__).resolve().parents[2]

# what the keys of such a file look like; the values are an example's
FILE = '''
"""a config"""
from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r50"
config.resume = False
config.output = None
config.embedding_size = 512
config.sample_rate = 0.2
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 512
config.lr = 0.4
config.verbose = 10000
config.dali = False
config.rec = "/data/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = config.num_epoch // 10
config.using_wandb = True
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
'''


def write(folder, text):
    (folder / "mine.py").write_text(text)
    return folder / "mine.py"


def test_every_recipe_is_in_bounds_and_says_where_it_is_from():
    for name, recipe in configs.RECIPES.items():
        recipe.check()
        if recipe.net_mode in model.BACKBONES and recipe.net_depth:
            model.describe(recipe.net_mode, recipe.net_depth, recipe.embedding_size, recipe.drop_ratio)
        published = configs.PUBLISHED.get(name)
        if published:
            assert published.per_rank * published.ranks * recipe.accumulate == recipe.batch_size
            for words in (published.source, published.hardware, published.data, published.wall, published.accuracy):
                assert words
    for start in ("casia", "ms1mv2", "ms1mv3", "glint360k", "wf4m", "wf12m", "wf42m"):
        assert any(start in name for name in configs.PUBLISHED)
    assert configs.RECIPES["ms1mv3_r50"].decay_norms and configs.RECIPES["ms1mv3_r50"].clip_grad_norm == 5


def test_a_file_of_arcface_torch_is_mapped_and_the_rest_is_said(tmp_path):
    recipe, notes = read_config(write(tmp_path, FILE), 8)
    assert (recipe.net_mode, recipe.net_depth, recipe.loss_type, recipe.margin) == ("iresnet", 50, "cosface", 0.4)
    assert (recipe.batch_size, recipe.lr, recipe.epochs, recipe.warmup_epochs) == (4096, 0.4, 20, 2)
    assert (recipe.sample_rate, recipe.weight_decay, recipe.decay_norms) == (0.2, 5e-4, True)
    assert (recipe.data_path, recipe.num_classes, recipe.opt_level) == ("/data/WebFace42M", 2059906, "O1")
    assert recipe.val_targets == ("lfw", "cfp_fp", "agedb_30") and recipe.lr_schedule == "polynomial"
    said = "\n".join(notes)
    assert "using_wandb = True: has no place here" in said
    assert "512 a rank there; here all together, 4096" in said and "weight_decay" in said and "num_image" in said


@pytest.mark.parametrize(
    "margins,expected",
    [
        ((1.0, 0.5, 0.0), ("arcface_straight_through", 0.5)),
        ((1.0, 0.0, 0.35), ("cosface", 0.35)),
        ((1.0, 0.3, 0.2), ("combined", None)),
    ],
)
def test_margins(tmp_path, margins, expected):
    recipe, _notes = read_config(write(tmp_path, f"config = edict()\nconfig.margin_list = {margins}\n"), 1)
    assert (recipe.loss_type, recipe.margin) == expected


@pytest.mark.parametrize(
    "line,says",
    [
        ("import os", "line 2: holds code"),
        ("config.lr = __import__('os').system('touch /tmp/x')", "line 2: holds code"),
        ("config.lr = open('x')", "line 2: holds code"),
        ("for i in range(3): pass", "line 2: holds code"),
        ("config.lr = 2 ** 1000000", "line 2: holds code"),
        ("config.lr = 1 / 0", "line 2: holds code"),
        ("config.lr = [1] * 1000000000", "line 2: holds code"),
        ("config.lr = 'much'", "--lr"),
        ("config.network = 'vit_b'", "choose from r18"),
        ("config.optimizer = 'adamw'", "only sgd"),
        ("config.batch_size = 0", "above 0"),
        ("config.margin_list = 3", "three numbers"),
        ("config.lr = (", "is no config file"),
    ],
)
def test_code_and_wrong_values_are_one_line(tmp_path, line, says):
    with pytest.raises(ConfigError, match=says) as caught:
        read_config(write(tmp_path, f"config = edict()\n{line}\n"), 1)
    assert "\n" not in str(caught.value)


def test_the_command_line_takes_names_and_files(tmp_path, capsys):
    for name in ("configs/ms1mv3_r100", "configs/ms1mv3_r100.py"):  # arcface_torch's own name for it
        assert configs.take_config([f"--config={name}"])[0] == ["--recipe", "ms1mv3_r100"]
    argv, recipes = configs.take_config(["--config=ms1mv3_r100", "--lr=0.3"])
    taken = options.parse_arguments(argv, recipes=recipes)
    assert (taken.net_depth, taken.lr, taken.batch_size) == (100, 0.3, 1024)
    path = str(write(tmp_path, FILE))
    argv, recipes = configs.take_config(["--config", path, "--epochs=1"], ranks=2)
    assert options.parse_arguments(argv, recipes=recipes).batch_size == 1024
    assert "has no place here" in capsys.readouterr().err
    for words, says in ((["--config=nothing"], "--list_configs shows"), (["--config"], "give a recipe's name")):
        with pytest.raises(ConfigError, match=says):
            configs.take_config(words)
    with pytest.raises(ConfigError, match="cannot be read"):
        configs.take_config(["--config=nothing.py"])


def test_list_configs():
    done = subprocess.run([sys.executable, "train.py", "--list_configs"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(configs.RECIPES) + len(configs.LACKING) + 3
    assert "IJB-C 1e-4 96.37" in done.stdout and "none published" in done.stdout


def test_schedules_fall_after_the_warm_up():
    line = optim.with_warmup(optim.polynomial(0.4, 1.0, 100, 20), 20)
    assert [line(step) for step in (0, 19, 20, 60, 100, 200)] == pytest.approx([0.02, 0.4, 0.4, 0.2, 0, 0])
    half = optim.cosine(0.4, 100, 20)
    assert [half(step) for step in (0, 20, 60, 100)] == pytest.approx([0.4, 0.4, 0.2, 0])
    assert half(40) == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))


def test_decay_of_everything():
    net = model.create_model("mbf", embedding_size=8)
    assert {group["weight_decay"] for group in optim.parameter_groups(net, "mbf", 5e-4, True)} == {5e-4}
    count = sum(p.requires_grad for p in net.parameters())
    assert sum(len(group["params"]) for group in optim.parameter_groups(net, "mbf", 5e-4, True)) == count
