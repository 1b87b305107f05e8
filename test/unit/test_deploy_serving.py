"""The server: what each address answers, what it refuses, batching, and the seeds' client and server class."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pytest
from tiny_deploy import picture, tiny_onnx
from tiny_server import ANN, BOB, Server, face, png

from deploy.batching import Batcher, Busy
from deploy.metrics import Metrics
from face_service import FaceService, FaceServiceError
from plsc_serving.run import PLSCServer

for package in ("fastapi", "uvicorn", "onnxruntime", "python_multipart"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        server = Server(tmp_path_factory.mktemp("server"), patch)
        yield server
        server.close()


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts servers with settings of their own, and closes them."""
    servers = []

    def start(**settings):
        servers.append(Server(tmp_path, monkeypatch, **settings))
        return servers[-1]

    yield start
    for one in servers:
        one.close()


# --- what it answers --------------------------------------------------------------------------------------------------


def test_the_seeds_wire_format(server):
    body = json.dumps({"base64_string": [base64.b64encode(face(c)).decode() for c in (ANN, BOB)]})
    status, answer = server.ask("POST", "/FaceClassifyService/inference", body, "application/json")
    assert status == 200 and set(answer) == {"instance"}
    expected = server.engine.recognizer.embed(np.stack([np.full((112, 112, 3), c, np.uint8) for c in (ANN, BOB)]))
    np.testing.assert_allclose([one["embedding"] for one in answer["instance"]], expected, atol=1e-7)
    assert server.ask("POST", "/FaceClassifyService/inference", '{"base64_string": []}')[1] == {"instance": []}


def multipart(*images):
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="../../a"\r\n\r\n' + i + b"\r\n" for i in images
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


def test_images_come_in_three_ways_and_mean_the_same(server):
    image = png(picture(BOB, ANN))
    answers = [server.ask("POST", "/v1/embed", image, "image/png"), server.post("/v1/embed", image),
               server.ask("POST", "/v1/embed", *multipart(image)),
               server.ask("POST", "/v1/embed", image, "application/octet-stream")]  # fmt: skip
    assert all(answer == answers[0] for answer in answers)
    status, answer = answers[0]
    (one,) = answer["images"]
    assert status == 200 and answer["dimension"] == 3 and answer["model"] == server.engine.fingerprint
    assert one["faces"][1]["box"] == [122, 3, 234, 115] and len(one["faces"][1]["landmarks"]) == 5
    np.testing.assert_allclose(np.linalg.norm([f["embedding"] for f in one["faces"]], axis=1), 1, atol=1e-6)


def test_verify(server):
    status, answer = server.post("/v1/verify", png(picture(ANN)), face(ANN))
    assert status == 200 and answer["same"] is True and answer["similarity"] > 0.99 and answer["threshold"] == 0.2
    assert answer["faces"][0]["box"] == [2, 3, 114, 115]
    assert server.post("/v1/verify", face(ANN), face(BOB))[1]["same"] is False
    assert server.post("/v1/verify", face(ANN))[0] == 400
    assert server.post("/v1/verify", face(ANN), png(np.zeros((50, 50, 3), np.uint8))) == (
        422, {"error": "image 1: no face was found"})  # fmt: skip


def test_a_gallery_is_filled_searched_and_emptied(server):
    name = urllib.parse.quote("王/小明")
    assert server.post(f"/v1/gallery?name={name}", face(ANN), face(ANN))[1]["added"] == 2
    status, answer = server.post("/v1/gallery?name=bob", face(BOB))
    assert answer == {"name": "bob", "added": 1, "warning": None}
    assert "two people, one name" in server.post("/v1/gallery?name=bob", face(ANN))[1]["warning"]
    assert server.ask("GET", "/v1/gallery")[1] == {"people": {"bob": 2, "王/小明": 2}}
    status, answer = server.post("/v1/search?count=2", png(picture(ANN, (250, 240, 20))))
    known, other = answer["images"][0]["faces"]
    assert known["name"] == "王/小明" and len(known["candidates"]) == 2 and other["name"] is None
    assert server.post("/v1/search", png(np.zeros((50, 50, 3), np.uint8)))[1]["images"] == [{"faces": []}]
    for gone in (name, "bob"):
        assert server.ask("DELETE", f"/v1/gallery?name={gone}")[1]["removed"] == 2
    assert server.ask("DELETE", "/v1/gallery?name=bob")[0] == 404
    assert server.ask("GET", "/v1/gallery")[1] == {"people": {}}
    status, answer = server.post("/v1/gallery?name=" + urllib.parse.quote("two\nlines"), face(ANN))
    assert status == 422 and "one line" in answer["error"]


