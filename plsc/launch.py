"""torchrun in PLSC's words: `python -m plsc.launch --selected_gpus=0,1 train.py [its own options]`.

--selected_gpus (or --gpus, --devices): the devices of this machine, one rank each; all of them if left out.
--cluster_node_ips (or --ips) and --node_ip: the machines, and which of them this is. --nproc_per_node: ranks where
there are no devices. --log_dir: each rank's output in workerlog.<rank> of this folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from runtime.device import best_kind, device_count
from runtime.errors import ConfigError
from runtime.log import run_command

PORT = 6070


def torchrun_arguments(options) -> list[str]:
    """The words for torchrun, and before them what the environment gets: see `main`."""
    nodes = [ip.strip() for ip in options.ips.split(",") if ip.strip()]
    gpus = [gpu.strip() for gpu in (options.gpus or "").split(",") if gpu.strip()]
    if not all(gpu.isdigit() for gpu in gpus) or len(set(gpus)) != len(gpus):
        raise ConfigError(f"--selected_gpus {options.gpus}: give numbers such as 0,1,2,3, each once")
    if not nodes:
        raise ConfigError("--cluster_node_ips is empty: give the machines' addresses, this one's among them")
    if len(nodes) > 1 and options.node_ip not in nodes:
        raise ConfigError(
            f"--node_ip {options.node_ip} is not among --cluster_node_ips {options.ips}: which is this one?"
        )
    ranks = options.nproc_per_node or len(gpus) or max(1, device_count(best_kind()))
    words = [f"--nproc-per-node={ranks}"]
    if len(nodes) > 1:
        rank = nodes.index(options.node_ip)
        port = options.started_port or PORT
        words += [f"--nnodes={len(nodes)}", f"--node-rank={rank}", f"--master-addr={nodes[0]}", f"--master-port={port}"]
    else:
        words += ["--standalone"]
    return words


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m plsc.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--selected_gpus", "--gpus", "--devices", dest="gpus", default=None)
    parser.add_argument("--cluster_node_ips", "--ips", dest="ips", default="127.0.0.1")
    parser.add_argument("--node_ip", default="127.0.0.1")
    parser.add_argument("--nproc_per_node", type=int, default=None)
    parser.add_argument("--started_port", type=int, default=None)
    parser.add_argument("--log_dir", default=None)
    for ignored in ("--use_paddlecloud", "--print_config", "--log_level", "--run_mode"):
        parser.add_argument(ignored, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not Path(options.script).is_file():
        raise ConfigError(f"{options.script}: no such script")
    words = torchrun_arguments(options)
    environment = dict(os.environ)
    if options.gpus:
        kind = best_kind()
        name = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}.get(kind)
        visible = environment.get(name, "").split(",") if name and environment.get(name) else None
        gpus = options.gpus.split(",")
        if visible is not None and not set(gpus) <= set(visible):
            raise ConfigError(f"--selected_gpus {options.gpus}: {name} shows {environment[name]} only")
        if name:
            environment[name] = options.gpus
    # so that the script finds plsc from whatever folder it is in
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    script = [options.script, *options.arguments]
    if options.log_dir:
        environment["PLSC_LOG_DIR"] = options.log_dir
        Path(options.log_dir).mkdir(parents=True, exist_ok=True)
        script = ["-m", "plsc.worker", *script]
    sys.stdout.flush()
    os.execvpe(sys.executable, [sys.executable, "-m", "torch.distributed.run", *words, *script], environment)


if __name__ == "__main__":
    run_command(main)
