"""The operators that training needs on an NPU, and in which types: what to check on a new version of CANN.

    python test/npu/operators.py            prints them for the torch at hand
    python test/npu/operators.py --write    and keeps them in docs/npu_operators.md

They are counted by the emulated NPU while the Learner trains, verifies and saves in small under every policy.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIST = ROOT / "docs" / "npu_operators.md"

NETS = {
    "ir_se": {"net_depth": 18},
    "mobilefacenet": {},
    "iresnet": {"net_depth": 18},
    # its untrained activations grow past fp16's range with batch norm in evaluation mode
    "resnet": {"net_depth": 50, "with_test": False},
}
LOSSES = ("arcface", "arcface_straight_through", "cosface", "combined", "adaface", "softmax", "linear_softmax")


def cases() -> dict[str, dict]:
    """{what it is: the options that differ from ir_se with arcface in O2}."""
    from runtime.precision import POLICIES

    return {
        **{policy: {"opt_level": policy} for policy in POLICIES},
        **{net: {"net_mode": net, **options} for net, options in NETS.items()},
        **{loss: {"loss_type": loss} for loss in LOSSES},
        "dynamic loss scale": {"loss_scale": "dynamic"},
        "sampled classes": {"sample_rate": 0.5},
        "update_rows=all": {"sample_rate": 0.5, "update_rows": "all"},
        "accumulation of sampled classes": {"sample_rate": 0.5, "accumulate": 2},
        "bf16 centers": {"centers_dtype": "bf16"},
        "int8 momentum": {"centers_dtype": "bf16", "momentum_dtype": "int8"},
        "momentum on the host": {"momentum_on_host": True},
        "top5": {"top5": True},
        "filtering": {"interclass_filtering_threshold": 0.4},
        "clipping": {"clip_grad_norm": 1.0},
        "accumulation": {"accumulate": 2},
        "flip sum": {"flip_sum": True},
    }


def measure() -> dict[str, tuple[set[str], set[str]]]:
    """{operator: (types of its first argument, cases that call it)}. Needs the emulated NPU installed."""
    import npu_sim
    from tiny_set import make_tiny_set

    from config import Config
    from learner import Learner
    from runtime.device import Device

    device = Device("npu")
    device.describe(), device.fused_optimizers()  # what tries operators out does so once, and not for a case
    found: dict[str, tuple[set[str], set[str]]] = {}
    with tempfile.TemporaryDirectory() as folder, narrow_nets():
        data = make_tiny_set(Path(folder) / "set", classes=12, shots=1, pairs=10)
        plain = {
            "net_mode": "ir_se",
            "net_depth": 18,
            "opt_level": "O2",
            "data_path": str(data),
            "batch_size": 4,
            "epochs": 1,
            "max_iter": 2,
            "num_workers": 0,
            "tensorboard": False,
            "work_path": folder,
            "embedding_size": 32,
        }
        for name, options in cases().items():
            npu_sim.forget_operators()
            Learner.from_config(Config(**{**plain, **options}), device).train()
            for operator, dtypes in npu_sim.operators().items():
                of_all, needed_by = found.setdefault(operator, (set(), set()))
                of_all.update(dtypes)
                needed_by.add(name)
    return found


@contextmanager
def narrow_nets() -> Iterator[None]:
    """Every layer of the nets, at a fraction of their width."""
    import model.iresnet

    with patch.multiple(model.iresnet, STAGE_WIDTHS=(16, 16, 32, 32), STEM_WIDTH=16):
        yield


def table(found) -> str:
    """Markdown rows `operator | types | needed by`, sorted by name; * where the chip's cores do not compute it."""
    import npu_sim

    slow = npu_sim.slow({name: dtypes for name, (dtypes, _) in found.items()})
    rows = [
        f"| {name}{' *' if name in slow else ''} | {' '.join(sorted(dtypes - {'-'}))} | {_which(by)} |"
        for name, (dtypes, by) in sorted(found.items())
    ]
    return "\n".join(["| operator | types | needed by |", "| --- | --- | --- |", *rows])


def _which(by: set[str]) -> str:
    others = [case for case in cases() if case not in by]
    if len(others) > len(by):
        return ", ".join(case for case in cases() if case in by)
    return "all" + (f" but {', '.join(others)}" if others else "")


def section() -> str:
    """The heading of the torch at hand."""
    import torch

    return "## torch " + ".".join(torch.__version__.split(".")[:2])


def kept() -> dict[str, dict[str, set[str]]]:
    """{section: {operator: types}} of docs/npu_operators.md."""
    sections: dict[str, dict[str, set[str]]] = {}
    for part in re.split(r"^(?=## torch )", LIST.read_text(), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| (aten::\S+)(?: \*)? \| ([^|]*)\|", part, flags=re.MULTILINE)
        sections[part.splitlines()[0]] = {name: set(dtypes.split()) for name, dtypes in rows}
    return sections


INTRODUCTION = """# Operators that training needs on an NPU

What the Learner calls on the device while it trains, verifies and saves, with the types of each operator's first
argument: what to check on a new version of CANN or torch_npu. Counted on the emulated NPU by

    {command}

which rewrites the section of the torch that it runs on. Cases: ir_se with arcface in O2, and one option changed at a
time. On a real NPU torch_npu may answer some of them by an operator of its own under the same name; `bash
test/npu_check.sh` compares each of them with float64 there.

## Versions that have them

As their sources say; nothing of it was run on an NPU.

- torch_npu 2.1 and later has a kernel for each operator below; 1.8.1 and 1.11 under older names: prelu for
  _prelu_kernel, norm for linalg_vector_norm, single copies for _foreach_copy_.
- _foreach_copy_ between half and float is one kernel from CANN 9.1 on, before that a loop of copies on the device.
- mm with out_dtype: torch 2.9 with op-plugin 26.1.0. Before, fp16 operands give an fp16 product, and the loss scale
  keeps it in range.
- _fused_sgd_ is in op-plugin's newest sources only; before, it falls back to the host: torch's foreach SGD goes first.
- Right shifts and sorts of integers, cumsum of int64 and bool and index_put into int64 run on the chip's slow CPU
  (AICPU) before Ascend950. They are marked with * below; no step of training uses them (`test/npu/test_npu_head.py`).
"""


def write(text: str) -> None:
    """Puts the table of the torch at hand into its section of the kept list, which stays sorted."""
    introduction = INTRODUCTION.format(command="python test/npu/operators.py --write")
    parts = re.split(r"^(?=## torch )", LIST.read_text(), flags=re.MULTILINE)[1:] if LIST.exists() else []
    sections = {part.splitlines()[0]: part.rstrip() for part in parts if part.startswith("## torch ")}
    sections[section()] = f"{section()}\n\n{text}"
    LIST.parent.mkdir(exist_ok=True)
    LIST.write_text("\n".join([introduction, "\n\n".join(sections[name] for name in sorted(sections)), ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the list in docs/npu_operators.md")
    arguments = parser.parse_args()
    import torch_npu  # noqa: F401  (the emulated one)

    text = table(measure())
    print(f"{section()}\n\n{text}")
    if arguments.write:
        write(text)


if __name__ == "__main__":
    # The one of the tests, not an installed torch_npu: it must be found first, and torch must not load another.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    sys.path[:0] = [str(HERE / "stubs"), str(HERE), str(ROOT / "test"), str(ROOT)]
    main()
