"""Ranks: the process group, and the few collectives that the project uses."""

from __future__ import annotations

import inspect
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from runtime import ascend, host
from runtime.device import Device, check_ranks
from runtime.errors import DeviceError, RankError


@dataclass(frozen=True)
class World:
    """The ranks that train together. One rank is not special: every method is then a correct no-op.

    group: what torch.distributed calls the process group, over `device`'s backend; None at size 1.
    host_group: a gloo group over the same ranks for objects and barriers (the same as `group` on cpu).
    device: where the tensors of collectives live.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: object = None
    device: torch.device = torch.device("cpu")
    host_group: object = None
    timeout_s: float = 600.0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_(self, t: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Sum, max or min over the ranks, in place. op: "sum" | "max" | "min"."""
        if op not in _REDUCE:
            raise ValueError(f"op '{op}': choose from {', '.join(_REDUCE)}")
        if self.size > 1 and t.numel():  # gloo of torch 1.8 crashes on empty tensors
            self._check_reducible(t.dtype)
            dist.all_reduce(t, op=_REDUCE[op](), group=self.group)
        return t

    def all_gather(self, t_BD: torch.Tensor) -> torch.Tensor:
        """[B, ...] on each rank, the same B everywhere -> [size * B, ...] in rank order."""
        if self.size == 1:
            return t_BD
        t_BD = t_BD.contiguous()
        out = t_BD.new_empty((self.size * t_BD.shape[0], *t_BD.shape[1:]))
        if out.numel() == 0:
            return out
        gather = self._one_tensor("all_gather_single", "all_gather_into_tensor")
        if gather is not None:
            gather(out, t_BD, group=self.group)
        else:
            dist.all_gather(list(out.chunk(self.size)), t_BD, group=self.group)
        return out

    def gather_rows(self, t: torch.Tensor, counts) -> torch.Tensor:
        """[counts[rank], ...] on each rank -> [sum(counts), ...] in rank order, on every rank."""
        counts = [int(n) for n in counts]
        if len(counts) != self.size or counts[self.rank] != t.shape[0]:
            raise ValueError(f"rank {self.rank} holds {t.shape[0]} rows; counts say {counts} for {self.size} ranks")
        if self.size == 1:
            return t
        most = max(counts)
        padded = t.new_zeros((most, *t.shape[1:]))
        padded[: t.shape[0]] = t
        gathered = self.all_gather(padded)
        return torch.cat([gathered[r * most : r * most + n] for r, n in enumerate(counts)])

    def reduce_scatter_rows(self, t: torch.Tensor) -> torch.Tensor:
        """[size * B, ...] on each rank -> this rank's [B, ...] of the sum over ranks."""
        if self.size == 1:
            return t
        if t.shape[0] % self.size:
            raise ValueError(f"{t.shape[0]} rows do not divide among {self.size} ranks")
        rows = t.shape[0] // self.size
        self._check_reducible(t.dtype)
        if self.device.type != "cpu":  # gloo has none in most versions of torch
            out, t = t.new_empty((rows, *t.shape[1:])), t.contiguous()
            scatter = self._one_tensor("reduce_scatter_single", "reduce_scatter_tensor")
            if scatter is not None:
                scatter(out, t, group=self.group)
            else:
                dist.reduce_scatter(out, list(t.chunk(self.size)), group=self.group)
            return out
        summed = self.all_reduce_(t.clone(memory_format=torch.contiguous_format))
        return summed[self.rank * rows : (self.rank + 1) * rows].clone()

    def broadcast_(self, t: torch.Tensor, src: int = 0) -> torch.Tensor:
        """The tensor of rank src, on every rank, in place."""
        if self.size > 1:
            dist.broadcast(t, src, group=self.group)
        return t

    def all_gather_object(self, obj) -> list:
        """Small picklable objects of all ranks, in rank order. Not for tensors: they have all_gather."""
        if self.size == 1:
            return [obj]
        objects = [None] * self.size
        dist.all_gather_object(objects, obj, group=self.host_group)
        return objects

    def _one_tensor(self, *names):
        """torch's collective over one tensor under the newest name that it has; None before torch 1.13, and where
        hccl documents none."""
        if self.device.type == "npu" and self.size in (3, 5, 6, 7):
            return None
        return next((getattr(dist, name) for name in names if hasattr(dist, name)), None)

    def _check_reducible(self, dtype: torch.dtype) -> None:
        if self.device.type == "npu" and dtype in (torch.float64, torch.uint8):
            raise DeviceError(f"hccl does not reduce {dtype}: convert to float32 or int32 before")

    def core_share(self) -> int:
        """How many cores this rank may fill, at least 1: each core that it may use, divided by the number of ranks on
        this machine that may use it too. So ranks that a launcher has bound to cores of their own get those whole.
        Every rank must call it."""
        here, mine = socket.gethostname(), host.allowed_cores()
        beside = [cores for machine, cores in self.all_gather_object((here, mine)) if machine == here]
        return max(1, int(sum(1 / sum(core in cores for cores in beside) for core in mine)))

    def barrier(self) -> None:
        """Wait for all ranks on the host; a rank that does not come within the timeout is named on rank 0."""
        if self.size > 1:
            if hasattr(dist, "monitored_barrier"):  # torch 1.9
                # Shorter than the timeout of the device's collectives: nccl aborts the process without naming anybody.
                dist.monitored_barrier(self.host_group, timedelta(seconds=0.75 * self.timeout_s))
            else:
                dist.barrier(self.host_group)


