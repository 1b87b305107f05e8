"""Mutated files and arguments against every reader and command: `python test/fuzz/run.py TARGET --cases N --seed S`.

A case ends in valid data or in the project's own error (`UserError`: one printable line of at most 300 characters).
All else is a finding: another exception, a crash, a hang, memory out of proportion, a file touched outside the case's
folder, a program started, a log line that carries a file's control codes on. It is kept in findings/TARGET/ and
`test/unit/test_fuzz.py` tries it again for ever.

`all` runs every target, `--replay FILE` one finding. Case i of a seed is the same case on every machine.
A target is a decorated function in targets/: see `target`.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import faulthandler
import gc
import hashlib
import importlib
import json
import logging
import mmap
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
for _folder in (HERE, ROOT / "test", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from mutations import Sample, header_bits, mutated, with_flipped_bit  # noqa: E402

from runtime.errors import LINE_LENGTH, UserError  # noqa: E402

FINDINGS = HERE / "findings"  # of targets called NAME_real outside of the repository: they hold people's faces
CPU_SECONDS = 10  # for a case; of the process, so that a busy machine changes nothing
WAIT_SECONDS = 5  # asleep so long without computing anything: waits for ever
MEMORY_BYTES = 1 << 30  # beyond what the process had before the case
CASES_A_PROCESS = 1000  # what a case leaves behind in its process has an end
NOBODY = 65534
NO_CASE = struct.pack("<q", -1)


@dataclass(frozen=True)
class Target:
    """A reader or a command: `read(folder)` returns for valid data and raises UserError for what it refuses."""

    name: str
    read: Callable[[Path], object]
    samples: Callable[[], list]
    prepare: Callable[[], object]
    weight: float  # of the cases that are asked for: less for what takes long
    names_paths: bool = False  # a command: its arguments may name any place, where a case has no rights


TARGETS: dict[str, Target] = {}


def target(
    samples: Callable[[], list],
    prepare: Callable[[], object] = lambda: None,
    weight: float = 1.0,
    names_paths: bool = False,
):
    """Decorates `read(folder)`, under its name. `samples()`: a few small valid inputs, each a dict of path in the
    folder -> bytes, or a `mutations.Sample`; each must be read as valid. `prepare()`: called once before them."""

    def register(read):
        TARGETS[read.__name__] = Target(read.__name__, read, samples, prepare, weight, names_paths)
        return read

    return register


def load_targets() -> dict[str, Target]:
    for path in sorted((HERE / "targets").glob("*.py")):
        importlib.import_module(f"targets.{path.stem}")
    return TARGETS


class Outcome(NamedTuple):
    """How a case ended: "valid", "refused", or what was found and where."""

    kind: str
    detail: str = ""

    @property
    def is_finding(self) -> bool:
        return self.kind not in ("valid", "refused")


# --- one case, in a process that may die -----------------------------------------------------------------------------


class _Touched(BaseException):
    """Not an Exception: a reader that catches everything must not hide it."""


class _Watch(logging.Handler):
    """What a case does beside returning: files outside its folder, programs, log lines that are not printable."""

    STARTS_A_PROGRAM = (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
        "os.startfile",
        "pickle.find_class",
    )
    CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
               "shutil.rmtree", "os.chown", "os.utime")  # fmt: skip

    def __init__(self, names_paths: bool):
        super().__init__()
        self.names_paths = names_paths
        self.folder = self.secret = None
        self.found = ""

    def begin(self, folder: Path, secret: Path) -> None:
        """From here on: changes belong into `folder`, and `secret` in it is not to be read."""
        self.secret = os.stat(secret)
        self.folder = os.path.join(os.path.realpath(folder), "")

    def end(self) -> None:
        self.folder = None

    def note(self, what: str) -> None:
        self.found = self.found or what

    def refuse(self, what: str) -> None:
        """An event that must not happen, and with this does not."""
        self.note(what)
        raise _Touched(what)

    def refuse_path(self, event: str, path) -> None:
        if self.names_paths:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self.refuse(f"{event} {os.fsdecode(path)[-100:]!r}")

    def emit(self, record) -> None:
        if self.names_paths:
            return
        text = record.getMessage()
        if not all(line.isprintable() and len(line) <= 2 * LINE_LENGTH for line in text.splitlines() or [""]):
            self.note(f"log: {record.name}:{record.funcName} {text[:100]!r}")

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in self.STARTS_A_PROGRAM:
            self.refuse(f"{event} {arguments!r:.100}")
        elif event == "open":
            path, _mode, flags = arguments
            if isinstance(path, (str, bytes)) and (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_outside(path) or self._is_secret(path)
            ):
                self.refuse_path("opened", path)
        elif event in self.CHANGES:
            for path in arguments:
                if isinstance(path, (str, bytes, os.PathLike)) and self._is_outside(os.fspath(path)):
                    self.refuse_path(event, path)

    def _is_outside(self, path) -> bool:
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))), "")
        return not path.startswith((self.folder, "/dev/", "/proc/self/"))

    def _is_secret(self, path) -> bool:
        try:
            return os.path.samestat(os.stat(path), self.secret)
        except (OSError, ValueError):
            return False


def attempt(read: Callable[[Path], object], folder: Path) -> Outcome:
    """One reading of a case's folder in this process."""
    try:
        read(folder)
    except UserError as error:
        cause, text = error, str(error)
        while cause is not None:
            if isinstance(cause, MemoryError):
                return Outcome("memory", f"MemoryError behind {_place(cause)}")
            cause = cause.__cause__ or cause.__context__
        if len(text) > LINE_LENGTH or not text.isprintable() or not text:
            return Outcome("message", f"{type(error).__name__} {len(text)} {_place(error)}")
        return Outcome("refused", text)
    except MemoryError as error:
        return Outcome("memory", f"MemoryError {_place(error)}")
    except BaseException as error:  # SystemExit and KeyboardInterrupt as well: a reader raises none
        return Outcome("exception", f"{type(error).__name__} {_place(error)} {error!s:.120}")
    return Outcome("valid")


