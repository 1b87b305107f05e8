"""Every option of the project, once: its name, type, default, bounds, meaning, and what other projects call it.

The command lines (`parse_arguments`), the EasyDict of upstream projects (`get_config`) and the PLSC setters derive from
`Config`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import re
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Optional

from runtime.address import split_address
from runtime.errors import ConfigError

VERIFICATION_SETS = ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw", "vgg2_fp", "synthetic")


def option(
    default: Any,
    help: str,
    choices: tuple = (),
    *,
    low: Optional[float] = None,
    high: Optional[float] = None,
    above: Optional[float] = None,
    below: Optional[float] = None,
    known: tuple = (),
    form: str = "",
    old: tuple = (),
) -> Any:
    """One field of Config.

    choices: the values it may have. low, high: the least and the greatest value; above, below: what it must exceed, and
    stay under. Each element of a tuple is held to them. known: the values that a registry holds from the start; a
    `--plugin` adds more. form: a regular expression, and after a blank what it asks for in words.
    old: its names in other projects that mean the same there; a name that means something else stands in ELSEWHERE.
    """
    metadata = dict(help=help, choices=choices, low=low, high=high, above=above, below=below, known=known, form=form)
    return dataclasses.field(default=default, metadata={**metadata, "old": old})


# The name of a run, and so of a file.
CASE = r"\w[\w.+-]*"
FILLED = r".+ a folder's name, and is empty (is a variable of your shell not set?)"
INSIDE = r"(?!(.*/)?\.\.(/|$)).* a folder inside the store, and leads out of the store with .."

# The option that begins a group in --help, and the group's title.
GROUPS = {
    "net_mode": "network and head",
    "data_mode": "data",
    "epochs": "optimisation",
    "use_amp": "precision",
    "device_type": "machine",
    "work_path": "files",
}


@dataclass
class Config:
    # network and head
    net_mode: str = option(
        "ir_se",
        "backbone",
        known=(
            "ir",
            "ir_se",
            "mobilefacenet",
            "iresnet",
            "mbf",
            "mbf_large",
            "resnet",
            "resnet_basic",
            "resnet_narrow",
        ),
        old=("-net",),
    )
    net_depth: int = option(
        100, "layers of the backbone: 18 34 50 100 152 200 (resnet: 50 100 101 152)", low=1, old=("-depth",)
    )
    embedding_size: int = option(512, "length of an embedding", low=1, high=2**16, old=("--emb_size", "--emb_dim"))
    drop_ratio: Optional[float] = option(
        None, "dropout before the embedding; the backbone's own when not given", low=0, below=1, old=("--dropout",)
    )
    loss_type: str = option(
        "arcface",
        "margin of the classification loss",
        known=("arcface", "arcface_straight_through", "cosface", "combined", "adaface", "softmax", "linear_softmax"),
    )
    margin: Optional[float] = option(
        None, "margin m; the loss's own default when not given (arcface 0.5)", low=0, high=4
    )
    scale: float = option(64.0, "scale s of the cosines", above=0, high=1e6)
    combined_margin: tuple[float, ...] = option(
        (1.0, 0.5, 0.0),
        "m1 m2 m3 of cos(m1 t + m2) - m3; alone it means --loss_type=combined",
        low=-4,
        high=4,
        old=("--margin_list",),
    )
    sample_rate: float = option(
        1.0, "share of the class centers sampled each step (Partial FC)", above=0, high=1, old=("--sample_ratio",)
    )
    interclass_filtering_threshold: float = option(
        0.0, "cosine above which another class counts as noise; 0 = off", low=0, high=1
    )
    top5: bool = option(False, "count as well how often the right class is among the five best")
    head_op: str = option("auto", "implementation of the loss: auto, or one of head/ops by name")
    head_skip: bool = option(
        True, "head_op=triton: leave out products of tiles whose probabilities are all below 2^-24, or compute them all"
    )
    head_lr_factor: float = option(
        1.0,
        "learning rate of the centers over the backbone's; 10 makes up for no momentum, 0 holds the centers still",
        low=0,
    )
    update_rows: str = option("sampled", "sample_rate < 1: which centers decay and keep moving", ("sampled", "all"))
    model_parallel: bool = option(True, "spread the class centers over the ranks; off: every rank holds all of them")
    centers_norm: float = option(
        1.0, "length of a class center before training; arcface_torch's is 0.2263", above=0, high=1e3
    )
    centers_dtype: str = option(
        "fp32", "storage of the class centers; bf16 is rounded stochastically", ("fp32", "bf16")
    )
    momentum_dtype: str = option("fp32", "storage of the centers' momentum", ("fp32", "bf16", "int8", "none"))
    momentum_on_host: bool = option(False, "keep the centers' momentum in the host's memory")

    # data
    data_mode: str = option(
        "emore", "vgg, ms1m, emore, concat, synthetic, or a folder's name under data_path", old=("-d",)
    )
    data_path: str = option(
        "./data/faces_emore",
        "training set of any format; for evaluation a folder or one set",
        form=FILLED,
        old=("--rec", "--data_dir", "--dataset_dir"),
    )
    num_classes: int = option(0, "number of classes; 0 = as the data set says", low=0, old=("--class_num",))
    channel_order: str = option(
        "", "channel order of another project's data; as its format says when not given", ("", "rgb", "bgr")
    )
    weights_channel_order: str = option(
        "", "channel order that another project's weights (--pth_path) were trained on", ("", "rgb", "bgr")
    )
    strict_data: bool = option(False, "stop at the first damaged image instead of replacing it")
    num_workers: int = option(
        -1, "loader processes a rank; -1 = the rank's share of the cores, at most 8", low=-1, high=512, old=("-w",)
    )
    val_targets: tuple[str, ...] = option(("lfw", "synthetic"), "verification sets, by name", old=("--eval_data_mode",))
    with_test: bool = option(True, "verify after every epoch, and once before training")
    flip_sum: bool = option(False, "verify on the sum of an image's and its mirror's embeddings", old=("-tta",))
    eval_batch_size: int = option(128, "images a rank embeds at a time", low=1, high=2**20, old=("--test_batch_size",))
    plugin: tuple[str, ...] = option(
        (), "Python files or modules of yours that register a backbone, a margin or a data set (docs/extending.md)"
    )

    # optimisation
    epochs: int = option(20, "epochs to train", low=0, old=("-e", "--num_epoch", "--train_epochs"))
    start_epoch: int = option(0, "epoch to start from (resuming sets it)", low=0)
    max_iter: int = option(-1, "steps an epoch at most; -1 = the whole set", low=-1)
    batch_size: int = option(256, "images a step, all ranks together", low=1, high=2**30, old=("-b",))
    lr: float = option(1e-3, "base learning rate", low=0, old=("-lr",))
    lr_schedule: str = option(
        "milestones", "course of the learning rate", ("milestones", "polynomial", "cosine", "constant")
    )
    milestones: tuple[int, ...] = option(
        (12, 15, 18), "epochs, counted from 0, at whose start the learning rate is multiplied by gamma", low=0
    )
    gamma: float = option(0.1, "factor at a milestone", low=0, old=("--lr_decay", "--lr_decay_factor"))
    lr_power: float = option(2.0, "power of the polynomial schedule", low=0, high=100)
    warmup_epochs: float = option(
        0.0, "epochs in which the learning rate grows linearly from zero", low=0, old=("--warmup_epoch",)
    )
    momentum: float = option(0.9, "momentum of SGD", low=0, below=1)
    weight_decay: float = option(5e-4, "weight decay of everything but batch norm", low=0)
    decay_norms: bool = option(False, "batch norms and single PReLU values decay too, as in arcface_torch and PLSC")
    freeze: int = option(0, "parts of the backbone that stay: 1 the stem, 2 to 5 stages after it too", low=0, high=5)
    lr_decay_by_part: float = option(
        1.0, "factor of a part's learning rate over the next one's towards the embedding", above=0, high=1
    )
    class_balanced: bool = option(False, "show every class equally often, whatever its number of images")
    augment: tuple[str, ...] = option(
        (), "changes of training images, on the device", ("crop", "low_resolution", "photometric")
    )
    clip_grad_norm: float = option(0.0, "largest norm of the backbone's gradient; 0 = no clipping", low=0)
    accumulate: int = option(1, "micro-batches whose gradients make one update; batch_size counts them together", low=1)
    seed: int = option(2021, "seed of weights, order, flips, dropout and samples", low=0, high=2**31 - 1)

    # precision
    use_amp: bool = option(True, "mixed precision; off is O0")
    opt_level: str = option(
        "auto",
        "precision policy; auto = O2 on npu and cuda, O0 on cpu",
        ("auto", "O0", "O1", "O2", "fp16", "bf16", "bf16_master"),
    )
    loss_scale: str = option("128.0", "a number, or dynamic")
    amp_backend: str = option("auto", "who carries mixed precision out", ("auto", "native", "apex"))
    init_loss_scaling: float = option(2.0**16, "dynamic scaling: first scale", above=0, high=2.0**32)
    incr_every_n_steps: int = option(2000, "dynamic scaling: good steps in a row before the scale grows", low=1)
    decr_every_n_nan_or_inf: int = option(2, "dynamic scaling: bad steps in a row before it shrinks", low=1)
    incr_ratio: float = option(2.0, "dynamic scaling: factor of growth", low=1, high=2.0**20)
    decr_ratio: float = option(0.5, "dynamic scaling: factor of shrinking", above=0, high=1)

    # machine
    device_type: str = option("auto", "npu, cuda (or gpu), cpu; auto = the first of these that is there")
    device_id: int = option(0, "device of the first rank on this machine", low=0, high=2**16)
    distributed: bool = option(False, "insist on more than one rank")
    dist_backend: str = option(
        "auto",
        "how ranks talk; auto = what moves the device's tensors, and no other does",
        ("auto", "gloo", "nccl", "hccl"),
        old=("--backend",),
    )
    dist_timeout: float = option(600.0, "seconds after which a silent rank is given up", low=1, high=2592000)
    memory_format: str = option(
        "auto",
        "layout of activations; auto = contiguous, on a CPU channels_last; fastest = channels_last where it exists",
        ("auto", "fastest", "contiguous", "channels_last"),
    )
    static: bool = option(
        False, "compile the backbone (torch.compile); off is the eager, dynamic mode", old=("--is_static",)
    )
    tf32: bool = option(False, "fp32 products with fewer mantissa bits, where the device has that")
    autotune: bool = option(True, "try convolution algorithms for the batch's shape and keep the quickest (cudnn)")
    memory_reserve: str = option("0", "device memory that the head must leave for activations, as 16GiB")
    profile: bool = option(False, "trace a few steps of the run into run_dir/profile")

    # files
    work_path: str = option(
        "work_space", "folder of checkpoints (models/) and logs (log/)", form=FILLED, old=("--model_save_dir",)
    )
    run_dir: str = option("", "folder of metrics.jsonl; a new one in work_path/log when not given")
    case: str = option(
        "", "name of the run in reports", form=rf"({CASE})? the name of a file: letters, digits and _ . + -"
    )
    pth_path: str = option(
        "",
        "weights to start from or to evaluate: ours or a known project's; of a folder the newest. A training of ours "
        "goes on at its step, unless --is_finetune",
    )
    is_finetune: bool = option(False, "take only the backbone of pth_path, with a new head")
    resume: str = option(
        "",
        "continue a checkpoint: its path; 'newest' for the newest whole one of work_path; 'auto' "
        "for that one if there is any, else from the start",
    )
    keep: int = option(1, "checkpoints kept beside the best and the last", low=0)
    save_every: int = option(0, "steps between checkpoints inside an epoch; 0 = at its end only", low=0)
    save_minutes: float = option(0.0, "minutes between checkpoints inside an epoch; 0 = by steps only", low=0)
    checkpoint: str = option(
        "pth", "one .pth file for exchange, or a sharded directory that any number of ranks loads", ("pth", "sharded")
    )
    fs_name: str = option("", "remote store for checkpoints: hdfs://, webhdfs://, s3:// or any other address of fsspec")
    fs_ugi: str = option("", "name,password for the store; rather set FS_UGI, which no list of processes shows")
    fs_dir_for_save: str = option(
        "", "folder of the store to which checkpoints are uploaded, beside the training", form=INSIDE
    )
    fs_checkpoint_dir: str = option(
        "", "folder of the store from which checkpoints are downloaded before the training", form=INSIDE
    )
    log_every: int = option(
        10, "steps between two lines of metrics.jsonl", low=1, old=("--frequent", "--log_interval_step", "--log_period")
    )
    tensorboard: bool = option(True, "write tensorboard events beside metrics.jsonl (needs tensorboardX)")
    output: str = option(
        "",
        "evaluation: folder of the results; training: work_path, and through a launcher run_dir inside it",
    )
    recipe: str = option("", "start from a named recipe of configs/ instead of the defaults")

    def check(self) -> Config:
        """Raises ConfigError for a value outside its bounds, or options that exclude each other; returns self."""
        for field in dataclasses.fields(self):
            problem = _problem(field, getattr(self, field.name))
            if problem:
                raise ConfigError(f"--{field.name} '{_shown(getattr(self, field.name))}': {problem}")
        if self.max_iter == 0:
            raise ConfigError("--max_iter 0: a number of steps, or -1 for the whole set")
        if self.loss_scale != "dynamic" and not _positive(self.loss_scale):
            raise ConfigError(f"--loss_scale {self.loss_scale}: give a positive number such as 128.0, or dynamic")
        if (self.fs_dir_for_save or self.fs_checkpoint_dir) and not self.fs_name:
            raise ConfigError("--fs_dir_for_save and --fs_checkpoint_dir are folders of a store: name it by --fs_name")
        if not self.model_parallel and (self.checkpoint == "sharded" or self.sample_rate < 1):
            raise ConfigError(
                "--model_parallel=false holds all class centers on every rank: with --checkpoint=pth alone, "
                "and --sample_rate=1"
            )
        if len(self.combined_margin) != 3:
            raise ConfigError(f"--combined_margin {_shown(self.combined_margin)}: needs three numbers, m1 m2 m3")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values (tuples as lists), as checkpoints and metrics keep them: without the store's password."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {**values, "fs_ugi": "", "fs_name": split_address(self.fs_name).url}


# Names of other projects' options that have no namesake of the same meaning here, and what to say instead.
_NETWORK = "--net_mode and --net_depth: arcface_torch's r100 is --net_mode=iresnet --net_depth=100"
_RANKS = "the launchers: RANK_SIZE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (docs/clusters.md)"
_PLACE = "--pth_path for weights to start from, --resume to go on where a checkpoint stopped"
ELSEWHERE = {
    # arcface_torch
    "network": _NETWORK,
    "fp16": "--opt_level=fp16 --loss_scale=dynamic, or a safer policy such as bf16",
    "gradient_acc": "--accumulate, and --batch_size counts the images of all ranks and micro-batches together",
    "optimizer": "nothing: the optimizer is SGD with --momentum and --weight_decay",
    "dali": "nothing: the loader of data/ needs no other library",
    "dali_aug": "nothing: images are mirrored, and no more",
    "verbose": "--save_every; verification comes after every epoch",
    "num_image": "nothing: the images are counted in the data set",
    "save_all_states": "nothing: a checkpoint always holds all that --resume needs",
    "wandb_key": "--tensorboard, whose files lie beside metrics.jsonl",
    "using_wandb": "--tensorboard, whose files lie beside metrics.jsonl",
    "config_file": "--recipe or its other name, config: a recipe, or a config file of arcface_torch",
    # PLSC
    "backbone": _NETWORK,
    "model_name": _NETWORK,
    "classifier": "nothing: the class centers are always spread over the ranks",
    "loss": "--loss_type with --margin and --scale: arcface, cosface, combined, adaface, softmax",
    "use_dynamic_loss_scaling": "--loss_scale=dynamic",
    "max_loss_scaling": "nothing: --loss_scale=dynamic has no upper end but fp32's",
    "train_unit": "--epochs, --milestones and --warmup_epochs, all in epochs",
    "train_num": "--epochs",
    "train_steps": "--epochs with --max_iter",
    "warmup_num": "--warmup_epochs",
    "decay_boundaries": "--milestones, in epochs",
    "lr_steps": "--milestones, in epochs",
    "train_batch_size": "--batch_size, which counts all ranks together",
    "train_image_num": "nothing: the images are counted in the data set",
    "use_synthetic_dataset": "--data_mode=synthetic",
    "dataset": "--data_path, whose format is found out",
    "label_file": "--data_path, the folder of label.txt",
    "is_bin": "--data_path, whose format is found out",
    "do_validation_while_train": "--with_test",
    "validation_interval_step": "--with_test: verification comes after every epoch",
    "logdir": "--run_dir",
    "checkpoint_dir": _PLACE,
    "max_num_last_checkpoint": "--keep, beside the best and the last",
    "calc_acc": "--top5; the accuracy of the best class is always counted",
    "use_fp16": "--opt_level=O1, O2, fp16 or bf16",
    # Ascend's entry, InsightFace_Pytorch
    "dist_url": _RANKS,
    "dist_rank": _RANKS,
    "gpus": _RANKS,
    "world_size": _RANKS,
    "local_rank": _RANKS,
    "workers": "--num_workers",
    "learning_rate": "--lr",
    "weights": _PLACE,
    "pretrained": _PLACE,
}
# Options of earlier versions of this program, and why they are gone.
GONE = {"head_update": "the centers are always updated a chunk at a time, and no gradient of all of them exists"}
_CONFIG_OF_ARCFACE_TORCH = re.compile(r"(.*/)?(base|(ms1mv[23]|glint360k|wf\d+m|3millions|casia)\w*)(\.py)?")


def replace(config: Config, **changes: Any) -> Config:
    """A copy with some options changed; an unknown name is a ConfigError that lists what is close."""
    for name in changes:
        if name not in _types():
            raise ConfigError(_unknown(name))
    return dataclasses.replace(config, **changes)


def get_config(training: bool = True):
    """The upstream projects' EasyDict of the same options."""
    from easydict import EasyDict

    return EasyDict((Config() if training else _for_evaluation(Config())).as_dict())


