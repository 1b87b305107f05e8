"""What the spawned ranks of test_head_ranks.py run. Each rank builds the same global batch and takes its part."""

from __future__ import annotations

import torch

from head.head import MarginHead
from runtime.dist import wrap_data_parallel


def global_batch(step, num_classes, size, dim, labels=None):
    generator = torch.Generator().manual_seed(1000 + step)
    image_BD = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    label_B = torch.randint(num_classes, (size,), generator=generator)
    if labels is not None:
        label_B = torch.tensor(labels)
    return image_BD, label_B


def train(world, steps=4, num_classes=23, size=12, dim=5, accumulate=1, labels=None, **kw):
    """A linear net and a head; what they are after some steps, and every step's loss and count."""
    torch.manual_seed(0)
    net = torch.nn.Linear(dim, dim).double()
    parallel = wrap_data_parallel(net, world)
    kw.setdefault("dtype", torch.float64)
    head = MarginHead(num_classes, dim, world=world, s=16.0, seed=3, top5=True, **kw)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            image_BD, label_B = global_batch(step * accumulate + micro, num_classes, size, dim, labels)
            part = size // world.size
            mine = slice(world.rank * part, (world.rank + 1) * part)
            out = head(parallel(image_BD[mine]), label_B[mine])
            (out.loss / accumulate).backward()
            history.append((float(out.loss), int(out.correct), int(out.correct_top5)))
        assert float(world.all_reduce_(head.found_inf(), op="max")) == 0
        optimizer.step()
        head.step(0.1)
    state = head.gathered_training_state(max_bytes=200)
    return {
        "history": history,
        "net": net.weight.detach().clone(),
        "kernel": head.gathered_kernel(max_bytes=200),
        "momentum": state["momentum"],
        "bias": state["bias"],
        "norms": state["norms"],
        "weight": head.centers.weight.clone(),
        "rows": (head.centers.shard.start, head.centers.shard.stop),
    }


def samples(world):
    head = MarginHead(4000, 4, world=world, sample_rate=0.1)
    label_B = torch.tensor([5, 5]) if world.is_main else torch.tensor([3999, 7])
    sample = head._sample(label_B)
    return head.centers.shard.start, sample.index_R.tolist(), sample.place_B.tolist()


def bad_batch(world):
    """One rank's embeddings are not finite; what moved, and what the ranks say."""
    head = MarginHead(11, 4, world=world, dtype=torch.float64)
    before_RW = head.centers.weight.clone()
    emb_BD = torch.ones(3, 4, dtype=torch.float64) * (1 + world.rank)
    if world.rank == 1:
        emb_BD[1, 2] = float("inf")
    emb_BD.requires_grad_()
    head(emb_BD, torch.tensor([0, 5, 10])).loss.backward()
    found = world.all_reduce_(head.found_inf(), op="max")
    head.step(0.1, found_inf=found)
    return float(found), bool(torch.equal(head.centers.weight, before_RW)), bool(torch.isfinite(emb_BD.grad).all())


def reload(world, kernel_DC, state):
    """A checkpoint of one file onto other ranks, and one more step from there."""
    head = MarginHead(23, 5, world=world, s=16.0, seed=99, dtype=torch.float64)
    head.load_kernel(kernel_DC)
    head.load_training_state(state)
    image_BD, label_B = global_batch(50, 23, 12, 5)
    part = 12 // world.size
    mine = slice(world.rank * part, (world.rank + 1) * part)
    head(image_BD[mine].requires_grad_(), label_B[mine]).loss.backward()
    head.step(0.1)
    return head.gathered_kernel()


def several(world, calls):
    """{name: (function, arguments, keywords)} -> {name: result}: one world for all of a file's cases."""
    return {name: function(world, *args, **kw) for name, (function, args, kw) in calls.items()}


def train_and_save(world):
    head = MarginHead(23, 5, world=world, s=16.0, seed=3, dtype=torch.float64)
    for step in range(2):
        image_BD, label_B = global_batch(step, 23, 12, 5)
        part = 12 // world.size
        mine = slice(world.rank * part, (world.rank + 1) * part)
        head(image_BD[mine].requires_grad_(), label_B[mine]).loss.backward()
        head.step(0.1)
    return head.gathered_kernel(), head.gathered_training_state()
