"""The Learner with what PLSC's users see of it: its lines, its folders a pass, readers, and their own optimizer."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch

from data.dataset import ImageDataset
from learner import Learner
from plsc import fluid
from plsc.models.base_model import BaseModel
from plsc.passes import FolderAPass
from plsc.reader import ReaderLoader
from runtime.errors import ConfigError

log = logging.getLogger("plsc")


class ReaderSet(ImageDataset):
    """Stands for what a user's reader gives: only how much of it there is said to be."""

    def __init__(self, images: int, num_classes: int):
        super().__init__()
        self._images, self.num_classes = images, num_classes

    def __len__(self) -> int:
        return self._images


class Trainer(FolderAPass, Learner):
    """entry: the Entry, whose attributes say what no option does. See `Learner`."""

    def __init__(self, entry, recognizer, config, world):
        self.entry = entry
        dataset = None
        if entry.train_reader is not None:
            dataset = ReaderSet(max(entry.train_image_num, config.batch_size), entry.num_classes)
        super().__init__(recognizer, config, dataset, world)
        if entry.train_reader is not None:
            self.loader = ReaderLoader(entry.train_reader, entry.num_classes, world, self._ended)
        if isinstance(self.backbone, BaseModel):
            self._hand_over_labels()
        self._set_optimizer()
        self._set_head(entry.param_attr, entry.bias_attr)
        if entry.use_fp16 and entry.amp_lists is not None:
            entry.amp_lists.apply(self.backbone, self.precision.policy.compute)
        self._sums, self._count, self._seconds, self._of_pass = 0, 0, 0.0, 0.0

    def _ended(self, steps: int) -> None:
        self.steps_per_epoch = steps

    def _hand_over_labels(self) -> None:
        prepare = self.head.prepare

        def with_labels(labels_B):
            self.backbone.label_B = labels_B
            prepare(labels_B)

        self.head.prepare = with_labels

    # --- what set_optimizer and set_distfc_attr say ------------------------------------------------------------------

    def _set_optimizer(self) -> None:
        entry = self.entry
        if entry.optimizer is None:
            self.schedule = entry.learning_rate()
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        made = entry.optimizer(parameters)
        self.optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"set_optimizer: the factory gave a {type(self.optimizer).__name__}, not a torch optimizer"
            )

        rates, taken = [group["lr"] for group in self.optimizer.param_groups], 0
        for group, rate in zip(self.optimizer.param_groups, rates):
            group["lr_factor"] = rate / rates[0] if rates[0] else 1.0

        def schedule(step: int) -> float:
            nonlocal taken
            if scheduler is not None:
                with warnings.catch_warnings():  # that no step came before: those were of the run that goes on
                    warnings.simplefilter("ignore")
                    for _ in range(step - taken):
                        scheduler.step()
                taken = max(step, taken)
            return self.optimizer.param_groups[0]["lr"]

        self.schedule = schedule

    def _set_head(self, weight, bias) -> None:
        """Initial values, decay, and what the rate is multiplied with, of W and of b."""
        if weight is None and bias is None:
            return
        centers, dim = self.head.centers, self.head.embedding_size
        if bias is not None and not self.head.bias:
            raise ConfigError("set_distfc_attr: arcface has no b: leave bias_attr out, or use softmax")
        decay = centers.weight_decay
        self.device.seed(self.config.seed + 1 + centers.shard.start)  # each rank's rows are its own
        if weight is not None:
            fluid.initialize(centers.weight[:, :dim], weight)
            centers.rate = weight.rate
            centers.weight_decay = weight.decay(decay)
        if bias is not None:
            fluid.initialize(centers.weight[:, dim:], bias)
            centers.bias_rate = bias.rate
        centers.measure()
        of_bias = decay if bias is None else bias.decay(decay)
        if self.head.bias and of_bias != centers.weight_decay:
            centers.bias_decay = of_bias

    # --- a step ------------------------------------------------------------------------------------------------------

    def _train_step(self, batches, lr: float) -> torch.Tensor:
        begun = time.perf_counter()
        sums = super()._train_step(batches, lr)
        self._say(sums, lr, begun)
        return sums

    def _to_device(self, batch):
        if self.entry.train_reader is None:
            return super()._to_device(batch)
        images, labels = (tensor.to(self.device.torch, non_blocking=True) for tensor in batch)
        images = images.contiguous(memory_format=self.recognizer.memory_format)
        return self.precision.cast_input(images), labels, batch.labels_B

    def _say(self, sums, lr: float, begun: float) -> None:
        """PLSC's line: at the pass's first step and every log_period steps; lr and loss are means since the last."""
        entry, at = self.entry, self.progress
        self._of_pass = self._of_pass + sums[0] if at.step_in_epoch else sums[0]
        self._sums, self._count = self._sums + torch.stack([sums[0], sums[0].new_tensor(lr)]), self._count + 1
        if at.step_in_epoch % entry.log_period:
            self._seconds += time.perf_counter() - begun
            return
        loss, rate = (self._sums / self._count).tolist()  # waits for the device
        self._seconds += time.perf_counter() - begun
        qps = self.config.batch_size * self._count / self._seconds
        accuracies = ""
        if entry.calc_train_acc:
            top1, top5 = (sums[1:3] / self.config.batch_size).tolist()
            accuracies = f" acc1:{top1:.6f} acc5:{top5:.6f}"
        log.info(
            "Pass:%d batch:%d lr:%.8f loss:%.6f qps:%.2f%s", at.epoch, at.step_in_epoch, rate, loss, qps, accuracies
        )
        self._sums, self._count, self._seconds = 0, 0, 0.0

    def _train_epoch(self, *arguments) -> None:
        super()._train_epoch(*arguments)
        at = self.progress
        self._sums, self._count, self._seconds = 0, 0, 0.0
        log.info("End pass %d, train_loss %.6f", at.epoch, float(self._of_pass) / max(1, at.step_in_epoch))

    # --- after a pass ------------------------------------------------------------------------------------------------

    def _verify(self, *arguments) -> None:
        if self.progress.step:  # PLSC verifies nothing that has learnt nothing
            self.entry.trained_pass = max(0, self.progress.epoch - 1)
            super()._verify(*arguments)

    def evaluate(self, sets: Optional[dict] = None, **watch) -> dict:
        with x_norm(self.recognizer, self.world) as norm:
            started = time.time()
            results = super().evaluate(sets, **watch)
        for name, result in results.items():
            say_result(name, result, norm(), f"[{self.entry.trained_pass}]", time.time() - started)
        return results


