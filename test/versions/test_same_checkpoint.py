"""One checkpoint trains on in every version of torch that is installed here, old and new, with the same losses.

Interpreters: the one that runs this test, those of .venv* in the project's root, and those that TEST_PYTHONS names
(separated by colons). run_tests.sh makes .venv, .venv-1.8 and .venv-2.13.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(900)  # each version trains in a process of its own

STEPS = 20
# At a larger rate the rounding of one kernel or another decides on which side of a PReLU's kink a value near zero
# falls, and 20 steps at scale 64 carry that to the third digit. At this one a gradient wrong by 1 % still shows.
LR = 1e-5
OPTIONS = (
    "--device_type=cpu",
    "--opt_level=O0",
    "--net_mode=mobilefacenet",
    "--batch_size=8",
    "--num_workers=0",
    "--log_every=1",
    "--tensorboard=false",
    "--with_test=false",
    "--memory_format=contiguous",
)


def _run(python, root, *arguments):
    done = subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pythons(root):
    """{torch's version: interpreter}, the newest last."""
    found = {}
    named = filter(None, os.environ.get("TEST_PYTHONS", "").split(os.pathsep))
    for python in [sys.executable, *sorted(root.glob(".venv*/bin/python")), *named]:
        try:
            version = _run(python, root, "-c", "import torch; print(torch.__version__.split('+')[0])").strip()
        except (AssertionError, OSError):
            continue  # no torch in it, or not an interpreter
        found.setdefault(version, python)
    if len(found) < 2:
        pytest.skip(f"one version of torch here ({', '.join(found)}): run_tests.sh --all brings the others")
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")[:2]]))


@pytest.fixture(scope="module")
def trained_on(root, pythons, tmp_path_factory):
    """{version: (losses of the second epoch, checkpoint after it)}, each resumed from one checkpoint of the newest."""
    work = tmp_path_factory.mktemp("versions")
    newest = list(pythons.values())[-1]
    _run(
        newest,
        root,
        "-m",
        "data.synthetic",
        "--output",
        work / "set",
        "--identities",
        8,
        "--images_per_identity",
        STEPS,
        "--verify_identities",
        10,
        "--verify_images",
        2,
        "--pairs",
        20,
    )

    def train(python, name, *options):
        _run(python, root, "train.py", *OPTIONS, f"--data_path={work / 'set'}", f"--work_path={work / name}", *options)
        lines = map(json.loads, (work / name / "log" / "metrics.jsonl").read_text().splitlines())
        (checkpoint,) = (work / name / "models").glob("*.pth")
        return [line["loss"] for line in lines if line["kind"] == "step"], checkpoint

    _, first = train(newest, "first", "--epochs=1", "--lr=0.01")
    return {
        version: train(python, version, "--epochs=2", f"--lr={LR}", f"--resume={first}")
        for version, python in pythons.items()
    }


def test_the_losses_agree(trained_on):
    (newest, (expected, _)), *older = reversed(trained_on.items())
    assert len(expected) == STEPS
    for version, (losses, _) in older:
        apart = max(abs(a - b) for a, b in zip(losses, expected))
        assert len(losses) == STEPS and apart < 1e-4, f"torch {version} and {newest} are {apart:.2e} apart"


def test_every_version_reads_what_every_other_wrote(root, pythons, trained_on, tmp_path):
    """Verification of the newest's checkpoint by the oldest, and the other way round."""
    versions = list(pythons)
    accuracies = set()
    for reader, writer in ((versions[0], versions[-1]), (versions[-1], versions[0])):
        checkpoint = trained_on[writer][1]
        _run(
            pythons[reader],
            root,
            "evaluate.py",
            f"--pth_path={checkpoint}",
            "--device_type=cpu",
            "--opt_level=O0",  # the old one has no bf16
            f"--data_path={checkpoint.parents[2] / 'set'}",
            "--val_targets=synthetic",
            f"--run_dir={tmp_path / reader}",
        )
        lines = map(json.loads, (tmp_path / reader / "metrics.jsonl").read_text().splitlines())
        accuracies.update(line["accuracy"] for line in lines if line["kind"] == "verify")
    assert len(accuracies) == 1
