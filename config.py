"""Every option of the project, once: its name, type, default, meaning.

The command lines (`parse_arguments`), the lineage's EasyDict (`get_config`) and the PLSC setters derive from `Config`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import sys
import typing
from dataclasses import dataclass
from typing import Any, NoReturn, Optional

from runtime.errors import ConfigError

VERIFICATION_SETS = ("lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw", "vgg2_fp")


def option(default: Any, help: str, choices: tuple = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    # network and head
    net_mode: str = option("ir_se", "backbone", ("ir", "ir_se", "mobilefacenet", "iresnet", "resnet"))
    net_depth: int = option(100, "layers of the backbone: 18 34 50 100 152 200 (resnet: 50 101 152)")
    embedding_size: int = option(512, "length of an embedding")
    drop_ratio: Optional[float] = option(None, "dropout before the embedding; the backbone's own when not given")
    loss_type: str = option(
        "arcface",
        "margin of the classification loss",
        ("arcface", "arcface_straight_through", "cosface", "combined", "adaface", "softmax", "linear_softmax"),
    )
    margin: Optional[float] = option(None, "margin m; the loss's own default when not given (arcface 0.5)")
    scale: float = option(64.0, "scale s of the cosines")
    combined_margin: tuple[float, ...] = option((1.0, 0.5, 0.0), "m1 m2 m3 of cos(m1 t + m2) - m3")
    sample_rate: float = option(1.0, "share of the class centers drawn each step (Partial FC)")
    interclass_filtering_threshold: float = option(0.0, "cosine above which another class counts as noise; 0 = off")
    top5: bool = option(False, "count as well how often the right class is among the five best")
    head_op: str = option("auto", "implementation of the loss: auto, or one of head/ops by name")
    head_update: str = option(
        "step", "centers move after the backward pass, or inside it (no gradient of them exists)", ("step", "backward")
    )
    head_lr_factor: float = option(1.0, "learning rate of the centers over the backbone's; 10 makes up for no momentum")
    update_rows: str = option("drawn", "with sample_rate < 1: which centers decay and keep moving", ("drawn", "all"))
    centers_dtype: str = option(
        "fp32", "storage of the class centers; half ones are rounded stochastically", ("fp32", "bf16", "fp16")
    )
    momentum_dtype: str = option("fp32", "storage of the centers' momentum", ("fp32", "bf16", "int8", "none"))
    momentum_on_host: bool = option(False, "keep the centers' momentum in the host's memory")

    # data
    data_mode: str = option("emore", "vgg, ms1m, emore, concat, synthetic, or a folder's name under data_path")
    data_path: str = option("./data/faces_emore", "training set of any format; for evaluation a folder or one set")
    num_classes: int = option(0, "number of classes; 0 = as the data set says")
    channel_order: str = option(
        "", "channel order of another project's data; as its format says when not given", ("", "rgb", "bgr")
    )
    weights_channel_order: str = option(
        "", "channel order that another project's weights (--pth_path) were trained on", ("", "rgb", "bgr")
    )
    strict_data: bool = option(False, "stop at the first damaged image instead of replacing it")
    num_workers: int = option(-1, "loader processes a rank; -1 = the rank's share of the cores, at most 8")
    val_targets: tuple[str, ...] = option(("lfw",), "verification sets, by name")
    with_test: bool = option(True, "verify after every epoch, and once before training")
    flip_sum: bool = option(False, "verify on the sum of an image's and its mirror's embeddings")
    eval_batch_size: int = option(128, "images a rank embeds at a time")

    # optimisation
    epochs: int = option(20, "epochs to train")
    start_epoch: int = option(0, "epoch to start from (resuming sets it)")
    max_iter: int = option(-1, "steps an epoch at most; -1 = the whole set")
    batch_size: int = option(256, "images a step, all ranks together")
    lr: float = option(1e-3, "base learning rate")
    lr_schedule: str = option("milestones", "course of the learning rate", ("milestones", "polynomial", "constant"))
    milestones: tuple[int, ...] = option((12, 15, 18), "epochs at which the learning rate is multiplied by gamma")
    gamma: float = option(0.1, "factor at a milestone")
    lr_power: float = option(2.0, "power of the polynomial schedule")
    warmup_epochs: float = option(0.0, "epochs in which the learning rate grows linearly from zero")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(5e-4, "weight decay of everything but batch norm")
    clip_grad_norm: float = option(0.0, "largest norm of the backbone's gradient; 0 = no clipping")
    accumulate: int = option(1, "micro-batches whose gradients make one update; batch_size counts them together")
    seed: int = option(2021, "seed of weights, order, flips, dropout and draws")

    # precision
    use_amp: bool = option(True, "mixed precision; off is O0")
    opt_level: str = option(
        "auto",
        "precision policy; auto = O2 on npu and cuda, O0 on cpu",
        ("auto", "O0", "O1", "O2", "fp16", "bf16", "bf16_master"),
    )
    loss_scale: str = option("128.0", "a number, or dynamic")
    amp_backend: str = option("auto", "who carries mixed precision out", ("auto", "native", "apex"))
    init_loss_scaling: float = option(2.0**16, "dynamic scaling: first scale")
    incr_every_n_steps: int = option(2000, "dynamic scaling: good steps in a row before the scale grows")
    decr_every_n_nan_or_inf: int = option(2, "dynamic scaling: bad steps in a row before it shrinks")
    incr_ratio: float = option(2.0, "dynamic scaling: factor of growth")
    decr_ratio: float = option(0.5, "dynamic scaling: factor of shrinking")

    # machine
    device_type: str = option("auto", "npu, cuda (or gpu), cpu; auto = the first of these that is there")
    device_id: int = option(0, "device of the first rank on this machine")
    distributed: bool = option(False, "insist on more than one rank")
    dist_backend: str = option(
        "auto",
        "how ranks talk; auto = what moves the device's tensors, and no other does",
        ("auto", "gloo", "nccl", "hccl"),
    )
    dist_timeout: float = option(600.0, "seconds after which a silent rank is given up")
    memory_format: str = option(
        "auto", "layout of activations; auto = what the device prefers", ("auto", "contiguous", "channels_last")
    )
    static: bool = option(False, "compile the backbone (torch.compile); off is the eager, dynamic mode")
    tf32: bool = option(False, "fp32 products with fewer mantissa bits, where the device has that")
    autotune: bool = option(True, "try convolution algorithms for the batch's shape and keep the quickest (cudnn)")
    memory_reserve: str = option("0", "device memory that the head must leave for activations, as 16GiB")
    profile: bool = option(False, "trace a few steps of the run into run_dir/profile")

    # files
    work_path: str = option("work_space", "folder of checkpoints (models/) and logs (log/)")
    run_dir: str = option("", "folder of metrics.jsonl; work_path/log when not given")
    case: str = option("", "name of the run in reports")
    pth_path: str = option("", "weights to start from or to evaluate: ours or a known project's")
    is_finetune: bool = option(False, "take only the backbone of pth_path, with a new head")
    resume: str = option(
        "",
        "continue a checkpoint: its path; 'newest' for the newest whole one of work_path; 'auto' "
        "for that one if there is any, else from the start",
    )
    keep: int = option(1, "checkpoints kept beside the best and the last")
    save_every: int = option(0, "steps between checkpoints inside an epoch; 0 = at its end only")
    save_minutes: float = option(0.0, "minutes between checkpoints inside an epoch; 0 = by steps only")
    checkpoint: str = option(
        "pth", "one .pth file for exchange, or a sharded directory that any number of ranks loads", ("pth", "sharded")
    )
    fs_name: str = option("", "remote store for checkpoints: hdfs://, webhdfs://, s3:// or any other address of fsspec")
    fs_ugi: str = option("", "name,password for the store; rather set FS_UGI, which no list of processes shows")
    fs_dir_for_save: str = option("", "folder of the store to which checkpoints are uploaded, beside the training")
    fs_checkpoint_dir: str = option("", "folder of the store from which checkpoints are downloaded before the training")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    tensorboard: bool = option(True, "write tensorboard events beside metrics.jsonl (needs tensorboardX)")
    output: str = option("", "evaluation: folder of the results")
    recipe: str = option("", "start from a named recipe of configs/ instead of the defaults")

    def check(self) -> Config:
        """Raises ConfigError for a value outside its range; returns self."""
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                raise ConfigError(f"--{field.name} '{value}': choose from {', '.join(c for c in choices if c)}")
        for name, low in (
            ("embedding_size", 1),
            ("epochs", 0),
            ("batch_size", 1),
            ("accumulate", 1),
            ("eval_batch_size", 1),
            ("log_every", 1),
            ("keep", 0),
            ("start_epoch", 0),
            ("num_classes", 0),
            ("save_every", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least {low}")
        for name, low in (
            ("lr", 0),
            ("weight_decay", 0),
            ("momentum", 0),
            ("gamma", 0),
            ("warmup_epochs", 0),
            ("clip_grad_norm", 0),
            ("save_minutes", 0),
            ("dist_timeout", 1),
            ("num_workers", -1),
        ):
            if not low <= getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name} {getattr(self, name)}: must be a number of at least {low}")
        if self.momentum >= 1:
            raise ConfigError(f"--momentum {self.momentum}: must be below 1")
        for name in ("data_path", "work_path"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty: name a folder (is a variable of your shell not set?)")
        for name in ("fs_dir_for_save", "fs_checkpoint_dir"):
            if ".." in getattr(self, name).split("/"):
                raise ConfigError(f"--{name} {getattr(self, name)}: leads out of the store's folder with ..")
        if self.head_lr_factor < 0:
            raise ConfigError(f"--head_lr_factor {self.head_lr_factor}: must be at least 0 (0 holds the centers still)")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"--sample_rate {self.sample_rate}: must be above 0 and at most 1")
        if self.max_iter == 0 or self.max_iter < -1:
            raise ConfigError(f"--max_iter {self.max_iter}: a number of steps, or -1 for the whole set")
        if self.head_update == "backward" and self.accumulate > 1:
            raise ConfigError("--head_update=backward moves the centers in every backward pass: use --accumulate=1")
        if (self.fs_dir_for_save or self.fs_checkpoint_dir) and not self.fs_name:
            raise ConfigError("--fs_dir_for_save and --fs_checkpoint_dir are folders of a store: name it by --fs_name")
        if len(self.combined_margin) != 3:
            raise ConfigError(f"--combined_margin {self.combined_margin}: needs three numbers, m1 m2 m3")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values (tuples as lists), as checkpoints and metrics keep them: without the store's password."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {**values, "fs_ugi": ""}


def replace(config: Config, **changes: Any) -> Config:
    """A copy with some options changed; an unknown name is a ConfigError that lists what is close."""
    for name in changes:
        if name not in _types():
            raise ConfigError(_unknown(name))
    return dataclasses.replace(config, **changes)


def get_config(training: bool = True):
    """The lineage's EasyDict of the same options."""
    from easydict import EasyDict

    return EasyDict((Config() if training else _for_evaluation(Config())).as_dict())