# looked up late: torch built without distributed has no ReduceOp
_REDUCE = {"sum": lambda: dist.ReduceOp.SUM, "max": lambda: dist.ReduceOp.MAX, "min": lambda: dist.ReduceOp.MIN}

ALONE = World()


def world_env() -> dict:
    """rank, size, local_rank and local_size as torchrun's variables say; one rank where there are none."""
    variables = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    defaults = {"rank": 0, "size": 1, "local_rank": 0, "local_size": 1}
    values = {}
    for name, variable in variables.items():
        text = os.environ.get(variable, "")
        if text and not re.fullmatch(r"\d+", text):
            raise DeviceError(f"{variable}='{text}' is not a number: start the ranks with torchrun or test/*.sh")
        values[name] = int(text) if text else defaults[name]
    if "LOCAL_RANK" not in os.environ:
        values["local_rank"] = values["rank"]
    if "LOCAL_WORLD_SIZE" not in os.environ:  # torch.distributed.launch of torch 1.8 does not set it
        values["local_size"] = values["size"]
    if values["rank"] >= max(values["size"], 1):
        raise DeviceError(f"RANK={values['rank']} does not exist among WORLD_SIZE={values['size']} ranks")
    return values


@contextmanager
def open_world(device: Device, timeout_s: float = 600, backend: str = "auto") -> Iterator[World]:
    """The world that torchrun's variables describe; opens and closes the process group only if WORLD_SIZE > 1.

    timeout_s: how long a rank waits for the others. After it, or at once where a rank's connection breaks, the
    waiting ranks leave with a RankError that names the rank that died, hung or stopped, and why if it could say.
    backend: only the device's own works; "auto" takes it.
    Raises DeviceError where ranks, device and backend do not fit together.
    """
    env = world_env()
    _check(device, env, device.backend if backend == "auto" else backend)
    if env["size"] == 1:
        yield World(device=device.torch)
        return
    timeout = timedelta(seconds=timeout_s)
    groups_timeout = timedelta(seconds=_hccl_timeout(timeout_s)) if device.backend == "hccl" else timeout
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store = _of_this_start(store, rank, size, timeout_s)
        dist.init_process_group(device.backend, store=store, rank=rank, world_size=size, timeout=groups_timeout)
        host_group = dist.group.WORLD if device.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        world = World(**env, group=dist.group.WORLD, device=device.torch, host_group=host_group, timeout_s=timeout_s)
        # nccl and hccl connect at the first collective: what they have to complain of belongs here.
        world.all_reduce_(torch.ones(1, device=device.torch))
    except (RuntimeError, ValueError) as error:
        cause = ascend.explain(str(error)) if device.backend == "hccl" or "in use" in str(error) else None
        raise RankError(
            f"rank {env['rank']} found no world of {env['size']} ranks within {timeout_s:g} s "
            f"({error}): {cause or 'are all ranks started, and MASTER_ADDR and MASTER_PORT the same?'}"
        ) from error
    # gloo's collectives fail by themselves where a rank is lost; the others' only wait
    roll = _Roll(store, rank, size, silence_s=timeout_s / 2 if device.backend != "gloo" else math.inf)
    finished = False
    try:
        yield world
        world.barrier()  # nobody tears the group down under a rank that still works
        finished = True
    except BaseException as error:
        if not _is_lost_peer(error):
            roll.stopped(error)
            raise
        raise RankError(roll.explain(error, hccl=device.backend == "hccl")) from error
    finally:
        roll.close()
        # nccl and hccl may wait there for collectives that never end; the process's own end cuts those off.
        if finished or device.backend == "gloo":
            dist.destroy_process_group()


