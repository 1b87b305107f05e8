"""A server under load, beside a plain server of the same model that infers once for each request, in one run.

    python -m benchmark.serve --model model.onnx --clients 1,8,64 --seconds 5

Both servers, on the CPU, take the seed's wire format from the same clients, one after the other, round by round: p50
and p99 of a request and images/s by number of clients. The plain server is what one writes in an hour: FastAPI under
uvicorn with all defaults, Pillow, and the model as its library runs it by default (an onnxruntime session without
options; `Recognizer.load` for a checkpoint), one call for each request. The clients are one process that sends
prepared bytes, so that the two cores are the servers'.

Then, with --kill, the load goes on while one of two servers is killed and started again: counted are requests that
failed for good, of threads over `face_service.FaceService`. --search measures a gallery of a million entries beside
plain numpy, --photo the way of a photo from its bytes to embeddings.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from face_service import ADDRESS, FaceService, FaceServiceError  # noqa: E402


def images(count: int = 16) -> list:
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((112, 112)).save(buffer, "JPEG")
        made.append(buffer.getvalue())
    return made


# --- the plain server -------------------------------------------------------------------------------------------------


def plain_model(path: str):
    """uint8 [N, 112, 112, 3] -> unit embeddings, as the model's own library runs it by default."""
    if not path.endswith(".onnx"):
        from recognizer import Recognizer

        return Recognizer.load(path, "cpu", opt_level="O0").embed
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def embed(images_NHWC):
        input_NCHW = (images_NHWC.transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
        emb_ND = session.run(None, {name: input_NCHW})[0]
        return emb_ND / np.linalg.norm(emb_ND, axis=1, keepdims=True)

    return embed


def plain_server(model: str, port: int) -> None:
    import uvicorn
    from fastapi import FastAPI

    embed, app, lock = plain_model(model), FastAPI(), threading.Lock()

    @app.post(ADDRESS)
    def inference(body: dict):
        rows = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
                for text in body["base64_string"]]  # fmt: skip
        with lock:  # else forty threads share two cores, which is slower
            emb_ND = embed(np.stack(rows))
        return {"instance": [{"embedding": row} for row in emb_ND.tolist()]}

    @app.get("/readyz")
    def ready():
        return {}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(kind: str, args, port: int) -> subprocess.Popen:
    if kind == "plain":
        words = ["-m", "benchmark.serve", "--plain_server", str(port), "--model", args.model]
    else:
        words = ["-m", "deploy.server", "--model", args.model, "--port", str(port), "--no_detect", "--device", "cpu",
                 "--workers", str(args.workers), "--threads", str(args.threads)]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
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


def request_bytes(images: list) -> bytes:
    body = json.dumps({"base64_string": [base64.b64encode(image).decode("ascii") for image in images]}).encode()
    head = (
        f"POST {ADDRESS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def load(port: int, clients: int, seconds: float, requests: list) -> dict:
    """What `clients` see, each on a connection of its own, asking for one image after the other."""
    waiting = selectors.DefaultSelector()
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(clients)]
    taken, failed, number = [], 0, 0
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(connection, selectors.EVENT_READ, [0.0, bytearray(), 0])

    def ask(connection, state):
        nonlocal number
        state[:] = time.perf_counter(), bytearray(), 0
        connection.sendall(requests[number % len(requests)])
        number += 1

    began = time.perf_counter()
    for key in list(waiting.get_map().values()):
        ask(key.fileobj, key.data)
    open_requests = clients
    while open_requests:
        for key, _ in waiting.select(60):
            state = key.data
            part = key.fileobj.recv(1 << 16)
            if not part:
                raise SystemExit("error: the server hung up")
            state[1] += part
            if not state[2] and (end := state[1].find(b"\r\n\r\n")) >= 0:
                (length,) = [
                    line for line in state[1][:end].lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                state[2] = end + 4 + int(length.split(b":")[1])
            if state[2] and len(state[1]) >= state[2]:
                now = time.perf_counter()
                taken.append(now - state[0])
                failed += not state[1].startswith(b"HTTP/1.1 200")
                if now - began < seconds:
                    ask(key.fileobj, state)
                else:
                    open_requests -= 1
    wall = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return described(taken, failed, wall, clients)


def described(taken: list, failed: int, wall: float, clients: int) -> dict:
    p50, p99 = (1e3 * np.percentile(taken, [50, 99])).round(2).tolist() if taken else (None, None)
    return {"clients": clients, "p50_ms": p50, "p99_ms": p99, "images_per_second": round(len(taken) / wall, 1),
            "requests": len(taken), "failed": failed}  # fmt: skip


def load_of_the_client(ports: list, clients: int, seconds: float, bodies: list, during) -> dict:
    """What threads over FaceService see while `during` runs."""
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
            during()
            time.sleep(max(seconds - (time.perf_counter() - began), 0))
            stop.set()
            for thread in threads:
                thread.join()
            wall = time.perf_counter() - began
        finally:
            sys.stdout = shown
    return described(taken, len(failed), wall, clients)


def cpu_seconds(process: subprocess.Popen) -> float:
    """Of a server and its workers so far."""
    own = [process.pid]
    for pid in own:
        own += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in own]
    return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")


