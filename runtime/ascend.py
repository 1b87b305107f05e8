"""What to know about an Ascend machine without touching it: which versions go together, and what its usual errors mean.

Knows words and numbers alone: runtime.device imports torch_npu, and asks here.
"""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple


class Lane(NamedTuple):
    """Versions that were released for each other. pythons: the oldest and the newest 3.x."""

    torch_npu: str
    torch: str
    cann: str
    pythons: tuple[int, int]

    @property
    def numpy(self) -> str:
        """torch of that age was built for numpy 1 and fails with numpy 2."""
        return "numpy<2" if _numbers(self.torch) < (2, 3) else "numpy"


_PYTHONS = {
    "1.8": (7, 9), "1.11": (7, 10), "2.0": (8, 10), "2.1": (8, 11), "2.3": (8, 11), "2.4": (8, 11), "2.5": (9, 11),
    "2.6": (9, 11), "2.7": (9, 13), "2.8": (9, 13), "2.9": (10, 13), "2.10": (10, 13), "2.11": (10, 14),
    "2.12": (10, 14),
}  # fmt: skip


def _lanes(cann: str, *torch_npus: str) -> list[Lane]:
    torches = [re.match(r"\d+\.\d+\.\d+", version)[0] for version in torch_npus]
    return [
        Lane(torch_npu, torch, cann, _PYTHONS[torch.rpartition(".")[0]])
        for torch_npu, torch in zip(torch_npus, torches)
    ]


# From the compatibility table that torch_npu publishes with its sources, the newest first.
LANES = [
    *_lanes("9.1", "2.12.0", "2.11.0", "2.10.0.post4", "2.9.0.post6", "2.7.1.post8"),
    *_lanes("9.0", "2.9.0.post2", "2.8.0.post4", "2.7.1.post4"),
    *_lanes("8.5", "2.9.0", "2.8.0.post2", "2.7.1.post2", "2.6.0.post5"),
    *_lanes("8.3", "2.8.0", "2.7.1", "2.6.0.post3", "2.1.0.post17"),
    *_lanes("8.2", "2.6.0", "2.5.1.post1", "2.1.0.post13"),
    *_lanes("8.1", "2.5.1", "2.4.0.post4", "2.3.1.post6", "2.1.0.post12"),
    *_lanes("8.0.0", "2.4.0.post2", "2.3.1.post4", "2.1.0.post10"),
    *_lanes("7.0.0", "2.1.0", "2.0.1.post1", "1.11.0.post8"),
    *_lanes("6.3.RC2", "2.0.1.rc1", "1.11.0.post1", "1.8.1.post2"),
]


def table() -> str:
    """LANES as a Markdown table: docs/npu.md, docs/npu_zh.md and `python -m runtime.device --lanes` show it."""
    rows = [
        f"| {lane.cann} | {lane.torch_npu} | {lane.torch} | {_range(lane.pythons)} | {lane.numpy} |" for lane in LANES
    ]
    return "\n".join(["| CANN | torch_npu | torch | Python | numpy |", "| --- | --- | --- | --- | --- |", *rows])


def standing(torch: str, torch_npu: str | None, cann: str | None, python: str, numpy: str) -> str:
    """One line: whether these versions go together, and else what to install."""
    torch, torch_npu = torch.split("+")[0], torch_npu and torch_npu.split("+")[0]
    if torch_npu is None:
        fitting = [lane for lane in LANES if lane.torch == torch]
        return f"for torch {torch}: " + (_choices(fitting) if fitting else f"none is known; {_choices(LANES[:1])}")
    known = [lane for lane in LANES if lane.torch_npu == torch_npu]
    if not known:
        near = [lane for lane in LANES if lane.torch == torch]
        return f"torch_npu {torch_npu} is not in the table; for torch {torch}: {_choices(near)}"
    lane, problems = known[0], []
    if torch != lane.torch:
        problems.append(f"torch is {torch}: install {lane.torch}")
    if cann is None:
        problems.append(f"CANN is not found: install {lane.cann}, and `source test/env_npu.sh`")
    elif _numbers(cann)[:2] != _numbers(lane.cann)[:2]:
        others = [one for one in LANES if one.torch == lane.torch and _numbers(one.cann)[:2] == _numbers(cann)[:2]]
        other = f", or torch_npu {others[0].torch_npu}" if others else ""
        problems.append(f"CANN is {cann}: install {lane.cann}{other}")
    if not lane.pythons[0] <= _numbers(python)[1] <= lane.pythons[1]:
        problems.append(f"Python is {python}: take {_range(lane.pythons)}")
    if lane.numpy == "numpy<2" and _numbers(numpy)[0] >= 2:
        problems.append(f"numpy is {numpy}: pip install 'numpy<2'")
    return f"torch_npu {torch_npu}: " + ("; ".join(problems) or "torch, CANN, Python and numpy go with it")


def what_to_install(torch: str) -> str:
    """The newest versions for a torch, or, where none is known, the newest of all."""
    torch = torch.split("+")[0]
    return _choices([lane for lane in LANES if lane.torch == torch][:1] or LANES[:1])


def _choices(lanes) -> str:
    named = [f"CANN {lane.cann} with torch=={lane.torch} torch-npu=={lane.torch_npu}" for lane in lanes]
    return "; ".join(named) or "none"


def _range(pythons) -> str:
    return "3.{} to 3.{}".format(*pythons)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


# What CANN, HCCL and npu-smi say (the first pattern that fits), and what it means.
MISTAKES = {
    r"-8020|device is used": "another container or process holds the device: stop it, or give this one a free device "
    "(docker --device=/dev/davinciN)",
    r"-8005|DrvMngGetConsoleLogLevel": "the driver does not answer: is it loaded, and this user in its group; a "
    "container needs /dev/davinci_manager, /dev/devmm_svm and /dev/hisi_hdc",
    r"EJ0003|EI0019|bind the IP port|bound already": "another training on this machine has HCCL's port: "
    "export HCCL_IF_BASE_PORT=61000, another for each",
    r"EADDRINUSE|address already in use": "the port at which ranks meet is in use: export MASTER_PORT=29600, or so",
    r"EI0015|failed to connect agent": "some ranks never came: start as many as RANK_SIZE says, and look at the log "
    "that stops first",
    r"EI0006|socket establish timeout|socket timeout": "two NPUs did not connect in time: see whether all ranks run "
    "and hccn_tool shows their links up; raise HCCL_CONNECT_TIMEOUT and --dist_timeout",
    r"EI0013|CQE error|error CQE": "the network between two NPUs lost packets: check the link with hccn_tool, and "
    "whether another rank ended first",
    r"EI0002|notify.{0,20}time ?out": "a rank did not come to a collective: see the log of the one that failed first",
    r"version.{0,40}(mismatch|not match|inconsistent)|(mismatch|inconsistent).{0,40}version": "driver, firmware and "
    "CANN are of different releases: install the driver that CANN's release notes name, the same on all machines",
}


def explain(said: str) -> str | None:
    """What an error text of CANN, HCCL or npu-smi means, in one line with the cure; None for others."""
    return next((meaning for pattern, meaning in MISTAKES.items() if re.search(pattern, said, re.IGNORECASE)), None)


def ask_npu_smi() -> str | None:
    """What the machine's own tool complains of, explained; None where it is content or not there."""
    try:
        done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return explain(done.stdout + done.stderr) if done.returncode or "ret is -" in done.stdout + done.stderr else None
