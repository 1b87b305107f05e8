"""The training step, fast path by fast path, beside the plain formulation and a baseline's, in one run.

    OMP_NUM_THREADS=2 python -m benchmark.step [--device cpu] [--nets ir_50 mobilefacenet] [--batches 8 32]
    python -m benchmark.step --device cuda --head 85742 --policies O2 bf16 --baseline FOLDER_OF_ARCFACE_TORCH
    python -m benchmark.step --nets mobilefacenet ir_se_50 --head 85742 --baseline FOLDER_OF_INSIGHTFACE_PYTORCH

A step is what `Learner` does with a batch of synthetic faces that lies on the device: forward, backward, update; with
--head C also the margin loss over C classes and the update of their centers, without it (0) a fixed gradient of the
embedding. Each of --fast is a form of it: `plain` (torch.nn modules, autocast where the policy is not O0,
torch.optim.SGD, a dense Partial FC), `default` (what train.py does here without options), or switches over these,
joined by +: contiguous channels_last static tf32 no_autotune sgd_plain sgd_foreach sgd_fused npu_fused_sgd, and copied
or overlapped for a batch that comes from the host in every step, in turn with the computation or beside it.

The forms take turns, so that whatever else the machine does meets all of them; figures are medians over the rounds, a
speed-up is the median of (seconds of the first form / its seconds). CPU seconds (all threads) stand beside, because
they count less of what other processes do. matmul_share is the arithmetic of net and head (forward and backward,
recomputation not counted) a second, over what a square matrix product of the same type reached in the same round; on a
CPU it may pass 1, where convolutions use its instructions better than the matrix product does. peak_MiB is measured in
a process of its own, above what importing torch and opening the device take.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch.nn import functional as F

from benchmark.head import ENVIRONMENT, PlainPartialFC
from benchmark.plain_backbones import PLAIN
from benchmark.record import write_record
from data.faces import draw_face, draw_identity
from data.transforms import to_input
from head.head import MarginHead
from model import create_model
from optim import SGD_KINDS, make_sgd, parameter_groups, sgd_kind
from runtime import log
from runtime.device import Device, parse_device
from runtime.errors import UserError
from runtime.loss_scale import parse_loss_scale
from runtime.precision import BATCH_NORM, POLICIES, Precision

EMBEDDING_SIZE = 512
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# A small rate: large steps on one batch soon collapse the activations, whose signs the processor then predicts, and
# whatever branches on them runs faster than it does in training.
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 5e-4
WARMUP_ROUNDS = 2
# Without --nets: {net: batches}
ON_CPU = {"ir_50": (8,), "mobilefacenet": (32,)}
ON_ACCELERATOR = dict.fromkeys(("ir_100", "ir_se_100", "iresnet_100", "ir_50", "mobilefacenet"), (128, 256, 512))
FAST = {
    "cpu": ("plain", "default", "contiguous", "sgd_foreach", "sgd_fused"),
    "cuda": ("plain", "default", "contiguous", "channels_last", "sgd_plain", "sgd_foreach", "tf32", "no_autotune",
             "static", "channels_last+static", "copied", "overlapped"),
    "npu": ("plain", "default", "contiguous", "channels_last", "sgd_plain", "sgd_foreach", "tf32", "copied",
            "overlapped"),
}  # fmt: skip


class BenchmarkError(UserError):
    """What was asked for cannot be measured here; one line with the cure."""


@dataclass(frozen=True)
class Form:
    """How a step is taken. memory_format and sgd None: what the device prefers (ours), torch's defaults (plain)."""

    name: str
    net: str = "ours"  # or "plain", "baseline"
    memory_format: str | None = None
    sgd: str | None = None
    static: bool = False
    tf32: bool = False
    autotune: bool = True
    feed: str = "resident"  # or "copied", "overlapped"


SWITCHES = {
    "default": {},
    "plain": {"net": "plain"},
    "baseline": {"net": "baseline"},
    **{name: {"memory_format": name} for name in FORMATS},
    **{kind: {"sgd": kind} for kind in SGD_KINDS},
    "static": {"static": True},
    "tf32": {"tf32": True},
    "no_autotune": {"autotune": False},
    "copied": {"feed": "copied"},
    "overlapped": {"feed": "overlapped"},
}


