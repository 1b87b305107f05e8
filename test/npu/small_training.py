"""A training in small, of the project's own parts: a narrow net of the real kind, the real head, policy and SGD."""

from __future__ import annotations

from unittest.mock import patch

import torch

import model.iresnet
from data.transforms import to_input
from head.head import MarginHead
from model import create_model
from optim import head_weight_decay, make_sgd, parameter_groups
from runtime.device import Device
from runtime.loss_scale import LossScaling
from runtime.precision import Precision

CLASSES, BATCH, LR = 11, 6, 0.02
STATIC = LossScaling(init_loss_scaling=128.0, use_dynamic_loss_scaling=False)


def narrow_net(net_mode: str, dropout=None):
    """A backbone with all of its layers and a fraction of its width; MobileFaceNet as it is."""
    with patch.multiple(model.iresnet, STAGE_WIDTHS=(16, 16, 32, 32), STEM_WIDTH=16):
        return create_model(net_mode, 18, embedding_size=32, dropout=dropout)


def batch(seed: int, size: int = BATCH):
    """uint8 images [size, 112, 112, 3], which to flip, labels."""
    generator = torch.Generator().manual_seed(seed)
    images_BHWC = torch.randint(0, 256, (size, 112, 112, 3), generator=generator, dtype=torch.uint8)
    return (
        images_BHWC,
        torch.rand(size, generator=generator) < 0.5,
        torch.randint(0, CLASSES, (size,), generator=generator),
    )


class SmallTraining:
    """Steps on two batches of random images in turn, the same on every device: few enough to be learnt by heart.

    wide: the net in its full width and depth (ir_50), to be timed. batch: images a step. head: MarginHead's options.
    """

    def __init__(
        self,
        device: Device,
        policy: str = "O0",
        net_mode: str = "ir_se",
        margin: str = "arcface",
        scaling: LossScaling = STATIC,
        sgd: str = "auto",
        dropout=None,
        wide: bool = False,
        batch: int = BATCH,
        **head,
    ):
        device.set()
        device.seed(0)
        self.device, self.batch = device, batch
        net = create_model("ir", 50, dropout=dropout) if wide else narrow_net(net_mode, dropout)
        self.net = net.to(device.torch)
        self.precision = Precision(policy, device, scaling=scaling)
        groups = parameter_groups(self.net, net_mode)
        self.optimizer = self.precision.prepare(self.net, lambda groups: make_sgd(groups, LR, 0.9, device, sgd), groups)
        self.head = MarginHead(
            CLASSES,
            512 if wide else 32,
            margin=margin,
            device=device.torch,
            weight_decay=head_weight_decay(net_mode),
            **head,
        )
        self.forward = self.net
        self.losses: list[float] = []
        self.steps = 0

    def images(self):
        """The next step's, as the net wants them."""
        images_BHWC, flip_B = (t.to(self.device.torch) for t in batch(self.steps % 2, self.batch)[:2])
        return self.precision.cast_input(to_input(images_BHWC, flip_B))

    def step(self, max_norm=None):
        labels_B = batch(self.steps % 2, self.batch)[-1]
        images = self.images()
        self.steps += 1
        self.head.prepare(labels_B)
        self.net.train()
        with self.precision.autocast():
            embeddings_BD = self.forward(images)
        out = self.head(embeddings_BD, labels_B.to(self.device.torch))
        self.precision.backward(out.loss)
        self.precision.step(self.optimizer, head=self.head, lr=LR, max_norm=max_norm)
        self.losses.append(out.loss.item())

    def run(self, steps: int, max_norm=None):
        for _ in range(steps):
            self.step(max_norm)
        return self

    @torch.no_grad()
    def embed(self):
        """Embeddings of a fixed batch by the net in evaluation mode, [BATCH, 32] float32 on the host."""
        images_BHWC = batch(2)[0].to(self.device.torch)
        self.net.eval()
        with self.precision.autocast():
            return self.net(self.precision.cast_input(to_input(images_BHWC))).float().cpu()

    def weights(self):
        return {name: t.cpu() for name, t in self.precision.model_state(self.net).items()}
