"""The Learner: builds the parts, and holds the one training loop."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

import data
import model
import optim
from checkpoint import folder, remote, reshard, sharded, store
from config import Config
from data import pairs, transforms
from data.synthetic import SyntheticDataset
from head import plan
from head.head import MarginHead
from model import foreign
from runtime import log as runlog
from runtime.device import Device, parse_device
from runtime.dist import ALONE, World, wrap_data_parallel
from runtime.divergence import first_non_finite
from runtime.errors import CheckpointError, ConfigError
from runtime.loss_scale import parse_loss_scale
from runtime.precision import make_precision
from runtime.profile import profiled
from verify import embed, facebank

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "none": torch.float32,
}

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The first steps compile kernels, fill caches and start workers: they do not count as speed.
WARMUP_STEPS = 5


class Stopped(Exception):
    """A signal asked the run to end; the state was saved. `signal_number` says which."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the state is saved, --resume continues it")
        self.signal_number = signal_number


class Learner:
    """Trains, verifies, saves and resumes one backbone with one margin head.

    config: the options. device: where it computes; `config.device_type` says which if not given. world: the ranks that
    train together (`runtime.dist.open_world`). training: False builds the backbone alone, for evaluate and infer.

    Raises ConfigError, DataError, ModelError, DeviceError or CheckpointError, one line each, for what a user can mend.
    """

    def __init__(self, config: Config, device: Optional[Device] = None, world: World = ALONE, training: bool = True):
        self.config = config.check()
        self.world = world
        self.device = device or parse_device(config.device_type, config.device_id)
        self.device.set()
        self.tuned = self.device.tune(config.tf32, config.autotune)
        self.device.seed(config.seed)  # the same weights on every rank
        self.threshold: Optional[float] = None
        self.channel_order = config.channel_order or "rgb"
        opt_level = policy_name(config, self.device)
        # The head normalises by itself; margins that read the embedding's length need it as it is.
        l2_norm = False if config.loss_type in ("adaface", "linear_softmax") else None
        self.backbone = model.create_model(
            config.net_mode, config.net_depth, config.embedding_size, dropout=config.drop_ratio, l2_norm=l2_norm
        )
        self.memory_format = self.device.layout(config.memory_format)
        self.backbone.to(device=self.device.torch, memory_format=self.memory_format)
        scaling = parse_loss_scale(
            config.loss_scale,
            init_loss_scaling=config.init_loss_scaling,
            incr_every_n_steps=config.incr_every_n_steps,
            decr_every_n_nan_or_inf=config.decr_every_n_nan_or_inf,
            incr_ratio=config.incr_ratio,
            decr_ratio=config.decr_ratio,
        )
        self.precision = make_precision(opt_level, self.device, world, scaling, config.amp_backend)
        self.meta = {
            **model.describe(config.net_mode, config.net_depth, config.embedding_size, config.drop_ratio, l2_norm),
            "normalisation": "(x / 255 - 0.5) / 0.5",
            "num_classes": None,
        }
        self.files = folder.RunFolder(config.work_path, world, config.fs_name, config.fs_ugi)
        self.epoch, self.step_in_epoch, self.step = config.start_epoch, 0, 0
        self.accuracy = self.accuracy_of_training = 0.0  # the first of the newest verification, where there is one
        self.saved: list[str] = []  # names of this run's .pth files: others in the folder are not its to delete
        self.log: Optional[runlog.RunLog] = None
        self.saver: Optional[sharded.Saver] = None
        self.uploader: Optional[remote.Uploader] = None
        self.optimizer: Optional[torch.optim.Optimizer] = None
        if training:
            self._build_training()
        else:
            self.precision.prepare(self.backbone, None)
            if config.pth_path:
                self.load(config.pth_path, backbone_only=True)

    def _build_training(self) -> None:
        config, world = self.config, self.world
        parts = world.size * config.accumulate
        if config.batch_size % parts:
            raise ConfigError(
                f"--batch_size {config.batch_size} does not divide among {world.size} ranks of "
                f"{config.accumulate} micro-batches: choose a multiple of {parts}"
            )
        workers = config.num_workers if config.num_workers >= 0 else loader_workers(self.device, world)
        if config.data_mode == "synthetic":
            self.dataset = SyntheticDataset(
                num_images=config.batch_size * max(config.max_iter, 100),
                num_classes=config.num_classes or 85742,
                seed=config.seed,
            )
        else:
            self.dataset = data.open_dataset(
                config.data_path, config.data_mode or None, config.channel_order or None, config.num_classes or None
            )
        self.loader = data.build_loader(
            self.dataset,
            config.batch_size // parts,
            world.rank,
            world.size,
            config.seed,
            workers,
            config.strict_data,
            pin_memory=self.device.kind,
        )
        self.steps_per_epoch = len(self.loader) // config.accumulate
        if not self.steps_per_epoch:
            raise data.DataError(
                f"{config.data_path}: {len(self.dataset)} images do not fill one batch of "
                f"{config.batch_size}; lower --batch_size"
            )
        if config.max_iter > 0:
            self.steps_per_epoch = min(self.steps_per_epoch, config.max_iter)
        self.step = self.epoch * self.steps_per_epoch
        self.meta["num_classes"] = self.dataset.num_classes

        self._check_memory()
        self.head = MarginHead(
            self.dataset.num_classes,
            config.embedding_size,
            margin=config.loss_type,
            s=config.scale,
            m=config.margin,
            combined=config.combined_margin,
            world=world,
            op=config.head_op,
            sample_rate=config.sample_rate,
            update_rows=config.update_rows,
            operand=self.precision.policy.compute,
            batch=config.batch_size // parts,
            interclass_filtering_threshold=config.interclass_filtering_threshold,
            seed=config.seed + config.is_finetune,  # not the head that the weights were trained with, before training
            top5=config.top5,
            momentum=0.0 if config.momentum_dtype == "none" else config.momentum,
            weight_decay=optim.head_weight_decay(config.net_mode, config.weight_decay),
            device=self.device.torch,
            dtype=DTYPES[config.centers_dtype],
            momentum_dtype=DTYPES[config.momentum_dtype],
            momentum_on_host=config.momentum_on_host,
        )
        groups = optim.parameter_groups(self.backbone, config.net_mode, config.weight_decay)
        self.optimizer = self.precision.prepare(
            self.backbone, lambda groups: optim.make_sgd(groups, config.lr, config.momentum, self.device), groups
        )
        # The compiled module shares the backbone's parameters; checkpoints and verification use the backbone itself.
        self.ddp = wrap_data_parallel(self.device.compiled(self.backbone) if config.static else self.backbone, world)
        self.schedule = make_schedule(config, self.steps_per_epoch)
        self.pair_sets = self._find_pair_sets()

        wanted = config.resume
        if config.fs_checkpoint_dir:
            self.files.download(config.fs_checkpoint_dir, may_be_empty=config.resume == "auto")
            wanted = wanted or ("" if config.pth_path else "newest")
        self.resumed = self._resume(wanted) if wanted else None
        if self.resumed:
            logger.info("resumed %s at step %d", self.resumed, self.step)
        elif config.pth_path:
            self.load(config.pth_path, backbone_only=config.is_finetune)
        elif config.is_finetune:
            raise ConfigError("--is_finetune needs --pth_path, the weights to start from")

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains up to `config.epochs`: each epoch trains, verifies and saves. Raises Stopped after a signal."""
        config, world = self.config, self.world
        run_dir = Path(config.run_dir or Path(config.work_path) / "log")
        started = time.time()
        # Different on each rank (dropout), unlike the weights.
        if not self.resumed:
            self.device.seed(config.seed + 1 + world.rank)
        if self.epoch >= config.epochs:
            logger.info("trained to epoch %d already, and --epochs is %d: raise it to go on", self.epoch, config.epochs)
        self.files.make(config.checkpoint)
        self.log = runlog.RunLog(run_dir, world, config.as_dict(), config.tensorboard)
        uploads = saver = nullcontext()
        if config.fs_dir_for_save and world.is_main:
            uploads = self.uploader = self.files.uploader(config.fs_dir_for_save)
        if config.checkpoint == "sharded":
            saver = self.saver = sharded.Saver(
                self.files.sharded, world, keep=config.keep + 1, published=self.uploader and self.uploader.put
            )
            saver.names = self.saved
        self.save_every = sharded.SaveEvery(config.save_every, config.save_minutes, world)
        tracing = profiled(self.device, run_dir / "profile", config.profile and world.is_main)
        with self.log, uploads, saver, tracing as self.profiler, caught_signals() as caught:
            self.log.record(
                "run",
                case=config.case,
                network=self.network,
                batch_size=config.batch_size,
                command=runlog.command_line(config.fs_ugi),
                device=self.device.describe(),
                num_classes=self.meta["num_classes"],
                images=len(self.dataset),
                opt_level=self.precision.policy.name,
                fast_paths=self.fast_paths(),
            )
            if config.with_test and self.step == 0:
                self._verify(untrained=True)
            self.speed = Speed(
                self.device,
                world,
                config.batch_size,
                min(WARMUP_STEPS, (config.epochs - self.epoch) * self.steps_per_epoch // 2),
            )
            reason = "failed"
            try:
                while self.epoch < config.epochs:
                    self._train_epoch(caught)
                    self.epoch, self.step_in_epoch = self.epoch + 1, 0
                    if config.with_test:
                        self._verify()
                    self.save()
                reason = "finished"
            except Stopped:
                reason = "signal"
                self.save()
                if self.saver is not None:
                    self.saver.wait()  # the process ends next, and its threads with it
                raise
            finally:
                self.log.record("end", seconds=time.time() - started, reason=reason, steps=self.step)

    def _train_epoch(self, caught: dict) -> None:
        config, log = self.config, self.log
        self.backbone.train()
        self.loader.set_position(self.epoch, self.step_in_epoch * config.accumulate)
        batches = iter(self.device.prefetch(iter(self.loader), self._to_device))
        bar = progress(self.world, self.epoch, config.epochs, self.steps_per_epoch, self.step_in_epoch)
        # Sums stay on the device between two lines of the log: no step waits for the host.
        sums, steps = 0, 0
        self.speed.start()
        with bar:
            while self.step_in_epoch < self.steps_per_epoch:
                lr = self.schedule(self.step)
                sums, steps = sums + self._train_step(batches, lr), steps + 1
                self.step += 1
                self.step_in_epoch += 1
                self.speed.step()
                self.profiler.step()
                bar.update(1)
                if self.step % config.log_every == 0 or self.step_in_epoch == self.steps_per_epoch:
                    mean, correct, *top5 = (value / steps for value in sums.tolist())
                    self.accuracy_of_training = correct / config.batch_size
                    top5 = {"accuracy_top5": top5[0] / config.batch_size} if top5 else {}
                    log.record(
                        "step",
                        step=self.step,
                        epoch=self.epoch,
                        loss=mean,
                        lr=lr,
                        accuracy=self.accuracy_of_training,
                        **top5,
                        images_per_s=self.speed.recent(),
                        scale=self.precision.scale,
                        skipped=self.precision.skipped,
                        memory=self.device.max_memory_allocated(),
                        damaged=self.loader.damaged,
                    )
                    log.scalar("train_loss", mean, self.step)
                    log.scalar("learning_rate", lr, self.step)
                    if bar.disable:
                        logger.info(
                            "epoch %d step %d/%d loss %.4f accuracy %.4f lr %.3g %.1f images/s",
                            self.epoch,
                            self.step_in_epoch,
                            self.steps_per_epoch,
                            mean,
                            self.accuracy_of_training,
                            lr,
                            self.speed.recent(),
                        )
                    bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{self.speed.recent():.1f}", lr=f"{lr:.3g}")
                    if not math.isfinite(mean):
                        logger.warning("loss is not finite at step %d", self.step)
                    sums, steps = 0, 0
                self._leave_if_asked(caught)
                if self.save_every.due(self.step) and self.step_in_epoch < self.steps_per_epoch:
                    with self.speed.paused():
                        self.save()
        self.speed.stop()
        log.record("window", **self.speed.window())

    def _train_step(self, batches, lr: float) -> torch.Tensor:
        """One update from `accumulate` micro-batches; on the device: the mean loss, how many images have their own
        class as the best, and, where that is counted, among the five best."""
        sums = 0
        for micro in range(self.config.accumulate):
            images, labels, labels_on_host = next(batches)
            last = micro == self.config.accumulate - 1
            # Ranks exchange gradients once an update, with the last micro-batch.
            exchange = nullcontext() if last or self.world.size == 1 else self.ddp.no_sync()
            self.head.prepare(labels_on_host)
            with exchange:
                with self.precision.autocast():
                    embeddings_BD = self.ddp(images)
                out = self.head(embeddings_BD, labels)
                self.precision.backward(out.loss / self.config.accumulate)
            loss = out.loss.detach() / self.config.accumulate
            counts = [count for count in (out.correct, out.correct_top5) if count is not None]
            sums = sums + torch.stack([loss, *(count.to(loss.dtype) for count in counts)])
        optim.set_lr(self.optimizer, lr)
        head_lr = lr * self.config.head_lr_factor
        self.precision.step(
            self.optimizer,
            self.head,
            head_lr,
            self.config.clip_grad_norm or None,
            lambda: first_non_finite(self.backbone, lambda: self._scaled_loss(images, labels)),
        )
        return sums

    def _scaled_loss(self, images, labels):
        # by the eager module: hooks see nothing inside a compiled one
        with self.precision.autocast():
            embeddings_BD = self.backbone(images)
        return self.head(embeddings_BD, labels).loss * self.precision.scale

    def _to_device(self, batch):
        """A loader's Batch -> (images [B, 3, H, W] as the backbone wants them, labels [B]), on the device; and the
        labels where they are, in host memory, for the head's class sampler."""
        images, labels, flip = (
            tensor.to(self.device.torch, non_blocking=True)
            for tensor in (batch.images_BHWC, batch.labels_B, batch.flip_B)
        )
        images = transforms.to_input(images, flip, memory_format=self.memory_format)
        return self.precision.cast_input(images), labels, batch.labels_B

    def _leave_if_asked(self, caught: dict) -> None:
        # Every rank must leave at the same step. Asking costs a wait for the device, so accelerators ask now and then.
        if self.world.size > 1 and self.device.kind != "cpu" and self.step % self.config.log_every:
            return
        number = caught.get("signal", 0)
        if self.world.size > 1:
            number = int(self.world.all_reduce_(torch.tensor(number, device=self.device.torch), "max"))
        if number:
            raise Stopped(number)

    # --- verification and inference ----------------------------------------------------------------------------------

    def evaluate(self, pair_sets: Optional[dict] = None) -> dict:
        """Verifies the backbone: {set's name: PairResult}. pair_sets: {name: path}, else `config.val_targets`.

        Every rank embeds its part and has the whole result. Batch norm's running statistics differ between ranks that
        saw different images: they are averaged first, so that all ranks verify, and save, the same network.
        """
        average_buffers(self.backbone, self.world)
        paths = self._find_pair_sets() if pair_sets is None else pair_sets
        sets = {name: pairs.load_pairs(path) for name, path in paths.items()}
        return embed.verify(
            self.backbone,
            sets,
            self.device,
            self.world,
            to_input=self._embed_input,
            batch_size=self.config.eval_batch_size,
            flip_sum=self.config.flip_sum,
            autocast=self.precision.autocast,
        )

    def _embed_input(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        return self.precision.cast_input(
            transforms.to_input(images_BHWC, memory_format=self.memory_format, channel_order=self.channel_order)
        )

    def _find_pair_sets(self) -> dict:
        if not self.config.with_test or self.config.data_mode == "synthetic":
            return {}
        root = Path(self.config.data_path)
        found = pairs.find_pair_sets(root if root.is_dir() else root.parent, self.config.val_targets)
        by_default = self.config.val_targets == Config().val_targets and found  # which of them, the data decides
        for name in () if by_default else self.config.val_targets:
            if name not in found:
                logger.warning("%s has no verification set '%s'", root, name)
        return found

    def _verify(self, untrained: bool = False) -> None:
        if not self.pair_sets:
            self.accuracy = self.accuracy_of_training
            return
        results = self.evaluate(self.pair_sets)
        for name, result in results.items():
            logger.info(
                "%s_accuracy: %.5f +- %.5f at %.2f%s",
                name,
                result.accuracy,
                result.std,
                result.threshold,
                " (untrained)" if untrained else "",
            )
            self.log.record(
                "verify", step=self.step, epoch=self.epoch, set=name, untrained=untrained, **embed.as_record(result)
            )
            self.log.scalar(f"{name}_accuracy", result.accuracy, self.step)
            self.log.scalar(f"{name}_best_threshold", result.threshold, self.step)
            self.log.figure(f"{name}_roc_curve", partial(embed.roc_figure, result, name), self.step)
        first = next(iter(results.values()))
        self.accuracy, self.threshold = first.accuracy, first.threshold

    def embed(self, images) -> np.ndarray:
        """uint8 RGB [N, H, W, 3] -> unit float32 [N, D]."""
        return embed.embed_images(
            self.backbone,
            images,
            self.device,
            self.world,
            to_input=self._embed_input,
            batch_size=self.config.eval_batch_size,
            flip_sum=self.config.flip_sum,
            autocast=self.precision.autocast,
        )

    def infer(self, faces, target_embeddings, threshold: Optional[float] = None):
        """Who is on each face? faces: uint8 RGB [N, H, W, 3] or a list of such images; target_embeddings [M, D].

        Returns (index [N] of the nearest target, -1 where it is further than the threshold; squared L2 distance [N]).
        threshold: squared L2; by default the one calibrated by verification and kept in the checkpoint, else 1.5.
        """
        limit = threshold if threshold is not None else self.threshold if self.threshold is not None else 1.5
        return facebank.nearest(self.embed(np.stack([np.asarray(face) for face in faces])), target_embeddings, limit)

    # --- learning-rate range ----------------------------------------------------------------------------------------

    def find_lr(self, lowest: float = 1e-6, highest: float = 10.0, steps: int = 100, plot_path: Optional[str] = None):
        """Learning-rate range test (arXiv 1506.01186): raises the rate from lowest to highest over `steps` updates.

        Stops early where the loss passes four times its lowest. Returns (rates, smoothed losses); plot_path: a PNG to
        draw them in. The learner is afterwards as it was before.
        """
        before = mapped(torch.clone, {**self._state(), "head": self.head.local_state()})
        self.backbone.train()
        rates, losses, smooth = [], [], 0.0
        self.loader.set_position(0, 0)
        batches = self._endless()
        for i in range(steps):
            lr = lowest * (highest / lowest) ** (i / max(1, steps - 1))
            loss = float(self._train_step(batches, lr)[0])
            smooth = 0.95 * smooth + 0.05 * loss
            rates.append(lr)
            losses.append(smooth / (1 - 0.95 ** (i + 1)))  # the mean's start from zero, corrected
            if not losses[-1] < 4 * min(losses):
                break
        self.head.load_local_state(before["head"])
        self._load_training(before)
        if plot_path and self.world.is_main:
            lr_figure(rates, losses).savefig(plot_path)
        return rates, losses

    def _endless(self):
        epoch = 0
        while True:
            self.loader.set_position(epoch, 0)
            yield from map(self._to_device, self.loader)
            epoch += 1

    # --- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def network(self) -> str:
        """Name for reports: ir_se_100."""
        c = self.config
        return c.net_mode if c.net_mode == "mobilefacenet" else f"{c.net_mode}_{c.net_depth}"

    def fast_paths(self) -> dict[str, Any]:
        """Which of the things that only speed depends on are on, for reports."""
        paths = {
            "opt_level": self.precision.policy.name,
            "memory_format": next(name for name, value in MEMORY_FORMATS.items() if value == self.memory_format),
            **self.tuned,
        }
        if self.optimizer is not None:
            paths.update(
                static=self.config.static,
                sgd=optim.sgd_kind(self.optimizer),
                head_op=self.head.op.name,
                copy_beside_compute=self.device.kind != "cpu",
            )
            if self.head.trials:
                paths["head_op_trials"] = self.head.trials
        return paths

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on but the head, in the lineage's schema. Every rank has it whole."""
        average_buffers(self.backbone, self.world)
        return {
            "model": self.precision.model_state(self.backbone),
            "optimizer": optim.optimizer_state(self.optimizer, self.precision.names),
            "epoch": self.epoch if self.step_in_epoch else max(0, self.epoch - 1),  # the one last trained in
            "config": self.config.as_dict(),
            "meta": dict(
                self.meta, channel_order=self.channel_order, threshold=self.threshold, versions=runlog.versions()
            ),
            "training": {
                "step": self.step,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "accuracy": self.accuracy,
                "damaged": self.loader.damaged,
                "saved": list(self.saved),
                "precision": self.precision.state_dict(),
                "rng": self.world.all_gather_object(self.device.rng_state()),
            },
        }

    def _load_training(self, state: dict[str, Any]) -> None:
        """What `_state` gave, on as many ranks or another number of them."""
        self.precision.load_model_state(self.backbone, state["model"])
        optim.load_optimizer_state(self.optimizer, state["optimizer"], self.precision.names)
        training = state["training"]
        self.precision.load_state_dict(training["precision"])
        self.epoch, self.step, self.step_in_epoch = training["epoch"], training["step"], training["step_in_epoch"]
        self.accuracy, self.loader.damaged = training["accuracy"], training["damaged"]
        self.saved = list(training.get("saved", []))
        if self.world.rank < len(training["rng"]):
            self.device.set_rng_state(training["rng"][self.world.rank])
        else:  # more ranks than there were: the new ones start streams of their own
            self.device.seed(self.config.seed + 1 + self.world.rank + self.step)

    def save(self) -> Optional[Path]:
        """Writes `work_path/models/model_{time}_epoch:{e}_{accuracy:.5f}.pth`; returns its path, on rank 0.

        With `checkpoint="sharded"` starts a directory in `work_path/sharded` instead; training goes on meanwhile.
        """
        if self.saver is not None:
            return self._save_sharded()
        state = self._state()
        state["head"] = {"kernel": self.head.gathered_kernel()}
        state["training"]["head"] = self.head.gathered_training_state()
        path = None
        if self.world.is_main:
            self.files.make("pth")
            name = store.checkpoint_name(time.strftime("%Y-%m-%d-%H-%M"), state["epoch"], self.accuracy)
            path = self.files.models / name
            self.saved.append(name)
            store.save_pth(path, mapped(torch.Tensor.cpu, state))  # a file names no device
            store.prune(self.files.models, keep=self.config.keep, names=self.saved)
            logger.info("saved %s", path)
            if self.uploader is not None:
                self.uploader.put(path)
        self.world.barrier()
        return path

    def load(self, path, backbone_only: bool = False) -> None:
        """Loads a checkpoint of ours (`.pth`, or a sharded directory), or backbone and head of a known project's file.

        backbone_only: leave head, optimizer and position as they are (fine-tuning, evaluation).
        """
        if Path(path).is_dir():
            path = reshard.find(path)
            if not backbone_only:
                return self._take_sharded(path, *sharded.load(path, self._head_rows(), self.world))
            state = sharded.load(path, {}, self.world)[0]
        else:
            state = store.load_pth(path)
        if not (isinstance(state, dict) and "meta" in state):
            return self._load_foreign(state, path, backbone_only)
        meta = state["meta"]
        wanted = self.meta if not backbone_only else {**self.meta, "num_classes": None}
        store.check_architecture(meta, wanted, path)
        self.threshold, self.channel_order = meta["threshold"], self.config.channel_order or meta["channel_order"]
        if backbone_only:
            self.precision.load_model_state(self.backbone, state["model"])
        else:
            self._load_training(state)
            self.saved.append(Path(path).name)
            self.head.load_kernel(state["head"]["kernel"])
            self.head.load_training_state(state["training"]["head"])

    def _load_foreign(self, state, path, backbone_only: bool) -> None:
        found = foreign.recognise(state, self.config.channel_order or None, place=path)
        logger.info("%s: weights of %s", path, found)
        if found.assumed:
            logger.warning("%s: %s", path, found.assumed)
        classes = None if found.head_kernel is None or backbone_only else found.head_kernel.shape[1]
        store.check_architecture({**vars(found), "num_classes": classes}, self.meta, path)
        self.channel_order = self.backbone.channel_order = found.channel_order
        self.precision.load_model_state(self.backbone, found.state_dict)
        if classes is not None:
            self.head.load_kernel(found.head_kernel)

    def _resume(self, wanted: str) -> Optional[Path]:
        """Continues `wanted`, a .pth file or a sharded directory; "newest" or "auto" is the newest whole one of either
        kind, and None is what comes back where "auto" finds none. All ranks take the same."""
        if wanted not in ("auto", "newest"):
            self.load(wanted)
            return Path(wanted)
        for path in self.files.newest_first():
            if path.is_file():
                self.load(path)
                return path
            found = sharded.load_newest(path.parent, self._head_rows(), self.world)
            if found is not None:
                self._take_sharded(*found)
                return found[0]
        if wanted == "newest":
            raise CheckpointError(f"{self.config.work_path}: no whole checkpoint to resume: train first, or name one")
        logger.info("%s: no checkpoint to resume, the training starts from the beginning", self.config.work_path)
        return None

    def _check_memory(self) -> None:
        """Refuses a head that would not fit, before it is allocated. Beside it the device has to hold the backbone's
        gradients, momentum and masters, and what --memory_reserve asks for."""
        config = self.config
        form = plan.StorageFormat(
            DTYPES[config.centers_dtype],
            None if config.momentum_dtype == "none" or not config.momentum else DTYPES[config.momentum_dtype],
            config.momentum_on_host,
        )
        head = plan.HeadPlan(
            self.dataset.num_classes,
            config.embedding_size,
            self.world.size,
            config.batch_size // (self.world.size * config.accumulate),
            config.sample_rate,
            form,
            config.update_rows,
            self.device.kind,
            torch.empty(0, dtype=self.precision.policy.compute).element_size(),
            config.accumulate,
            config.checkpoint,
        )
        backbone = 3 * 4 * sum(parameter.numel() for parameter in self.backbone.parameters())
        sharing = self.world.local_size
        free = (
            self.device.free_memory() // (sharing if self.device.kind == "cpu" else 1),
            Device("cpu").free_memory() // sharing,
        )
        # All ranks look before any of them allocates, and come to the same answer.
        device, host = (min(values) for values in zip(*self.world.all_gather_object(free)))
        plan.check(head, max(0, device - backbone - plan.parse_size(config.memory_reserve)), host)

    def _head_rows(self) -> dict:
        """What this rank holds of the head's tables: {name: (the stored tensor itself, its RowShard)}."""
        state, shard = self.head.local_state(), self.head.centers.shard
        names = ("weight", "momentum", "momentum_scale")
        return {name: (state[name], shard) for name in names if state[name] is not None}

    def _save_sharded(self) -> None:
        state = self._state()
        head = self.head.local_state()
        state["head"] = {name: head[name] for name in ("draws", "updates", "norms")}
        local = {"rng": state["training"].pop("rng")[self.world.rank]}
        self.saver.save(f"step_{self.step}", state, self._head_rows(), local)

    def _take_sharded(self, path, state, local) -> None:
        store.check_architecture(state["meta"], self.meta, path)
        self.threshold, self.channel_order = state["meta"]["threshold"], state["meta"]["channel_order"]
        state["training"]["rng"] = [] if local is None else [local["rng"]] * self.world.size
        self._load_training(state)
        self.saved.append(Path(path).name)
        self.head.load_local_state({**self.head.local_state(), **state["head"]})


# --- small parts of the loop -----------------------------------------------------------------------------------------


class Speed:
    """Images per second over all ranks: without warm-up, the device synchronised at both ends of what is measured."""

    def __init__(self, device: Device, world: World, images_a_step: int, warmup: int):
        self.device, self.world, self.images_a_step, self.warmup = device, world, images_a_step, warmup
        self.seconds, self.steps, self.since = 0.0, 0, None
        self._total, self._begun, self._rate = 0, 0, 0.0

    def start(self) -> None:
        if self.warmup == 0:
            self._begin()
        self._mark = (time.perf_counter(), self._total)

    def _begin(self) -> None:
        self.device.synchronize()
        self.since, self._begun = time.perf_counter(), self._total

    def step(self) -> None:
        self._total += 1
        if self.warmup:
            self.warmup -= 1
            if self.warmup == 0:
                self._begin()

    def stop(self) -> None:
        if self.since is not None:
            self.device.synchronize()
            self.seconds += time.perf_counter() - self.since
            self.steps += self._total - self._begun
            self.since = None

    @contextmanager
    def paused(self):
        running = self.since is not None
        self.stop()
        yield
        if running:
            self._begin()

    def recent(self) -> float:
        """Images a second since the last call, for the log and the bar; not synchronised."""
        (then, at), now = self._mark, time.perf_counter()
        if self._total > at:
            self._rate = (self._total - at) * self.images_a_step / (now - then)
            self._mark = (now, self._total)
        return self._rate

    def window(self) -> dict:
        images = self.steps * self.images_a_step
        return {
            "images": images,
            "seconds": self.seconds,
            "steps": self.steps,
            "images_per_s": images / self.seconds if self.seconds else None,
        }


def policy_name(config: Config, device: Device) -> str:
    """The precision policy that the options ask for on this device."""
    if not config.use_amp:
        return "O0"
    if config.opt_level != "auto":
        return config.opt_level
    if device.kind == "cpu":
        logger.info("cpu has no fast fp16: training in O0 (fp32); --opt_level=O2 insists")
        return "O0"
    return "O2"


def make_schedule(config: Config, steps_per_epoch: int):
    """step -> learning rate, as the options say."""
    schedules = {
        "milestones": lambda: optim.milestones(config.lr, config.milestones, config.gamma, steps_per_epoch),
        "polynomial": lambda: optim.polynomial(config.lr, config.lr_power, config.epochs * steps_per_epoch),
        "constant": lambda: optim.milestones(config.lr, (), config.gamma, steps_per_epoch),
    }
    return optim.with_warmup(schedules[config.lr_schedule](), round(config.warmup_epochs * steps_per_epoch))


def average_buffers(module: torch.nn.Module, world: World) -> None:
    """Makes the floating-point buffers (batch norm's running statistics) the mean over the ranks."""
    if world.size > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(world.all_reduce_(buffer / world.size))


def mapped(function, value: Any) -> Any:
    """Nested dicts and lists with function applied to their tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return [mapped(function, item) for item in value] if isinstance(value, list) else value


@contextmanager
def caught_signals():
    """While open, SIGINT and SIGTERM are noted in the dict that it yields instead of ending the process."""
    caught: dict[str, int] = {}
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, lambda n, frame: caught.__setitem__("signal", n))
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def loader_workers(device: Device, world: World) -> int:
    """Loader processes a rank: its share of the cores; on cpu, where they compete with the training, one."""
    return 1 if device.kind == "cpu" else min(8, world.core_share())


def lr_figure(rates: list, losses: list):
    """The smoothed loss over the learning rate, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=150, constrained_layout=True)
    axes = figure.add_subplot()
    axes.plot(rates, losses)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss, smoothed")
    return figure


def progress(world: World, epoch: int, epochs: int, total: int, done: int):
    """A tqdm bar on rank 0's terminal; elsewhere it is disabled, and plain lines take its place."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=f"epoch {epoch + 1}/{epochs}",
        unit="step",
        dynamic_ncols=True,
        disable=not world.is_main or not sys.stderr.isatty(),
    )
