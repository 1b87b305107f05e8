"""A device is a value that says where a run computes: a Cpu, a Cuda or an Npu. The only file, beside head/ops/, that
names torch.cuda and torch_npu.

`python -m runtime.device` prints what this machine has, what is missing for the rest, and how to get it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import random
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass

import numpy as np

from runtime import ascend, host
from runtime.errors import DeviceError

if __name__ == "__main__":
    # A recent torch loads torch_npu at `import torch` and dies with a traceback where CANN is missing; as a command
    # this file has to say that in one line. Other commands have it from runtime.log.run_command.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A place to compute. Making the value opens nothing; set() makes it the process's current device.

    kind: "cpu" | "cuda" | "npu", and decides the class: Device("npu", 3) is an Npu.   index: which one; 0 on cpu.
    """

    kind: str
    index: int = 0

    # backend: the torch.distributed backend that moves this device's tensors: gloo, nccl or hccl.
    # memory_format: the layout of activations [B, C, H, W] that convolutions prefer here.
    # driver_errors, tool: what the driver's errors look like, and the command that lists its devices.
    # activities: names in torch.profiler.ProfilerActivity.
    memory_format = torch.contiguous_format
    driver_errors, tool = r"(?!)", ""
    activities = ()

    def __new__(cls, kind: str = "", index: int = 0):
        return object.__new__(KINDS[kind] if cls is Device and kind else cls)

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @property
    def torch(self) -> torch.device:
        return torch.device(str(self))

    def layout(self, name: str = "auto") -> torch.memory_format:
        """The layout of images and weights by its name: auto (preferred here), fastest, contiguous, channels_last.
        Raises DeviceError where the device has no such layout."""
        return {
            "auto": self.memory_format,
            "fastest": torch.channels_last,
            "contiguous": torch.contiguous_format,
            "channels_last": torch.channels_last,
        }[name]

    def embedding_policy(self) -> str:
        """The precision policy in which a trained net is run where nobody asks for another: the quickest that costs
        less than 0.1 points of accuracy (benchmark/cpu_inference.py)."""
        return "O0"

    # What a machine has of this kind: asked of the class.

    @classmethod
    def reason_unavailable(cls) -> str | None:
        """None where the kind can be used, else one line: what is missing and how to get it."""
        raise NotImplementedError

    @classmethod
    def count(cls) -> int:
        """How many of them this process sees."""
        raise NotImplementedError

    def compiled(self, module):
        """torch.compile of a module for inputs of one shape. It shares the module's parameters; the module stays eager.

        Compiles and runs a tiny function first: a machine that cannot do that raises DeviceError, one line, here and
        not with a traceback at the first step.
        """
        missing = self.missing_for_compiling() or _why_compiling_fails(self)
        if missing:
            raise DeviceError(f"static mode (torch.compile) on {self}: {missing}, or leave --static out")
        return torch.compile(module, dynamic=False)

    def missing_for_compiling(self) -> str | None:
        """What torch.compile lacks for this device and how to get it; None where it can be tried."""
        if not hasattr(torch, "compile"):
            return f"it needs torch 2.0 or newer, and this is {torch.__version__}; install one"
        return self._compiler_missing()

    def meaning(self, said: str) -> str | None:
        """What an error text of the driver means and how to mend it, where that is known."""
        return None

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """While open, what the driver raises for a device that vanished, hung or is full becomes a DeviceError of one
        line with the cure. Errors of collectives stay as they are: runtime.dist says which rank is to blame."""
        try:
            yield
        except RuntimeError as error:
            said = str(error)
            if isinstance(error, DeviceError) or re.search(r"nccl|hccl|gloo", said, re.IGNORECASE):
                raise
            if re.search(r"out of memory|not enough memory|can't allocate memory", said):
                raise DeviceError(
                    f"{self} is out of memory ({_first_line(error)}): lower --batch_size, or split it "
                    "with --accumulate; `python -m head.plan` says what the classes take"
                ) from error
            if not re.search(self.driver_errors, said):
                raise
            cure = self.meaning(said) or (
                f"see whether {self.tool} still lists it, and go on with --resume or on another --device_id"
            )
            raise DeviceError(f"{self} failed while it computed ({_first_line(error)[:100]}): {cure}") from error

    def seed(self, seed: int) -> None:
        """Seed Python's, NumPy's, torch's and the device's generators."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def rng_state(self) -> dict:
        """The state of all generators that seed() seeds, as tensors: {"python", "numpy", "torch"} and the kind."""
        _, words, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
            "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
            "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
            "torch": torch.get_rng_state(),
        }

    def set_rng_state(self, state: dict) -> None:
        """Continue from rng_state(). A state of another kind of device leaves this device's generator as it is."""
        random.setstate((3, tuple(state["python"].tolist()), next(iter(state["python_gauss"].tolist()), None)))
        *keys, position, has_gauss = state["numpy"].tolist()
        np.random.set_state(
            ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item())
        )
        torch.set_rng_state(state["torch"].cpu())

    # What it can do.

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether a convolutional net can train in that dtype here. The first question tries a tiny convolution."""
        return dtype.is_floating_point and _has_arithmetic(self, dtype) and self._is_native(dtype)

    def autocast(self, dtype: torch.dtype | None, enabled: bool = True):
        """A context in which torch chooses `dtype` where it is safe; float32, None or enabled=False switch it off."""
        enabled = enabled and dtype not in (None, torch.float32)
        if hasattr(torch, "autocast"):  # torch 1.10
            return torch.autocast(self.kind, dtype=dtype if enabled else None, enabled=enabled)
        own = self._old_autocast(enabled) if not enabled or dtype == torch.float16 else None
        if own is None:
            raise DeviceError(
                f"autocast to {_name(dtype)} on {self.kind} needs torch 1.10 and this is "
                f"{torch.__version__}: use O0, or install a newer torch"
            )
        return own

    def grad_scaler_class(self):
        """The loss scaler of torch for this device, called as class(init_scale=..., ...); None where there is none."""
        scaler = getattr(torch.amp, "GradScaler", None) if hasattr(torch, "amp") else None  # torch 2.3
        return functools.partial(scaler, self.kind) if scaler else None

    @property
    def saturates(self) -> bool:
        """Whether results have no inf and no nan: a flag of the chip remembers an overflow, clear_overflow() drops it,
        and what checks gradients reads that flag and not the gradients."""
        return False

    def clear_overflow(self) -> None:
        pass

    def fused_sgd_class(self):
        """An SGD class of the device's vendor, or None. Ascend's: fp32 and fp16 parameters only, zero_grad keeps the
        gradients' memory, and neither parameters nor gradients may be replaced once it exists."""
        return None

    def fused_optimizers(self) -> set:
        """Names of the quick SGDs that work here: "sgd_foreach", "sgd_fused", "npu_fused_sgd"."""
        names = {f"sgd_{how}" for how in ("foreach", "fused") if _sgd_works(self, how)}
        return names | ({"npu_fused_sgd"} if self.fused_sgd_class() is not None else set())

    # For reports.

    def profiler_module(self):
        """The module whose profile(activities=...) sees this device: torch.profiler or Ascend's counterpart."""
        return torch.profiler

    def profiler_activities(self) -> list:
        """What profiler_module().profile() takes as activities: the host's and the device's."""
        activity = self.profiler_module().ProfilerActivity
        names = ("CPU", *self.activities)
        # torch's own has NPU and PrivateUse1 as two names of one activity
        return list(dict.fromkeys(getattr(activity, name) for name in names if hasattr(activity, name)))

    def describe(self) -> dict:
        """{"device", "kind", "name", "count", "memory" (bytes), "machine", "torch", and its toolkit's versions}."""
        return {
            "device": str(self),
            "kind": self.kind,
            "name": self.name(),
            "count": device_count(self.kind),
            "memory": self.total_memory(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            **self.versions(),
        }

    def versions(self) -> dict:
        """Of the toolkit below torch."""
        return {}


class Cpu(Device):
    # The quicker layout (benchmark/step.py), and as exact as the other with model.layers.BatchNorm2d.
    memory_format = torch.contiguous_format if torch.__version__.startswith("1.") else torch.channels_last
    backend = "gloo"

    def __str__(self) -> str:
        return "cpu"

    @classmethod
    def reason_unavailable(cls):
        return None

    @classmethod
    def count(cls):
        return 1

    def embedding_policy(self) -> str:
        # bf16 is slower than fp32 on a CPU that does not multiply it
        return "bf16" if getattr(getattr(torch, "cpu", None), "_is_avx512_bf16_supported", bool)() else "O0"

    def set(self) -> None:
        host.keep_freed_memory()

    def synchronize(self) -> None:
        pass

    def tune(self, tf32: bool = False, autotune: bool = True) -> dict:
        """tf32: let fp32 matrix products and convolutions drop mantissa bits (TF32 on cuda, HF32 on npu), process-wide.
        autotune: try convolution algorithms on each new shape and keep the quickest (cudnn); for fixed shapes.

        Returns {"tf32", "autotune"}: which of them are on now; False where the device has no such switch."""
        return {"tf32": False, "autotune": False}

    # Memory: the process's resident set, its peak, and the machine's memory.

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return host.process_memory()

    def max_memory_allocated(self) -> int:
        return host.process_memory_peak()

    def reset_peak_memory(self) -> None:
        host.reset_process_memory_peak()

    def total_memory(self) -> int:
        return host.total_memory()

    def free_memory(self) -> int:
        return host.memory_left()

    def name(self) -> str:
        return host.cpu_name()

    def event(self):
        return None

    def prefetch(self, batches: Iterable, move) -> Iterator:
        return map(move, batches)

    def _is_native(self, dtype) -> bool:
        return True

    def _old_autocast(self, enabled):
        return None if enabled else nullcontext()

    def _compiler_missing(self):
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            return "there is no C++ compiler (g++, clang++ or $CXX); install one"
        return None


class _Accelerator(Device):
    """What cuda and npu share: their modules in torch (`api`) have the same functions."""

    @classmethod
    def count(cls):
        return cls.api().device_count()

    def set(self) -> None:
        """Make it the current device; raises DeviceError with the reason where it cannot be opened."""
        try:
            self.api().set_device(self.index)
        except (RuntimeError, AssertionError) as error:
            meaning = self.meaning(str(error))
            said = f"{meaning} ({_first_line(error)})" if meaning else _first_line(error)
            raise DeviceError(f"{self} cannot be opened: {said}") from error

    def synchronize(self) -> None:
        """Wait until everything queued on the device is done."""
        self.api().synchronize(self.index)

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.api().manual_seed_all(seed)

    def rng_state(self) -> dict:
        return {**super().rng_state(), self.kind: self.api().get_rng_state(self.torch).cpu()}

    def set_rng_state(self, state: dict) -> None:
        super().set_rng_state(state)
        if self.kind in state:
            self.api().set_rng_state(state[self.kind].cpu(), self.torch)

    # Memory, in bytes.

    def empty_cache(self) -> None:
        self.api().empty_cache()

    def memory_allocated(self) -> int:
        return self.api().memory_allocated(self.index)

    def max_memory_allocated(self) -> int:
        return self.api().max_memory_allocated(self.index)

    def reset_peak_memory(self) -> None:
        self.api().reset_peak_memory_stats(self.index)

    def total_memory(self) -> int:
        return self.api().get_device_properties(self.index).total_memory

    def free_memory(self) -> int:
        """What can still be allocated: on the device, or of the machine (or the container) on cpu."""
        # torch 1.8 cannot ask the driver, and knows only of its own
        ask = getattr(self.api(), "mem_get_info", None)
        return ask(self.index)[0] if ask else self.total_memory() - self.memory_allocated()

    def name(self) -> str:
        return self.api().get_device_name(self.index)

    def event(self):
        """A timing event: record(), synchronize(), elapsed_time(other) in ms; None where there are none."""
        return self.api().Event(enable_timing=True)

    def prefetch(self, batches: Iterable, move) -> Iterator:
        """move(batch) for each batch, one batch ahead on a stream of its own, so that the copy of the next batch
        runs beside the computation on this one. Copies overlap only from pinned memory with non_blocking=True."""
        api, ahead = self.api(), None
        stream = api.Stream(device=self.torch)
        for batch in batches:
            with api.stream(stream):
                moved = move(batch)
                done = stream.record_event()
            if ahead is not None:
                yield _handed_over(api, *ahead)
            ahead = moved, done
        if ahead is not None:
            yield _handed_over(api, *ahead)

    def _old_autocast(self, enabled):
        return self.api().amp.autocast(enabled=enabled)


class Cuda(_Accelerator):
    backend = "nccl"
    driver_errors, tool = r"CUDA (driver )?error|cuDNN error|CUBLAS_STATUS|CUDNN_STATUS|HIP error", "nvidia-smi"
    activities = ("CUDA",)

    @staticmethod
    def api():
        return torch.cuda

    @classmethod
    def reason_unavailable(cls):
        if not torch.backends.cuda.is_built():
            return f"torch {torch.__version__} is a build without CUDA; install one with it (pip install torch)"
        if torch.cuda.device_count() == 0:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            if hidden is not None:
                return f"CUDA_VISIBLE_DEVICES='{hidden}' leaves no GPU visible; unset it or name one"
            return "torch sees no GPU; install the NVIDIA driver and see that nvidia-smi lists a GPU"
        if not torch.cuda.is_available():
            return f"the driver is too old for the CUDA {torch.version.cuda} of this torch; update the driver"
        return None

    def tune(self, tf32: bool = False, autotune: bool = True) -> dict:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = autotune
        return {"tf32": tf32, "autotune": autotune}

    def grad_scaler_class(self):
        return super().grad_scaler_class() or torch.cuda.amp.GradScaler

    def versions(self) -> dict:
        versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        return {**versions, "driver": getattr(torch.version, "hip", None)} if torch.version.hip else versions

    def _is_native(self, dtype) -> bool:
        # Older cards emulate bfloat16, slower than float32: not what somebody who asks for it wants.
        return (
            dtype != torch.bfloat16 or bool(torch.version.hip) or torch.cuda.get_device_capability(self.index)[0] >= 8
        )

    def _compiler_missing(self):
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed; pip install triton"
        return None


class Npu(_Accelerator):
    backend = "hccl"
    driver_errors, tool = r"NPU (function )?error|ERR\d{5}|\bE[A-Z]\d{4}\b|\bacl\w+|ACL stream", "npu-smi info"
    activities = ("NPU", "PrivateUse1")

    @staticmethod
    def api():
        return torch.npu

    @classmethod
    def reason_unavailable(cls):
        reason = _load_torch_npu()
        if reason:
            return reason
        if not torch.npu.is_available() or torch.npu.device_count() == 0:
            return "torch_npu is installed but sees no device; " + (
                ascend.ask_npu_smi()
                or "check `npu-smi info`, ASCEND_RT_VISIBLE_DEVICES (its numbers have to ascend), "
                "and that this user belongs to the driver's group (HwHiAiUser)"
            )
        return None

    def meaning(self, said: str) -> str | None:
        return ascend.explain(said)

    def compiled(self, module):
        """By torch_npu's inductor where it is whole; else forward and backward are recorded as NPU graphs and replayed,
        where that is quicker than eager."""
        record = getattr(torch.npu, "make_graphed_callables", None)
        if record is None or self.missing_for_compiling() is None:
            return super().compiled(module)
        from runtime.captured import Captured  # loads torch, which has to come after what stands at this file's top

        return Captured(module, self, record)

    def layout(self, name: str = "auto") -> torch.memory_format:
        if name == "channels_last":
            raise DeviceError("--memory_format=channels_last: torch_npu has no such layout; leave the option out")
        return torch.contiguous_format

    def set(self) -> None:
        host.allowed_cores()  # counted now: when the device opens, some releases of CANN bind the process to a part
        host.raise_open_files()
        super().set()
        self._keep_fp32()

    def tune(self, tf32: bool = False, autotune: bool = True) -> dict:
        """HF32, said for matrix products and convolutions each: by default only the latter have it. Adds to the record
        what set() said: "precision_mode", "internal_format"."""
        tuned = {"tf32": False, "autotune": False, **self._keep_fp32()}
        for products in ("matmul", "conv"):
            if hasattr(torch.npu, products):
                # torch_npu 1.8.1 has the switches, which can be set and not read
                getattr(torch.npu, products).allow_hf32 = tf32
                tuned["tf32"] = tf32
        return tuned

    @staticmethod
    def _keep_fp32() -> dict:
        """fp32 stays fp32 in the operators' compiler, which else computes it in fp16 on the first chips; no private
        layouts, which cost copies. Returns what this torch_npu could be told."""
        said = {}
        if hasattr(torch.npu, "set_option"):
            torch.npu.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})
            said["precision_mode"] = "must_keep_origin_dtype"
        if hasattr(torch.npu, "config"):
            torch.npu.config.allow_internal_format = False
            said["internal_format"] = False
        return said

    @property
    def saturates(self) -> bool:
        # the oldest torch_npu cannot say; there every chip saturates unless INF_NAN_MODE_ENABLE is set
        ask = getattr(getattr(torch.npu, "utils", None), "is_support_inf_nan", None)
        return not ask() if ask else os.environ.get("INF_NAN_MODE_ENABLE", "0") != "1"

    def clear_overflow(self) -> None:
        if self.saturates:
            place = torch.npu.utils if hasattr(torch.npu, "utils") else torch.npu
            place.clear_npu_overflow_flag()

    def grad_scaler_class(self):
        # Ascend's own first: it also clears the overflow flag of chips whose fp16 saturates instead of giving inf.
        own = getattr(getattr(torch.npu, "amp", None), "GradScaler", None)
        return own or super().grad_scaler_class()

    def fused_sgd_class(self):
        return getattr(getattr(sys.modules.get("torch_npu"), "optim", None), "NpuFusedSGD", None)

    def profiler_module(self):
        return getattr(sys.modules.get("torch_npu"), "profiler", torch.profiler)

    def versions(self) -> dict:
        return {"torch_npu": getattr(sys.modules.get("torch_npu"), "__version__", None), "cann": _cann_version()}

    def _is_native(self, dtype) -> bool:
        bf16 = getattr(torch.npu, "is_bf16_supported", lambda: False)
        return dtype != torch.bfloat16 or bool(bf16())

    def _compiler_missing(self):
        # torchair is another backend, for inference: that it is there says nothing of torch.compile's default one
        for package, brought_by in (("torch_npu._inductor", "torch_npu 2.6 or newer"), ("triton", "triton-ascend")):
            if not _is_installed(package):
                return f"torch.compile needs {package} ({brought_by}), and NPU graphs need torch_npu 2.5; install them"
        return None