def parse_arguments(
    argv: Optional[list[str]] = None, training: bool = True, recipes: Optional[dict[str, Config]] = None
) -> Config:
    """The options of a command line, over the defaults or a recipe's.

    Both `--batch_size` and `--batch-size` are taken, with `=` or a space. Raises ConfigError, one line, for an unknown
    option (with the close ones), a value of the wrong type, or one out of range.
    """
    parser = _Parser(
        description=sys.modules["__main__"].__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = Config() if training else _for_evaluation(Config())
    for field in dataclasses.fields(Config):
        name, kind = field.name, _types()[field.name]
        spellings = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])
        many = typing.get_origin(kind) is tuple
        item = typing.get_args(kind)[0] if many or typing.get_origin(kind) is typing.Union else kind
        extra: dict[str, Any] = {"nargs": "+"} if many else {}
        if item is bool:
            extra = {"nargs": "?", "const": True}
        elif name == "resume":
            extra = {"nargs": "?", "const": "newest"}
        parser.add_argument(
            *spellings,
            dest=name,
            type=str if many else _converter(item),
            default=argparse.SUPPRESS,
            metavar=item.__name__.upper(),
            help=f"{field.metadata['help']} [{getattr(defaults, name)}]",
            **extra,
        )
    given = vars(parser.parse_args(argv))
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
    return replace(defaults, **given).check()


def _for_evaluation(config: Config) -> Config:
    return dataclasses.replace(config, val_targets=VERIFICATION_SETS)


def _types() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(_types()), n=3, cutoff=0.5)
    return f"unknown option --{name}: " + (
        f"did you mean {', '.join('--' + c for c in close)}?" if close else "see --help for all of them"
    )


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
    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (.*)", message)
        if unknown:
            words = unknown.group(1).split()
            flag = next((w for w in words if w.startswith("-")), None)
            if flag:
                raise ConfigError(_unknown(flag.lstrip("-").split("=")[0]))
            raise ConfigError(f"'{words[0]}' is not an option: options begin with --")
        raise ConfigError(message)
