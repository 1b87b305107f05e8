"""A server under load, beside a plain server of the same model that infers once for each request, in one run.

    python benchmark/serve.py --model model.onnx --clients 1,8,64 --seconds 5

Both servers, on the CPU, take the seed's wire format from the same clients, one after the other, round by round: p50
and p99 of a request and images/s by number of clients. Then the load goes on while one of two servers is killed and
started again: counted are requests that failed for good. --search measures a gallery of a million entries beside plain
numpy.
The clients are one process of threads over `face_service.FaceService`.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from face_service import FaceService, FaceServiceError  # noqa: E402
from runtime.files import write_json  # noqa: E402


def images(count: int = 16) -> list:
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((112, 112)).save(buffer, "JPEG")
        made.append(buffer.getvalue())
    return made


def plain_server(model: str, port: int, threads: int) -> None:
    """One request, one inference: what the standard library and the model alone give."""
    import base64

    from deploy.backends import load_recognizer

    _, recognizer = load_recognizer(model, "cpu", threads)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet
        disable_nagle_algorithm = True

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
                    for text in body["base64_string"]]  # fmt: skip
            with lock:
                emb_ND = recognizer.embed(np.stack(rows))
            answer = json.dumps({"instance": [{"embedding": row.astype(float).round(8).tolist()} for row in emb_ND]})
            self.answer(answer.encode())

        def do_GET(self):
            self.answer(b"{}")

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    Server(("127.0.0.1", port), Handler).serve_forever()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(kind: str, args, port: int) -> subprocess.Popen:
    if kind == "plain":
        words = [__file__, "--plain_server", str(port), "--model", args.model, "--threads", str(args.threads)]
    else:
        words = ["-m", "deploy.server", "--model", args.model, "--port", str(port), "--no_detect", "--device", "cpu",
                 "--workers", str(args.workers), "--threads", str(args.threads)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return process
        except (OSError, http.client.HTTPException):
            if process.poll() is not None:
                break
            time.sleep(0.2)
    raise SystemExit(f"error: the {kind} server did not start")


def load(ports: list, clients: int, seconds: float, bodies: list, during=None) -> dict:
    """What `clients` see, each asking for one image after the other."""
    taken, failed, stop = [], [], threading.Event()

    def client(number: int) -> None:
        service = FaceService(timeout=30)
        service.connect_all_server([f"127.0.0.1:{port}" for port in ports])
        service.con_index = number % len(ports)
        turn = number
        while not stop.is_set():
            began = time.perf_counter()
            try:
                service.encode([bodies[turn % len(bodies)]])
                taken.append(time.perf_counter() - began)
            except FaceServiceError as error:
                failed.append(str(error))
            turn += 1

    with open(os.devnull, "w") as nothing:
        shown, sys.stdout = sys.stdout, nothing  # the client prints each server that fails
        try:
            threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            if during:
                during()
            time.sleep(max(seconds - (time.perf_counter() - began), 0))
            stop.set()
            for thread in threads:
                thread.join()
            wall = time.perf_counter() - began
        finally:
            sys.stdout = shown
    p50, p99 = (1e3 * np.percentile(taken, [50, 99])).round(2).tolist() if taken else (None, None)
    rate = round(len(taken) / wall, 1)
    return {"clients": clients, "p50_ms": p50, "p99_ms": p99, "images_per_second": rate,
            "requests": len(taken), "failed": len(failed)}  # fmt: skip


def under_load(args, bodies) -> list:
    ports, processes, records = {}, [], []
    try:
        for kind in ("plain", "ours"):
            ports[kind] = free_port()
            processes.append(start(kind, args, ports[kind]))
        for clients in args.clients:
            rounds: dict = {"plain": [], "ours": []}
            for _ in range(args.rounds):
                for kind, done in rounds.items():
                    load([ports[kind]], clients, 0.5, bodies)  # warm
                    done.append(load([ports[kind]], clients, args.seconds, bodies))
            for kind, done in rounds.items():
                middle = sorted(done, key=lambda record: record["images_per_second"])[len(done) // 2]
                records.append({"server": kind, **middle})
                print(json.dumps(records[-1]), flush=True)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
    return records


def kill_and_restart(args, bodies) -> dict:
    ports = [free_port(), free_port()]
    processes = [start("ours", args, port) for port in ports]

    def during():
        for number in range(2):
            time.sleep(args.seconds / 4)
            os.killpg(processes[number].pid, signal.SIGKILL)  # with its workers
            processes[number].wait()
            time.sleep(2)
            processes[number] = start("ours", args, ports[number])

    try:
        record = load(ports, 8, 4 * args.seconds, bodies, during)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
    print(json.dumps({"killed_and_restarted": 2, **record}), flush=True)
    return {"killed_and_restarted": 2, **record}


def search(entries: int, dimension: int) -> list:
    """One face against a gallery: our index, fp32 and int8, beside numpy's product and maximum."""
    from deploy.gallery import SearchIndex

    rng = np.random.default_rng(0)
    vectors_MD = rng.standard_normal((entries, dimension), dtype=np.float32)
    vectors_MD /= np.linalg.norm(vectors_MD, axis=1, keepdims=True)
    asked = rng.standard_normal((32, dimension)).astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    ways = {"numpy": lambda face_D: int((vectors_MD @ face_D).argmax())}
    for storage in ("fp32", "int8"):
        index = SearchIndex(dimension, storage)
        for first in range(0, entries, 100_000):
            rows = np.arange(first, min(first + 100_000, entries))
            index.add(rows, vectors_MD[rows])
        ways[f"index {storage}"] = lambda face_D, index=index: int(index.search(face_D[None], 1)[0][0, 0])
    taken: dict = {name: [] for name in ways}
    for face_D in asked:
        for name, way in ways.items():
            began = time.perf_counter()
            way(face_D)
            taken[name].append(time.perf_counter() - began)
    records = [{"search": name, "entries": entries, "dimension": dimension,
                "p50_ms": round(1e3 * float(np.median(seconds)), 2)} for name, seconds in taken.items()]  # fmt: skip
    for record in records:
        print(json.dumps(record), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an ONNX file or a checkpoint")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of load, each time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--search", type=int, default=0, help="entries of a gallery, for example 1000000")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--plain_server", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--output")
    args = parser.parse_args()
    if args.plain_server:
        return plain_server(args.model, args.plain_server, args.threads)
    records = []
    if args.model:
        bodies = images()
        records += under_load(args, bodies)
        records.append(kill_and_restart(args, bodies))
    if args.search:
        records += search(args.search, args.dimension)
    if args.output:
        about = {"python": platform.python_version(), "threads": args.threads, "workers": args.workers,
                 "model": Path(args.model).name if args.model else None, "date": time.strftime("%Y-%m-%d")}  # fmt: skip
        write_json(args.output, {"about": about, "records": records})
    return None


if __name__ == "__main__":
    main()