KINDS = {"cpu": Cpu, "cuda": Cuda, "npu": Npu}


def parse_device(text: str = "auto", index: int | None = None) -> Device:
    """ "npu:3", "cuda", "gpu" (cuda), "cpu", "auto" (npu, else cuda, else cpu) -> a Device that is there.

    index: which one, where the text does not say. Raises DeviceError that names the choices, or the reason why the
    device is unavailable and the cure.
    """
    matched = re.fullmatch(r"([a-z]+)(?::(\d+))?", str(text).strip().lower())
    kind = matched and {"gpu": "cuda"}.get(matched[1], matched[1])
    if kind not in (*KINDS, "auto"):
        raise DeviceError(f"device '{text}': choose from auto, {', '.join(KINDS)} or gpu, with an index as in npu:3")
    if matched[2] is not None:
        index = int(matched[2])
    if kind == "auto":
        kind = best_kind()
    reason = reason_unavailable(kind)
    if reason:
        raise DeviceError(f"no {kind} here: {reason}")
    if kind == "cpu":
        return Device("cpu")
    index, count = index or 0, device_count(kind)
    if not 0 <= index < count:
        raise DeviceError(
            f"{kind}:{index} does not exist: this process sees {count} {kind} "
            f"device{'s' * (count > 1)}, numbered from 0"
        )
    return Device(kind, index)


