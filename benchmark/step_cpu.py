"""The backbone's training step on the CPU beside the plain formulation, in one run.

    OMP_NUM_THREADS=2 python -m benchmark.step_cpu [--nets ir_50 mobilefacenet] [--batches 8 32] [--rounds 9]

A step is forward, backward and SGD in float32, on drawn faces, without loader or head. The forms take turns, so that
whatever else the machine does meets all of them; a row's speed-up is the median over the rounds of plain seconds / its
seconds. CPU seconds (all threads) stand beside, because they count less of what other processes do. Before the timing,
the forms are seen to give the same output for the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy
import torch

from benchmark import plain_backbones
from data.faces import draw_face, draw_identity
from data.transforms import to_input
from model import create_model
from optim import make_sgd, parameter_groups
from runtime.device import Device

NETS = {
    "ir_50": (plain_backbones.IR50, ("ir", 50)),
    "mobilefacenet": (plain_backbones.MobileFaceNet, ("mobilefacenet", None)),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A small rate: large steps on one batch soon collapse the activations, whose signs the processor then predicts, and
# whatever branches on them runs faster than it does in training.
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4


def make_forms(net: str, batch_size: int) -> dict:
    """{name of the form: function that takes one training step}, all from the same weights and images."""
    device = Device("cpu")
    plain_class, (net_mode, net_depth) = NETS[net]
    torch.manual_seed(0)
    random = numpy.random.RandomState(0)
    faces = [numpy.asarray(draw_face(draw_identity(random), random)) for _ in range(batch_size)]
    x_BCHW = to_input(torch.from_numpy(numpy.stack(faces)))
    goal_BD = torch.randn(batch_size, 512)
    nets = {"plain": plain_class()}
    for name in FORMATS:
        nets[name] = create_model(net_mode, net_depth)
        nets[name].load_state_dict(nets["plain"].state_dict())
        difference = _difference(nets["plain"], nets[name], x_BCHW[:2])
        if difference:
            raise SystemExit(f"{net}: the two formulations differ by {difference}")
    sgd = torch.optim.SGD(nets["plain"].parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    forms = {"plain": _step(nets["plain"], sgd, x_BCHW, goal_BD)}
    for name, memory_format in FORMATS.items():
        ours = nets[name].to(memory_format=memory_format)
        sgd = make_sgd(parameter_groups(ours, net_mode, WEIGHT_DECAY), LR, MOMENTUM, device)
        default = " (default)" if memory_format == device.memory_format else ""
        forms[f"{name}{default}"] = _step(ours, sgd, x_BCHW.contiguous(memory_format=memory_format), goal_BD)
    return forms


def _difference(one, other, x_BCHW) -> float:
    with torch.no_grad():
        return float((one.eval()(x_BCHW) - other.eval()(x_BCHW)).abs().max())


def _step(net, optimizer, x_BCHW, goal_BD):
    def step():
        net.train()
        optimizer.zero_grad(set_to_none=True)
        (net(x_BCHW) * goal_BD).sum().backward()
        optimizer.step()

    return step


def measure(forms: dict, rounds: int) -> dict:
    """{form: [(seconds, CPU seconds) of each round]}, after two rounds that do not count."""
    taken = {name: [] for name in forms}
    for _ in range(rounds + 2):
        for name, step in forms.items():
            start = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: times[2:] for name, times in taken.items()}


def rows_of(net: str, batch_size: int, taken: dict) -> list[dict]:
    def median(name, column):
        return statistics.median(times[column] for times in taken[name])

    def speedup(name, column):
        return statistics.median(plain[column] / ours[column] for plain, ours in zip(taken["plain"], taken[name]))

    return [
        {
            "net": net,
            "batch_size": batch_size,
            "form": name,
            "images_per_s": round(batch_size / median(name, 0), 2),
            "step_s": round(median(name, 0), 4),
            "step_cpu_s": round(median(name, 1), 4),
            "speedup": round(speedup(name, 0), 3),
            "speedup_cpu": round(speedup(name, 1), 3),
        }
        for name in taken
    ]


def as_markdown(record: dict) -> str:
    columns = list(record["rows"][0])
    lines = [f"# Training step on the CPU, {record['date']}", "", f"    {record['command']}", ""]
    lines += [f"- {key}: {record[key]}" for key in ("machine", "torch", "threads", "rounds", "load", "malloc")]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in record["rows"]]
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="images a step, one number per net")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    options = parser.parse_args(argv)
    if len(options.batches) != len(options.nets):
        parser.error(f"--batches {options.batches}: give one number for each of {', '.join(options.nets)}")
    description = Device("cpu").describe()
    rows = []
    for net, batch_size in zip(options.nets, options.batches):
        rows += rows_of(net, batch_size, measure(make_forms(net, batch_size), options.rounds))
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    record = {
        "benchmark": "step_cpu",
        "date": time.strftime("%Y-%m-%d"),
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python -m benchmark.step_cpu "
        f"--nets {' '.join(options.nets)} --batches {' '.join(map(str, options.batches))} --rounds {options.rounds}",
        "machine": description["name"],
        "torch": description["torch"],
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "load": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "malloc": " ".join(f"{name}={value}" for name, value in sorted(malloc.items())) or "as the system has it",
        "rows": rows,
    }
    print(as_markdown(record))
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"{record['date']}_step_cpu_torch-{torch.__version__.split('+')[0]}"
    Path(f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(as_markdown(record), encoding="utf-8")


if __name__ == "__main__":
    main()
