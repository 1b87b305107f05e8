"""The server's page in a browser without a window (Debian's chromium), driven over its debugging pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image
from tiny_deploy import picture
from tiny_server import ANN, BOB, Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
for package in ("fastapi", "uvicorn", "onnxruntime", "onnx", "python_multipart"):
    pytest.importorskip(package)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")


class Browser:
    """One page; messages of the DevTools protocol end in a zero byte, on the browser's files 3 and 4."""

    def __init__(self, profile):
        here_in, there_out = os.pipe()
        there_in, here_out = os.pipe()

        def files_3_and_4():
            # first out of the way: the pipes' own numbers may be 3 and 4
            source, target = os.dup(there_in), os.dup(there_out)
            os.dup2(source, 3)
            os.dup2(target, 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--remote-debugging-pipe", "--no-first-run", f"--user-data-dir={profile}"]  # fmt: skip
        self._process = subprocess.Popen([CHROMIUM, *flags, "about:blank"], preexec_fn=files_3_and_4, close_fds=False,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(there_in)
        os.close(there_out)
        self._in, self._out = os.fdopen(here_in, "rb"), os.fdopen(here_out, "wb")
        self._number, self._session = 0, None
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self("Page.enable")

    def __call__(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            text = bytearray()
            while (byte := self._in.read(1)) != b"\0":
                assert byte, "the browser has gone"
                text += byte
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def value(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression):
        end = time.monotonic() + 300
        while not (value := self.value(expression)):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.05)
        return value

    def choose(self, selector, path):
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def close(self):
        self._process.kill()
        self._process.wait(20)


def test_two_photos_are_compared_and_their_faces_boxed(tmp_path, monkeypatch):
    server, photos = Server(tmp_path, monkeypatch), {}
    for name, image in (("ann", picture(ANN)), ("other ann", picture(ANN)), ("bob", picture(BOB)),
                        ("nobody", np.zeros((50, 50, 3), np.uint8))):  # fmt: skip
        photos[name] = tmp_path / f"{name}.png"
        Image.fromarray(image).save(photos[name])
    browser = Browser(tmp_path / "profile")
    try:
        browser("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        browser.until("document.querySelectorAll('#operations tr').length >= 8")
        browser.choose("#file0", photos["ann"])
        browser.choose("#file1", photos["other ann"])
        browser.until("document.querySelectorAll('canvas[data-box]').length == 2")
        assert browser.value("document.querySelector('#answer').innerText").startswith("The same person (")
        assert browser.value("document.querySelector('#drop1 canvas').dataset.box") == "2 3 114 115"
        browser.choose("#file1", photos["bob"])
        browser.until("document.querySelector('#answer').innerText.startsWith('Different people')")
        browser.choose("#file1", photos["nobody"])
        browser.until("document.querySelector('#answer').innerText == 'image 1: no face was found'")
    finally:
        browser.close()
        server.close()