def best_kind() -> str:
    """npu, else cuda, else cpu."""
    npu_reason = reason_unavailable("npu")
    if npu_reason and importlib.util.find_spec("torch_npu") is not None:
        logger.warning("no npu here, which is passed over: %s", npu_reason)  # who installs torch_npu expects one
    return next(kind for kind in ("npu", "cuda", "cpu") if reason_unavailable(kind) is None)


def device_count(kind: str) -> int:
    """How many devices of that kind this process can use; the cpu counts as one."""
    return 0 if reason_unavailable(kind) else KINDS[kind].count()


def reason_unavailable(kind: str) -> str | None:
    """None where the kind can be used, else one line: what is missing and how to get it."""
    return KINDS[kind].reason_unavailable()


@functools.cache
def _load_torch_npu() -> str | None:
    """Import torch_npu once; None where torch.npu is there afterwards, else the reason in one line."""
    if hasattr(torch, "npu"):
        return None
    if "torch_npu" not in sys.modules and importlib.util.find_spec("torch_npu") is None:
        return f"torch_npu is not installed; on an Ascend machine install {ascend.what_to_install(torch.__version__)}"
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            importlib.import_module("torch_npu")
    # ImportError of CANN's libraries, RuntimeError beside another accelerator, and more; torch_npu 1.8.1 and the first
    # of 2.1 print their traceback and end the process with status 0
    except (Exception, SystemExit) as error:
        sys.modules.pop("torch_npu", None)
        printed = said.getvalue().strip().splitlines()
        reason = printed[-1] if isinstance(error, SystemExit) and printed else _first_line(error)
        return (
            f"torch_npu is installed but does not load ({reason}); install CANN and "
            "`source test/env_npu.sh` before the command"
        )
    return None if hasattr(torch, "npu") else "torch_npu loads but brings no torch.npu; install the one for this torch"


