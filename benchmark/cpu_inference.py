"""Embedding on the CPU: ways to run one net, their latency, images/s and what each costs in accuracy.

    python -m benchmark.cpu_inference --net mobilefacenet --threads 2
    python -m benchmark.cpu_inference --net ir_50 --threads 2
    python -m benchmark.cpu_inference --accuracy --model mobilefacenet_128.onnx --pairs lfw.bin

Speed is measured on this project's nets with random weights (it does not depend on them), all ways in turn, round by
round, so that other work on the machine meets each alike; the record holds the median round, and the processor's time
beside it, which other work changes less. Accuracy is that of a trained ONNX model on a pair set; for the ways of torch
its graph is rebuilt in torch, operator by operator.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as every command has it; read when torch is loaded

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark.record import write_record  # noqa: E402
from data.pairs import load_pairs  # noqa: E402
from deploy.backends import OnnxRecognizer, open_session, without_prelu  # noqa: E402
from deploy.quantise import write_int8  # noqa: E402
from model import create_model  # noqa: E402
from runtime.device import parse_device  # noqa: E402
from verify.protocol import evaluate_pairs  # noqa: E402

NETS = {"mobilefacenet": ("mobilefacenet", None), "ir_50": ("ir", 50)}


class GraphInTorch(nn.Module):
    """An ONNX graph of Conv, Clip, Relu, Add and Reshape as a torch module."""

    def __init__(self, path):
        super().__init__()
        import onnx

        graph = onnx.load(path).graph
        constants = {i.name: torch.tensor(onnx.numpy_helper.to_array(i)) for i in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = torch.tensor(onnx.numpy_helper.to_array(node.attribute[0].t))
        self.steps, self.convs = [], nn.ModuleList()
        self.input, self.output = graph.input[0].name, graph.output[0].name
        for node in graph.node:
            options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = [name for name in node.input if name not in constants]
            if node.op_type == "Conv":
                weight, bias = (constants[name] for name in node.input[1:])
                conv = nn.Conv2d(weight.shape[1] * options["group"], len(weight), weight.shape[2:], options["strides"],
                                 options["pads"][:2], groups=options["group"])  # fmt: skip
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                step = len(self.convs)
                self.convs.append(conv)
            else:
                bounds = [float(constants[name]) for name in node.input[1:]] if node.op_type == "Clip" else ()
                step = (node.op_type, bounds)
            self.steps.append((step, inputs, node.output[0]))
        self.steps = [step for step in self.steps if step[1]]

    def forward(self, x):
        values = {self.input: x}
        for step, inputs, output in self.steps:
            x = [values[name] for name in inputs]
            if isinstance(step, int):
                values[output] = self.convs[step](x[0])
            elif step[0] == "Add":
                values[output] = x[0] + x[1]
            elif step[0] == "Reshape":
                values[output] = x[0].flatten(1)
            else:
                values[output] = F.relu(x[0]) if step[0] == "Relu" else x[0].clamp(*step[1])
        return values[self.output]


# --- the ways: each makes a function from float32 [B, 3, 112, 112] to float32 [B, D] ----------------------------------


def torch_way(net, memory_format=torch.contiguous_format, dtype=torch.float32, compiled=False, frozen=False):
    import copy

    net = copy.deepcopy(net).eval().to(memory_format=memory_format, dtype=dtype)
    run = torch.compile(net) if compiled else net
    if frozen:
        with torch.inference_mode():
            x = torch.zeros(2, 3, 112, 112, dtype=dtype).contiguous(memory_format=memory_format)
            run = torch.jit.freeze(torch.jit.trace(net, x, check_trace=False))

    def embed(x_BCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(x_BCHW).to(dtype=dtype).contiguous(memory_format=memory_format)
            return run(x).float().numpy()

    return embed


def onnx_way(path, threads, one_a_core=False):
    """one_a_core: as served, `threads` calls of one image each at a time."""
    from concurrent.futures import ThreadPoolExecutor

    session = open_session(path, threads)
    name, fixed = session.get_inputs()[0].name, isinstance(session.get_inputs()[0].shape[0], int)
    callers = ThreadPoolExecutor(threads)

    def embed(x_BCHW):
        if not one_a_core and not fixed:
            return session.run(None, {name: x_BCHW})[0]
        parts = (callers.map if one_a_core else map)(lambda x_CHW: session.run(None, {name: x_CHW[None]})[0], x_BCHW)
        return np.concatenate(list(parts))

    return embed


def export(net, path, relu: bool):
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(2, 3, 112, 112),), str(path), input_names=["x"], output_names=["y"],
                          dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, opset_version=17, dynamo=False)  # fmt: skip
    if relu:
        written = onnx.load(path)
        without_prelu(written.graph)
        onnx.save(written, path)
    return path


def ways(net, folder, threads, calibration_BCHW, onnx_path=None):
    last = {"memory_format": torch.channels_last}
    bf16 = {**last, "dtype": torch.bfloat16}
    table = {
        "torch fp32": lambda: torch_way(net),
        "torch fp32 channels_last": lambda: torch_way(net, **last),
        "torch fp32 compiled": lambda: torch_way(net, **last, compiled=True),
        "torch bf16 channels_last": lambda: torch_way(net, **bf16),
        "torch bf16 frozen": lambda: torch_way(net, **bf16, frozen=True),
        "torch bf16 compiled": lambda: torch_way(net, **bf16, compiled=True),
    }
    if onnx_path is None:
        source = folder / "relu.onnx"
        export(net, source, True)
        table["onnxruntime fp32"] = lambda: onnx_way(source, threads)
    else:
        source = onnx_path
    table["onnxruntime fp32, one image a core"] = lambda: onnx_way(source, threads, True)

    def int8():
        images_NSS3 = np.rint((calibration_BCHW.transpose(0, 2, 3, 1) + 1) * 127.5).astype(np.uint8)
        write_int8(source, folder / "int8.onnx", OnnxRecognizer(source), images_NSS3)
        return onnx_way(folder / "int8.onnx", threads, True)

    table["onnxruntime int8, one image a core"] = int8
    return table


def chosen(only: str, table: dict) -> list:
    """Without names all but those that a C++ compiler works on for minutes."""
    return [item for item in table.items() if (item[0] in only.split(",") if only else "compiled" not in item[0])]


def speed(args) -> list:
    records = []
    torch.manual_seed(0)
    net = create_model(*NETS[args.net], embedding_size=512).eval()
    images = np.random.default_rng(0).uniform(-1, 1, (32, 3, 112, 112)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name, make in chosen(args.only, ways(net, Path(folder), args.threads, images[:8])):
            began = time.perf_counter()
            made[name] = make()
            for batch in (1, 32):  # compiles, and warms up
                made[name](images[:batch])
            print(f"{name} is ready after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        times = {(name, batch): [] for name in made for batch in (1, 32)}
        for _ in range(args.rounds):
            for name, embed in made.items():
                for batch, repeat in ((1, 4), (32, 1)):
                    for _ in range(repeat):
                        began, cpu = time.perf_counter(), time.process_time()
                        embed(images[:batch])
                        times[name, batch].append((time.perf_counter() - began, time.process_time() - cpu))
    for (name, batch), taken in times.items():
        wall, cpu = (statistics.median(one) for one in zip(*taken))
        records.append({"net": args.net, "way": name, "batch": batch, "latency_ms": round(1e3 * wall, 2),
                        "images_per_second": round(batch / wall, 1),
                        "cpu_ms_per_image": round(1e3 * cpu / batch, 2)})  # fmt: skip
        print(json.dumps(records[-1]), flush=True)
    return records


def accuracy(args) -> list:
    images, issame = load_pairs(args.pairs)
    x_BCHW = images[:].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    net, records = GraphInTorch(args.model).eval(), []
    with tempfile.TemporaryDirectory() as folder:
        # calibrated on the first hundred images, as on any faces at hand
        for name, make in chosen(args.only, ways(net, Path(folder), args.threads, x_BCHW[:100], args.model)):
            embed = make()
            embed(x_BCHW[:32])  # warms up
            cpu = time.process_time()
            emb = np.concatenate([embed(x_BCHW[i : i + 32]) for i in range(0, len(x_BCHW), 32)])
            cpu = 1e3 * (time.process_time() - cpu) / len(x_BCHW)
            emb /= np.linalg.norm(emb, axis=1, keepdims=True)
            result = evaluate_pairs(emb, issame)
            if not records:
                exact = emb
            cosine = float((emb * exact).sum(1).min())
            records.append({"way": name, "accuracy": round(result.accuracy, 5), "threshold": round(result.threshold, 3),
                            "least_cosine_to_fp32": round(cosine, 5), "cpu_ms_per_image": round(cpu, 2)})  # fmt: skip
            print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="mobilefacenet", choices=list(NETS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="names of ways; all that need no C++ compiler by default")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--model", help="a trained ONNX model, for --accuracy")
    parser.add_argument("--pairs", help="a verification set, for --accuracy")
    parser.add_argument("--record", help="write benchmark/results/DATE_{this name}.json")
    args = parser.parse_args()
    device = parse_device("cpu")
    device.set()  # as every command does: freed memory is kept
    torch.set_num_threads(args.threads)
    records = accuracy(args) if args.accuracy else speed(args)
    if args.record:
        print(write_record(args.record, {"records": records}, device))


if __name__ == "__main__":
    main()
