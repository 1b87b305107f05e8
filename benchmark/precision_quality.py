"""Does a precision policy train as well as fp32 does: the final loss of each beside the seed-to-seed spread of O0.

    python -m benchmark.precision_quality DATA [--steps 300] [--batch_size 8] [--seeds 12] [--record NAME]

DATA: a training set that data.open_dataset reads. O0 is trained with every seed (weights, order and flips of the images
follow it), the other policies with the first. The final loss is the mean over the last tenth of the steps. A policy
passes where it lies between the least and the largest of O0's: rounding makes of the same seed another run after some
steps, so that a policy as good as O0 ends where another seed of O0 could have. With N seeds such a one still falls
outside once in (N + 1) / 2 times: few seeds prove little.

On a CPU without fp16 arithmetic (AVX512_FP16, AMX) O1, O2 and fp16 take four to five times as long as O0 and the bf16
policies less than O0; --policies chooses.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import data
import optim
from benchmark.record import write_record
from data.transforms import to_input
from head.head import MarginHead
from model import create_model
from runtime.device import Device, parse_device
from runtime.loss_scale import parse_loss_scale
from runtime.precision import POLICIES, Precision


def train(name: str, seed: int, dataset, device: Device, options) -> dict:
    """One training run: {"policy", "seed", "final_loss", "first_loss", "skipped", "scale", "seconds"}."""
    device.seed(seed)
    backbone = create_model(options.net_mode, options.net_depth, options.embedding_size).to(device.torch)
    decay = optim.head_weight_decay(options.net_mode)
    precision = Precision(name, device, scaling=parse_loss_scale(options.loss_scale))
    head = MarginHead(
        dataset.num_classes,
        options.embedding_size,
        seed=seed,
        weight_decay=decay,
        device=device.torch,
        operand=precision.policy.compute,
        batch=options.batch_size,
    )
    optimizer = precision.prepare(
        backbone,
        lambda groups: optim.make_sgd(groups, options.lr, 0.9, device),
        optim.parameter_groups(backbone, options.net_mode),
    )
    loader = data.build_loader(dataset, options.batch_size, seed=seed)
    backbone.train()
    losses, started = [], time.perf_counter()
    for step in range(options.steps):
        epoch, position = divmod(step, len(loader))
        if step == 0 or position == 0:
            loader.set_position(epoch)
            batches = iter(loader)
        batch = next(batches)
        images = to_input(batch.images_BHWC.to(device.torch), batch.flip_B.to(device.torch))
        with precision.autocast():
            embeddings_BD = backbone(precision.cast_input(images))
        out = head(embeddings_BD, batch.labels_B.to(device.torch))
        precision.backward(out.loss)
        precision.step(optimizer, head)
        losses.append(out.loss.detach())
    losses = torch.stack(losses).cpu().double()
    tenth = max(1, options.steps // 10)
    return {
        "policy": name,
        "seed": seed,
        "first_loss": round(float(losses[:tenth].mean()), 4),
        "final_loss": round(float(losses[-tenth:].mean()), 4),
        "skipped": precision.skipped,
        "scale": precision.scale,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_path")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--net_mode", default="mobilefacenet")
    parser.add_argument("--net_depth", type=int, default=50)
    parser.add_argument("--embedding_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--loss_scale", default="dynamic")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--device_type", default="auto")
    parser.add_argument("--record", help="write benchmark/results/DATE_{this name}.json")
    options = parser.parse_args(argv)
    device = parse_device(options.device_type)
    device.set()
    dataset = data.open_dataset(options.data_path)

    plan = [("O0", seed) for seed in range(options.seeds)] + [(p, 0) for p in options.policies if p != "O0"]
    runs = []
    for name, seed in plan:
        runs.append(train(name, seed, dataset, device, options))
        print(json.dumps(runs[-1]), flush=True)

    final = [run["final_loss"] for run in runs if run["policy"] == "O0"]
    summary = {
        "images": len(dataset),
        "classes": dataset.num_classes,
        **{k: getattr(options, k) for k in ("net_mode", "embedding_size", "steps", "batch_size", "lr", "loss_scale")},
        "O0_final_losses": final,
        "O0_spread": [min(final), max(final)],
        "final_losses": {run["policy"]: run["final_loss"] for run in runs[options.seeds :]},
        "within_the_spread": {
            run["policy"]: min(final) <= run["final_loss"] <= max(final) for run in runs[options.seeds :]
        },
    }
    print(json.dumps(summary))
    if options.record:
        print(write_record(options.record, {**summary, "runs": runs}, device))


if __name__ == "__main__":
    main()
