"""runtime/files.py: a file is the old one or the whole new one, whoever else writes it and whatever fails."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from runtime import files
from runtime.errors import CheckpointError, UserError

pytestmark = pytest.mark.core


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as file:
        file.write(b"half")
        file.flush()
        assert json.loads(path.read_text()) == {"a": 1}
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    files.write_text(path, "\u5b57\n")
    assert path.read_bytes() == "\u5b57\n".encode()


def test_two_writers_of_one_name_do_not_spoil_each_others_file(tmp_path):
    path, texts = tmp_path / "a.txt", [str(n) * 200_000 for n in range(4)]
    together = threading.Barrier(len(texts))

    def write(text):
        with files.atomic_file(path) as file:
            file.write(text[:100_000].encode())
            together.wait(60)  # all four are in the middle of their files
            file.write(text[100_000:].encode())

    threads = [threading.Thread(target=write, args=[text]) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_what_the_users_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o640


def test_what_cannot_be_written_is_one_line_of_the_class_asked_for(tmp_path):
    with pytest.raises(CheckpointError) as caught, files.atomic_file(tmp_path / "missing" / "a", CheckpointError):
        pass
    assert str(caught.value) == (
        f"{tmp_path}/missing/a: cannot be written (No such file or directory); what was there before is untouched: "
        "free space or choose another folder"
    )
    for odd in (tmp_path, "/dev/null"):
        with pytest.raises(UserError, match="is there and is no file.: choose another name"):
            files.write_text(odd, "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_name_as_long_as_the_system_allows(tmp_path):
    files.write_text(tmp_path / ("a" * 255), "text")
    assert os.listdir(tmp_path) == ["a" * 255]


def test_only_what_is_old_is_left_over(tmp_path):
    assert files.left_over(tmp_path / "missing") == []
    old, young = (files.temporary_path(tmp_path / name) for name in ("model_a.pth", "model_b.pth"))
    for path in (old, young, tmp_path / "model_c.pth"):
        path.write_bytes(b"half")
        os.utime(path, (1, 1) if path != young else None)
    assert files.left_over(tmp_path) == files.left_over(tmp_path, "model_*.pth*") == [old]
    assert files.left_over(tmp_path, "index*") == []


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / "a", "old")
    code = (
        "import os, sys; from runtime import files\n"
        f"with files.atomic_file({str(tmp_path / 'a')!r}) as file: file.write(b'new'); file.flush(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=900).returncode == 9
    assert (tmp_path / "a").read_text() == "old" and len(os.listdir(tmp_path)) == 2


def test_the_checksum_is_sha256(tmp_path):
    data = bytes(range(256)) * 8192
    (tmp_path / "a").write_bytes(data)
    assert files.checksum(data) == files.file_checksum(tmp_path / "a") == hashlib.sha256(data).hexdigest()