def parse_form(text: str) -> Form:
    """ "plain+channels_last" -> the Form. Raises BenchmarkError that names the choices."""
    form = Form(text)
    for word in text.split("+"):
        if word not in SWITCHES:
            raise BenchmarkError(f"--fast {text}: '{word}' is no fast path; choose from {', '.join(SWITCHES)}")
        form = dataclasses.replace(form, **SWITCHES[word])
    return form


def parse_net(text: str) -> tuple[str, int | None]:
    """ "ir_se_100", "iresnet100", "mobilefacenet" -> (net_mode, net_depth) of model.create_model."""
    matched = re.fullmatch(r"(ir|ir_se|iresnet|resnet)_?(\d+)", text)
    if not matched and text != "mobilefacenet":
        raise BenchmarkError(f"--nets {text}: name a net as in ir_50, ir_se_100, iresnet100 or mobilefacenet")
    return (matched[1], int(matched[2])) if matched else (text, None)


def name_of(net_mode: str, net_depth: int | None) -> str:
    return net_mode if net_depth is None else f"{net_mode}_{net_depth}"


@dataclass(frozen=True)
class Case:
    """One row of the table. classes: of the head; 0 for the backbone alone."""

    net_mode: str
    net_depth: int | None
    batch_size: int
    policy: str
    form: Form
    classes: int
    baseline: Path | None = None

    @property
    def net(self) -> str:
        return name_of(self.net_mode, self.net_depth)


