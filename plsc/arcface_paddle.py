"""arcface_paddle's training (PLSC 2.x) in its own options and lines, over this project's Learner: tools/train.py."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import config as options
from configs import RECIPES
from plsc import learning_rate
from plsc.passes import FolderAPass
from runtime.errors import ConfigError, DataError

log = logging.getLogger("plsc")

BACKBONES = {
    "FresResNet50": ("resnet", 50),
    "FresResNet100": ("resnet", 100),
    "MobileFaceNet_128": ("mobilefacenet", None),
}
LOSSES = {
    "ArcFace": dict(loss_type="arcface", margin=0.5),
    "CosFace": dict(loss_type="cosface", margin=0.35),
    "SphereFace": dict(loss_type="combined", combined_margin=(1.35, 0.0, 0.0)),
}
DEFAULTS = dict(
    is_static=True,
    backbone="FresResNet100",
    classifier="LargeScaleClassifier",
    embedding_size=512,
    model_parallel=True,
    sample_ratio=0.1,
    loss="ArcFace",
    dropout=0.0,
    fp16=True,
    init_loss_scaling=128.0,
    max_loss_scaling=128.0,
    incr_every_n_steps=2000,
    decr_every_n_nan_or_inf=1,
    incr_ratio=2.0,
    decr_ratio=0.5,
    use_dynamic_loss_scaling=True,
    custom_white_list=(),
    custom_black_list=(),
    lr=0.1,
    lr_decay=0.1,
    weight_decay=5e-4,
    momentum=0.9,
    train_unit="step",
    warmup_num=1000,
    train_num=180000,
    decay_boundaries=(100000, 140000, 160000),
    use_synthetic_dataset=False,
    dataset="MS1M_v3",
    data_dir="./MS1M_v3",
    label_file="./MS1M_v3/label.txt",
    is_bin=False,
    num_classes=93431,
    batch_size=64,
    num_workers=8,
    do_validation_while_train=True,
    validation_interval_step=2000,
    val_targets=("lfw", "cfp_fp", "agedb_30"),
    logdir="./log",
    log_interval_step=10,
    output="./MS1M_v3_arcface",
    resume=False,
    checkpoint_dir="",
    max_num_last_checkpoint=3,
    seed=0,
    data_format="NCHW",
    lsc_init_from_numpy=True,
    grad_norm_clip=0.0,
    grad_norm_clip_max=0.0,
    dataset_type="CommonDataset",
    batch_sampler="DistributedBatchSampler",
)
_MS1MV3 = dict(
    backbone="FresResNet50", train_unit="epoch", warmup_num=0, train_num=25, decay_boundaries=(10, 16, 22),
    is_bin=True, batch_size=128, log_interval_step=100, max_num_last_checkpoint=1,
)  # fmt: skip
CONFIGS = {
    "config": {},
    "ms1mv3_r50": _MS1MV3,
    "ms1mv3_r100": {**_MS1MV3, "backbone": "FresResNet100"},
    "ms1mv3_mobileface": {**_MS1MV3, "backbone": "MobileFaceNet_128", "embedding_size": 128, "fp16": False},
    "ms1mv2_mobileface": {
        **_MS1MV3, "backbone": "MobileFaceNet_128", "embedding_size": 128, "fp16": False, "sample_ratio": 1.0,
        "num_classes": 85742, "batch_size": 512,
    },
}  # fmt: skip
# What is read and has nothing to say here, and why.
WITHOUT_EFFECT = {
    "classifier": "the class centers are one implementation",
    "max_loss_scaling": "dynamic scaling has no upper end but fp32's",
    "is_bin": "the format of each image file is found out",
    "dataset": "a name only",
    "validation_interval_step": "verification comes after every epoch",
    "logdir": "metrics lie in the output folder",
    "lsc_init_from_numpy": "the seed gives the class centers on any number of ranks",
    "dataset_type": "the format of the set is found out",
    "batch_sampler": "there is one",
    "custom_white_list": "the fp16 policy decides by layers",
    "custom_black_list": "the fp16 policy decides by layers",
    "label_file": "it is label.txt in --data_dir",
}


def word(text: str) -> bool:
    """True for true, t and 1 in any case, and False for everything else, as arcface_paddle has it."""
    return text.lower() in ("true", "t", "1")


def parse(argv) -> argparse.Namespace:
    """Its options: defaults, then --config_file's, then the command line's."""
    parser = argparse.ArgumentParser(
        prog="tools/train.py", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config_file", default="configs/config.py", help=f"one of {', '.join(CONFIGS)} as configs/NAME.py"
    )
    for name, value in DEFAULTS.items():
        kind = word if isinstance(value, bool) else _list if isinstance(value, tuple) else type(value)
        note = f"; without effect: {WITHOUT_EFFECT[name]}" if name in WITHOUT_EFFECT else ""
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"[{value}]{note}")
    given = vars(parser.parse_args(argv))
    name = Path(given.pop("config_file")).stem
    if name not in CONFIGS:
        raise ConfigError(f"--config_file {name}: choose from {', '.join(f'configs/{one}.py' for one in CONFIGS)}")
    return argparse.Namespace(**{**DEFAULTS, **CONFIGS[name], **given})


def _list(text: str) -> tuple:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def network(backbone: str) -> tuple:
    """(net_mode, net_depth) of arcface_paddle's name, or of one of ours such as iresnet_100. Raises ConfigError."""
    if backbone in BACKBONES:
        return BACKBONES[backbone]
    name, _, depth = backbone.rpartition("_")
    if depth.isdigit():
        return name, int(depth)
    if backbone in ("mbf", "mbf_large", "mobilefacenet"):
        return backbone, None
    raise ConfigError(f"--backbone {backbone}: choose from {', '.join(BACKBONES)}, or name ours as iresnet_100")