def parse_arguments(
    argv: Optional[list[str]] = None, training: bool = True, recipes: Optional[dict[str, Config]] = None
) -> Config:
    """The options of a command line, over the defaults or a recipe's; modules of `--plugin` are imported.

    Both `--batch_size` and `--batch-size` are taken, with `=` or a space, and an option's old names. Raises
    ConfigError, one line, for an unknown option (with the close ones), a value of the wrong type, or one out of bounds.
    """
    defaults = Config() if training else _for_evaluation(Config())
    given = vars(_parser(defaults, training).parse_args(argv))
    for name, value in given.items():
        kind = _types()[name]
        if typing.get_origin(kind) is tuple:
            convert = _converter(typing.get_args(kind)[0])
            try:
                given[name] = tuple(convert(part) for text in value for part in re.split(r"[,\s]+", text) if part)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise ConfigError(f"--{name} {' '.join(value)}: {error}") from None
    recipe = given.get("recipe")
    if recipe:
        if not recipes or recipe not in recipes:
            raise ConfigError(f"--recipe '{recipe}': choose from {', '.join(recipes or ['(none here)'])}")
        defaults = recipes[recipe]
    if "combined_margin" in given and given.setdefault("loss_type", "combined") != "combined":
        raise ConfigError(f"--combined_margin is for --loss_type=combined, not {given['loss_type']}: use --margin")
    if training and given.get("output"):
        if "work_path" in given:
            raise ConfigError("--output and --work_path name the same folder: give one of them")
        given["work_path"] = given["output"]
    config = replace(defaults, **given).check()
    if config.is_finetune and not config.pth_path and config.resume not in ("", "auto", "newest"):
        raise ConfigError("--is_finetune takes its weights from --pth_path; --resume goes on with all of a checkpoint")
    load_plugins(config.plugin)
    for field in dataclasses.fields(config):
        value, known = getattr(config, field.name), field.metadata["known"]
        if known and value not in known and not config.plugin:
            raise ConfigError(f"--{field.name} '{value}': choose from {', '.join(known)}, or give your --plugin")
    return config


