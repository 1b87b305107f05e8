"""Mutated requests to a face server: each gets an answer in time, none a status of 500 or more.

    python test/fuzz/mutated_requests.py --cases 10000 --seed 1

A case is a good request with its path, headers, body or framing spoilt, sent as bytes. The server is the tiny one of
the tests, with the limits of a real one; its memory is measured from the first tenth of the cases to the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 20.0  # seconds for an answer; the server's own limits are far below
STRANGE = (
    b"\0",
    b"\xff\xfe",
    b"%00",
    b"../../etc/passwd",
    b"A" * 9000,
    b"\r\n",
    b"{",
    b"[[[[",
    b"nan",
    b"-1",
    b"1e999",
    b"'",
)


def _images() -> list:
    made = []
    for kind, mode, size in (("PNG", "RGB", 112), ("JPEG", "RGB", 112), ("PNG", "RGBA", 130), ("GIF", "P", 64),
                             ("JPEG", "CMYK", 112), ("PNG", "I;16", 112), ("TIFF", "F", 20)):  # fmt: skip
        buffer = io.BytesIO()
        grey = np.full((size, size), 77, np.uint16 if mode == "I;16" else np.float32 if mode == "F" else np.uint8)
        image = Image.fromarray(grey)
        (image if mode in ("I;16", "F") else image.convert(mode)).save(buffer, kind)
        made.append(buffer.getvalue())
    return made


def _good(rng: random.Random, images: list) -> tuple:
    """(method, path, headers, body) of a request that a server can answer."""
    chosen = [rng.choice(images) for _ in range(rng.randint(1, 3))]
    path = rng.choice(["/v1/embed", "/v1/verify", "/v1/search?count=3", "/v1/gallery?name=ann",
                       "/v1/embed?aligned=true",
                       "/FaceClassifyService/inference", "/v1/gallery", "/metrics", "/openapi.json", "/"])  # fmt: skip
    if path in ("/v1/gallery", "/metrics", "/openapi.json", "/"):
        return rng.choice([b"GET", b"DELETE"]), path.encode(), {}, b""
    key = "base64_string" if path.startswith("/Face") else "images"
    way = rng.randrange(3) if key == "images" else 0
    if way == 0:
        body = json.dumps({key: [base64.b64encode(image).decode() for image in chosen]}).encode()
        return b"POST", path.encode(), {b"Content-Type": b"application/json"}, body
    if way == 1:
        return b"POST", path.encode(), {b"Content-Type": b"image/png"}, chosen[0]
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = b"".join(head + image + b"\r\n" for image in chosen) + b"--x--\r\n"
    return b"POST", path.encode(), {b"Content-Type": b"multipart/form-data; boundary=x"}, body


def _spoil(rng: random.Random, data: bytes) -> bytes:
    data, place = bytearray(data), rng.randrange(len(data) + 1)
    way = rng.randrange(6)
    if way == 0 and data:
        data[min(place, len(data) - 1)] ^= 1 << rng.randrange(8)
    elif way == 1:
        del data[place:]
    elif way == 2:
        data[place:place] = rng.choice(STRANGE)
    elif way == 3:
        data[place:place] = data[: rng.randrange(len(data) + 1)]
    elif way == 4:
        data[place : place + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
    else:
        data[place : place + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
    return bytes(data)


def request(rng: random.Random, images: list) -> bytes:
    method, path, headers, body = _good(rng, images)
    headers = {b"Host": b"x", **headers, b"Content-Length": str(len(body)).encode()}
    for _ in range(rng.randrange(4)):
        part = rng.choice(["method", "path", "header", "body", "body", "body", "body", "length", "extra", "raw"])
        if part == "method":
            method = rng.choice([b"GET", b"PUT", b"OPTIONS", b"HEAD", b"POST", b"DELETE", _spoil(rng, method)])
        elif part == "path":
            path = _spoil(rng, path)
        elif part == "header":
            name = rng.choice(list(headers))
            headers[name] = _spoil(rng, headers[name])
        elif part == "extra":
            name = rng.choice([b"Transfer-Encoding", b"Origin", b"Authorization", b"Content-Encoding", b"Expect", b"X"])
            headers[name] = rng.choice([b"chunked", b"gzip", b"[::", b"Bearer \xff", b"100-continue", *STRANGE])
        elif part == "length":
            headers[b"Content-Length"] = rng.choice([b"0", b"-1", b"99999999999999", b"5", b"x", b"\xb2"])
        elif part == "body":
            body = _spoil(rng, body)
            if rng.random() < 0.8:
                headers[b"Content-Length"] = str(len(body)).encode()
    head = method + b" " + path + b" HTTP/1.1\r\n" + b"".join(n + b": " + v + b"\r\n" for n, v in headers.items())
    whole = head + b"Connection: close\r\n\r\n" + body
    return _spoil(rng, whole) if rng.random() < 0.05 else whole


def send(port: int, data: bytes) -> str:
    """The status, "closed" where the server only hung up, or what went wrong."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        try:
            connection.sendall(data)
        except OSError:
            pass  # it answered before it had heard everything
        try:
            answer = connection.recv(64)
        except socket.timeout:
            return "hang"
        except OSError:
            return "closed"
    return answer.split(b" ")[1].decode("latin1") if answer.startswith(b"HTTP/1.") else "closed"


def run(port: int, cases: int, seed: int, dimension: int = 3, every=lambda number: None) -> Counter:
    """How many cases ended how. AssertionError, with the request, for a hang or a status of 500 or more."""
    rng, images, counts = random.Random(seed), _images(), Counter()
    for number in range(cases):
        data = request(rng, images)
        end = send(port, data)
        counts[end] += 1
        assert end != "hang" and not end.startswith("5"), f"case {number} of seed {seed}: {end} after {data[:400]!r}"
        every(number)
    return counts


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "test")]
    import pytest
    from tiny_server import Server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    import tempfile

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), patch, timeout=1.0)
        began, memory = time.monotonic(), {}

        def every(number):
            if number in (args.cases // 10, args.cases - 1):
                memory[number] = resident()

        counts = run(server.port, args.cases, args.seed, every=every)
        server.close()
    first, last = memory.values()
    ends = ", ".join(f"{count} x {status}" for status, count in counts.most_common())
    print(f"{args.cases} cases in {time.monotonic() - began:.0f} s: {ends}")
    print(f"memory: {first >> 20} MiB after a tenth, {last >> 20} MiB at the end")


if __name__ == "__main__":
    main()