# --- what is measured ------------------------------------------------------------------------------------------------
class Step:
    """Calling it takes one training step. net: the backbone; on: its fast paths; precision: ours or None."""

    def __init__(self, case: Case, device: Device):
        self.case, self.device, self.precision = case, device, None
        torch.manual_seed(0)
        self.goal_BD = torch.randn(case.batch_size, EMBEDDING_SIZE).to(device.torch)
        build = {"ours": self._ours, "plain": self._plain, "baseline": self._baseline}[case.form.net]
        if case.form.net == "baseline" and is_insightface_pytorch(case.baseline):
            build = self._insightface_pytorch
        self.net, self._take, self._cast, memory_format, sgd, opt_level = build()
        self.memory_format = FORMATS[memory_format]
        self.on = {
            "memory_format": memory_format,
            "sgd": sgd,
            "static": case.form.static,
            **device.tune(case.form.tf32, case.form.autotune),
            "feed": case.form.feed,
            "opt_level": opt_level,
        }
        batch = draw_batch(case.batch_size, case.classes)
        if device.kind != "cpu":
            batch = tuple(tensor.pin_memory() for tensor in batch)
        if case.form.feed == "overlapped":
            self._batches = device.prefetch(itertools.repeat(batch), self._move)
        elif case.form.feed == "copied":
            self._batches = map(self._move, itertools.repeat(batch))
        else:
            self._batches = itertools.repeat(self._move(batch))

    def __call__(self) -> None:
        self._take(*next(self._batches))

    def _move(self, batch):
        images_BHWC, labels_B = (tensor.to(self.device.torch, non_blocking=True) for tensor in batch)
        return self._cast(to_input(images_BHWC, memory_format=self.memory_format)), labels_B

    def _ours(self):
        case, device, form = self.case, self.device, self.case.form
        default = next(name for name, value in FORMATS.items() if value == device.memory_format)
        memory_format = form.memory_format or default
        net = create_model(case.net_mode, case.net_depth, EMBEDDING_SIZE)
        net.to(device=device.torch, memory_format=FORMATS[memory_format])
        precision = self.precision = Precision(case.policy, device, scaling=parse_loss_scale("128.0"))
        optimizer = precision.prepare(
            net,
            lambda groups: make_sgd(groups, LR, MOMENTUM, device, form.sgd or "auto"),
            parameter_groups(net, case.net_mode, WEIGHT_DECAY),
        )
        options = dict(device=device.torch, operand=precision.policy.compute, batch=case.batch_size)
        head = MarginHead(case.classes, EMBEDDING_SIZE, **options) if case.classes else None
        run = device.compiled(net) if form.static else net

        def take(images_BCHW, labels_B):
            if head is not None:
                head.prepare(labels_B)
            with precision.autocast():
                emb_BD = run(images_BCHW)
            precision.backward((emb_BD * self.goal_BD).sum() if head is None else head(emb_BD, labels_B).loss)
            precision.step(optimizer, head, LR)

        return net, take, precision.cast_input, memory_format, sgd_kind(optimizer), case.policy

    def _plain(self):
        case, device, form = self.case, self.device, self.case.form
        if case.net not in PLAIN:
            raise BenchmarkError(
                f"{case.net} has no plain formulation here: give --fast without plain, or one of {', '.join(PLAIN)}"
            )
        net = PLAIN[case.net]()
        head = PlainPartialFC(case.classes, EMBEDDING_SIZE, 1.0, MOMENTUM, device.torch) if case.classes else None
        memory_format = form.memory_format or "contiguous"
        net.to(device=device.torch, memory_format=FORMATS[memory_format])
        parameters = [p for part in (net, head) if part is not None for p in part.parameters()]
        how = {} if form.sgd is None else {"foreach": form.sgd == "sgd_foreach", "fused": form.sgd == "sgd_fused"}
        optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **how)
        run = device.compiled(net) if form.static else net
        compute = POLICIES[case.policy].compute
        scaler = device.grad_scaler_class()(init_scale=128.0) if compute == torch.float16 else None

        def take(images_BCHW, labels_B):
            optimizer.zero_grad(set_to_none=True)
            with device.autocast(compute):
                emb_BD = run(images_BCHW)
                loss = (emb_BD * self.goal_BD).sum() if head is None else head(emb_BD, labels_B)
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        autocast = "fp32" if compute == torch.float32 else f"autocast to {str(compute).replace('torch.', '')}"
        return net, take, lambda images: images, memory_format, form.sgd or "torch.optim.SGD", autocast

    def _baseline(self):
        """The step of arcface_torch's train_v2.py: its net and Partial FC in fp32 or its fp16, data parallel over one
        rank, the gradient's norm clipped at 5."""
        case, device = self.case, self.device
        half = POLICIES[case.policy].compute == torch.float16
        if not half and case.policy != "O0":
            raise BenchmarkError(f"the baseline trains in fp32 and fp16 only, not in {case.policy}")
        get_model, losses, partial_fc = baseline_modules(case.baseline, device, bool(case.classes))
        net = get_model(
            "mbf" if case.net_depth is None else f"r{case.net_depth}",
            fp16=half,
            num_features=EMBEDDING_SIZE,
            dropout=0.0,
        ).to(device.torch)
        devices = None if device.kind == "cpu" else [device.index]
        net = torch.nn.parallel.DistributedDataParallel(
            net, device_ids=devices, broadcast_buffers=False, bucket_cap_mb=16, find_unused_parameters=True
        )
        net.train()
        net._set_static_graph()
        groups, head = [{"params": net.parameters()}], None
        if case.classes:
            margin = losses.CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0)
            head = partial_fc.PartialFC_V2(margin, EMBEDDING_SIZE, case.classes, 1.0, half).train().to(device.torch)
            groups.append({"params": head.parameters()})
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        scaler = device.grad_scaler_class()(growth_interval=100) if half else None

        def take(images_BCHW, labels_B):
            emb_BD = net(images_BCHW)
            loss = (emb_BD * self.goal_BD).sum() if head is None else head(emb_BD, labels_B)
            if scaler is None:
                loss.backward()
            else:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 5)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()

        precision = "its fp16" if half else "fp32"
        return net.module, take, lambda images: images, "contiguous", "torch.optim.SGD", precision

    def _insightface_pytorch(self):
        """The step of InsightFace_Pytorch's Learner.train: its net, its Arcface with all logits, one SGD over both in
        which batch norm does not decay, and the loss read in each step. fp32 is all it has."""
        case, device = self.case, self.device
        if case.policy != "O0":
            raise BenchmarkError(f"the baseline trains in fp32 only, not in {case.policy}")
        theirs = insightface_pytorch(case.baseline)
        if case.net_depth is None:
            net = theirs.MobileFaceNet(EMBEDDING_SIZE)
        else:
            net = theirs.Backbone(case.net_depth, 0.6, case.net_mode)
        net.to(device.torch).train()
        head = theirs.Arcface(EMBEDDING_SIZE, case.classes).to(device.torch) if case.classes else None
        norms = {id(p) for m in net.modules() if isinstance(m, BATCH_NORM) for p in m.parameters()}
        parameters = [p for part in (net, head) if part is not None for p in part.parameters()]
        groups = [
            {"params": [p for p in parameters if id(p) not in norms], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if id(p) in norms]},
        ]
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)

        def take(images_BCHW, labels_B):
            optimizer.zero_grad()
            emb_BD = net(images_BCHW)
            loss = (emb_BD * self.goal_BD).sum() if head is None else F.cross_entropy(head(emb_BD, labels_B), labels_B)
            loss.backward()
            loss.item()
            optimizer.step()

        return net, take, lambda images: images, "contiguous", "torch.optim.SGD", "fp32"