def load_plugins(names: typing.Iterable[str]) -> None:
    """Imports what `--plugin` names: a Python file, or a module. What it registers by its decorators exists then.

    A file's folder joins sys.path, so that loader processes find it again. Raises ConfigError where there is none.
    """
    for name in names:
        path = Path(name)
        if path.suffix == ".py":
            if not path.is_file():
                raise ConfigError(f"--plugin {name}: no such file")
            folder = str(path.resolve().parent)
            sys.path[:] = [*(place for place in sys.path if place != folder), folder]
            name = path.stem
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--plugin {name}: {error}; name a file, or a module that Python finds") from None


def _for_evaluation(config: Config) -> Config:
    return dataclasses.replace(config, val_targets=VERIFICATION_SETS)


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def _unknown(name: str) -> str:
    plain = name.replace("-", "_")
    if plain in GONE:
        return f"--{name} is gone: {GONE[plain]}"
    if plain in ELSEWHERE:
        return f"--{name} is of another project; here it is {ELSEWHERE[plain]}"
    close = difflib.get_close_matches(plain, list(_types()), n=3, cutoff=0.6)
    return f"unknown option --{name}: " + (
        f"did you mean {', '.join('--' + c for c in close)}?" if close else "see --help for all of them"
    )


# --- bounds ----------------------------------------------------------------------------------------------------------


