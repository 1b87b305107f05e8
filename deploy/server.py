"""A server of several processes: `python -m deploy.server --model model.onnx --gallery gallery.db --port 8010`.

One process binds the port and starts the workers, each with the model of its own; they share the port, the counters and
the gallery's file. A worker that dies is started again. SIGTERM and Ctrl-C let requests in flight end.
"""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from typing import Optional

from deploy.app import NEEDS, ROUTES, Engine, Settings, make_app, uvicorn_config
from deploy.metrics import Metrics
from runtime.errors import ConfigError, ModelError, UserError
from runtime.log import Parser, one_line, run_command, setup_logging

log = logging.getLogger(__name__)

GRACE = 30  # seconds that requests in flight get
FAILURES = 5  # of workers within a minute, after which there is no sense in starting more


def parser() -> Parser:
    default = Settings()
    options = Parser(prog="python -m deploy.server", description=__doc__.splitlines()[0])
    add = options.add_argument
    add("--model", required=True, help="an ONNX file or a checkpoint, or a folder with one")
    add("--device", default=None, help="cpu, cuda:0, npu:0; the first that is there by default")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for every network")
    add("--port", type=int, default=8010, help="0 takes a free one")
    add("--workers", type=int, default=1, help="processes")
    add("--threads", type=int, default=0, help="threads of a worker; 0: its share of the cores")
    add("--det_model", default="", help="an ONNX detector; else MTCNN where its weights are installed")
    add("--det_thresh", type=float, default=default.det_thresh, help="least score of a face")
    add("--no_detect", action="store_true", help="take aligned faces only")
    add("--gallery", default="", help="a gallery's file; made where it is missing")
    add("--storage", default="fp32", choices=("fp32", "int8"), help="of the gallery in memory")
    add("--threshold", type=float, default=None, help="squared L2 distance; default: the gallery's or the model's")
    add("--token", default=os.environ.get("FACE_SERVER_TOKEN", ""), help="bearer token; or FACE_SERVER_TOKEN")
    add("--max_body", type=int, default=default.max_body, help="bytes of a request")
    add("--max_pixels", type=int, default=default.max_pixels, help="pixels of an image")
    add("--max_images", type=int, default=default.max_images, help="images of a request")
    add("--timeout", type=float, default=default.timeout, help="seconds of a request")
    add("--batch", type=int, default=default.batch, help="faces that a checkpoint embeds together at most")
    return options


def main(argv: Optional[list] = None) -> int:
    args = parser().parse_args(argv)
    setup_logging()
    if args.workers < 1 or args.batch < 1 or args.timeout <= 0:
        raise ConfigError("--workers, --batch and --timeout must be at least 1, 1 and above 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = Settings(
        model=args.model,
        device=args.device,
        threads=args.threads or max(cores // args.workers, 1),
        det_model=args.det_model,
        det_thresh=args.det_thresh,
        detect=not args.no_detect,
        gallery=args.gallery,
        storage=args.storage,
        threshold=args.threshold,
        token=args.token,
        max_body=args.max_body,
        max_pixels=args.max_pixels,
        max_images=args.max_images,
        timeout=args.timeout,
        batch=args.batch,
    )
    if args.host not in ("127.0.0.1", "::1", "localhost") and not settings.token:
        log.warning("listening on %s without --token: whoever reaches it can use and change the gallery", args.host)
    return serve(settings, args.host, args.port, args.workers)


def serve(settings: Settings, host: str, port: int, workers: int) -> int:
    """Blocks until SIGTERM or Ctrl-C; returns the exit status."""
    if not all(map(importlib.util.find_spec, ("fastapi", "uvicorn", "python_multipart"))):
        raise ModelError(NEEDS)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    metrics = Metrics(list(ROUTES), workers)
    context = multiprocessing.get_context("spawn")
    stop, failures, ready = threading.Event(), [], context.Semaphore(0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def start(worker: int):
        arguments = (settings, listener, worker, workers, metrics.shared, ready, os.getpid())
        process = context.Process(target=_worker, args=arguments, name=f"worker {worker}")
        process.start()
        return process

    processes = [start(worker) for worker in range(workers)]
    status, waiting = 0, workers
    while not stop.wait(0.1):
        while waiting and ready.acquire(block=False):
            waiting -= 1
            if not waiting:
                print(f"serving on {_address(host, port)} with {workers} worker(s)", flush=True)
        for worker, process in enumerate(processes):
            if process.is_alive():
                continue
            failures = [moment for moment in failures if time.monotonic() - moment < 60] + [time.monotonic()]
            if waiting or len(failures) > FAILURES:  # it cannot start at all
                status = 1
                stop.set()
                break
            log.warning("worker %d ended with status %s and is started again", worker, process.exitcode)
            processes[worker] = start(worker)
            # the new one's word that it is ready is heard like the first ones'
            waiting = 0
    listener.close()
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(GRACE + 5)
        if process.is_alive():
            process.kill()
    return status


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: from 0 to 65535")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({error.strerror or error})") from None
    return listener


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _worker(settings, listener, worker, workers, shared, ready, parent) -> None:
    setup_logging()
    for library in ("uvicorn", "python_multipart"):  # a line for every bad request would fill a disk
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        _run_worker(settings, listener, worker, workers, shared, ready, parent)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _run_worker(settings, listener, worker, workers, shared, ready, parent) -> None:
    import uvicorn

    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    metrics = Metrics(list(ROUTES), workers, shared)
    metrics.use_row(worker)
    app = make_app(Engine(settings, metrics), ready.release)
    limits = {"limit_concurrency": 1024, "timeout_keep_alive": 30, "timeout_graceful_shutdown": GRACE}
    server = uvicorn.Server(uvicorn_config(app, settings, **limits))

    def leave_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        server.should_exit = True

    threading.Thread(target=leave_with_parent, daemon=True).start()
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
