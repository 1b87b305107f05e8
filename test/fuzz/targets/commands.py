"""Command lines: every command's main() in this process, with its arguments and its files mutated.

A command ends with status 0, or with another one and a single line `error: ...` on stderr; it leaves no temporary file.
"""

from __future__ import annotations

import concurrent.futures.process  # noqa: F401
import importlib
import io
import logging
import multiprocessing.popen_fork  # noqa: F401  (what a case without rights cannot import)
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import torch
from mutations import Sample, arguments_of
from run import target
from targets import data as sets
from targets import deploy
from targets.data import image, written

from runtime.errors import LINE_LENGTH, UserError


class _Ended(UserError):
    """A command's own error line."""


def run(module: str, folder) -> None:
    """main() of a module as `python -m module` runs it, in `folder`."""
    from runtime.log import run_command

    main = importlib.import_module(module).main
    out, err = io.StringIO(), io.StringIO()
    before, environment, handlers = sys.argv, dict(os.environ), logging.getLogger().handlers[:]
    level, signals = logging.getLogger().level, {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [module, *arguments_of(folder)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            run_command(main)
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.argv = before
        os.environ.clear()
        os.environ.update(environment)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
        for number, handler in signals.items():
            signal.signal(number, handler)
    left = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial")) and path.name != "x.tmp"]
    assert not left, f"left behind {left[0].name[-40:]}"
    text = err.getvalue() if not isinstance(status, str) else status
    if status not in (0, None):
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in text, f"status {status}: {text[-200:]!r}"
        assert errors[0].isprintable() and len(errors[0]) <= len("error: ") + LINE_LENGTH, f"{len(errors[0])} long"
        raise _Ended(errors[0])


def command(name: str, module: str, samples, weight: float = 0.1):
    """Enters a target called `name` for the command `python -m module`."""

    def read(folder):
        run(module, folder)

    read.__name__ = name
    target(samples, weight=weight, names_paths=True)(read)


def one(files: dict, *arguments: str) -> Sample:
    return Sample(dict(files), arguments)


# --- data -------------------------------------------------------------------------------------------------------------

FACES = {f"people/{name}/{i}.png": image(i, "PNG") for name in ("Ann", "Bo", "Cy") for i in range(3)}


def _set() -> dict:
    """train.rec, and lfw.bin of two pairs."""
    return {**sets._records()[0], **sets._bins()[0]}


command(
    "synthetic_command",
    "data.synthetic",
    lambda: [
        one({}, "--output=set", "--identities=2", "--images_per_identity=1", "--verify_identities=2",
            "--verify_images=2", "--pairs=20", "--seed=1")
    ],
    weight=0.02,
)  # fmt: skip
command("prepare_data", "tools.prepare_data", lambda: [one(_set(), "--rec_path=.", "--output=out")])
command("contact_sheet", "tools.contact_sheet", lambda: [one(_set(), "--data_path=.", "--output=sheet.png")])
command(
    "inspect_dataset", "tools.inspect_dataset", lambda: [one(_set(), "--data_path=.", "--workers=1", "--output=out")],
    weight=0.02,
)  # fmt: skip
command(
    "images_2_recordio",
    "tools.images_2_recordio",
    lambda: [one(FACES, "--image_path=people", "--output_dir=out", "--val_share=0.0", "--workers=1", "--seed=1")],
)
command(
    "mx_recordio_2_images",
    "tools.mx_recordio_2_images",
    lambda: [one(_set(), "--root_dir=.", "--output_dir=out", "--workers=1")],
)
command(
    "make_pairs",
    "tools.make_pairs",
    lambda: [one(FACES, "--image_path=people", "--output=a.bin", "--pairs=4", "--seed=3", "--workers=1")],
)
command(
    "convert_image_bin",
    "tools.convert_image_bin",
    lambda: [one(FACES, "--image_path=people/Ann", "--bin_path=bins", "--mode=image2bin", "--workers=1")],
)
command(
    "bin_converter",
    "tools.lfw_style_bin_dataset_converter",
    lambda: [one(_set(), "--bin_path=lfw.bin", "--out_dir=out", "--flip_test", "--workers=1")],
)
command(
    "process_base64_files",
    "tools.process_base64_files",
    lambda: [
        one(sets._base64()[0], "--data_dir=.", "--file_list=file_list.txt", "--nranks=2", "--seed=0", "--memory_mib=1",
            "--workers=1")
    ],
)  # fmt: skip


# --- checkpoints, plans, reports --------------------------------------------------------------------------------------


def _directory() -> dict:
    from checkpoint import sharded
    from runtime.shard import RowShard

    def write(folder):
        with sharded.Saver(folder / "all") as saver:
            rows = torch.arange(36.0).reshape(12, 3)
            saver.save("a", {"epoch": 1, "model": {}}, {"weight": (rows, RowShard.of(12))}, {})

    return written(write)


command("reshard", "checkpoint.reshard", lambda: [one(_directory(), "all", "a.pth")], weight=0.05)
command(
    "process_distfc",
    "plsc.utils.process_distfc_parameter",
    lambda: [one(_directory(), "--nranks=2", "--pretrained_model_dir=all", "--output_dir=out", "--num_classes=12")],
    weight=0.05,
)
command(
    "plan",
    "head.plan",
    lambda: [
        one({}, "--classes=1e6", "--world_size=8", "--batch_size=128", "--sample_rate=0.1", "--device_memory=80GiB",
            "--host_memory=1e11", "--reserve=0", "--embedding_size=512", "--checkpoint=pth")
    ],
    weight=0.3,
)  # fmt: skip


# --- train and evaluate, as far as the first device: from there on it is training -------------------------------------


class _Accepted(Exception):
    pass


def _options_only(name: str, samples) -> None:
    def prepare():
        import learner  # noqa: F401

    def read(folder):
        # what comes after the options would be the work itself
        with mock.patch("runtime.device.parse_device", side_effect=_Accepted):
            try:
                run(name, folder)
            except _Accepted:
                pass

    read.__name__ = f"{name}_options"
    target(samples, prepare, 0.3, names_paths=True)(read)


_options_only(
    "train",
    lambda: [
        one({}, "--data_path=.", "--batch_size=8", "--lr=0.1", "--epochs=2", "--net_mode=ir_se", "--net_depth=50",
            "--milestones=1,2", "--warmup_epochs=0.5", "--scale=64", "--margin=0.5", "--case=run", "--num_workers=2"),
        one({"arc.py": deploy.CONFIG}, "--config=arc.py", "--opt_level=O2", "--loss_scale=dynamic", "--sample_rate=.1",
            "--combined_margin", "1", "0.5", "0", "--fs_name=hdfs://x", "--work_path=out", "--keep=2", "--seed=3"),
    ],
)  # fmt: skip
_options_only(
    "evaluate",
    lambda: [
        one(_set(), "--data_path=.", "--pth_path=a.pth", "--val_targets=lfw", "--flip_sum", "--eval_batch_size=3"),
    ],
)