def draw_batch(batch_size: int, classes: int):
    """uint8 [B, 112, 112, 3] of synthetic faces, and int64 labels [B] below `classes`."""
    random = numpy.random.RandomState(0)
    drawn = [numpy.asarray(draw_face(draw_identity(random), random)) for _ in range(min(batch_size, 64))]
    faces = numpy.stack([drawn[i % len(drawn)] for i in range(batch_size)])
    return torch.from_numpy(faces), torch.from_numpy(random.randint(0, max(classes, 1), batch_size))


def baseline_modules(folder: Path, device: Device, with_head: bool):
    """(get_model, losses, partial_fc_v2) of a folder that holds arcface_torch, with its world of one rank open."""
    for file in ("backbones/__init__.py", "losses.py", "partial_fc_v2.py"):
        if not (folder / file).is_file():
            raise BenchmarkError(
                f"--baseline {folder}: no {file} in it; give the folder recognition/arcface_torch of a "
                "checkout of deepinsight/insightface"
            )
    if not hasattr(torch.nn.parallel.DistributedDataParallel, "_set_static_graph"):
        raise BenchmarkError(f"--baseline: arcface_torch needs torch 1.11 or newer, and this is {torch.__version__}")
    if with_head and device.kind != "cuda":
        raise BenchmarkError(
            f"--baseline with --head: the baseline's Partial FC runs on cuda only; leave --head out on {device.kind}"
        )
    if not dist.is_initialized():
        file = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group(device.backend, init_method=f"file://{file}", rank=0, world_size=1)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that no file of the baseline's hides one of ours
    return (
        importlib.import_module("backbones").get_model,
        importlib.import_module("losses"),
        importlib.import_module("partial_fc_v2"),
    )


def is_insightface_pytorch(folder: Path) -> bool:
    return (folder / "model.py").is_file() and (folder / "Learner.py").is_file()


def insightface_pytorch(folder: Path):
    """The module model.py of a checkout of InsightFace_Pytorch; the rest of it needs libraries that are gone."""
    spec = importlib.util.spec_from_file_location("insightface_pytorch_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_same_numbers(net_mode: str, net_depth: int | None, device: Device) -> None:
    """Raises BenchmarkError unless the plain formulation gives our embeddings for the same weights, in fp32."""
    plain, ours = PLAIN[name_of(net_mode, net_depth)](), create_model(net_mode, net_depth, EMBEDDING_SIZE)
    ours.load_state_dict(plain.state_dict())
    device.tune(tf32=False)
    x_BCHW = to_input(draw_batch(2, 0)[0].to(device.torch))
    with torch.no_grad():
        one, other = (F.normalize(net.to(device.torch).eval()(x_BCHW)) for net in (plain, ours))
    difference = float((one - other).abs().max())
    if not difference < 1e-5:
        raise BenchmarkError(f"{name_of(net_mode, net_depth)}: the two formulations' embeddings differ by {difference}")


class Matmul:
    """A square matrix product; calling it takes `flops` operations."""

    def __init__(self, device: Device, dtype: torch.dtype):
        size = 1024 if device.kind == "cpu" else 8192
        self.a, self.b = (torch.randn(size, size).to(device.torch, dtype) for _ in range(2))
        self.flops = 2 * size**3

    def __call__(self) -> None:
        torch.mm(self.a, self.b)


def training_flops(net: torch.nn.Module) -> int:
    """Operations of an image (2 a multiplication with its addition) in the convolutions and matrix products of a
    training step: forward, gradient of the weights and of the input; the image itself needs none."""
    counts = []

    def count(module, inputs, output):
        counts.append(2 * module.weight[0].numel() * output[0].numel())  # weights of an output, outputs of an image

    layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    handles = [layer.register_forward_hook(count) for layer in layers]
    weight = next(net.parameters())
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, 112, 112, device=weight.device, dtype=weight.dtype))
    net.train()
    for handle in handles:
        handle.remove()
    return 3 * sum(counts) - counts[0]


