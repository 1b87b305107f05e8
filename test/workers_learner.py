"""What the ranks of test_learner_ranks.py run."""

from __future__ import annotations

import torch
from torch import nn

import data
import model
import optim
from config import replace
from data.synthetic import SyntheticDataset
from data.transforms import to_input
from head.head import MarginHead
from learner import Learner
from runtime.device import Device
from runtime.dist import wrap_data_parallel
from runtime.errors import DataError

STEPS, BATCH = 3, 4


def train_in_float64(world, sample_rate=1.0):
    """Three steps on four images each, batch norm frozen: losses, the backbone's weights and the gathered centers."""
    torch.manual_seed(0)
    net = model.create_model("mobilefacenet", embedding_size=8).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    head = MarginHead(7, 8, margin="arcface", world=world, seed=3, dtype=torch.float64)
    groups = optim.parameter_groups(net, "mobilefacenet", 5e-4)
    optimizer = optim.make_sgd(groups, lr=1e-4, momentum=0.9, device=Device("cpu"))
    ddp = wrap_data_parallel(net, world)
    loader = data.build_loader(SyntheticDataset(STEPS * BATCH, 7), BATCH // world.size, world.rank, world.size, seed=5)
    losses = []
    for batch in loader:
        out = head(ddp(to_input(batch.images_BHWC, batch.flip_B, torch.float64)), batch.labels_B)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        head.step(1e-4)
        losses.append(float(out.loss.detach()))
    return losses, torch.cat([p.detach().flatten() for p in net.parameters()]).numpy(), _kernel(head)


def _kernel(head):
    kernel = head.gathered_kernel()
    return None if kernel is None else kernel.numpy()


def run_learner(world, config):
    """Trains; returns the position, the backbone's weights and its buffers, of this rank."""
    learner = Learner.from_config(config, Device("cpu"), world)
    learner.train()
    weights = torch.cat([p.detach().flatten() for p in learner.backbone.parameters()])
    buffers = torch.cat([b.flatten().double() for b in learner.backbone.buffers()])
    return learner.progress.step, weights.numpy(), buffers.numpy()


def run_with_failing_data(world, config, images):
    """Trains; on rank 1 the data fails after so many images. Returns what was raised, and the position it left."""
    learner = Learner.from_config(config, Device("cpu"), world)
    load, calls = learner.dataset.load_into, []

    def failing(index, out_HWC):
        calls.append(index)
        if len(calls) > images:
            raise DataError("the disk went away")
        return load(index, out_HWC)

    if world.rank == 1:
        learner.dataset.load_into = failing
    try:
        learner.train()
    except DataError as error:
        return str(error), learner.progress.step, learner.progress.step_in_epoch
    raise AssertionError("the data did not fail")


def resume_learner(world, config):
    learner = Learner.from_config(replace(config, resume="auto"), Device("cpu"), world)
    return learner.progress.step, _kernel(learner.head)
