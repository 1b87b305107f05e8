"""What each way to store class centers and momentum, and Partial FC, cost in quality: final loss and verification.

    OMP_NUM_THREADS=1 python -m benchmark.quality [--rows "bf16 + int8" ...] [--seeds 3] [--again]

The problem is synthetic, so that anyone can repeat it: an identity is a vector, an image of it a fixed random nonlinear
function of that vector and of as many nuisances, with noise. A small MLP learns embeddings of 2,000 identities with
ArcFace for 1,500 steps of 128 images and is verified on pairs of 500 identities that it never saw
(`verify.protocol.evaluate_pairs`). It is made hard enough that neither loss nor accuracy comes near its end: where
float32 leaves no error, nothing could show. Every row is trained with every seed (weights, centers, order, images; the
problem itself is the same), and stands beside the spread of fp32 + fp32 over the seeds. The row "bf16 to nearest" is a
control: the program does not offer it, and a table that could not tell it from fp32 would prove nothing.

The record is written after each run, and a second call does only what is missing (--again: everything anew).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmark.record import RESULTS, write_record
from head.head import MarginHead
from head.plan import FORMATS
from head.storage import bytes_per_row
from runtime.device import parse_device
from verify.protocol import evaluate_pairs

CLASSES, UNSEEN, STEPS, BATCH = 2000, 500, 1500, 128
LATENT, INPUT, HIDDEN, EMBEDDING = 24, 96, 192, 64
NUISANCE, NOISE = 1.2, 0.5  # of an image, beside an identity's 1
PAIRS = 6000
# Chosen on fp32 + fp32 alone: at 0.1 two of three seeds stay on a plateau at a loss of 18, and whether a row leaves it
# would be a lottery and not a measure of the row.
LR, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
MILESTONES = (1000, 1300)  # where the rate becomes a tenth
PROBLEM_SEED = 20_000
BASE = "fp32 + fp32"


def form_options(form) -> dict:
    """A form of `head.plan` as `MarginHead` takes it."""
    return dict(
        dtype=form.dtype,
        momentum_dtype=form.momentum_dtype or torch.float32,
        momentum=MOMENTUM if form.momentum_dtype else 0.0,
        momentum_on_host=form.momentum_on_host,
    )


def make_rows() -> dict:
    """{row: what of `train` differs}. "head_lr" is a factor."""
    half = dict(dtype=torch.bfloat16, momentum_dtype=torch.bfloat16)
    rows = {name: form_options(form) for name, form in FORMATS.items()}
    rows.update(
        {
            "bf16, no momentum, 10 x lr": dict(rows["bf16, no momentum"], head_lr=10.0),
            "fp32, no momentum": dict(momentum=0.0),
            "bf16 to nearest + fp32 (control)": dict(dtype=torch.bfloat16, nearest=True),
            "fp32 + fp32, rate 0.1, sampled": dict(sample_rate=0.1),
            "fp32 + fp32, rate 0.1, all": dict(sample_rate=0.1, update_rows="all"),
            "bf16 + bf16, rate 0.1, sampled": dict(half, sample_rate=0.1),
            "bf16 + bf16, rate 0.1, all": dict(half, sample_rate=0.1, update_rows="all"),
        }
    )
    return rows


class Problem:
    """Identities and how they look. The same for every row and seed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(PROBLEM_SEED)
        wide = 2 * INPUT
        self.mix = torch.randn(2 * LATENT, wide, generator=generator) / LATENT**0.5
        self.shift = torch.randn(wide, generator=generator) * 0.5
        self.out = torch.randn(wide, INPUT, generator=generator) / wide**0.5
        people = torch.randn(CLASSES + UNSEEN, LATENT, generator=generator)
        self.train_people, self.unseen_people = people[:CLASSES], people[CLASSES:]
        # pairs: even ones show one person, odd ones two
        first_N = torch.randint(UNSEEN, (PAIRS,), generator=generator)
        other_N = (first_N + torch.randint(1, UNSEEN, (PAIRS,), generator=generator)) % UNSEEN
        self.same_N = torch.arange(PAIRS) % 2 == 0
        second_N = torch.where(self.same_N, first_N, other_N)
        who_2N = torch.stack([first_N, second_N], dim=1).reshape(-1)
        self.pairs_2NX = self.images(self.unseen_people[who_2N], generator)

    def images(self, people_BZ, generator):
        """[B, LATENT] -> [B, INPUT], each call with other nuisances and noise."""
        nuisance_BZ = NUISANCE * torch.randn(people_BZ.shape, generator=generator)
        hidden = torch.tanh(torch.cat([people_BZ, nuisance_BZ], dim=1) @ self.mix + self.shift)
        seen = hidden @ self.out
        return seen + NOISE * seen.std() * torch.randn(seen.shape, generator=generator)

    def verify(self, net) -> float:
        """Accuracy on pairs of identities that were not trained on."""
        net.eval()
        with torch.no_grad():
            unit_2ND = F.normalize(net(self.pairs_2NX))
        net.train()
        return evaluate_pairs(unit_2ND.numpy(), self.same_N.numpy()).accuracy


