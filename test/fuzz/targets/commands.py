"""Command lines: every command's main() in this process, with its arguments and its files mutated.

A command ends with status 0, or with another one and a single line `error: ...` on stderr; it leaves no temporary file.
"""

from __future__ import annotations

import concurrent.futures.process  # noqa: F401
import contextlib
import importlib.util
import io
import logging
import multiprocessing.popen_fork  # noqa: F401  (what a case without rights cannot import)
import os
import pickle
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from unittest import mock

import torch
from mutations import Sample, arguments_of
from run import target
from targets import data as sets
from targets import deploy
from targets.data import image, written

from data.images import contact_sheet
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
    except _Accepted:
        return
    finally:
        sys.argv = before
        if os.environ != environment:
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


def command(name: str, module: str, samples, weight: float = 0.5, **instead):
    """Enters a target called `name` for the command `python -m module`. instead: {"module__function": what a case
    calls in its place}: what takes long and sees nothing of a file."""

    def read(folder):
        with contextlib.ExitStack() as stack:
            for place, stand_in in instead.items():
                stack.enter_context(mock.patch(place.replace("__", "."), stand_in))
            run(module, folder)

    read.__name__ = name
    target(samples, weight=weight, names_paths=True)(read)


def one(files: dict, *arguments: str) -> Sample:
    return Sample(dict(files), arguments)


# --- data -------------------------------------------------------------------------------------------------------------

FACES = {f"people/{name}/{i}.jpg": image(i, quality=20) for name in ("Ann", "Bo") for i in range(2)}


def _set() -> dict:
    """train.rec, and lfw.bin of two pairs."""
    return {**sets._records()[0], **sets._bins()[0]}


class _Accepted(Exception):
    """What comes now is the work itself."""


def _no_face(_person, _seed, _stream, number: int, image_number: int, _size: int) -> bytes:
    if number > 100 or image_number > 100:
        raise _Accepted
    return image(0)


command(
    "synthetic_command",
    "data.synthetic",
    lambda: [
        one({}, "--output=set", "--identities=2", "--images_per_identity=1", "--verify_identities=2",
            "--verify_images=2", "--pairs=20", "--seed=1")
    ],
    data__synthetic___jpeg=_no_face,
    data__synthetic___MOST=1 << 10,  # millions of pairs are work, as was asked for
)  # fmt: skip
command("prepare_data", "tools.prepare_data", lambda: [one(_set(), "--rec_path=.", "--output=out")])
command(
    "contact_sheet", "tools.contact_sheet", lambda: [one(_set(), "--data_path=.", "--output=sheet.png")],
    tools__contact_sheet__contact_sheet=partial(contact_sheet, cols=2),
)  # fmt: skip
command(
    "inspect_dataset", "tools.inspect_dataset", lambda: [one(_set(), "--data_path=.", "--workers=1", "--output=out")],
    tools__inspect_dataset__save_plot=lambda counts, path: path.write_bytes(b""),
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


command("reshard", "checkpoint.reshard", lambda: [one(_directory(), "all", "a.pth")])
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
)  # fmt: skip


# --- train and evaluate, as far as the first device: from there on it is training -------------------------------------


def _options_only(name: str, samples) -> None:
    def prepare():
        import learner  # noqa: F401

    def read(folder):
        # what comes after the options would be the work itself
        with mock.patch("runtime.device.parse_device", side_effect=_Accepted):
            run(name, folder)

    read.__name__ = f"{name}_options"
    target(samples, prepare, 0.5, names_paths=True)(read)


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


# --- deploy, without the server itself --------------------------------------------------------------------------------

if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
    from tiny_deploy import RedFaces

    from deploy.photos import list_photos

    def _model() -> dict:
        return deploy._models()[0]

    def _photos() -> dict:
        """A face of Ann and one of Bo, as RedFaces finds them."""
        from tiny_deploy import picture
        from tiny_server import png

        return {
            f"photos/{name}/1.png": png(picture(colour)) for name, colour in (("Ann", (9, 90, 9)), ("Bo", (9, 9, 90)))
        }

    def _photos_below(folder, *more):
        if os.path.abspath(folder) == "/":
            raise _Accepted  # the whole machine is work, as was asked for
        return list_photos(folder, *more)

    def _pairs() -> bytes:
        return pickle.dumps(([image(i, quality=10) for i in range(8)], [True, False, False, True]), 4)

    command(
        "calibrate", "tools.calibrate",
        lambda: [one({**_model(), "lfw.bin": _pairs()}, "--model=m.onnx", "--pairs=lfw.bin", "--far=0.5",
                     "--device=cpu", "--channel_order=rgb", "--output=out.onnx")],
        deploy__calibration__list_photos=_photos_below,
    )  # fmt: skip
    command(
        "demo", "deploy.demo",
        lambda: [
            one({**_model(), **_photos()}, "--rec", "--rec_model=m.onnx", "--build_index=people.db",
                "--img_dir=photos", "--use_gpu=False", "--det_thresh=0.8"),
            one({**_model(), **_photos(), **deploy._galleries()[2]}, "--det", "--input=photos/Ann/1.png",
                "--output=out", "--cdd_num=5", "--max_batch_size=1", "--rec_thresh=0.4", "--like_original"),
        ],
        deploy__demo__open_detector=lambda *_: RedFaces(),
        deploy__demo__list_photos=_photos_below,
    )  # fmt: skip

    def _serving(*_):
        raise _Accepted

    command(
        "server", "deploy.server",
        lambda: [one(_model(), "--model=m.onnx", "--device=cpu", "--port=0", "--workers=1", "--threads=1",
                     "--no_detect", "--gallery=people.db", "--storage=int8", "--threshold=1.2", "--token=word",
                     "--max_body=100000", "--max_images=4", "--timeout=5", "--batch=8")],
        deploy__server__serve=_serving,
    )  # fmt: skip
