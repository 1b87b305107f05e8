"""The Learner: trains a recognizer with a margin head. The one training loop."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch

import data
import optim
from checkpoint import schema, store
from checkpoint.run import Checkpoints, Restored, read
from checkpoint.sharded import SaveEvery
from config import Config
from data import pairs, transforms
from data.synthetic import SyntheticDataset
from head import plan
from head.head import MarginHead
from head.margins import find_margin
from model import foreign
from model.stages import PARTS, freeze, parts_of
from recognizer import Recognizer
from runtime import log as runlog
from runtime.device import Device, parse_device
from runtime.dist import ALONE, World, wrap_data_parallel
from runtime.divergence import first_non_finite
from runtime.errors import ConfigError, DataError, PrecisionError
from runtime.loss_scale import parse_loss_scale
from runtime.opening import opening_lines
from runtime.precision import Precision, make_precision
from runtime.profile import profiled
from runtime.progress import progress, ticking
from runtime.signals import FAILED, Stopped, StopSignals
from runtime.speed import WARMUP_STEPS, Speed
from verify import embed
from verify.nearest import nearest

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "none": torch.float32,
}

SAVE_ROWS = 1 << 16  # of the class centers that are looked at in one piece


@dataclass
class Progress:
    """How far a training is. step: updates so far. epoch and step_in_epoch: the position, both from 0. accuracy: of the
    newest verification's first set, or of training where nothing is verified. verified: whether the weights at the end
    of the last epoch were verified."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    accuracy: float = 0.0
    verified: bool = True

    @property
    def last_epoch(self) -> int:
        """The epoch last trained in, from 0."""
        return self.epoch if self.step_in_epoch else max(0, self.epoch - 1)


class DataFailed(DataError):
    """What one of several ranks read, said on all of them at the same step."""


class _Lasting:
    """The batches of an epoch. Where the data of one of several ranks fails, the others wait for that rank in every
    step: so its last batch comes again until `signals` has told them all. error: what failed; position: the step of the
    epoch that it was for."""

    def __init__(self, batches, progress: Progress, signals: StopSignals):
        self.error: Optional[DataError] = None
        self.position: Optional[int] = None
        self._batches, self._progress, self._signals, self._last = iter(batches), progress, signals, None

    def __next__(self):
        if self.error is None:
            try:
                self._last = next(self._batches)
            except DataError as error:
                if self._last is None:
                    raise
                self.error, self.position = error, self._progress.step_in_epoch
                self._signals.give_up()
        return self._last