def _problem(field: dataclasses.Field, value: Any) -> str:
    """What is wrong with an option's value, in words; nothing where it is within its bounds."""
    kind, rules = _types()[field.name], field.metadata
    if typing.get_origin(kind) is tuple:
        kind, values = typing.get_args(kind)[0], value
        if not isinstance(values, (tuple, list)):
            return "must be a list of values"
    elif typing.get_origin(kind) is typing.Union:
        kind, values = typing.get_args(kind)[0], [] if value is None else [value]
    else:
        values = [value]
    if rules["choices"] and any(v not in rules["choices"] for v in values):
        return f"choose from {', '.join(choice for choice in rules['choices'] if choice)}"
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        # nan is within no bounds, and no number beyond 64 bits is meant
        if not all(
            isinstance(v, number) and not isinstance(v, bool) and abs(v) < 2**63 and _within(rules, v) for v in values
        ):
            return f"must be {'a whole' if kind is int else 'a finite'} number{_range(rules)}"
    elif kind is bool and not isinstance(value, (bool, int)):
        return "must be true or false"
    form, _, words = rules["form"].partition(" ")
    if form and not re.fullmatch(form, str(value), re.DOTALL):
        return f"must be {words}"
    return ""


def _within(rules: typing.Mapping, value: float) -> bool:
    low, high, above, below = (rules[name] for name in ("low", "high", "above", "below"))
    return (
        math.isfinite(value)
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _range(rules: typing.Mapping) -> str:
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    said = [f"{word} {rules[name]}" for name, word in words.items() if rules[name] is not None]
    return f", {' and '.join(said)}" if said else ""


def _positive(text: Any) -> bool:
    try:
        return 0 < float(text) < math.inf
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else "none" if value is None else str(value)


# --- the command line ------------------------------------------------------------------------------------------------

EXAMPLES = {
    True: """examples:
  python train.py --recipe=full_1p --data_path=./data/faces_emore
  python train.py --data_mode=synthetic --net_mode=mobilefacenet --epochs=1 --max_iter=20 --batch_size=32
  python train.py --recipe=full_1p --data_path=SET --resume          go on with the newest checkpoint
  python train.py --list_configs                                     recipes, and what was published with them
  python train.py --config=ms1mv3_r50 --data_path=SET                a recipe, or a config file of arcface_torch
  python train.py --data_path=SET --pth_path=WEIGHTS --is_finetune --lr=0.01
  torchrun --nproc-per-node=2 train.py --device_type=cpu --data_path=SET""",
    False: """examples:
  python evaluate.py --pth_path=model.pth --data_path=./data/faces_emore
  python evaluate.py --pth_path=model.pth --data_path=./data/faces_emore/lfw.bin --flip_sum""",
}


def _parser(defaults: Config, training: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [--OPTION=VALUE ...]",
        description=sys.modules["__main__"].__doc__,
        epilog=EXAMPLES[training],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser
    for field in dataclasses.fields(Config):
        name, kind, rules = field.name, _types()[field.name], field.metadata
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        many = typing.get_origin(kind) is tuple
        item = typing.get_args(kind)[0] if many or typing.get_origin(kind) is typing.Union else kind
        taken: dict[str, Any] = {"nargs": "+"} if many else {}
        if item is bool:
            taken = {"nargs": "?", "const": True}
        elif name == "resume":
            taken = {"nargs": "?", "const": "newest"}
        taken.update(dest=name, type=str if many else _converter(item), default=argparse.SUPPRESS)
        values = ", ".join(choice for choice in (*rules["choices"], *rules["known"]) if choice)
        said = [rules["help"], f"one of {values}" if values else "", _range(rules).lstrip(", ")]
        said += [f"also {', '.join(rules['old'])}"] if rules["old"] else []
        help = f"{'; '.join(filter(None, said))} [{_shown(getattr(defaults, name))}]"
        group.add_argument(f"--{name}", metavar=item.__name__.upper(), help=help.replace("%", "%%"), **taken)
        others = {*rules["old"], *(word.replace("_", "-") for word in (f"--{name}", *rules["old"]))} - {f"--{name}"}
        if others:
            group.add_argument(*sorted(others), help=argparse.SUPPRESS, **taken)
    return parser


def _converter(kind: type):
    if kind is not bool:
        return kind

    def boolean(text: str) -> bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")

    return boolean


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.partition("=")[2] == "--":  # which argparse takes for no value at all
                raise ConfigError(f"{word}: expected a value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            words = unknown.group(1).split() or [""]
            flag = next((w for w in words if w.startswith("-")), None)
            if flag:
                raise ConfigError(_unknown(flag.lstrip("-").split("=")[0]))
            if _CONFIG_OF_ARCFACE_TORCH.fullmatch(words[0]):
                raise ConfigError(
                    f"'{words[0]}' is a config of arcface_torch: --config={words[0]} reads it, "
                    "--list_configs shows those that are here"
                )
            raise ConfigError(f"'{words[0]}' is not an option: options begin with --")
        value = re.fullmatch(r"argument ([^/:]+)\S*: invalid (int|float) value: (.*)", message, re.DOTALL)
        if value:
            wanted = "a whole number" if value.group(2) == "int" else "a number"
            raise ConfigError(f"{value.group(1)} {value.group(3)}: must be {wanted}")
        raise ConfigError(message.removeprefix("argument "))