def as_config(given: argparse.Namespace, ranks: int) -> options.Config:
    """The same as this project's options. Raises ConfigError."""
    net_mode, net_depth = network(given.backbone)
    if given.loss not in LOSSES:
        raise ConfigError(f"--loss {given.loss}: choose from {', '.join(LOSSES)}")
    if given.train_unit not in ("step", "epoch"):
        raise ConfigError(f"--train_unit {given.train_unit}: choose from step, epoch")
    total = given.batch_size * ranks
    return options.replace(
        RECIPES["plsc_ms1mv3_r50"],
        net_mode=net_mode,
        net_depth=net_depth or 100,
        embedding_size=given.embedding_size,
        drop_ratio=given.dropout or None if net_mode == "mobilefacenet" else given.dropout,
        **LOSSES[given.loss],
        sample_rate=given.sample_ratio,
        model_parallel=given.model_parallel or given.sample_ratio < 1,
        lr=learning_rate.base_rate(given.lr, total, learning_rate.BATCH_2_X),
        lr_schedule="constant",
        momentum=given.momentum,
        weight_decay=given.weight_decay,
        clip_grad_norm=given.grad_norm_clip,
        opt_level="fp16",
        use_amp=given.fp16,
        loss_scale="dynamic" if given.use_dynamic_loss_scaling else str(given.init_loss_scaling),
        init_loss_scaling=given.init_loss_scaling,
        incr_every_n_steps=given.incr_every_n_steps,
        decr_every_n_nan_or_inf=given.decr_every_n_nan_or_inf,
        incr_ratio=given.incr_ratio,
        decr_ratio=given.decr_ratio,
        static=given.is_static,
        memory_format="channels_last" if given.data_format == "NHWC" else "auto",
        data_mode="synthetic" if given.use_synthetic_dataset else "",
        data_path=given.data_dir,
        num_classes=given.num_classes,
        val_targets=tuple(given.val_targets),
        with_test=given.do_validation_while_train,
        flip_sum=True,
        epochs=given.train_num if given.train_unit == "epoch" else 1,  # of steps when their number is known
        max_iter=given.train_num if given.use_synthetic_dataset and given.train_unit == "step" else -1,
        batch_size=total,
        num_workers=given.num_workers,
        seed=given.seed,
        log_every=given.log_interval_step,
        work_path=str(Path(given.output) / given.backbone),
        run_dir=str(Path(given.output)),
    ).check()


def train(given: argparse.Namespace) -> None:
    """The whole run, of this rank."""
    from runtime.device import parse_device
    from runtime.dist import open_world, world_env

    ranks = world_env()
    config = as_config(given, ranks["size"])
    if not given.use_synthetic_dataset and not Path(given.data_dir).is_dir():
        raise DataError(f"{given.data_dir}: no such folder: give the training set's as --data_dir")
    _open_log(Path(given.output), ranks)
    for name, why in WITHOUT_EFFECT.items():
        if getattr(given, name) != DEFAULTS[name] and name not in ("is_bin", "logdir", "label_file", "dataset"):
            log.info("--%s has no effect: %s", name, why)
    device = parse_device("auto", ranks["local_rank"])
    device.set()
    with open_world(device) as world, device.failures_explained():
        log.info("rank: %d", world.rank)
        log.info("--------args----------")
        for name, value in vars(given).items():
            log.info("%s: %s", name, value)
        log.info("------------------------")
        learner = _learner_class()(given, config, device, world)
        learner.train()