def make_net():
    layers, width = [], INPUT
    for _ in range(2):
        layers += [nn.Linear(width, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.PReLU(HIDDEN)]
        width = HIDDEN
    return nn.Sequential(*layers, nn.Linear(width, EMBEDDING, bias=False), nn.BatchNorm1d(EMBEDDING))


def to_nearest(rows_KW, dtype, _noise):
    return rows_KW.to(dtype)


def train(problem, seed, steps=STEPS, head_lr=1.0, nearest=False, margin="arcface", **options) -> dict:
    """One run. options: of `MarginHead`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(PROBLEM_SEED + 1 + seed)
    net = make_net()
    head = MarginHead(
        CLASSES, EMBEDDING, margin=margin, seed=seed, weight_decay=WEIGHT_DECAY, **{"momentum": MOMENTUM, **options}
    )
    optimizer = torch.optim.SGD(net.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY)
    untrained = problem.verify(net)
    losses, started = [], time.perf_counter()
    with mock.patch("head.storage.round_stochastically", to_nearest) if nearest else nullcontext():
        for step in range(steps):
            lr = LR * 0.1 ** sum(step >= milestone for milestone in MILESTONES)
            for group in optimizer.param_groups:
                group["lr"] = lr
            label_B = torch.randint(CLASSES, (BATCH,), generator=generator)
            image_BX = problem.images(problem.train_people[label_B], generator)
            loss = head(net(image_BX), label_B).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            head.step(lr * head_lr)
            losses.append(float(loss.detach()))
    seconds = time.perf_counter() - started
    return {
        "final_loss": round(float(np.mean(losses[-100:])), 4),
        "accuracy": round(problem.verify(net), 5),
        "untrained_accuracy": round(untrained, 5),
        "full_loss": round(full_loss(problem, net, head, margin), 4),
        "first_loss": round(float(np.mean(losses[:10])), 4),
        "seconds": round(seconds, 1),
    }


def full_loss(problem, net, head, margin) -> float:
    """The loss over all classes on fresh images of the trained people, with batch norm's running statistics: what rows
    with a sample rate have to be compared by, as their training loss has fewer classes in it."""
    generator = torch.Generator().manual_seed(PROBLEM_SEED - 1)
    net.eval(), head.eval()
    with torch.no_grad():
        label_N = torch.arange(CLASSES)
        images_NX = problem.images(problem.train_people, generator)
        loss = head(net(images_NX), label_N).loss
    return float(loss)


def row_bytes(options) -> int:
    """Of weight and momentum of a class of 512."""
    has_momentum = options.get("momentum", MOMENTUM) > 0
    return bytes_per_row(512, options.get("dtype", torch.float32)) + (
        bytes_per_row(512, options.get("momentum_dtype", torch.float32)) if has_momentum else 0
    )


# --- the record ------------------------------------------------------------------------------------------------------

MEASURES = {"final_loss": "loss, last 100 steps", "full_loss": "loss, all classes", "accuracy": "verification"}


def spread(runs, measure) -> tuple:
    """(mean, least, most) over the seeds."""
    values = [run[measure] for run in runs.values()]
    return sum(values) / len(values), min(values), max(values)


def outside(runs, base, measure) -> str:
    """Where a row's mean lies beside the seeds' spread of the base: "better", "worse" or "within"."""
    mean = spread(runs, measure)[0]
    _, least, most = spread(base, measure)
    if least <= mean <= most:
        return "within"
    return "better" if (mean > most) == (measure == "accuracy") else "worse"


def table(runs_by_row) -> str:
    """The rows as markdown: mean (least to most over the seeds), and which lie outside the spread of fp32 + fp32."""
    base = runs_by_row[BASE]
    lines = [
        "| centers + momentum | bytes a class of 512 | loss, last 100 steps | loss, all classes, fresh images | "
        "verification | beside the seeds of fp32 + fp32 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in runs_by_row.items():
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*spread(runs, measure)) for measure in ("final_loss", "full_loss")]
        cells.append("{:.4f} ({:.4f} to {:.4f})".format(*spread(runs, "accuracy")))
        verdict = f"loss {outside(runs, base, 'full_loss')}, verification {outside(runs, base, 'accuracy')}"
        lines.append(
            f"| {name} | {row_bytes(make_rows()[name]):,} | {' | '.join(cells)} | "
            f"{'the spread itself' if name == BASE else verdict} |"
        )
    return "\n".join(lines)


def content_of(runs_by_row) -> dict:
    """The problem, each run, and the summary that the table shows."""
    problem = dict(
        classes=CLASSES,
        unseen=UNSEEN,
        steps=STEPS,
        batch=BATCH,
        latent=LATENT,
        input=INPUT,
        hidden=HIDDEN,
        embedding=EMBEDDING,
        nuisance=NUISANCE,
        noise=NOISE,
        pairs=PAIRS,
        lr=LR,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        milestones=MILESTONES,
        margin="arcface",
        s=64,
        m=0.5,
    )
    summary = (
        {
            name: {
                measure: dict(
                    zip(("mean", "least", "most"), (round(v, 5) for v in spread(runs, measure))),
                    beside_base=outside(runs, runs_by_row[BASE], measure),
                )
                for measure in MEASURES
            }
            for name, runs in runs_by_row.items()
        }
        if BASE in runs_by_row
        else {}
    )
    return {"problem": problem, "summary": summary, "runs": runs_by_row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(make_rows()),
        default=list(make_rows()),
        metavar="ROW",
        help=f"of {', '.join(make_rows())}; {BASE} is always among them",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after the run in which they end; 0 = never")
    parser.add_argument("--again", action="store_true", help="do not go on from the record of an earlier call")
    parser.add_argument("--output", default=str(RESULTS), help="folder of the record, DATE_quality_cpu.json")
    options = parser.parse_args()
    file = Path(options.output) / f"{time.strftime('%Y-%m-%d')}_quality_cpu.json"
    done = {} if options.again or not file.exists() else json.loads(file.read_text())["runs"]
    device, problem, all_rows = parse_device("cpu"), Problem(), make_rows()
    wanted = [name for name in all_rows if name in options.rows or name == BASE]
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    for seed in range(options.seeds):
        for name in wanted:
            if str(seed) in done.get(name, {}) or time.monotonic() > end:
                continue
            run = train(problem, seed, options.steps, **all_rows[name])
            done.setdefault(name, {})[str(seed)] = run
            sys.stderr.write(f"{name}, seed {seed}: {json.dumps(run)}\n")
            ordered = {row: done[row] for row in all_rows if row in done}
            write_record("quality_cpu", content_of(ordered), device, options.output)
    missing = sum(options.seeds - len(done.get(name, {})) for name in wanted)
    if missing:
        sys.exit(f"{missing} runs are missing: the same command goes on from {file}")
    sys.stdout.write(table({row: done[row] for row in all_rows if row in done}) + "\n")


if __name__ == "__main__":
    main()