@functools.cache
@torch.no_grad()
def _has_arithmetic(device: Device, dtype: torch.dtype) -> bool:
    """Whether convolution, batch norm and matrix product exist there in that dtype; batch norm with the fp32 weights
    that it keeps beside half activations. Without backward(): torch 1.8 may hang where the process ends right after
    its first one."""
    kept = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    try:
        images = torch.ones(2, 3, 8, 8, device=device.torch, dtype=dtype)
        kernel = torch.ones(4, 3, 3, 3, device=device.torch, dtype=dtype)
        maps = torch.nn.functional.conv2d(images, kernel)
        zeros_4, ones_4 = (make(4, device=device.torch, dtype=kept) for make in (torch.zeros, torch.ones))
        maps = torch.nn.functional.batch_norm(maps, zeros_4, ones_4, ones_4, ones_4, training=True)  # all 1 again
        features_B4 = maps.mean((2, 3))
        return bool((features_B4 @ features_B4.t() > 0).all())
    except (RuntimeError, TypeError):
        return False


@functools.cache
def _sgd_works(device: Device, how: str) -> bool:
    """Whether torch's SGD(foreach=True or fused=True) exists in this torch and steps on this device."""
    try:
        weight = torch.ones(4, device=device.torch, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.5, momentum=0.9, **{how: True}).step()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((weight == 0.5).all())


