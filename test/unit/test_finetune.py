"""Fine-tuning on few people: parts that stay, slower ones, classes equally often, images changed on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_set import make_tiny_set

import optim
from config import Config, replace
from data.sampler import BatchSampler, balanced_order
from data.transforms import AUGMENTATIONS, augment
from learner import Learner
from model import create_model
from model.stages import PARTS, freeze, parts_of
from runtime.errors import ModelError

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "net", [("ir", 18), ("ir_se", 50), ("iresnet", 18), ("resnet", 50), ("mobilefacenet", None), ("mbf", None)]
)
def test_parts_follow_the_resolution(net):
    """From part to part the sides of what the modules give become smaller, and every parameter has its part."""
    backbone = create_model(*net, embedding_size=16).eval()
    part, sides = parts_of(backbone), {number: set() for number in range(PARTS)}
    assert set(part) == set(backbone.state_dict())

    def note(numbers):
        def hook(module, inputs, output):
            if output.dim() == 4 and output.shape[-1] > 1:  # not a squeeze-and-excite's
                sides[numbers.pop()].add(output.shape[-1])

        return hook

    for name, module in backbone.named_modules():
        own = {part[f"{name}.{key}"] for key, _ in module.named_parameters(recurse=False)}
        if own:
            assert len(own) == 1
            module.register_forward_hook(note(own))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 112, 112))
    smallest = [min(sides[number]) for number in range(5)]
    assert smallest == sorted(smallest, reverse=True) and smallest[0] >= 56 and smallest[4] == 7


def test_a_backbone_of_ones_own_has_no_known_parts():
    with pytest.raises(ModelError, match="no parts are known"):
        freeze(torch.nn.Linear(2, 2), 1)
    freeze(torch.nn.Linear(2, 2), 0)
    own = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    own.part_of = lambda name: 5 * int(name[0])
    freeze(own, 3)
    assert [value.requires_grad for value in own.parameters()] == [False, False, True, True]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    make_tiny_set(folder / "set", classes=4, shots=4)
    config = replace(
        Config(), data_path=str(folder / "set"), work_path=str(folder / "work"), net_mode="mobilefacenet",
        device_type="cpu", embedding_size=16, batch_size=8, epochs=1, num_workers=0, lr=0.1, with_test=False,
        tensorboard=False, freeze=3, lr_decay_by_part=0.5, class_balanced=True, augment=AUGMENTATIONS,
    )  # fmt: skip
    learner = Learner.from_config(config)
    before = {name: value.clone() for name, value in learner.backbone.state_dict().items()}
    learner.train()
    return learner, before


def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(trained):
    learner, before = trained
    part, after = parts_of(learner.backbone), learner.backbone.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert not {name for name in moved if part[name] < 3}  # batch norms' statistics among them
    assert {part[name] for name in moved} == {3, 4, 5}
    assert all("running" in name or "tracked" in name or name in moved for name in after if part[name] == 5)


def test_each_part_has_its_rate(trained):
    learner, _ = trained
    optim.set_lr(learner.optimizer, 0.8)
    name_of = {id(value): name for name, value in learner.backbone.named_parameters()}
    part = parts_of(learner.backbone)
    for group in learner.optimizer.param_groups:
        rates = {0.8 * 0.5 ** (5 - part[name_of[id(value)]]) for value in group["params"]}
        assert len(rates) == 1 and group["lr"] == pytest.approx(rates.pop())
    assert {round(group["lr"], 4) for group in learner.optimizer.param_groups} == {0.8, 0.4, 0.2}


def test_a_run_to_be_resumed_begins_from_the_given_weights(trained, tmp_path):
    learner, _ = trained
    start = learner.recognizer.save(tmp_path / "start.pth")
    config = replace(
        learner.config, pth_path=str(start), is_finetune=True, resume="auto", work_path=str(tmp_path), embedding_size=8
    )
    given = Learner.from_config(config).backbone.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in learner.backbone.state_dict().items())


def test_every_class_comes_equally_often():
    labels = np.repeat(np.arange(5), (1, 40, 3, 9, 47))
    order, flips = balanced_order(labels, seed=3, epoch=0)
    assert order.shape == flips.shape == (100,) and np.bincount(labels[order]).tolist() == [20] * 5
    assert len(set(order[labels[order] == 4])) == 20  # none twice while others were not shown
    assert np.array_equal(order, balanced_order(labels, 3, 0)[0]) and not np.array_equal(
        order, balanced_order(labels, 3, 1)[0]
    )
    whole = np.concatenate([indices for indices, _ in BatchSampler(100, 20, seed=3, labels=labels).batches(0)])
    two = [BatchSampler(100, 10, rank, 2, 3, labels).batches(0) for rank in range(2)]
    assert np.array_equal(whole, np.concatenate([np.concatenate([a, b]) for (a, _), (b, _) in zip(*two)]))


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_images_are_changed_but_stay_images(kind):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 7, 7, 3), dtype=torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = images[:, :112, :112].contiguous()
    before = images.clone()
    changed = augment(images, (kind,))
    assert changed.dtype == torch.uint8 and changed.shape == images.shape and torch.equal(images, before)
    same = (changed == images).flatten(1).all(1).float().mean().item()
    assert 0.6 < same < 0.95 if kind == "low_resolution" else same < 0.05
    assert (changed.float().mean() - images.float().mean()).abs() < 8
    assert torch.equal(augment(images, ()), images)
    torch.manual_seed(5)
    one = augment(images)
    torch.manual_seed(5)
    assert torch.equal(one, augment(images))