def _open_log(folder: Path, ranks: dict) -> None:
    formatter = logging.Formatter("Training: %(asctime)s - %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if ranks["rank"] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "training.log"))
    root = logging.getLogger()
    root.handlers[:] = handlers if ranks["rank"] == 0 else []
    for handler in handlers:
        handler.setFormatter(formatter)
    root.setLevel(logging.INFO)


def _learner_class():
    """Here, because the Learner loads torch, and a misspelt option answers at once."""
    from learner import Learner
    from plsc.trainer import x_norm
    from recognizer import Recognizer

    class ArcfacePaddleLearner(FolderAPass, Learner):
        """Its schedule, lines and folders; see `Learner`."""

        def __init__(self, given, config, device, world):
            device.seed(config.seed)
            net_mode, net_depth = network(given.backbone)
            recognizer = Recognizer.create(net_mode, net_depth, given.embedding_size, config.drop_ratio, device=device)
            super().__init__(recognizer, config, None, world)
            self.given, self._highest = given, {}
            unit = self.steps_per_epoch if given.train_unit == "epoch" else 1
            steps = given.train_num * unit
            if given.train_unit == "step" and not given.use_synthetic_dataset:
                self.config = options.replace(config, epochs=-(-steps // self.steps_per_epoch))
            boundaries = [int(boundary) * unit for boundary in given.decay_boundaries]
            warmup = given.warmup_num * unit
            self.schedule = learning_rate.learning_rate_2_x(config.lr, boundaries, given.lr_decay, warmup)
            self._total, self._begun = steps, time.time()
            if given.resume:
                self.resume(self._checkpoint())
            for name, value in (
                ("world_size", world.size),
                ("total_batch_size", config.batch_size),
                ("warmup_steps", warmup),
                ("steps_per_epoch", self.steps_per_epoch),
                ("total_steps", steps),
                ("total_epoch", self.config.epochs),
                ("decay_steps", boundaries),
            ):
                log.info("%s: %s", name, value)

        def _checkpoint(self) -> str:
            from checkpoint import store

            folder = self.given.checkpoint_dir
            if not folder:
                raise ConfigError(
                    "--resume True needs --checkpoint_dir, the folder of an epoch such as .../FresResNet50/3"
                )
            return str(store.newest(folder) or folder)

        def _log_step(self, run_log, bar, speed, lr, means) -> None:
            super()._log_step(run_log, bar, speed, lr, means)
            at, rate = self.progress, speed.recent()
            left = max(0, self._total - at.step) * self.config.batch_size / rate / 3600 if rate else 0.0
            log.info(
                "loss %.4f, lr: %f, epoch: %d, step: %d, eta: %1.2f hours, throughput: %.2f imgs/sec",
                means[0], lr, at.epoch, at.step, left, rate,
            )  # fmt: skip

        def _verify(self, *arguments) -> None:
            if self.progress.step:
                super()._verify(*arguments)

        def evaluate(self, sets=None, **watch) -> dict:
            started, step = time.time(), self.progress.step
            with x_norm(self.recognizer, self.world) as norm:
                results = super().evaluate(sets, **watch)
            for name, result in results.items():
                self._highest[name] = max(self._highest.get(name, 0.0), result.accuracy)
                say(name, step, norm(), result, self._highest[name], time.time() - started)
            return results

        def save(self, replaces=None):
            path = super().save(replaces)
            if self.world.is_main:
                log.info("Save model to %s.", self.checkpoints.models)
                self._forget_old()
            self.world.barrier()
            return path

        def _forget_old(self) -> None:
            """Removes the folders that this run made, but for the newest max_num_last_checkpoint."""
            folder = self.checkpoints.models
            made = self.__dict__.setdefault("_made", [])
            if folder not in made:
                made.append(folder)
            while len(made) > max(1, self.given.max_num_last_checkpoint):
                oldest = made.pop(0)
                for file in oldest.iterdir():
                    if file.name == "meta.json" or file.name in self.checkpoints.saved:
                        file.unlink()
                if not any(oldest.iterdir()):
                    oldest.rmdir()
                    log.info("Remove checkpoint %s.", oldest)

    return ArcfacePaddleLearner


def say(name: str, step: int, norm: float, result, highest: float, seconds: float) -> None:
    """The lines of one verification."""
    log.info("[%s][%d]XNorm: %f", name, step, norm)
    log.info("[%s][%d]Accuracy-Flip: %1.5f+-%1.5f", name, step, result.accuracy, result.std)
    log.info("[%s][%d]Accuracy-Highest: %1.5f", name, step, highest)
    log.info("test time: %.4f", seconds)