def owns_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is NpuFusedSGD, which keeps gradients in memory of its own: a .grad that is replaced or set to None is
    cut off from it without a word. Its versions call their mark by two names; all have this attribute."""
    return hasattr(optimizer, "is_params_grads_combined")


def _handed_over(api, moved, done):
    """The batch, after the current stream was told to wait for its copy; its memory is not reused before use."""
    current = api.current_stream()
    current.wait_event(done)
    for tensor in _tensors(moved):
        if tensor.device.type != "cpu":
            tensor.record_stream(current)
    return moved


def _tensors(batch):
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)


@functools.cache
def _why_compiling_fails(device: Device) -> str | None:
    """What a tiny function's compilation ends with; None where it compiles and computes."""
    try:
        doubled = torch.compile(lambda x: x.sin() * 2, dynamic=False)(torch.ones(16, device=device.torch))
    except RuntimeError as error:  # of torch._dynamo and torch._inductor, whose classes move between versions
        return f"compiling a tiny function fails ({_first_line(error)}); repair the compiler"
    return None if torch.allclose(doubled.cpu(), torch.ones(16).sin() * 2) else "it computes wrong numbers"


def _cann_version() -> str | None:
    """The version that CANN's toolkit states beside its libraries."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    for name in ("version.cfg", "ascend_toolkit_install.info", "version.info"):
        try:
            with open(os.path.join(home or "", name)) as file:
                found = re.search(r"version\w*\s*=\s*\[?([\w.:]+)", file.read(), re.IGNORECASE)
        except OSError:
            continue
        if found:
            return found[1]
    return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # its parent is not there
        return False


def _installed_torch_npu() -> str | None:
    """Its version where it cannot be imported."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(dtype) -> str:
    return str(dtype).replace("torch.", "")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_ranks(device: Device, ranks: int) -> None:
    """Raises DeviceError where this machine has no device for each of its ranks, of which `device` is the first one's.
    The cpu takes any number of ranks."""
    have = device_count(device.kind) - device.index
    if device.kind != "cpu" and ranks > have:
        after = f" from {device} on" if device.index else ""
        raise DeviceError(
            f"{ranks} ranks on this machine, but {have} {device.kind} device{'s' * (have != 1)}{after}: "
            f"start with RANK_SIZE={have}, or with --device_type=cpu"
        )


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description="What this machine can compute on, and what is missing for the rest.")
    parser.add_argument("device", nargs="?", help="print only the kind of this device (auto: of the best one), or fail")
    parser.add_argument("--index", type=int, help="number of the device, where its name does not say")
    parser.add_argument("--lanes", action="store_true", help="the versions of CANN, torch_npu, torch that go together")
    parser.add_argument("--ranks", type=int, default=1, help="and fail unless so many ranks have a device each")
    arguments = parser.parse_args()
    if arguments.device:
        device = parse_device(arguments.device, arguments.index)
        check_ranks(device, arguments.ranks)
        print(device.kind)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    for kind in KINDS:
        print(f"{kind}: {_summary(kind)}")
    on_ascend = importlib.util.find_spec("torch_npu") is not None or os.path.exists("/dev/davinci_manager")
    if on_ascend:
        torch_npu = Npu("npu").versions()["torch_npu"] or _installed_torch_npu()
        print(
            "npu versions: "
            + ascend.standing(torch.__version__, torch_npu, _cann_version(), platform.python_version(), np.__version__)
        )
    if on_ascend or arguments.lanes:
        print(ascend.table())


def _summary(kind: str) -> str:
    reason = reason_unavailable(kind)
    if reason:
        return f"not here: {reason}"
    device = Device(kind)
    facts = device.describe()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("cuda", "cudnn", "torch_npu", "cann") if facts.get(name))
    dtypes = ", ".join(_name(t) for t in (torch.float16, torch.bfloat16) if device.supports(t)) or "neither"
    return (
        f"{facts['count']} x {facts['name']}, {facts['memory'] / 2**30:.0f} GiB"
        f"{', ' + versions if versions else ''}; half precision: {dtypes}; ranks talk over {device.backend}"
    )


if __name__ == "__main__":
    from runtime.log import run_command

    run_command(main)