def _place(error: BaseException) -> str:
    """The innermost function of ours in an error's trace."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    ours = [f for f in frames if ".venv" not in f.filename and "/test/fuzz/" not in f.filename]
    last = (ours or frames or traceback.extract_tb(error.__traceback__))[-1]
    return f"{Path(last.filename).name}:{last.name}"


def _serve(case_target: Target, samples_of, indices, folder: Path, at: mmap.mmap, ended: int) -> None:
    """Runs cases one after the other in this (forked) process; limits end the process. `at`, shared with the parent,
    holds the number of the case at work; a line for each that has ended goes to the file `ended`. (A pipe would wake
    the parent twice a case, which costs more than most cases.)"""
    os.setsid()
    gc.freeze()  # torch has a million objects, which no collection here needs to visit
    faulthandler.disable()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    watch = _Watch(case_target.names_paths)
    root = logging.getLogger()
    root.handlers[:] = [watch]
    root.setLevel(logging.INFO)
    root.manager.loggerDict.clear()  # torch's thousand, each of which is told of every change of the level
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    folder.mkdir()
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"not for readers")
    if os.geteuid() == 0:
        for path in (folder, outside):
            os.chown(path, NOBODY, NOBODY)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    inside = outside / "case"
    sys.addaudithook(watch)
    for name in set(os.environ) - {"PATH", "OMP_NUM_THREADS"}:  # a command's case copies them all
        del os.environ[name]
    os.environ["HOME"] = os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = str(folder)
    page = resource.getpagesize()
    had = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
    statm = open("/proc/self/statm", "rb", buffering=0)
    for index in indices:
        sample = samples_of(index)
        inside.mkdir()
        sample.write(inside)
        os.chdir(inside)
        watch.found = ""
        used = int(os.pread(statm.fileno(), 100, 0).split()[0]) * page
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEMORY_BYTES, hard))
        at[:8] = struct.pack("<q", index)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        watch.begin(folder, outside / "secret.jpg")
        outcome = attempt(case_target.read, inside)
        watch.end()
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if watch.found:
            outcome = Outcome("touched", watch.found)
        elif peak - had > MEMORY_BYTES and not outcome.is_finding:
            outcome = Outcome("memory", f"{(peak - had) >> 20} MiB for {sum(map(len, sample.files)) >> 10} KiB")
        os.write(ended, json.dumps([index, outcome.kind, outcome.detail]).encode() + b"\n")
        at[:8] = NO_CASE
        if peak - had > MEMORY_BYTES:
            return  # the peak stays in the books of this process
        os.chdir("/")
        shutil.rmtree(inside, ignore_errors=True)
        if inside.exists():  # a mutation or a case took the rights to its own files away
            return


def outcomes(case_target: Target, sample_of: Callable[[int], Sample], indices) -> dict[int, Outcome]:
    """{index: how it ended} of every case, in forked processes that die without harm."""
    indices, done = list(indices), {}
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    os.chmod(scratch, 0o755)
    try:
        round_number = 0
        while indices:
            round_number += 1
            batch = indices[:CASES_A_PROCESS]
            ended = _one_process(case_target, sample_of, batch, scratch / str(round_number))
            if not ended:
                raise RuntimeError(f"{case_target.name}: its process dies before its first case")
            done.update(ended)
            indices = indices[len(ended) :]
            shutil.rmtree(scratch / str(round_number), ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def _one_process(case_target, sample_of, indices, folder) -> dict[int, Outcome]:
    at = mmap.mmap(-1, mmap.PAGESIZE)
    at[:8] = NO_CASE
    lives, until_death = os.pipe()
    with tempfile.TemporaryFile(dir=folder.parent) as lines:
        pid = os.fork()
        if pid == 0:
            os.close(lives)
            status = 1
            try:
                _serve(case_target, sample_of, indices, folder, at, lines.fileno())
                status = 0
            except BaseException:
                os.write(lines.fileno(), json.dumps(["harness", traceback.format_exc()]).encode() + b"\n")
            finally:
                os._exit(status)
        os.close(until_death)
        status, hung = _wait(pid, lives)
        lines.seek(0)
        ended: dict[int, Outcome] = {}
        for line in lines:
            index, *outcome = json.loads(line)
            if index == "harness":
                raise RuntimeError(outcome[0])
            ended[index] = Outcome(*outcome)
    (started,) = struct.unpack("<q", at[:8])
    if started >= 0 and started not in ended:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if hung or number == signal.SIGPROF:
            ended[started] = Outcome("time", "waits for ever" if hung else f"more than {CPU_SECONDS} s of work")
        else:
            name = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}"
            ended[started] = Outcome("crash", name)
    return ended


def _wait(pid: int, lives: int) -> tuple[int, bool]:
    """(the process's status, whether it waited for ever), when it and its children are gone. lives: the end of a pipe
    of which it holds the other."""
    since = None
    status, hung = None, False
    try:
        while status is None and not hung:
            if select.select([lives], [], [], 1)[0]:
                status = os.waitpid(pid, 0)[1]
                break
            gone, ended = os.waitpid(pid, os.WNOHANG)  # a child of its own may hold the pipe
            if gone:
                status = ended
                break
            now = _asleep(pid)
            since = since if now and since and now == since[0] else (now, time.monotonic())
            hung = bool(now) and time.monotonic() - since[1] > WAIT_SECONDS
    finally:
        os.close(lives)
        for stop in (lambda: os.killpg(pid, signal.SIGKILL), lambda: status is None and os.kill(pid, signal.SIGKILL)):
            with contextlib.suppress(OSError):
                stop()
        if status is None:
            status = os.waitpid(pid, 0)[1]
    return status, hung


def _asleep(pid: int):
    """The seconds that a process and its children have computed if all of them are asleep, else None."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == pid:  # its session
            if fields[0] not in "SZ":
                return None
            ticks += int(fields[11]) + int(fields[12])
    return ticks + 1


# --- cases -----------------------------------------------------------------------------------------------------------


def prepared(case_target: Target) -> list[Sample]:
    """The samples of a target, each read once here: what they import stays for the forked processes."""
    case_target.prepare()
    samples = [s if isinstance(s, Sample) else Sample.of(s) for s in case_target.samples()]
    for codec in (
        "utf-8-sig",
        "utf-16",
        "utf-16-be",
        "utf-16-le",
        "utf-32",
        "utf-32-be",
        "utf-32-le",
        "latin-1",
        "ascii",
        "idna",
    ):
        codecs.lookup(codec)
    handlers, streams, here = logging.getLogger().handlers[:], (sys.stdout, sys.stderr), os.getcwd()
    for number, sample in enumerate(samples):
        with tempfile.TemporaryDirectory() as folder:
            sample.write(Path(folder))
            os.chdir(folder)
            outcome = attempt(case_target.read, Path(folder))
            os.chdir(here)
        if outcome.kind != "valid":
            raise RuntimeError(f"{case_target.name}: its sample {number} is not valid: {outcome.kind} {outcome.detail}")
    logging.getLogger().handlers[:] = handlers
    sys.stdout, sys.stderr = streams
    return samples


class Cases:
    """Case i of a target and a seed. Where there are many, every single bit of the headers comes first."""

    def __init__(self, case_target: Target, count: int, seed: int):
        self.samples = prepared(case_target)
        self.name, self.seed = case_target.name, seed
        bits = [(number, place) for number, s in enumerate(self.samples) for place in header_bits(s)]
        self.bits = bits if count >= 4 * len(bits) and seed == 0 else []

    def __call__(self, index: int) -> Sample:
        if index < len(self.bits):
            number, place = self.bits[index]
            return with_flipped_bit(self.samples[number], place)
        rng = random.Random(f"{self.name} {self.seed} {index}")
        return mutated(rng.choice(self.samples), rng, self.samples)


def fuzz(case_target: Target, count: int, seed: int, first: int = 0, keep: Optional[Path] = None) -> dict:
    """{kind: number of cases}, "findings": {signature: file}. `keep`: the folder for findings (None keeps none)."""
    cases = Cases(case_target, count, seed)
    ended = outcomes(case_target, cases, range(first, first + count))
    tally: dict = {"findings": {}}
    for index, outcome in sorted(ended.items()):
        tally[outcome.kind] = tally.get(outcome.kind, 0) + 1
        signature = " ".join(f"{outcome.kind} {outcome.detail}".split()[:3])
        if outcome.is_finding and signature not in tally["findings"]:
            case, path = cases(index), None
            if keep is not None:
                folder = keep if not case_target.name.endswith("_real") else ROOT / "test" / "output" / "fuzz"
                text = case.to_json()
                name = f"{outcome.kind}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
                path = folder / case_target.name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            tally["findings"][signature] = f"case {index}: {outcome.detail}" + (f" ({path})" if path else "")
    return tally


def replay(path: Path) -> Outcome:
    """How a kept finding, findings/TARGET/NAME.json, ends now."""
    case_target = load_targets()[Path(path).parent.name]
    prepared(case_target)
    sample = Sample.from_json(Path(path).read_text())
    return outcomes(case_target, lambda _index: sample, [0])[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="all", help="a target's name, or all")
    parser.add_argument("--cases", type=int, default=2000, help="cases a target, of most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--replay", type=Path, help="a kept finding")
    parser.add_argument("--list", action="store_true", help="name the targets")
    options = parser.parse_args()
    if options.replay:
        outcome = replay(options.replay)
        print(outcome.kind, outcome.detail)
        return int(outcome.is_finding)
    known = load_targets()
    if options.list:
        print("\n".join(known))
        return 0
    if options.target != "all" and options.target not in known:
        parser.error(f"target {options.target!r}: choose from all, {', '.join(known)}")
    # A process a core takes the next target; ranks of torch's own threads would take the cores from each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = list(known) if options.target == "all" else [options.target]
    found, cases, began = 0, 0, time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as lanes:
        for line, count, findings in lanes.map(partial(_one_target, options), names):
            print(line, *findings, sep="\n  ", flush=True)
            found, cases = found + len(findings), cases + count
    print(f"{cases} cases of {len(names)} targets, {found} findings; {time.perf_counter() - began:.1f} s")
    return int(found > 0)


def _one_target(options, name: str) -> tuple[str, int, list]:
    """(what became of its cases, how many they were, a line for each finding)."""
    began, target_ = time.perf_counter(), TARGETS[name]
    count = max(1, round(options.cases * target_.weight))
    tally = fuzz(target_, count, options.seed, options.first, FINDINGS)
    findings = [f"{signature}: {where}" for signature, where in tally.pop("findings").items()]
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(tally.items()))
    return f"{name}: {counts}; {time.perf_counter() - began:.1f} s", count, findings


if __name__ == "__main__":
    # the targets import this file under its own name
    sys.modules["run"] = sys.modules["__main__"]
    sys.exit(main())
