"""Raw photos to a trained, calibrated, served model: the four commands that the documents show, one after the other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

for package in ("fastapi", "uvicorn", "onnxruntime", "python_multipart"):
    pytest.importorskip(package)


def test_four_commands(tmp_path, root, shared, monkeypatch):
    from tiny_server import Server

    from recognizer import Recognizer

    photos, detector = shared / "real" / "friends" / "gallery", shared / "models" / "yunet_n_dynamic.onnx"
    start = Recognizer.create("mobilefacenet", embedding_size=32, device="cpu").save(tmp_path / "start.pth")
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

    def run(*words):
        done = subprocess.run(
            list(map(str, words)), cwd=root, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = [sys.executable, "-m"]
    run(*python, "tools.align", f"--input={photos}", f"--output={tmp_path}/aligned", f"--det_model={detector}")
    run(*python, "tools.images_2_recordio", f"--image_path={tmp_path}/aligned", f"--output_dir={tmp_path}/set",
        "--val_share=0.34", "--val_pairs=20", "--workers=1")  # fmt: skip
    options = ["--device_type=cpu", "--net_mode=mobilefacenet", "--embedding_size=32", "--epochs=1", "--batch_size=8",
               "--lr=0.01", "--num_workers=0", f"--work_path={tmp_path}/work", f"--run_dir={tmp_path}/run"]  # fmt: skip
    run("bash", "test/train_finetune_1p.sh", f"--pth_path={start}", f"--data_path={tmp_path}/set", "--val_targets=val",
        *options)  # fmt: skip
    said = run(*python, "tools.calibrate", f"--model={tmp_path / 'work' / 'models'}", f"--pairs={tmp_path}/aligned",
               "--far=0.05", "--device=cpu")  # fmt: skip
    assert "false-accept rate of 0.05 on 540 pairs" in said

    model = said.split("written to ")[1].strip()
    server = Server(tmp_path, monkeypatch, model=model, device="cpu", threshold=None, max_body=1 << 20)
    try:
        monkeypatch.undo()
        server.engine.detector = server.engine._detector()
        photo = (photos / "Ross" / "Ross00006.png").read_bytes()
        status, answer = server.post("/v1/verify", photo, photo)
        assert status == 200 and answer["same"] is True and 0 < answer["threshold"] < 4
    finally:
        server.close()