# --- verification in PLSC's words -----------------------------------------------------------------------------------


@contextmanager
def x_norm(recognizer, world):
    """Yields a function: the mean length of what the network has given inside the block, over all ranks."""
    total = torch.zeros(2, dtype=torch.float64)

    def note(_module, _input, output):
        if isinstance(output, torch.Tensor):
            total.add_(torch.tensor([float(output.detach().float().norm(dim=1).sum()), len(output)]))

    handle = recognizer.backbone.register_forward_hook(note)

    def mean() -> float:
        length, count = (sum(values) for values in zip(*world.all_gather_object(total.tolist())))
        return length / max(1, count)

    try:
        yield mean
    finally:
        handle.remove()


def say_result(name: str, result, norm: float, place: str, seconds: float) -> None:
    log.info("[%s]%sXNorm: %.5f", name, place, norm)
    log.info("[%s]%sAccuracy-Flip: %.5f+-%.5f", name, place, result.accuracy, result.std)
    log.info("test time: %.4f", seconds)


def embed_arrays(recognizer, sets, world, batch_size: int) -> np.ndarray:
    """Unit embeddings of a test_reader's [originals, flips], float32 [2N, 3, H, W] each: of both together."""
    from verify import embed

    class Both:
        def __len__(self):
            return len(sets[0])

        def __getitem__(self, rows):
            return np.stack([np.asarray(one[rows], np.float32) for one in sets], axis=1)

    class Summed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = recognizer.backbone

        def forward(self, images_B2CHW):
            return self.net(images_B2CHW[:, 0]) + self.net(images_B2CHW[:, 1])

    return embed.embed_images(
        Summed(), Both(), recognizer.device, world, batch_size, autocast=recognizer.precision.autocast,
        to_input=recognizer.precision.cast_input,
    )  # fmt: skip