def test_health_counters_and_pages(server):
    assert server.ask("GET", "/healthz") == (200, {"alive": True})
    assert server.ask("GET", "/readyz")[1]["model"] == "model.onnx"
    server.post("/v1/embed", face(ANN))
    status, text = server.ask("GET", "/metrics")
    assert 'face_requests_total{route="/v1/embed",status="200"}' in text and "face_batch_rows_sum" in text
    status, page = server.ask("GET", "/")
    assert status == 200 and "http" not in page.split("</title>")[1].replace("openapi.json", "")
    paths = server.ask("GET", "/openapi.json")[1]["paths"]
    assert set(paths) == {"/FaceClassifyService/inference", "/v1/embed", "/v1/verify", "/v1/search", "/v1/gallery",
                          "/healthz", "/readyz", "/metrics"}  # fmt: skip


# --- what it refuses --------------------------------------------------------------------------------------------------

BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I", 13)
    + b"IHDR"
    + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    + bytes(9)
)
REFUSED = {
    "no json": ("/v1/embed", b"{", "application/json", 400),
    "deep json": ("/v1/embed", b"[" * 200_000, "application/json", 400),
    "other json": ("/v1/embed", b'{"images": "x"}', "application/json", 400),
    "no base64": ("/v1/embed", b'{"images": ["\\u00e9 "]}', "application/json", 400),
    "no images": ("/v1/embed", b'{"images": []}', "application/json", 400),
    "65 images": ("/v1/embed", json.dumps({"images": [""] * 65}).encode(), "application/json", 413),
    "no type": ("/v1/embed", b"x", None, 415),
    "text": ("/v1/embed", b"x", "text/plain", 415),
    "no boundary": ("/v1/embed", b"x", "multipart/form-data", 400),
    "no parts": ("/v1/embed", b"x", "multipart/form-data; boundary=y", 400),
    "no image": ("/v1/embed", b"hello", "image/jpeg", 422),
    "empty": ("/v1/embed", b"", "image/jpeg", 422),
    "bomb": ("/v1/embed", BOMB, "image/png", 422),
    "large body": ("/v1/embed", bytes(300_001), "image/png", 413),
    "wrong size": ("/v1/embed?aligned=true", png(picture(ANN)), "image/png", 422),
    "wrong flag": ("/v1/embed?aligned=1", face(ANN), "image/png", 400),
    "wrong count": ("/v1/search?count=0", face(ANN), "image/png", 400),
    "no name": ("/v1/gallery", face(ANN), "image/png", 422),
    "nowhere": ("/v2/embed", b"", "image/png", 404),
    "not so": ("/healthz", b"", "image/png", 405),
    "the wire's own": ("/FaceClassifyService/inference", b'{"base64_string": ["aGk="]}', "application/json", 422),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_one_line_that_tells_nothing_of_us(server, case):
    path, body, kind, expected = REFUSED[case]
    status, answer = server.ask("POST", path, body, kind)
    assert status == expected and set(answer) == {"error"}
    assert "\n" not in answer["error"] and "Traceback" not in answer["error"] and "/tmp" not in answer["error"]


def test_a_body_is_not_read_past_its_limit(server):
    """Without a length, in pieces: the answer comes although the body never ends."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(
        b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\n"
    )
    try:
        for _ in range(400):
            connection.sendall(b"1000\r\n" + bytes(4096) + b"\r\n")
    except OSError:
        pass  # it has already hung up
    else:
        assert b" 413 " in connection.recv(200)
    connection.close()
    assert server.ask("GET", "/healthz")[0] == 200


def test_a_slow_request_ends_in_time(started):
    server = started(timeout=0.5)
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(b"POST /v1/embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nContent-Type: image/png\r\n\r\nx")
    assert b" 408 " in connection.recv(300)
    connection.close()


def test_the_token_is_needed_and_other_web_sites_are_kept_out(started):
    server = started(token="secret")
    assert server.post("/v1/embed", face(ANN))[0] == 401
    assert server.post("/v1/embed", face(ANN), Authorization="Bearer wrong")[0] == 401
    assert server.post("/v1/embed", face(ANN), Authorization="Basic secret")[0] == 401
    assert server.post("/v1/embed", face(ANN), Authorization="Bearer secret")[0] == 200
    assert server.ask("GET", "/metrics")[0] == 401 and server.ask("GET", "/healthz")[0] == 200
    good = {"Authorization": "Bearer secret"}
    assert server.post("/v1/embed", face(ANN), Origin="http://localhost:1", **good)[0] == 403
    assert server.post("/v1/embed", face(ANN), Origin=f"http://127.0.0.1:{server.port}", **good)[0] == 200


def test_an_error_of_ours_says_only_that_there_was_one(started, monkeypatch, caplog):
    server = started()
    monkeypatch.setattr(server.engine, "compute", Batcher(lambda rows: 1 / 0).submit)
    assert server.post("/v1/embed", face(ANN)) == (500, {"error": "internal error"})
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(server.engine, "compute", Batcher(lambda rows: np.full((len(rows), 3), np.nan)).submit)
    status, answer = server.post("/v1/gallery?name=ann", face(ANN))
    assert status == 422 and "no finite embedding" in answer["error"] and server.engine.gallery.people() == {}
    monkeypatch.setattr(server.engine, "compute", Batcher(lambda rows: rows, capacity=0).submit)
    assert server.post("/v1/embed", face(ANN))[0] == 503


def test_without_a_gallery_or_a_threshold(started):
    server = started(gallery="", threshold=None)
    assert server.ask("GET", "/v1/gallery")[0] == 404 and server.post("/v1/search", face(ANN))[0] == 404
    assert server.post("/v1/gallery?name=ann", face(ANN))[0] == 404
    assert server.post("/v1/verify", face(ANN), face(ANN))[1]["same"] is None


# --- batching ---------------------------------------------------------------------------------------------------------


def test_what_waits_is_computed_together_and_an_idle_model_waits_for_nobody():
    sizes, go = [], threading.Event()

    def compute(rows):
        go.wait(20)
        return rows * 2

    batcher = Batcher(compute, most=8, observe=sizes.append)
    first = batcher.submit(np.ones((1, 2)))
    while not sizes:  # it has begun, alone
        time.sleep(0.001)
    others = [batcher.submit(np.full((3, 2), n)) for n in range(4)]
    go.set()
    assert (first.result(20) == 2).all() and [int(f.result(20)[0, 0]) for f in others] == [0, 2, 4, 6]
    assert sizes[0] == 1 and sum(sizes) == 13 and len(sizes) == 3
    batcher.close()


def test_the_answers_are_the_same_whether_faces_are_gathered_or_not(server, monkeypatch):
    """As a checkpoint is served: its faces wait for one another, those of an ONNX file do not."""
    images = face(ANN), png(picture(BOB, ANN)), png(np.zeros((50, 50, 3), np.uint8))
    alone = server.post("/v1/embed", *images)
    batcher = Batcher(server.engine.recognizer.embed, most=2)
    monkeypatch.setattr(server.engine, "compute", batcher.submit)
    assert server.post("/v1/embed", *images) == alone and alone[0] == 200
    batcher.close()


def test_a_failure_reaches_all_who_wait_and_the_full_queue_says_so():
    batcher = Batcher(lambda rows: 1 / 0, capacity=3)
    assert isinstance(batcher.submit(np.ones((2, 1))).exception(20), ZeroDivisionError)
    stuck = threading.Event()
    batcher = Batcher(lambda rows: stuck.wait(20) and rows, capacity=3)
    batcher.submit(np.ones((1, 1)))
    with pytest.raises(Busy):
        for _ in range(5):
            batcher.submit(np.ones((1, 1)))
    stuck.set()
    batcher.close()


def test_counters_of_two_processes_are_summed():
    one = Metrics(["/a"], workers=2)
    two = Metrics(["/a"], workers=2, shared=one.shared)
    two.use_row(1)
    one.request("/a", 200, 0.003)
    two.request("/a", 200, 0.3)
    two.request("/zzz", 418, 20)
    two.batch(3)
    text = one.text()
    assert 'face_requests_total{route="/a",status="200"} 2' in text
    assert 'face_requests_total{route="other",status="500"} 1' in text
    assert 'face_request_seconds_bucket{route="/a",le="0.005"} 1' in text
    assert 'face_request_seconds_count{route="/a"} 2' in text and "face_batch_rows_sum 3" in text


# --- the seeds' client and server -------------------------------------------------------------------------------------


def test_the_client_of_the_seed(server, capsys):
    client = FaceService()
    client.connect(f"127.0.0.1:{server.port}")
    result = client.encode([face(ANN), face(BOB)])
    assert len(result) == 2 and len(result[0]) == 3 and all(isinstance(v, float) for v in result[0])
    with pytest.raises(FaceServiceError, match="image 0: not an image"):
        client.encode([b"no image"])
    assert len(client.con_list) == 1  # the server is as good as before
    client.close()
    with pytest.raises(FaceServiceError, match="no server"):
        client.encode([face(ANN)])


def test_the_client_goes_over_to_the_next_server(server, started, capsys):
    other = started()
    client = FaceService()
    client.connect_all_server([f"127.0.0.1:{other.port}", f"127.0.0.1:{server.port}"])
    assert [client.encode([face(ANN)]) for _ in range(2)] and client.con_index == 0
    other.close()
    for connection in client.con_list:  # and no idle connection is left
        connection.close()
    assert client.encode([face(ANN)]) and len(client.con_list) == 1
    assert f"127.0.0.1:{other.port}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="host:port"):
        client.connect("8010")
    gone = FaceService()
    gone.connect(f"127.0.0.1:{other.port}")
    assert gone.infer("{}") == "fail" and "All server failed" in capsys.readouterr().out
    with pytest.raises(FaceServiceError, match="All server failed"):
        gone.encode([face(ANN)])


def test_the_client_needs_the_standard_library_only(root, tmp_path):
    (tmp_path / "face_service.py").write_bytes((root / "face_service.py").read_bytes())
    code = "import sys, face_service; assert not {'numpy', 'torch', 'PIL', 'runtime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, check=True, timeout=900)


def test_what_the_server_class_refuses(tmp_path, capsys):
    server = PLSCServer()
    assert server.with_model(model_path=str(tmp_path / "missing")) == -1 and "missing" in capsys.readouterr().out
    assert server.run(gpu_index=-1, port=1) == -1 and server.get_model("face_resnet50") == -1
    with pytest.raises(TypeError):
        server.with_model()
    assert server.with_model(model_path=str(tmp_path)) is None
    assert server.run_multi([0, 1], [8010]) == -1 and server.run_multi([], []) == -1


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_ready(port, deadline=60):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def children(pid):
    """The processes that a process started, and theirs."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [one for child in map(int, file.read().split()) for one in (child, *children(child))]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="worker processes are looked for in /proc")
def test_the_seeds_lines_run_and_ctrl_c_ends_them(tmp_path, root):
    """As a script without a main guard; its one worker is killed, and another takes its place."""
    tiny_onnx(tmp_path / "model.onnx")
    port = free_port()
    (tmp_path / "serve.py").write_text(
        "from plsc_serving.run import PLSCServer\n"
        "fs = PLSCServer(options=['--no_detect'])\n"
        "fs.with_model(model_path='model.onnx')\n"
        f"fs.run(gpu_index=-1, port={port})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "serve.py"], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        wait_ready(port)
        with FaceService() as client:
            client.connect(f"127.0.0.1:{port}")
            assert len(client.encode([face(ANN)])[0]) == 3
            assert process.stdout.readline() == f"Start serving on cpu port = {port}\n"
            worker = children(process.pid)[-1]  # after multiprocessing's own helper
            os.kill(worker, signal.SIGKILL)
            wait_ready(port)
            assert len(client.encode([face(ANN)])[0]) == 3 and worker not in children(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output = process.communicate(timeout=900)[0]
    assert "Traceback" not in output, output
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_model_that_cannot_be_served_is_one_line(tmp_path, root):
    (tmp_path / "bad.onnx").write_text("no model")
    command = [sys.executable, "-m", "deploy.server", "--model", str(tmp_path / "bad.onnx"), "--port", "0"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_schemathesis_finds_no_fault_with_our_own_page(server, tmp_path):
    """What the OpenAPI page says is what is answered. No schema can say "bytes of a photo", so what fits the page may
    still be refused."""
    pytest.importorskip("schemathesis")
    words = ["run", f"http://127.0.0.1:{server.port}/openapi.json", "--seed=1", "--max-examples=3",
             "--exclude-checks=positive_data_acceptance"]  # fmt: skip
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "generated" in done.stdout, done.stdout + done.stderr


def test_an_image_is_built_from_what_is_here(root):
    """There is no container on most machines that test: what the Dockerfile copies exists, and its command is one."""
    from deploy.server import parser

    lines = [line for line in (root / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((root / word).exists() for word in copied)
    (entry,) = [json.loads(line.split(" ", 1)[1]) for line in lines if line.startswith("ENTRYPOINT ")]
    assert entry[:3] == ["python", "-m", "deploy.server"]
    assert parser().parse_args([*entry[3:], "--model", "x"]).port == 8010


@pytest.mark.slow
def test_mutated_requests_get_an_answer(started):
    """The short form of test/fuzz/mutated_requests.py."""
    from fuzz.mutated_requests import run

    server = started(timeout=3.0)  # short enough for bodies that never come, long for a busy machine
    counts = run(server.port, cases=100, seed=1, dimension=3)
    assert sum(counts.values()) == 100 and counts["200"] > 10