class Learner:
    """Trains `recognizer` with a head of its own on `dataset`, verifies, saves and resumes.

    config: the options; the network is the recognizer's, whatever they say of it. dataset: `config.data_path`'s if
    None. world: the ranks that train together (`runtime.dist.open_world`).

    Raises ConfigError, DataError, ModelError, DeviceError or CheckpointError, one line each, for what a user can mend.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        config: Config,
        dataset: Optional[data.ImageDataset] = None,
        world: World = ALONE,
    ):
        self.recognizer, self.config, self.world = recognizer, config.check(), world
        self.device = recognizer.device
        self.backbone = recognizer.backbone
        self.dataset = dataset or open_training_set(config)
        parts = world.size * config.accumulate
        if config.batch_size % parts:
            raise ConfigError(
                f"--batch_size {config.batch_size} does not divide among {world.size} ranks of "
                f"{config.accumulate} micro-batches: choose a multiple of {parts}"
            )
        if config.batch_size == parts and any(isinstance(m, torch.nn.BatchNorm1d) for m in self.backbone.modules()):
            raise ConfigError(
                f"--batch_size {config.batch_size}: one image a rank and micro-batch has no variance, which the batch "
                f"norm of {recognizer.name} needs: choose at least {2 * parts}"
            )
        self.loader = data.build_loader(
            self.dataset,
            config.batch_size // parts,
            world.rank,
            world.size,
            config.seed,
            config.num_workers if config.num_workers >= 0 else loader_workers(self.device, world),
            config.strict_data,
            pin_memory=self.device.kind,
            class_balanced=config.class_balanced,
        )
        self.steps_per_epoch = len(self.loader) // config.accumulate
        if not self.steps_per_epoch:
            raise DataError(
                f"{config.data_path}: {len(self.dataset)} images do not fill one batch of "
                f"{config.batch_size}; lower --batch_size"
            )
        if config.max_iter > 0:
            self.steps_per_epoch = min(self.steps_per_epoch, config.max_iter)
        self.pair_sets = find_pair_sets(config)

        self.tuned = self.device.tune(config.tf32, config.autotune)
        self.precision = recognizer.precision = choose_precision(config, self.device, world)
        # switched off, mixed precision says nothing of verification; evaluate.py takes the same way
        recognizer.as_quickest = not (config.use_amp and config.opt_level == "O0")
        check_memory(config, recognizer, self.dataset.num_classes, world)
        net_mode = recognizer.architecture["net_mode"]
        self.head = MarginHead(
            self.dataset.num_classes,
            recognizer.architecture["embedding_size"],
            margin=config.loss_type,
            s=config.scale,
            m=config.margin,
            combined=config.combined_margin,
            world=world,
            sharded=config.model_parallel,
            op=config.head_op,
            skip=config.head_skip,
            sample_rate=config.sample_rate,
            update_rows=config.update_rows,
            operand=self.precision.policy.compute,
            batch=config.batch_size // parts,
            interclass_filtering_threshold=config.interclass_filtering_threshold,
            seed=config.seed + config.is_finetune,  # not the head that the weights were trained with, before training
            top5=config.top5,
            momentum=0.0 if config.momentum_dtype == "none" else config.momentum,
            weight_decay=optim.head_weight_decay(net_mode, config.weight_decay),
            init_norm=config.centers_norm,
            device=self.device.torch,
            dtype=DTYPES[config.centers_dtype],
            momentum_dtype=DTYPES[config.momentum_dtype],
            momentum_on_host=config.momentum_on_host,
        )
        freeze(self.backbone, config.freeze)
        rates = None
        if config.lr_decay_by_part < 1:
            rates = {
                name: config.lr_decay_by_part ** (PARTS - 1 - part) for name, part in parts_of(self.backbone).items()
            }
        groups = optim.parameter_groups(self.backbone, net_mode, config.weight_decay, config.decay_norms, rates)
        self.optimizer = self.precision.prepare(
            self.backbone, lambda groups: optim.make_sgd(groups, config.lr, config.momentum, self.device), groups
        )
        # The compiled module shares the backbone's parameters; checkpoints and verification use the backbone itself.
        self.ddp = wrap_data_parallel(self.device.compiled(self.backbone) if config.static else self.backbone, world)
        self.schedule = make_schedule(config, self.steps_per_epoch)
        self.checkpoints = Checkpoints(
            config.work_path, world, config.checkpoint, config.keep, config.fs_name, config.fs_ugi
        )
        self.progress = Progress(step=config.start_epoch * self.steps_per_epoch, epoch=config.start_epoch)
        self.resumed: Optional[Path] = None  # the checkpoint whose training this one continues
        self.run_dir = Path(config.run_dir) if config.run_dir else None  # of metrics and report; found when it begins
        self.weights = ""  # where the first weights come from; empty for new ones

    @classmethod
    def from_config(
        cls,
        config: Config,
        device: Optional[Device] = None,
        world: World = ALONE,
        dataset: Optional[data.ImageDataset] = None,
    ) -> Learner:
        """The Learner that the options ask for: of a new network, of the one in `pth_path`, or resumed.

        device: `config.device_type` says which if not given. Raises a UserError, one line, for what a user can mend.
        """
        config.check()
        if config.is_finetune and not config.pth_path:
            raise ConfigError("--is_finetune needs --pth_path, the weights to start from")
        device = device or parse_device(config.device_type, config.device_id)
        device.set()
        device.seed(config.seed)  # the same weights on every rank
        # The head normalises by itself; margins that read the embedding's length need it as it is.
        l2_norm = False if find_margin(config.loss_type).reads_lengths else None
        start = None
        # "auto" where there is nothing to resume begins like a run without it
        if config.pth_path and config.resume in ("", "auto") and not config.fs_checkpoint_dir:
            start = read(config.pth_path, world)
            recognizer = Recognizer.from_state(
                start[1],
                start[0],
                device,
                config.weights_channel_order or None,
                config.drop_ratio,
                l2_norm,
                config.memory_format,
            )
        else:
            recognizer = Recognizer.create(
                config.net_mode,
                config.net_depth,
                config.embedding_size,
                config.drop_ratio,
                l2_norm,
                device,
                config.weights_channel_order or "rgb",
                config.memory_format,
            )
        learner = cls(recognizer, config, dataset, world)
        learner.weights = config.pth_path if start is not None else ""
        if config.resume or config.fs_checkpoint_dir:
            learner.resume(config.resume)
        if start is not None and not config.is_finetune and learner.resumed is None:
            learner.start_from(*start)
        return learner

    # --- training ----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains up to `config.epochs`: each epoch trains, saves and verifies. Raises Stopped after a signal."""
        config, world, at = self.config, self.world, self.progress
        started = time.time()
        run_dir = self.run_dir = self.run_dir or runlog.run_folder(config.work_path, self.resumed is not None)
        if self.resumed is None:
            self.device.seed(config.seed + 1 + world.rank)  # different on each rank (dropout), unlike the weights
        if at.epoch >= config.epochs:
            logger.info("%d of --epochs=%d are trained already: raise it to go on", at.epoch, config.epochs)
        log = runlog.RunLog(run_dir, world, config.as_dict(), config.tensorboard)
        saving = self.checkpoints.opened(config.fs_dir_for_save)
        tracing = profiled(self.device, run_dir / "profile", config.profile and world.is_main)
        with log, saving, tracing as profiler, StopSignals(world) as signals:
            log.record("run", **self.describe())
            for line in self._opening():
                logger.info(line)
            warmup = min(WARMUP_STEPS, (config.epochs - at.epoch) * self.steps_per_epoch // 2)
            speed = Speed(self.device, config.batch_size, warmup)
            reason = "failed"
            try:
                if at.step == 0 or not at.verified:
                    self._verify(log, signals)
                while at.epoch < config.epochs:
                    self._train_epoch(log, signals, speed, profiler)
                    at.epoch, at.step_in_epoch, at.verified = at.epoch + 1, 0, not self.pair_sets
                    # Before verifying, which takes minutes; what it finds goes into the checkpoint that replaces this.
                    at.accuracy = 0.0 if self.pair_sets else at.accuracy  # that of other weights
                    saved = self.save()
                    if self.pair_sets:
                        self._verify(log, signals)
                        self.save(replaces=saved)
                reason = "finished"
            except Stopped:
                reason = "signal"
                if at.verified or at.step_in_epoch:  # else nothing was learnt since the last save
                    self.save()
                self.checkpoints.wait()  # the process ends next, and its threads with it
                raise
            except PrecisionError:
                for name in self.checkpoints.saved[-1:]:
                    logger.info("the last checkpoint is %s", self.checkpoints.folder / name)
                raise
            except DataError as error:
                # The data failed, not the training. With several ranks the others may be in the middle of a step.
                if (world.size == 1 or isinstance(error, DataFailed)) and at.step_in_epoch:
                    self.save()
                    self.checkpoints.wait()
                raise
            finally:
                log.record("end", seconds=time.time() - started, reason=reason, steps=at.step)

    def _train_epoch(self, log, signals, speed, profiler) -> None:
        """From where `progress` stands to the end of its epoch."""
        config, at = self.config, self.progress
        save_every = SaveEvery(config.save_every, config.save_minutes, self.world)
        self.backbone.train()
        freeze(self.backbone, self.config.freeze)  # batch norms that stay are not in training
        self.loader.set_position(at.epoch, at.step_in_epoch * config.accumulate)
        batches = self.device.prefetch(iter(self.loader), self._to_device)
        batches = _Lasting(batches, at, signals) if self.world.size > 1 else iter(batches)
        title = f"epoch {at.epoch} of 0-{config.epochs - 1}"
        # Sums stay on the device between two lines of the log: no step waits for the host.
        sums, steps = 0, 0
        speed.start()
        with progress(self.steps_per_epoch, title, "step", at.step_in_epoch, self.world.is_main) as bar:
            while at.step_in_epoch < self.steps_per_epoch:
                lr = self.schedule(at.step)
                sums, steps = sums + self._train_step(batches, lr), steps + 1
                at.step += 1
                at.step_in_epoch += 1
                speed.step()
                profiler.step()
                bar.update(1)
                if at.step % config.log_every == 0 or at.step_in_epoch == self.steps_per_epoch:
                    self._log_step(log, bar, speed, lr, (sums / steps).tolist())
                    sums, steps = 0, 0
                self._leave_if_asked(signals, batches)
                if save_every.due(at.step) and at.step_in_epoch < self.steps_per_epoch:
                    with speed.paused():
                        share_buffers(self.backbone, self.world)
                        self.save()
        speed.stop()
        log.record("window", **speed.window())
        self.precision.divergence.check(self._first_non_finite, at_end=True)
        share_buffers(self.backbone, self.world)

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

    def _first_non_finite(self) -> str:
        return first_non_finite(self.backbone, lambda: self._scaled_loss(*next(self._endless())[:2]))

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
        if self.config.augment:
            images = transforms.augment(images, self.config.augment)
        return self.recognizer.to_input(images, flip), labels, batch.labels_B

    def _log_step(self, log, bar, speed, lr, means) -> None:
        config, at = self.config, self.progress
        loss, accuracy, *top5 = means[0], *(count / config.batch_size for count in means[1:])
        if not self.pair_sets:
            at.accuracy = accuracy
        log.record(
            "step",
            step=at.step,
            epoch=at.epoch,
            loss=loss,
            lr=lr,
            accuracy=accuracy,
            **({"accuracy_top5": top5[0]} if top5 else {}),
            images_per_s=speed.recent(),
            scale=self.precision.scale,
            skipped=self.precision.skipped,
            memory=self.device.max_memory_allocated(),
            damaged=self.loader.damaged,
        )
        log.scalar("train_loss", loss, at.step)
        log.scalar("learning_rate", lr, at.step)
        bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{speed.recent():.1f}", lr=f"{lr:.3g}")
        if bar.disable:
            logger.info(
                "epoch %d step %d/%d loss %.4f accuracy %.4f lr %.3g %.1f images/s",
                at.epoch,
                at.step_in_epoch,
                self.steps_per_epoch,
                loss,
                accuracy,
                lr,
                speed.recent(),
            )
        if not math.isfinite(loss):
            logger.warning("loss is not finite at step %d", at.step)

    def _leave_if_asked(self, signals: StopSignals, batches) -> None:
        at = self.progress
        number = signals.asked(at.step, now=at.step_in_epoch == self.steps_per_epoch)
        if number == FAILED:
            share_buffers(self.backbone, self.world)
            failed = self.world.all_gather_object((batches.position, str(batches.error)))
            position, rank, why = min((p, rank, why) for rank, (p, why) in enumerate(failed) if p is not None)
            # The steps since then saw this rank's last batch again: they are to be trained on its own.
            at.step, at.step_in_epoch = at.step - at.step_in_epoch + position, position
            raise DataFailed(f"rank {rank}: {why}")
        if number:
            share_buffers(self.backbone, self.world)
            raise Stopped(number)

    # --- verification ------------------------------------------------------------------------------------------------

    def evaluate(self, sets: Optional[dict] = None, **watch) -> dict:
        """Verifies the recognizer: {set's name: PairResult}. sets: {name: path}, else `config.val_targets`."""
        config = self.config
        return self.recognizer.verify(
            self.pair_sets if sets is None else sets,
            self.world,
            config.eval_batch_size,
            config.flip_sum,
            config.channel_order or None,
            **watch,
        )

    def _verify(self, log, signals) -> None:
        at, untrained = self.progress, self.progress.step == 0
        for name, path in self.pair_sets.items():
            with progress(None, f"verifying on {name}", "image", shown=self.world.is_main) as bar:
                result = self.evaluate({name: path}, stop_signal=lambda: signals.here, progress=ticking(bar))[name]
            logger.info(
                "%s_accuracy: %.5f +- %.5f at %.2f%s",
                name,
                result.accuracy,
                result.std,
                result.threshold,
                " (untrained)" if untrained else "",
            )
            found = embed.as_record(result)
            log.record("verify", step=at.step, epoch=at.last_epoch, set=name, untrained=untrained, **found)
            log.scalar(f"{name}_accuracy", result.accuracy, at.step)
            log.scalar(f"{name}_best_threshold", result.threshold, at.step)
            log.figure(f"{name}_roc_curve", partial(embed.roc_figure, result, name), at.step)
            if name == next(iter(self.pair_sets)) and not result.caution:
                at.accuracy, self.recognizer.threshold = result.accuracy, result.threshold
        at.verified = True

    def infer(self, faces, target_embeddings, threshold: Optional[float] = None):
        """Who is on each face? faces: uint8 RGB [N, H, W, 3] or a list of such images; target_embeddings [M, D].

        Returns (index [N] of the nearest target, -1 where it is further than the threshold; squared L2 distance [N]).
        threshold: squared L2; by default the one calibrated by verification and kept in the checkpoint, else 1.5.
        """
        known = self.recognizer.threshold
        limit = threshold if threshold is not None else known if known is not None else 1.5
        return nearest(self.recognizer.embed(faces, self.world), target_embeddings, limit)

    def find_lr(self, lowest: float = 1e-6, highest: float = 10.0, steps: int = 100, plot_path: Optional[str] = None):
        """Learning-rate range test (`optim.range_test`); the learner is afterwards as it was before.

        Returns (rates, smoothed losses); plot_path: a PNG to draw them in."""
        before = _mapped(torch.clone, {**self._state(), "head": self.head.local_state()})
        rng = self.device.rng_state()
        self.backbone.train()
        freeze(self.backbone, self.config.freeze)  # batch norms that stay are not in training
        batches = self._endless()
        rates, losses = optim.range_test(lambda lr: float(self._train_step(batches, lr)[0]), lowest, highest, steps)
        self.head.load_local_state(before["head"])
        self._load_state(before, rng)
        if plot_path and self.world.is_main:
            optim.range_figure(rates, losses).savefig(plot_path)
        return rates, losses

    def _endless(self):
        epoch = 0
        while True:
            self.loader.set_position(epoch, 0)
            yield from map(self._to_device, self.loader)
            epoch += 1

    def _opening(self) -> list[str]:
        """What this run is about to do, for who started it."""
        config, at = self.config, self.progress
        milestones = [str(epoch) for epoch in config.milestones if epoch < config.epochs]
        course = {
            "milestones": f"x {config.gamma:g} from epochs {', '.join(milestones)} on" if milestones else "constant",
            "constant": "constant",
        }.get(config.lr_schedule, config.lr_schedule)
        return opening_lines(
            network=self.recognizer.name,
            parameters=sum(p.numel() for p in self.backbone.parameters()),
            embedding_size=self.recognizer.architecture["embedding_size"],
            loss=config.loss_type,
            data=f"{config.data_path}, {self.dataset.channel_order} files (--channel_order says otherwise)"
            if config.data_mode != "synthetic"
            else "made in memory",
            images=len(self.dataset),
            classes=self.dataset.num_classes,
            verified=list(self.pair_sets),
            batch_size=config.batch_size,
            ranks=self.world.size,
            accumulate=config.accumulate,
            epochs=(at.epoch, config.epochs),
            steps_per_epoch=self.steps_per_epoch,
            device=self.device.describe()["name"],
            precision=self.precision.policy.name,
            lr=config.lr,
            lr_course=course,
            weights=f"{self.resumed or self.weights or 'new, random'}; the net takes {self.recognizer.channel_order}",
            checkpoints=str(self.checkpoints.folder),
            run_dir=str(self.run_dir),
        )

    # --- what a run and its checkpoints record -----------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What this run is, for its log and its reports."""
        config = self.config
        return {
            "case": config.case,
            "network": self.recognizer.name,
            "batch_size": config.batch_size,
            "command": runlog.command_line(config.fs_ugi),
            "device": self.device.describe(),
            "num_classes": self.dataset.num_classes,
            "images": len(self.dataset),
            "opt_level": self.precision.policy.name,
            "fast_paths": self.fast_paths(),
        }

    def fast_paths(self) -> dict[str, Any]:
        """Which of the things that only speed depends on are on."""
        return {
            **self.recognizer.fast_paths,
            **self.tuned,
            "static": self.config.static,
            "sgd": optim.sgd_kind(self.optimizer),
            "head_op": self.head.op.name,
            "copy_beside_compute": self.device.kind != "cpu",
            **({"head_op_trials": self.head.trials} if self.head.trials else {}),
        }

    @property
    def meta(self) -> dict[str, Any]:
        return {**self.recognizer.meta, "num_classes": self.dataset.num_classes}

    def save(self, replaces: Optional[Path] = None) -> Optional[Path]:
        """Writes a checkpoint (`checkpoint.run.Checkpoints.save`); returns its path, on rank 0, where it has one.

        While loss, gradients or weights are not finite it writes and prunes nothing, and says so."""
        if not self.precision.finite(self.head.centers.weight.split(SAVE_ROWS)):
            logger.warning("step %d: not saved, for loss or weights are not finite", self.progress.step)
            return None
        return self.checkpoints.save(self._state(), self.device.rng_state(), self.head, replaces)

    def _state(self) -> dict[str, Any]:
        """All that the next step depends on but the head and the generators. Every rank has it whole."""
        at = self.progress
        return {
            "model": self.recognizer.state_dict(),
            "optimizer": optim.optimizer_state(self.optimizer, self.precision.names),
            "epoch": at.last_epoch,
            "config": self.config.as_dict(),
            "meta": {**self.meta, "versions": runlog.versions()},
            "training": {**asdict(at), "damaged": self.loader.damaged, "precision": self.precision.state_dict()},
        }

    def resume(self, wanted: str = "newest") -> None:
        """Continues `wanted`, a .pth file or a sharded directory; "newest" or "auto" is the newest whole one of this
        run, and "auto" starts anew where there is none."""
        config = self.config
        if config.fs_checkpoint_dir:
            self.checkpoints.download(config.fs_checkpoint_dir, may_be_empty=wanted == "auto")
        found = self.checkpoints.restore(wanted or "newest", self.meta, self.head)
        if found is not None:
            self._continue(found)
            logger.info("resumed %s at step %d", found.path, self.progress.step)

    def start_from(self, path: Path, state: Any) -> None:
        """Takes over what `checkpoint.run.read` gave, whose network the recognizer has: all of a training of ours, or
        the class centers of a known upstream project where it has any."""
        if "meta" in state:
            self._continue(self.checkpoints.take(path, state, self.meta, self.head))
            self.resumed = None
            return
        kernel_DC = foreign.recognise(state, place=path).head_kernel
        if kernel_DC is not None:
            store.check_architecture({"num_classes": kernel_DC.shape[1]}, self.meta, path)
            self.head.load_kernel(kernel_DC)

    load = resume

    def _continue(self, found: Restored) -> None:
        with schema.fitting(found.path):
            self._load_state(found.state, found.rng)
            self.resumed = found.path
            saved = found.state["config"].get("batch_size", self.config.batch_size)
            at = self.progress
            if saved != self.config.batch_size:
                at.step_in_epoch = min(at.step_in_epoch * saved // self.config.batch_size, self.steps_per_epoch)
                at.step = at.epoch * self.steps_per_epoch + at.step_in_epoch
                logger.info(
                    "the batch was %d images and is %d: goes on at step %d of epoch %d, as many images into it",
                    saved,
                    self.config.batch_size,
                    at.step_in_epoch,
                    at.epoch,
                )

    def _load_state(self, state: dict[str, Any], rng: Optional[dict]) -> None:
        """What `_state` gave, on as many ranks or another number of them."""
        meta, training = state["meta"], state["training"]
        self.recognizer.load_state_dict(state["model"])
        self.recognizer.threshold = meta.get("threshold")
        self.recognizer.channel_order = self.config.weights_channel_order or meta["channel_order"]
        optim.load_optimizer_state(self.optimizer, state["optimizer"], self.precision.names)
        self.precision.load_state_dict(training["precision"])
        for name in asdict(self.progress):
            setattr(self.progress, name, training.get(name, getattr(self.progress, name)))
        self.loader.damaged = training["damaged"]
        if rng is not None:
            self.device.set_rng_state(rng)
        else:  # more ranks than there were: the new ones start streams of their own
            self.device.seed(self.config.seed + 1 + self.world.rank + self.progress.step)


# --- small parts -----------------------------------------------------------------------------------------------------


def open_training_set(config: Config) -> data.ImageDataset:
    """The set of the options `data_path` and `data_mode`."""
    if config.data_mode == "synthetic":
        images = config.batch_size * max(config.max_iter, 100)
        return SyntheticDataset(images, config.num_classes or 85742, seed=config.seed)
    return data.open_dataset(
        config.data_path, config.data_mode or None, config.channel_order or None, config.num_classes or None
    )


def find_pair_sets(config: Config) -> dict[str, Path]:
    """{name: path} of the verification sets that lie beside the training set; those missing are warned of."""
    if not config.with_test or config.data_mode == "synthetic":
        return {}
    root = Path(config.data_path)
    found = pairs.find_pair_sets(root if root.is_dir() else root.parent, config.val_targets)
    by_default = config.val_targets == Config().val_targets and found  # which of them, the data decides
    for name in () if by_default else config.val_targets:
        if name not in found:
            logger.warning("%s has no verification set '%s'", root, name)
    return found


def loader_workers(device: Device, world: World) -> int:
    """Loader processes a rank: its share of the cores; on cpu, where they compete with the training, one."""
    return 1 if device.kind == "cpu" else min(8, world.core_share())


def choose_precision(config: Config, device: Device, world: World) -> Precision:
    """The precision policy that the options ask for on this device."""
    name = config.opt_level if config.use_amp else "O0"
    if name == "auto":
        name = "O2"
        if device.kind == "cpu":
            logger.info("cpu has no fast fp16: training in O0 (fp32); --opt_level=O2 insists")
            name = "O0"
    scaling = parse_loss_scale(
        config.loss_scale,
        init_loss_scaling=config.init_loss_scaling,
        incr_every_n_steps=config.incr_every_n_steps,
        decr_every_n_nan_or_inf=config.decr_every_n_nan_or_inf,
        incr_ratio=config.incr_ratio,
        decr_ratio=config.decr_ratio,
    )
    return make_precision(name, device, world, scaling, config.amp_backend)


def check_memory(config: Config, recognizer: Recognizer, num_classes: int, world: World) -> None:
    """Refuses a head that would not fit, before it is allocated. Beside it the device has to hold the backbone's
    gradients, momentum and masters, and what --memory_reserve asks for."""
    device = recognizer.device
    momentum = config.momentum and config.momentum_dtype != "none"
    form = plan.StorageFormat(
        DTYPES[config.centers_dtype],
        DTYPES[config.momentum_dtype] if momentum else None,
        config.momentum_on_host,
    )
    head = plan.HeadPlan(
        num_classes,
        recognizer.architecture["embedding_size"],
        world.size if config.model_parallel else 1,
        config.batch_size // (world.size * config.accumulate),
        config.sample_rate,
        form,
        config.update_rows,
        device.kind,
        torch.empty(0, dtype=recognizer.precision.policy.compute).element_size(),
        config.accumulate,
        config.checkpoint,
    )
    backbone = 3 * 4 * sum(parameter.numel() for parameter in recognizer.backbone.parameters())
    sharing = world.local_size
    free = (
        device.free_memory() // (sharing if device.kind == "cpu" else 1),
        Device("cpu").free_memory() // sharing,
    )
    # All ranks look before any of them allocates, and come to the same answer.
    on_device, on_host = (min(values) for values in zip(*world.all_gather_object(free)))
    plan.check(head, max(0, on_device - backbone - plan.parse_size(config.memory_reserve)), on_host)


def make_schedule(config: Config, steps_per_epoch: int) -> optim.Schedule:
    """step -> learning rate, as the options say."""
    warmup, total = round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch
    schedules = {
        "milestones": lambda: optim.milestones(config.lr, config.milestones, config.gamma, steps_per_epoch),
        "polynomial": lambda: optim.polynomial(config.lr, config.lr_power, total, warmup),
        "cosine": lambda: optim.cosine(config.lr, total, warmup),
        "constant": lambda: optim.milestones(config.lr, (), config.gamma, steps_per_epoch),
    }
    return optim.with_warmup(schedules[config.lr_schedule](), warmup)


def share_buffers(module: torch.nn.Module, world: World) -> None:
    """Makes the floating-point buffers (batch norm's running statistics) the mean over the ranks, once after the steps
    in which each saw other images. Rank 0's mean is everyone's, to the bit."""
    if world.size > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(world.broadcast_(world.all_reduce_(buffer / world.size)))


def _mapped(function, value: Any) -> Any:
    """Nested dicts and lists with function applied to their tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(function, item) for key, item in value.items()}
    return [_mapped(function, item) for item in value] if isinstance(value, list) else value
