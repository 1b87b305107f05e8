"""PLSC's Entry: its setters and methods over this project's options, Learner and Recognizer."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from plsc import config as defaults
from plsc import environment, learning_rate
from runtime.address import without_passwords
from runtime.errors import CheckpointError, ConfigError, DataError, UserError
from runtime.log import one_line

log = logging.getLogger("plsc")

LOSSES = {  # PLSC's name: (ours, whether the class centers are spread over the ranks)
    "softmax": ("linear_softmax", False),
    "arcface": ("arcface", False),
    "dist_softmax": ("linear_softmax", True),
    "dist_arcface": ("arcface", True),
}
MODELS = {  # of PLSC's documents, and (_basic) as its sources have two of them from April 2020 on
    "ResNet50": ("resnet", 50),
    "RestNet50": ("resnet", 50),  # the document's misprint
    "ResNet100": ("resnet", 100),
    "ResNet101": ("resnet", 101),
    "ResNet152": ("resnet", 152),
    "ResNet101_basic": ("resnet_basic", 101),
    "ResNet152_basic": ("resnet_basic", 152),
    "ResNet101_narrow": ("resnet_narrow", 101),  # and as they have them before
    "ResNet152_narrow": ("resnet_narrow", 152),
    "FresResNet50": ("resnet", 50),
    "FresResNet100": ("resnet", 100),
}
FORMAT, DATES = "%(asctime)s - %(levelname)s - %(message)s", "%d %b %Y %H:%M:%S"
WEIGHT_DECAY, MOMENTUM = 5e-4, 0.9


def setter(**spellings):
    """A setter of one attribute a parameter, whose new values are logged; spellings: other keywords of the parameters,
    as the documents and the sources have them."""

    def wrap(method):
        parameters = inspect.signature(method)

        @functools.wraps(method)
        def called(self, *args, **given):
            given = {spellings.get(name, name): value for name, value in given.items()}
            values = parameters.bind(self, *args, **given)
            values.apply_defaults()
            method(*values.args, **values.kwargs)
            shown = {name: value for name, value in list(values.arguments.items())[1:] if name != "fs_ugi"}
            text = ", ".join(f"{name} to {value}" for name, value in shown.items())
            log.info("Set %s.", without_passwords(text))

        return called

    return wrap


def _absolute(folder):
    return os.path.abspath(folder) if folder else folder


class Entry:
    """All of PLSC's operations. What `plsc.config.config` holds when it is made are its defaults; every value is a
    plain attribute as well. Errors that a user can mend are one line, and ValueErrors or RuntimeErrors."""

    def __init__(self):
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, format=FORMAT, datefmt=DATES)
        _show_errors_as_one_line()
        environment.share_ranks()
        self.config = defaults.config
        for name, value in self.config.items():
            setattr(self, name, value)
        self.checkpoint_dir, self.model_save_dir, self.dataset_dir = map(
            _absolute, (self.checkpoint_dir, self.model_save_dir, self.dataset_dir)
        )
        self.trainer_id, self.num_trainers = environment.trainer()
        self.global_train_batch_size = self.train_batch_size * self.num_trainers
        self.global_test_batch_size = self.test_batch_size * self.num_trainers
        self.optimizer = self.model = self.train_reader = self.test_reader = self.predict_reader = None
        self.fs_name = self.fs_ugi = self.fs_dir_for_save = self.fs_checkpoint_dir = None
        self.param_attr = self.bias_attr = self.amp_lists = None
        self.use_fp16, self.fp16_user_dict = False, {}
        self.calc_train_acc, self.lr_decay_factor, self.log_period = False, 0.1, 200
        self.has_run_train, self.train_pass_id, self.trained_pass = False, -1, 0
        self._recognizer = None
        log.info("=" * 30)
        log.info("Default configuration:")
        for name, value in self.config.items():
            log.info("\t%s: %s", name, value)
        log.info("trainer_id: %d, num_trainers: %d", self.trainer_id, self.num_trainers)
        log.info("default lr_decay_factor: %s, default log period: %s", self.lr_decay_factor, self.log_period)
        log.info("=" * 30)

    # --- setters -----------------------------------------------------------------------------------------------------

    @setter()
    def set_val_targets(self, targets):
        self.val_targets = targets

    @setter(batch_size="size")
    def set_train_batch_size(self, size):
        self.train_batch_size, self.global_train_batch_size = size, size * self.num_trainers

    @setter(batch_size="size")
    def set_test_batch_size(self, size):
        self.test_batch_size, self.global_test_batch_size = size, size * self.num_trainers

    @setter()
    def set_mixed_precision(
        self,
        use_fp16,
        init_loss_scaling=1.0,
        incr_every_n_steps=2000,
        decr_every_n_nan_or_inf=2,
        incr_ratio=2.0,
        decr_ratio=0.5,
        use_dynamic_loss_scaling=True,
        amp_lists=None,
    ):
        self.use_fp16, self.amp_lists = use_fp16, amp_lists
        self.fp16_user_dict = dict(
            init_loss_scaling=float(init_loss_scaling),
            incr_every_n_steps=incr_every_n_steps,
            decr_every_n_nan_or_inf=decr_every_n_nan_or_inf,
            incr_ratio=float(incr_ratio),
            decr_ratio=float(decr_ratio),
            loss_scale="dynamic" if use_dynamic_loss_scaling else str(float(init_loss_scaling)),
        )

    @setter(directory="fs_dir_for_save")
    def set_hdfs_info(self, fs_name, fs_ugi, fs_dir_for_save=None, fs_checkpoint_dir=None):
        self.fs_name, self.fs_ugi = fs_name, fs_ugi
        self.fs_dir_for_save, self.fs_checkpoint_dir = fs_dir_for_save, fs_checkpoint_dir

    @setter(directory="dir")
    def set_model_save_dir(self, dir):
        self.model_save_dir = _absolute(dir)

    @setter()
    def set_calc_acc(self, calc):
        self.calc_train_acc = calc

    @setter(directory="dir")
    def set_dataset_dir(self, dir):
        self.dataset_dir = _absolute(dir)

    @setter()
    def set_train_image_num(self, num):
        self.train_image_num = num

    set_image_num = set_train_image_num  # as one remark of the document calls it

    @setter()
    def set_class_num(self, num):
        self.num_classes = num

    @setter()
    def set_emb_size(self, size):
        self.emb_dim = size

    @setter()
    def set_model(self, model):
        from plsc.models.base_model import BaseModel

        if not isinstance(model, BaseModel):
            raise ConfigError(f"set_model: a {type(model).__name__} is no instance of plsc.models.base_model.BaseModel")
        self.model = model

    @setter()
    def set_model_name(self, model_name):
        self.model_name = model_name

    @setter()
    def set_train_epochs(self, num):
        self.train_epochs = num

    @setter(directory="dir")
    def set_checkpoint_dir(self, dir):
        self.checkpoint_dir = _absolute(dir)

    @setter()
    def set_warmup_epochs(self, num):
        self.warmup_epochs = num

    @setter(type="loss_type")
    def set_loss_type(self, loss_type):
        if loss_type not in LOSSES:
            raise ConfigError(f"set_loss_type '{loss_type}': choose from {', '.join(LOSSES)}")
        self.loss_type = loss_type

    @setter(shape="size")
    def set_image_shape(self, size):
        if not isinstance(size, (list, tuple)):
            raise ConfigError(f"set_image_shape {size!r}: a list or tuple is needed, as (3, 112, 112)")
        self.image_shape = size

    @setter()
    def set_optimizer(self, optimizer):
        if not callable(optimizer):
            raise ConfigError(
                "set_optimizer: give a function of the parameters, as lambda p: torch.optim.SGD(p, lr=0.1): "
                "the network whose parameters it moves is made later"
            )
        self.optimizer = optimizer

    @setter()
    def set_with_test(self, with_test):
        self.with_test = with_test

    @setter()
    def set_distfc_attr(self, param_attr=None, bias_attr=None):
        self.param_attr, self.bias_attr = param_attr, bias_attr

    @setter()
    def set_log_period(self, period):
        self.log_period = period

    @setter()
    def set_lr_decay_factor(self, factor):
        self.lr_decay_factor = factor

    @setter()
    def set_step_boundaries(self, boundaries):
        if not isinstance(boundaries, (list, tuple)):
            raise ConfigError(f"set_step_boundaries {boundaries!r}: a list of steps is needed")
        self.lr_steps = tuple(boundaries)

    # --- what they come to -------------------------------------------------------------------------------------------

    def learning_rate(self):
        """step -> learning rate (`plsc.learning_rate`)."""
        steps = learning_rate.steps_per_epoch(self.train_image_num, self.num_trainers, self.train_batch_size)
        base = learning_rate.base_rate(self.lr, self.global_train_batch_size)
        log.info("Steps per epoch: %d", steps)
        log.info("LR boundaries: %s", list(self.lr_steps))
        log.info("lr_step: %s", [base * self.lr_decay_factor**i for i in range(len(self.lr_steps) + 1)])
        if self.warmup_epochs and base < self.lr:
            log.warning(
                "the warm-up falls: from %g to %g, because the total batch of %d is below %d",
                self.lr, base, self.global_train_batch_size, learning_rate.BATCH_0_1,
            )  # fmt: skip
        return learning_rate.learning_rate(
            self.lr, base, self.lr_steps, self.lr_decay_factor, int(steps * self.warmup_epochs)
        )

    def options(self, kind: str = "cpu"):
        """All of it as this project's Config. kind: of the device. Raises ConfigError."""
        from checkpoint import sharded
        from config import Config

        if self.loss_type not in LOSSES:
            raise ConfigError(f"loss_type '{self.loss_type}': choose from {', '.join(LOSSES)}")
        if self.train_reader is None and tuple(self.image_shape) != (3, 112, 112):
            raise ConfigError(
                f"image_shape {self.image_shape}: images are (3, 112, 112) here: align and crop them first"
            )
        loss_type, spread = LOSSES[self.loss_type]
        net_mode, net_depth = self._network()
        dim, classes = self.emb_dim, self.num_classes
        return Config(
            net_mode=net_mode,
            net_depth=net_depth or 100,
            embedding_size=dim,
            loss_type=loss_type,
            margin=self.margin if loss_type == "arcface" else None,
            scale=self.scale,
            model_parallel=spread,
            # as PLSC begins: Normal(0, sqrt(2 / (D + C))) sharded, sqrt(2 / C) else; softmax uniform within 1 / sqrt(D)
            centers_norm=(
                dim * 2 / (dim + classes) if spread else dim * 2 / classes if loss_type == "arcface" else 1 / 3
            )
            ** 0.5,
            top5=bool(self.calc_train_acc),
            data_mode="",
            data_path=self.dataset_dir,
            num_classes=classes,
            val_targets=tuple(name.strip() for name in self.val_targets.split(",") if name.strip()),
            with_test=bool(self.with_test),
            flip_sum=True,
            eval_batch_size=self.test_batch_size,
            epochs=self.train_epochs,
            batch_size=self.train_batch_size * self.num_trainers,
            lr=learning_rate.base_rate(self.lr, self.global_train_batch_size),
            lr_schedule="constant",
            momentum=MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            decay_norms=True,
            use_amp=bool(self.use_fp16),
            # bfloat16 where fp16 is slower than fp32; it has fp32's range and needs no scaling
            opt_level="bf16" if kind == "cpu" else "O1",
            **(self.fp16_user_dict if self.use_fp16 else {}),
            work_path=self.model_save_dir or "output",
            checkpoint="sharded" if spread and sharded.available() else "pth",
            fs_name=self.fs_name or "",
            fs_ugi=self.fs_ugi or "",
            fs_dir_for_save=self.fs_dir_for_save or "",
            keep=2**31,
            log_every=self.log_period,
            tensorboard=False,
        ).check()

    def _network(self) -> tuple:
        if self.model is not None:
            return "resnet", 50  # not read: the network is the model
        import model

        if self.model_name in MODELS:
            return MODELS[self.model_name]
        name, _, depth = str(self.model_name).rpartition("_")
        if self.model_name in model.BACKBONES:
            return self.model_name, None
        if name in model.BACKBONES and depth.isdigit():
            return name, int(depth)
        known = ", ".join(name for name in MODELS if name != "RestNet50")
        ours = ", ".join(f"{name}_100" if one.depths else name for name, one in model.BACKBONES.items())
        raise ConfigError(f"model_name '{self.model_name}': choose from {known}, or a backbone as {ours}")

    def _check_loss(self) -> None:
        if self.loss_type.startswith("dist_") and self.num_trainers < 2:
            raise ConfigError(
                f"loss_type '{self.loss_type}' spreads the class centers over ranks and there is one: start "
                f"torchrun --nproc_per_node=2 {os.path.basename(sys.argv[0])} (or python -m plsc.launch), or "
                f"set_loss_type('{self.loss_type[5:]}')"
            )

    # --- where the network comes from --------------------------------------------------------------------------------

    @contextmanager
    def _opened(self):
        from runtime.device import parse_device
        from runtime.dist import open_world, world_env

        device = parse_device(os.environ.get("PLSC_DEVICE", "auto"), world_env()["local_rank"])
        device.set()
        with open_world(device) as world, device.failures_explained():
            yield device, world

    def _make_recognizer(self, device, config):
        from recognizer import Recognizer

        device.seed(config.seed)
        if self.model is None:
            return Recognizer.create(
                config.net_mode, self._network()[1], config.embedding_size, config.drop_ratio, device=device,
                normalisation=PLSC_NORMALISATION,
            )  # fmt: skip
        backbone = self.model.build(self.emb_dim, tuple(self.image_shape))
        architecture = {
            "net_mode": type(self.model).__name__,
            "net_depth": None,
            "embedding_size": self.emb_dim,
            "dropout": None,
            "l2_norm": None,
        }
        return Recognizer(backbone, architecture, device, normalisation=PLSC_NORMALISATION)

    def _checkpoint(self, world) -> Path:
        """The checkpoint in checkpoint_dir, downloaded first where set_hdfs_info says so."""
        from checkpoint import remote, reshard, store
        from plsc import weights

        if not self.checkpoint_dir:
            raise ConfigError("checkpoint_dir is empty: set_checkpoint_dir('./saved_model/0/') names the network")
        folder = Path(self.checkpoint_dir)
        problem = None
        if self.fs_name and self.fs_checkpoint_dir and world.local_rank == 0:
            url = f"{self.fs_name.rstrip('/')}/{self.fs_checkpoint_dir.strip('/')}"
            try:
                remote.download(remote.Store(url, self.fs_ugi or ""), folder)
            except CheckpointError as error:
                problem = str(error)
        problems = [one for one in world.all_gather_object(problem) if one]
        if problems:
            raise CheckpointError(problems[0])
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such folder: correct set_checkpoint_dir")
        if weights.is_original(folder) or folder.is_file():
            return folder
        found = store.newest(folder)
        if found is not None:
            return found
        try:
            return reshard.find(folder)
        except CheckpointError:
            params = sorted(folder.glob("*.pdparams"))
            if params:
                return params[0]
            raise CheckpointError(
                f"{folder}: holds no checkpoint: give the folder of a pass, as ./saved_model/0/, or PLSC's own with "
                "meta.json"
            ) from None

    def _trained(self, device, world):
        """The network of this process's training, or the one in checkpoint_dir."""
        from checkpoint import run
        from plsc import weights
        from recognizer import Recognizer

        if self._recognizer is not None:
            return self._recognizer
        path = self._checkpoint(world)
        config = self.options(device.kind)
        if weights.is_original(path) or self.model is not None:
            recognizer = self._make_recognizer(device, config)
            if weights.is_original(path):
                recognizer.load_state_dict(weights.load(path, recognizer.backbone)["model"])
            else:
                try:
                    recognizer.load_state_dict(run.read(path, world)[1]["model"])
                except (RuntimeError, KeyError, TypeError) as error:
                    raise CheckpointError(f"{path}: is not of {type(self.model).__name__}: {one_line(error)}") from None
        else:
            recognizer = Recognizer.load(path, device, world=world)
        log.info("loaded %s", path)
        return recognizer

    # --- train, test, predict ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains, verifies and saves every pass. Continues checkpoint_dir's training where there is one."""
        self._check_loss()
        from plsc import weights
        from plsc.trainer import Trainer

        if self.train_reader is None and not os.path.isdir(self.dataset_dir):
            raise DataError(f"{self.dataset_dir}: no such folder: set_dataset_dir names the training data's")
        with self._opened() as (device, world):
            config = self.options(device.kind)
            trainer = Trainer(self, self._make_recognizer(device, config), config, world)
            if self.checkpoint_dir or self.fs_checkpoint_dir:
                path = self._checkpoint(world)
                if weights.is_original(path):
                    found = weights.load(path, trainer.recognizer.backbone)
                    trainer.recognizer.load_state_dict(found["model"])
                    head = found["head"]
                    if head is not None and head["kernel"].shape[1] == self.num_classes:
                        trainer.head.load_kernel(head["kernel"])
                        if head["bias"] is not None and trainer.head.bias:
                            own = trainer.head.centers.shard.slice
                            trainer.head.centers.weight[:, self.emb_dim] = head["bias"][own].to(device.torch)
                    else:
                        log.info("%s: its class centers are not taken: it has others or none", path)
                else:
                    self._continue(trainer, path, world)
                log.info("loaded %s", path)
            trainer.train()
            self.has_run_train, self.train_pass_id = True, self.train_epochs - 1
            self._recognizer = trainer.recognizer

    def _continue(self, trainer, path: Path, world) -> None:
        """All of the checkpoint's training; of one with another number of classes the network alone."""
        from checkpoint import run

        path, state = run.read(path, world)
        meta = state.get("meta", {})
        if meta.get("num_classes") in (None, trainer.dataset.num_classes):
            trainer.resume(str(path))
            return
        try:
            trainer.recognizer.load_state_dict(state["model"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is not of {trainer.recognizer.name}: {one_line(error)}") from None
        log.info(
            "%s: has %s classes and this training %d: its class centers are not taken",
            path, meta["num_classes"], trainer.dataset.num_classes,
        )  # fmt: skip

    def test(self, pass_id: int = 0) -> None:
        """Verifies the network of this process's training, or of checkpoint_dir, on val_targets."""
        from plsc.trainer import embed_arrays, say_result, x_norm
        from verify.protocol import evaluate_pairs

        with self._opened() as (device, world):
            recognizer = self._trained(device, world)
            place = f"[{self.trained_pass}]" if self.has_run_train else ""
            if self.test_reader is not None:
                for sets, name in zip(*self.test_reader(self.dataset_dir, self.val_targets)):
                    started = time.time()
                    with x_norm(recognizer, world) as norm:
                        emb_2ND = embed_arrays(recognizer, sets[0], world, self.test_batch_size)
                    say_result(name, evaluate_pairs(emb_2ND, sets[1]), norm(), place, time.time() - started)
                return
            for name, path in self._pair_sets().items():
                started = time.time()
                with x_norm(recognizer, world) as norm:
                    result = recognizer.verify({name: path}, world, self.test_batch_size, flip_sum=True)[name]
                say_result(name, result, norm(), place, time.time() - started)

    def _pair_sets(self) -> dict:
        from data import pairs

        names = [name.strip() for name in self.val_targets.split(",") if name.strip()]
        found = pairs.find_pair_sets(self.dataset_dir, names)
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(f"{self.dataset_dir}: holds no verification set {', '.join(missing)}: see set_val_targets")
        return found

    def predict(self) -> None:
        """Prints "emb:" and the embeddings of predict_reader's batches, else of the training images'."""
        import numpy as np
        import torch

        from plsc.reader import batch
        from plsc.utils import jpeg_reader
        from verify.embed import evaluating

        with self._opened() as (device, world):
            recognizer = self._trained(device, world)
            reader = self.predict_reader or batch(
                jpeg_reader.arc_train(self.dataset_dir, self.num_classes), self.train_batch_size
            )
            with evaluating(recognizer.backbone), torch.no_grad():
                for samples in reader():
                    images = np.stack([np.asarray(sample[0], np.float32) for sample in samples])
                    images = recognizer.precision.cast_input(torch.from_numpy(images).to(device.torch))
                    with recognizer.precision.autocast():
                        print("emb:", recognizer.backbone(images).float().cpu().numpy())

    def convert_for_prediction(self) -> None:
        """Writes model.onnx, and model.pth for this project's own server, into model_save_dir; deletes nothing."""
        from checkpoint import remote
        from deploy import onnx

        with self._opened() as (device, world):
            recognizer = self._trained(device, world)
            if not world.is_main:
                return
            folder = Path(self.model_save_dir or "output")
            folder.mkdir(parents=True, exist_ok=True)
            made = [onnx.export(recognizer, folder / "model.onnx")]
            if self.model is None:
                made.append(recognizer.save(folder / "model.pth"))
            for path in made:
                log.info("saved %s", path)
            if self.fs_name:
                if not self.fs_dir_for_save:
                    raise ConfigError("set_hdfs_info: fs_dir_for_save is missing: where shall the network go?")
                store = remote.Store(f"{self.fs_name.rstrip('/')}/{self.fs_dir_for_save.strip('/')}", self.fs_ugi or "")
                with remote.Uploader(store) as uploader:
                    for path in made:
                        uploader.put(path)


PLSC_NORMALISATION = "(x - 127.5) / 128"


def _show_errors_as_one_line() -> None:
    """What a user can mend ends a script as `error: <one line>` and status 1, as this project's commands end."""
    if getattr(sys.excepthook, "of_plsc", False):
        return
    before = sys.excepthook

    def hook(kind, error, trace):
        if issubclass(kind, UserError):
            print(f"error: {one_line(error)}", file=sys.stderr)
        else:
            before(kind, error, trace)

    hook.of_plsc = True
    sys.excepthook = hook
