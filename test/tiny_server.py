"""A server of the tiny recognizer in a thread, and requests to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading

import numpy as np
from PIL import Image
from tiny_deploy import RedFaces, tiny_onnx

from deploy import app as app_module

ANN, BOB = (30, 220, 40), (40, 30, 230)


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def face(colour) -> bytes:
    return png(np.full((112, 112, 3), colour, np.uint8))


class Server:
    """An app on a port of its own, in a thread, and requests to it."""

    def __init__(self, folder, monkeypatch, **settings):
        import uvicorn

        monkeypatch.setattr(app_module, "open_detector", lambda *_: RedFaces())
        model = folder / "model.onnx"
        if not model.exists():
            tiny_onnx(model)
        defaults = {"model": str(model), "gallery": str(folder / "people.db"), "max_body": 300_000}
        self.engine = app_module.Engine(app_module.Settings(**{**defaults, "threshold": 0.2, **settings}))
        ready = threading.Event()
        app = app_module.make_app(self.engine, ready.set)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self._server = uvicorn.Server(app_module.uvicorn_config(app, self.engine.settings, timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self._thread.start()
        assert ready.wait(20)

    def ask(self, method, path, body=None, kind=None, **headers):
        """(status, answer): the answer as JSON where it is that."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if kind:
            headers["Content-Type"] = kind
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        as_json = "json" in response.headers.get("content-type", "")
        return response.status, json.loads(text) if as_json else text

    def post(self, path, *images, **more):
        body = json.dumps({"images": [base64.b64encode(image).decode() for image in images]})
        return self.ask("POST", path, body, "application/json", **more)

    def close(self):
        self._server.should_exit = True
        self._thread.join(20)
        self.socket.close()
