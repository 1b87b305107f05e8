"""Raw photos to a trained, calibrated, served model: quickstart.sh runs the four commands that the documents show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

for package in ("fastapi", "uvicorn", "onnxruntime", "python_multipart"):
    pytest.importorskip(package)


@pytest.fixture
def project(tmp_path, root):
    """The project with nothing left to install; what a run leaves stays in here."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    left = ("work_space", "data", ".venv", "shared", "test")
    for path in root.iterdir():
        if path.name not in left and (path.suffix == ".py" or path.is_dir()):
            (folder / path.name).symlink_to(path)
    for path in (root / "data").glob("*.py"):
        (folder / "data" / path.name).symlink_to(path)
    for name in ("quickstart.sh", "requirements.txt", "requirements-serve.txt"):
        shutil.copy(root / name, folder)
    (folder / "test").mkdir()
    for path in (root / "test").glob("*.sh"):
        shutil.copy(path, folder / "test")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    names = ["requirements.txt", "requirements-serve.txt"]
    stamp = "".join(subprocess.check_output(["cksum", name], cwd=folder, text=True) for name in names)
    (folder / ".venv" / "requirements.stamp").write_text(stamp)
    return folder


def test_photos_to_server(tmp_path, project, shared, monkeypatch):
    from tiny_server import Server

    from recognizer import Recognizer

    photos = tmp_path / "photos"
    for name in ("Joey", "Monica", "Rachel", "Ross"):
        (photos / name).mkdir(parents=True)
        for photo in sorted((shared / "real" / "friends" / "gallery" / name).iterdir())[:5]:
            shutil.copy(photo, photos / name)
    (photos / "Ross" / "broken.jpg").write_text("no photo")

    def state():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in photos.rglob("*")}

    before = state()
    start = Recognizer.create("mobilefacenet", embedding_size=32, device="cpu").save(tmp_path / "start.pth")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                   "DET_MODEL": str(shared / "models" / "yunet_n_dynamic.onnx")}  # fmt: skip

    def quickstart():
        words = [f"--data_path={photos}", f"--pth_path={start}", "--epochs=1", "--device_type=cpu", "--num_workers=0"]
        done = subprocess.run(
            ["bash", "quickstart.sh", *words], cwd=project, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = quickstart()
    assert "1  not an image" in said and "10 images of 2 people to train on, 2 people apart" in said
    assert "false-accept rate of 0.05 on 25 pairs" in said
    assert state() == before
    model = project / said.split("written to ")[1].splitlines()[0]
    assert Recognizer.load(model, "cpu").architecture["embedding_size"] == 32  # the given network, not the recipe's
    again = quickstart()
    assert "21 photos were looked at before, 0 are left" in again and "trained before with these options" in again

    server = Server(tmp_path, monkeypatch, model=str(model), device="cpu", threshold=None, max_body=1 << 20)
    try:
        monkeypatch.undo()
        server.engine.detector = server.engine._detector()
        photo = (photos / "Ross" / "Ross00006.png").read_bytes()
        status, answer = server.post("/v1/verify", photo, photo)
        assert status == 200 and answer["same"] is True and 0 < answer["threshold"] < 4
    finally:
        server.close()
