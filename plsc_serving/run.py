"""PLSC's server by its own names, over deploy.server.

from plsc_serving.run import PLSCServer
fs = PLSCServer()
fs.with_model(model_path="/path/to/model.onnx")
fs.run(gpu_index=0, port=8010)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional, Union

ROOT = Path(__file__).resolve().parents[1]
GRACE = 40  # seconds that a server gets to end


class PLSCServer:
    """with_gpu=False serves on the CPU whatever the index. options: of deploy.server, as
    `PLSCServer(options=["--token=...", "--gallery=people.db"])`."""

    def __init__(self, with_gpu: bool = True, options: Optional[list] = None):
        self.with_gpu, self.options = with_gpu, list(options or [])
        self.model_path: Optional[str] = None
        self._processes: list[subprocess.Popen] = []

    def with_model(self, model_path: Optional[str] = None, model_name: Optional[str] = None):
        """The model to serve: an ONNX file, a checkpoint, or a folder with one; relative paths count from where this
        is called. Says why and returns -1 where there is none."""
        if model_name is not None:
            return self.get_model(model_name)
        path = os.path.abspath(os.fspath(model_path))
        if not os.path.exists(path):
            print(f"model_path {path}: no such file or folder")
            return -1
        self.model_path = path
        return None

    def get_model(self, model_name: str):
        """Models by name were downloaded once; nothing is downloaded here: says so and returns -1."""
        print(f"model {model_name!r}: nothing is downloaded: give the path of a model file to with_model")
        return -1

    def run(self, gpu_index: Union[int, str] = 0, port: int = 8866):
        """Serves until Ctrl-C or stop(). gpu_index: of the accelerator, -1 for the CPU, or a device such as "npu:0"."""
        return self.run_multi([gpu_index], [port])

    def run_multi(self, gpu_index_list: Optional[list] = None, port_list: Optional[list] = None):
        """One server for each pair of device and port, until Ctrl-C or stop(). -1 where lists do not fit."""
        gpus, ports = list(gpu_index_list or []), list(port_list or [])
        if self.model_path is None:
            print("no model: call with_model(model_path=...) first")
            return -1
        if not self.with_gpu:
            gpus = [-1] * len(ports)
        if not ports or len(gpus) != len(ports):
            print(f"{len(gpus)} devices and {len(ports)} ports: one port for each device is needed")
            return -1
        for gpu, port in zip(gpus, ports):
            self._start(gpu, port)
        return self.hold()

    def hold(self) -> int:
        """Waits until a server ends, then ends the others; Ctrl-C ends all. The first one's status."""
        status = 0
        try:
            while self._processes and not status:
                time.sleep(0.1)
                ended = [process.returncode for process in list(self._processes) if process.poll() is not None]
                if ended:
                    status = ended[0]
                    break
        except KeyboardInterrupt:
            pass
        self.stop()
        return status

    def stop(self) -> None:
        """Ends the servers, from another thread; requests in flight are answered."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()

    def get_path(self) -> str:
        """The folder of this package."""
        return str(Path(__file__).resolve().parent)

    def get_exe(self) -> str:
        """What runs the server."""
        return sys.executable

    def modify_conf(self, gpu_index: int = 0) -> None:
        """There are no configuration files to change: taken for compatibility."""

    def show_conf(self) -> None:
        """Shows nothing, as ever."""

    def _start(self, gpu: Union[int, str], port: int) -> None:
        device = _device(gpu)
        words = ["--model", self.model_path, "--port", str(port), "--device", device, *self.options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._processes.append(subprocess.Popen([sys.executable, "-m", "deploy.server", *words], env=environment))
        where = "cpu" if device == "cpu" else f"gpu {gpu}"
        print(f"Start serving on {where} port = {port}", flush=True)


def _device(gpu: Union[int, str]) -> str:
    """The device of an index: of the NPUs or GPUs of this machine; the CPU, with a word, where there are none."""
    if isinstance(gpu, str):
        return gpu
    if gpu < 0:
        return "cpu"
    from runtime.device import best_kind

    kind = best_kind()
    if kind == "cpu":
        print("neither an NPU nor a GPU is here: serving on the CPU")
        return "cpu"
    return f"{kind}:{gpu}"