def _hccl_timeout(timeout_s: float) -> float:
    """The group's timeout, which ends the process without naming anybody, and so has to be longer than the two that
    HCCL keeps itself: for connecting, and for a collective on the device. They follow timeout_s where not set."""
    # HCCL takes 120 and more seconds for the one, and older versions multiples of 68 for the other
    usual = {
        "HCCL_CONNECT_TIMEOUT": max(120, int(timeout_s / 2)),
        "HCCL_EXEC_TIMEOUT": 68 * max(1, int(timeout_s / 68)),
    }
    longest = timeout_s
    for name, seconds in usual.items():
        value = os.environ.setdefault(name, str(seconds))
        if not value.isdecimal():
            raise RankError(f"{name}={value}: give whole seconds, or leave it unset")
        longest = max(longest, int(value))
    return longest + 60


def _of_this_start(store, rank: int, size: int, timeout_s: float):
    """The store under a prefix that rank 0 makes up, agreed on by all ranks.

    torchrun may keep one store over its restarts, with the addresses of ranks that are gone in it, and nothing that it
    tells its ranks is sure to be new and the same on all machines. So each rank asks under a name that nobody had
    before, and rank 0 answers until all have come who belong to this start.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.add(f"{prefix}/came", 1)
        return dist.PrefixStore(prefix, store)
    answered, end = set(), time.monotonic() + timeout_s
    while store.add(f"{name}/came", 0) < size - 1:
        for asking in [store.get(f"asks/{other}").decode() for other in range(1, size)]:
            if asking not in answered:
                store.set(f"answer/{asking}", name)
                answered.add(asking)
        if time.monotonic() > end:
            raise RuntimeError(f"{1 + store.add(f'{name}/came', 0)} of {size} ranks came")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, so that the cause lies with another rank. torch's older versions have no class for
    it, only gloo's, nccl's and hccl's words."""
    words = r"gloo|nccl|hccl|monitoredBarrier|connection (closed|reset|refused)|broken pipe|time(d )? ?out"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