def under_load(args) -> list:
    servers, ports, records = {}, {}, []
    requests = [request_bytes([image]) for image in images()]
    try:
        for kind in ("plain", "ours"):
            ports[kind] = free_port()
            servers[kind] = start(kind, args, ports[kind])
        for clients in args.clients:
            rounds: dict = {"plain": [], "ours": []}
            for _ in range(args.rounds):
                for kind, done in rounds.items():
                    load(ports[kind], clients, 0.3, requests)  # warm
                    before = cpu_seconds(servers[kind])
                    done.append(load(ports[kind], clients, args.seconds, requests))
                    cpu = cpu_seconds(servers[kind]) - before
                    done[-1]["server_cpu_ms_per_image"] = round(1e3 * cpu / done[-1]["requests"], 2)
            for kind, done in rounds.items():
                middle = sorted(done, key=lambda record: record["images_per_second"])[len(done) // 2]
                records.append({"server": kind, **middle})
                print(json.dumps(records[-1]), flush=True)
    finally:
        for process in servers.values():
            process.terminate()
        for process in servers.values():
            process.wait(60)
    return records


def kill_and_restart(args) -> dict:
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
        record = load_of_the_client(ports, 8, 4 * args.seconds, images(), during)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
    print(json.dumps({"killed_and_restarted": 2, **record}), flush=True)
    return {"killed_and_restarted": 2, **record}


def search(entries: int, dimension: int) -> list:
    """One face against a gallery: our index, fp32 and int8, beside numpy's product and maximum. What does not fit into
    three quarters of the memory that is left is not measured."""
    from deploy.gallery import SearchIndex
    from runtime import host

    block_ND = np.random.default_rng(0).standard_normal((100_000, dimension), dtype=np.float32)
    block_ND /= np.linalg.norm(block_ND, axis=1, keepdims=True)

    def vectors(first: int) -> np.ndarray:
        # others of the block's by other places and signs of their numbers: drawing ten million takes minutes
        signs_D = np.random.default_rng(first).choice(np.float32([-1, 1]), dimension)
        return np.roll(block_ND[: entries - first], first // len(block_ND), axis=1) * signs_D

    asked = np.random.default_rng(-1 % 2**32).standard_normal((32, dimension)).astype(np.float32)
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    size, ways, records = entries * dimension, {}, {}
    for name, width in (("numpy", 4), ("index fp32", 4), ("index int8", 1)):
        if size * width > 0.75 * host.memory_left():
            print(f"{name}: {entries} entries do not fit", file=sys.stderr)
            continue
        before = host.process_memory()
        if name == "numpy":
            vectors_MD = np.empty((entries, dimension), np.float32)
            for first in range(0, entries, 100_000):
                vectors_MD[first : first + 100_000] = vectors(first)
            ways[name] = lambda face_D, all_MD=vectors_MD: [(all_MD @ face_D).argmax()]
            records[name] = {}
        else:
            index = SearchIndex(dimension, name.split()[1])
            for first in range(0, entries, 100_000):
                part_ND = vectors(first)
                index.add(np.arange(first, first + len(part_ND)), part_ND)
            changed, one_1D, one_1 = [], vectors(0)[:1], np.array([entries])
            for _ in range(9):
                began = time.perf_counter()
                index.add(one_1, one_1D)
                middle = time.perf_counter()
                index.remove(one_1)
                changed.append((middle - began, time.perf_counter() - middle))
            add, remove = (round(1e3 * float(value), 3) for value in np.median(changed, axis=0))
            ways[name] = lambda face_D, index=index: index.search(face_D[None], 1)[0][0]
            records[name] = {"add_one_ms": add, "remove_one_ms": remove}
        records[name]["memory_gib"] = round((host.process_memory() - before) / 2**30, 2)
    taken: dict = {name: [] for name in ways}
    found: dict = {name: [] for name in ways}
    for face_D in asked:
        for name, way in ways.items():
            began = time.perf_counter()
            found[name].append(way(face_D))
            taken[name].append(time.perf_counter() - began)
    first = next(iter(found.values()))
    for name, seconds in taken.items():
        records[name] = {"search": name, "entries": entries, "dimension": dimension,
                         "p50_ms": round(1e3 * float(np.median(seconds)), 2), **records[name],
                         "finds_the_nearest": sum(a[0] in b for a, b in zip(first, found[name]))}  # fmt: skip
        print(json.dumps(records[name]), flush=True)
    return list(records.values())


def photo(args) -> list:
    """A photo's way from its bytes to the embeddings of its faces, and the parts of it."""
    from deploy.alignment import align_faces
    from deploy.backends import load_recognizer
    from deploy.detection import open_detector
    from deploy.photos import decode_photo

    data = Path(args.photo).read_bytes()
    _, recognizer = load_recognizer(args.model, "cpu", args.threads)
    records = []
    for det_model in args.det_model or [""]:
        detector, taken = open_detector(det_model), []
        for _ in range(args.rounds * 10 + 1):
            moments = [time.perf_counter()]
            image_HWC = decode_photo(data)
            moments.append(time.perf_counter())
            faces = detector.detect(image_HWC)
            moments.append(time.perf_counter())
            crops_NSS3 = align_faces(image_HWC, faces.points_N52)
            moments.append(time.perf_counter())
            recognizer.embed(crops_NSS3)
            moments.append(time.perf_counter())
            taken.append(np.diff(moments))
        median = 1e3 * np.median(taken[1:], axis=0)  # the first warms up
        parts = dict(zip(("decode_ms", "detect_ms", "align_ms", "embed_ms"), median.round(2).tolist()))
        whole = 1e3 * np.sum(taken[1:], axis=1)
        records.append({"photo": list(image_HWC.shape[:2]), "faces": len(faces), **parts,
                        "detector": Path(det_model).name or "MTCNN",
                        "p50_ms": round(float(np.median(whole)), 2),
                        "p99_ms": round(float(np.percentile(whole, 99)), 2)})  # fmt: skip
        print(json.dumps(records[-1]), flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an ONNX file or a checkpoint")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of load, each time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="of our server; 0: every core")
    parser.add_argument("--kill", action="store_true", help="kill and restart servers under load, instead")
    parser.add_argument("--photo", help="time a photo's way through detection, alignment and embedding, instead")
    parser.add_argument("--det_model", action="append", help="for --photo: an ONNX detector; may be given again")
    parser.add_argument("--search", type=int, default=0, help="entries of a gallery to search, for example 1000000")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--record", help="write benchmark/results/DATE_{this name}.json")
    parser.add_argument("--plain_server", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_server:
        return plain_server(args.model, args.plain_server)
    if args.search:
        records = search(args.search, args.dimension)
    elif not args.model:
        parser.error("--model is missing (or --search)")
    elif args.photo:
        records = photo(args)
    else:
        records = [kill_and_restart(args)] if args.kill else under_load(args)
    if args.record:
        from benchmark.record import write_record
        from runtime.device import parse_device

        model = Path(args.model).name if args.model else None
        print(write_record(args.record, {"model": model, "records": records}, parse_device("cpu")))
    return None


if __name__ == "__main__":
    main()