# --- measuring -------------------------------------------------------------------------------------------------------
def take_turns(forms: dict, device: Device, rounds: int, steps: int) -> dict:
    """{name: [(seconds, CPU seconds) a call, of each round]}, after the rounds that do not count.

    forms: {name: (tf32, autotune, callable)}; each is called `steps` times a round, between two synchronisations.
    """
    taken = {name: [] for name in forms}
    for _ in range(WARMUP_ROUNDS + rounds):
        for name, (tf32, autotune, call) in forms.items():
            device.tune(tf32, autotune)
            device.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                call()
            device.synchronize()
            taken[name].append(((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    return {name: times[WARMUP_ROUNDS:] for name, times in taken.items()}


def peak_memory(case: Case, device: Device) -> int | None:
    """Bytes at the peak of two steps above what was there before the net; in a new process. None: out of memory."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak_memory, (case, device, torch.get_num_threads()))
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _peak_memory(case: Case, device: Device, threads: int) -> int | None:
    torch.set_num_threads(threads)
    if device.kind != "cpu":  # there set() keeps freed memory, and the peak would not be what was in use
        device.set()
        torch.zeros(1, device=device.torch)
    device.tune(case.form.tf32, case.form.autotune)
    draw_batch(1, 1)
    device.reset_peak_memory()
    before = device.memory_allocated()
    try:
        step = Step(case, device)
        for _ in range(2):
            step()
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return None
    return device.max_memory_allocated() - before


def _out_of_memory(error: RuntimeError) -> bool:
    return "out of memory" in str(error).lower()


def rows_of(cases: list, device: Device, rounds: int, steps: int) -> list[dict]:
    """The rows of cases that differ in their form only."""
    first = cases[0]
    dtype = POLICIES[first.policy].compute
    peaks = {case.form.name: peak_memory(case, device) for case in cases}
    forms = {f"matmul tf32={tf32}": (tf32, True, Matmul(device, dtype)) for tf32 in {c.form.tf32 for c in cases}}
    built = {case.form.name: Step(case, device) for case in cases if peaks[case.form.name] is not None}
    forms.update({name: (step.case.form.tf32, step.case.form.autotune, step) for name, step in built.items()})
    taken = take_turns(forms, device, rounds, steps)

    def ratios(name, other, column):
        return statistics.median(a[column] / b[column] for a, b in zip(taken[name], taken[other]))

    rows = []
    for case in cases:
        name = case.form.name
        row = {"net": case.net, "batch_size": case.batch_size, "policy": case.policy, "form": name}
        rows.append(row)
        if name not in built:
            row.update(note="out of memory")
            continue
        flops = training_flops(built[name].net) + 6 * EMBEDDING_SIZE * case.classes
        matmul = f"matmul tf32={case.form.tf32}"
        seconds, cpu_seconds = (statistics.median(times[column] for times in taken[name]) for column in (0, 1))
        matmul_seconds = statistics.median(times[0] for times in taken[matmul])
        skipped = built[name].precision.skipped if built[name].precision else 0
        row.update(
            images_per_s=round(case.batch_size / seconds, 2), step_s=round(seconds, 5),
            step_cpu_s=round(cpu_seconds, 5), peak_MiB=round(peaks[name] / 2**20),
            GFLOP_per_image=round(flops / 1e9, 2),
            matmul_share=round(case.batch_size * flops / forms[matmul][2].flops * ratios(matmul, name, 0), 3),
            matmul_GFLOP_per_s=round(forms[matmul][2].flops / matmul_seconds / 1e9, 1),
            speedup=round(ratios(next(iter(built)), name, 0), 3),
            speedup_cpu=round(ratios(next(iter(built)), name, 1), 3),
            note=f"{skipped} steps skipped for an overflow" if skipped else "", on=built[name].on)  # fmt: skip
    return rows


COLUMNS = ("net", "batch_size", "policy", "form", "images_per_s", "step_s", "step_cpu_s", "peak_MiB",
           "GFLOP_per_image", "matmul_share", "matmul_GFLOP_per_s", "speedup", "speedup_cpu", "on", "note")  # fmt: skip


def as_markdown(record: dict) -> str:
    def cell(row, column):
        value = row.get(column, "")
        if column == "on" and value:
            flags = [name for name in ("static", "tf32", "autotune") if value[name]]
            value = ", ".join([value["opt_level"], value["memory_format"], value["sgd"], *flags, value["feed"]])
        return str(value)

    lines = [f"# Training step on {record['hardware']['kind']}, {record['date']}", "", f"    {record['command']}", ""]
    lines += [f"- {key}: {log.plain(record[key])}" for key in (
        "hardware", "versions", "commit", "threads", "classes", "rounds", "steps", "load_before", "load",
        "malloc")]  # fmt: skip
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(row, column) for column in COLUMNS) + " |" for row in record["rows"]]
    return "\n".join(lines) + "\n"


def plan(options, device: Device) -> list[list[Case]]:
    """What to measure: the cases of each net, batch and policy. Everything that cannot be is refused here."""
    defaults = ON_CPU if device.kind == "cpu" else ON_ACCELERATOR
    nets = [parse_net(net) for net in options.nets or defaults]
    fast = options.fast or [
        name for name in FAST[device.kind] if name not in SGD_KINDS or name in {*device.fused_optimizers(), "sgd_plain"}
    ]
    forms = [parse_form(text) for text in fast]
    if options.baseline and not any(form.net == "baseline" for form in forms):
        forms.append(parse_form("baseline"))
    if not options.baseline and any(form.net == "baseline" for form in forms):
        raise BenchmarkError("--fast baseline: say with --baseline where arcface_torch or InsightFace_Pytorch is")
    policies = options.policies or ["O0" if device.kind == "cpu" else "O2"]
    for policy in policies:
        Precision(policy, device)  # says it where the device lacks the type
    groups = []
    for net_mode, net_depth in nets:
        create = name_of(net_mode, net_depth)
        batches = options.batches or defaults.get(create, (8,) if device.kind == "cpu" else (128, 256, 512))
        if any(form.net == "plain" for form in forms) and create not in PLAIN:
            raise BenchmarkError(
                f"--nets {create}: it has no plain formulation to stand beside; leave plain out of "
                f"--fast, or choose from {', '.join(PLAIN)}"
            )
        groups += [
            [
                Case(net_mode, net_depth, batch, policy, form, options.head, options.baseline)
                for form in forms
                if not (form.net == "baseline" and policy.startswith("bf16"))
            ]  # it has none
            for batch in batches
            for policy in policies
        ]
    if options.baseline and not is_insightface_pytorch(options.baseline):
        baseline_modules(options.baseline, device, bool(options.head))
    return groups


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="npu, cuda, cpu, with an index as in cuda:1")
    parser.add_argument("--nets", nargs="+", help="ir_50, ir_se_100, iresnet100, mobilefacenet ...")
    parser.add_argument("--batches", nargs="+", type=int, help="images a step, each for every net")
    parser.add_argument("--policies", nargs="+", help=f"{', '.join(POLICIES)}; without it O0 on cpu, else O2")
    parser.add_argument("--fast", nargs="+", help=f"forms of the step: {', '.join(SWITCHES)}, joined by +")
    parser.add_argument("--head", type=int, default=0, help="classes of the loss; 0 measures the backbone alone")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="steps a form takes in its turn; without it 1 on cpu, else 10")
    parser.add_argument("--baseline", type=Path, help="a folder with arcface_torch or InsightFace_Pytorch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the record")
    options = parser.parse_args(argv)
    for name, low in (("rounds", 1), ("steps", 1), ("head", 0)):
        if getattr(options, name) is not None and getattr(options, name) < low:
            raise BenchmarkError(f"--{name} {getattr(options, name)}: must be at least {low}")
    device = parse_device(options.device)
    device.set()
    steps = options.steps or (1 if device.kind == "cpu" else 10)
    groups = plan(options, device)
    load_before = [round(value, 1) for value in os.getloadavg()]
    for net in {(case.net_mode, case.net_depth) for group in groups for case in group if case.net in PLAIN}:
        check_same_numbers(*net, device)
    rows = []
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    name = f"step_{device.kind}_torch-{torch.__version__.split('+')[0]}"
    for cases in groups:
        rows += rows_of(cases, device, options.rounds, steps)
        for row in rows[-len(cases) :]:
            said = f"{row['net']} {row['batch_size']} {row['policy']} {row['form']}: {row.get('images_per_s')} images/s"
            print(said, file=sys.stderr)
        content = {
            "classes": options.head,
            "rounds": options.rounds,
            "steps": steps,
            "load_before": load_before,
            "malloc": malloc or "freed memory is kept, as in training (Device.set); for peak_MiB it is given back",
            "rows": rows,
        }
        command = f"OMP_NUM_THREADS={torch.get_num_threads()} python -m benchmark.step {arguments}".rstrip()
        path = write_record(name, content, device, options.output, command)  # as it goes
        path.with_suffix(".md").write_text(as_markdown(json.loads(path.read_text())), encoding="utf-8")
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    log.run_command(main)