class _Roll:
    """Says which rank is to blame when a collective fails, which torch itself mostly cannot.

    Every rank counts up a number of its own in the store once a second: one that stands still belongs to a dead or
    frozen process. A rank that leaves because of an error of its own leaves the reason, one whose collective failed
    signs that it waited. So there is a reason, or those who did not sign died (no heartbeat) or hang (heartbeat).

    silence_s: nccl's and hccl's collectives do not fail where a rank is lost; they wait, until a watchdog ends the
    process and says nothing of use. So rank 0 takes a rank whose heart stood still for so long for lost, and every
    rank that hears of a reason and is not out of its collective soon after says it and ends.
    """

    BEAT_S = 1.0
    PATIENCE_S = 4.0  # for the others to notice the same, and for a heart to be missed

    def __init__(self, store, rank, size, silence_s: float = math.inf):
        self.store, self.rank, self.size, self.silence_s = store, rank, size, silence_s
        self._heard: dict[int, tuple] = {}  # rank: (its count, when it last grew)
        self._lock = threading.Lock()  # torch 1.8's store is not safe to use from two threads
        self._closed = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="rank's heartbeat", daemon=True)
        self._beating.start()

    def _count(self, key, more=0) -> int:
        with self._lock:
            return self.store.add(key, more)

    def _beat(self):
        try:
            while not self._closed.wait(self.BEAT_S):
                self._count(f"beat/{self.rank}", 1)
                if self.silence_s < math.inf:
                    self._end_if_lost()
        except RuntimeError:  # the store went away with the rank that kept it
            if self.silence_s < math.inf:
                self._end("rank 0 died, and with it the store in which ranks meet")

    def _end_if_lost(self) -> None:
        if self.rank == 0 and not self._count("stopped"):
            lost = [rank for rank in range(1, self.size) if self._silent(rank)]
            if lost and self._count("stopped", 1) == 1:
                self._say(f"rank {', '.join(map(str, lost))} died or froze: see its log")
        if self._count("stopped"):
            with self._lock:
                reason = self.store.get("reason").decode()
            self._end(reason)

    def _silent(self, rank) -> bool:
        count, now = self._count(f"beat/{rank}"), time.monotonic()
        if self._heard.get(rank, (None,))[0] != count:
            self._heard[rank] = count, now
        return now - self._heard[rank][1] > self.silence_s

    def _end(self, reason: str) -> None:
        """Give the main thread time to leave by itself; else it waits in a collective, and the process ends here."""
        if not self._closed.wait(2 * self.PATIENCE_S):
            print(f"error: rank {self.rank} waits in vain: {reason}", file=sys.stderr, flush=True)
            os._exit(1)

    def close(self):
        self._closed.set()
        self._beating.join(self.PATIENCE_S)  # not for ever: the store may have died in the middle of an answer

    def stopped(self, error: BaseException) -> None:
        """Leave a reason for the others."""
        try:
            if self._count("stopped", 1) == 1:  # what the first has to say; the later ones may only follow from it
                said = " ".join(str(error).split())[:500]
                self._say(f"rank {self.rank} stopped: {type(error).__name__}: {said}")
        except RuntimeError:
            pass  # as above

    def _say(self, reason: str) -> None:
        with self._lock:
            self.store.set("reason", reason)

    def explain(self, error: BaseException, hccl: bool = False) -> str:
        """Why a collective failed, in one line."""
        try:
            blame, lost = self._blame()
            self._leave(lost)
        except RuntimeError:
            blame = "rank 0 died, and with it the store in which ranks meet"
        if " stopped: " in blame:
            return blame
        meaning = ascend.explain(str(error)) if hccl else None
        said = meaning or "the collective said: " + " ".join(str(error).split()).split(". ")[0][:200]
        return f"{blame} (of {self.size} ranks; {said})"

    def _blame(self) -> tuple:
        """(who, how many ranks will not come to ask the same)."""
        others = [r for r in range(self.size) if r != self.rank]
        before = {r: self._count(f"beat/{r}") for r in others}
        self._count(f"waited/{self.rank}", 1)
        end = time.monotonic() + self.PATIENCE_S
        while time.monotonic() < end:
            if self._count("stopped"):
                with self._lock:
                    return self.store.get("reason").decode(), 1
            time.sleep(0.1)
        silent = [r for r in others if not self._count(f"waited/{r}")]
        dead = [r for r in silent if self._count(f"beat/{r}") == before[r]]
        if not silent:
            return "every rank waits, but not all at the same place: they took different ways through the program", 0
        fate = "died or froze" if dead else "hangs"
        return f"rank {', '.join(map(str, dead or silent))} {fate}: see its log", len(silent)

    def _leave(self, lost: int):
        """Rank 0 leaves last, because the store may live in its process."""
        self._count("left", 1)
        end = time.monotonic() + self.PATIENCE_S
        while self.rank == 0 and self._count("left") + lost < self.size and time.monotonic() < end:
            time.sleep(0.1)


def wrap_data_parallel(module: nn.Module, world: World, **kw) -> nn.Module:
    """The module in DistributedDataParallel where there are several ranks: gradients are means over the ranks."""
    if world.size == 1:
        return module
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    options = {
        # Buffers are batch norm's running statistics. Broadcasting rank 0's before every forward costs a collective
        # a step and throws the other ranks' away; who verifies or saves averages them then.
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False,
        # Saves a copy of all gradients. Ascend's fused SGD lays them out in memory of its own instead.
        "gradient_as_bucket_view": world.device.type != "npu",
        "process_group": world.group,
    }
    if world.device.type != "cpu":
        options["device_ids"] = [world.device.index]
    return nn.parallel.DistributedDataParallel(module, **{**options, **kw})


def _check(device: Device, env: dict, backend: str) -> None:
    if backend != device.backend:
        raise DeviceError(f"{backend} cannot move {device.kind} tensors: --dist_backend=auto, or {device.backend}")
    check_ranks(Device(device.kind), env["local_size"])
    if backend == "nccl" and not dist.is_nccl_available():
        raise DeviceError(f"torch {torch.__version__} is built without nccl: install a build with it, or use one rank")
