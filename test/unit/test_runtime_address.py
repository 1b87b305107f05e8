"""Addresses of stores: taken apart and shown without the password, wherever it stands."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from config import Config, replace
from runtime.address import Address, split_address, without_passwords
from runtime.log import command_line, setup_logging

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "url, parts",
    [
        ("hdfs://host:9000/a", ("hdfs://host:9000/a", "", "")),
        ("hdfs://host/a@v1", ("hdfs://host/a@v1", "", "")),
        ("hdfs://host:9000/a@v1", ("hdfs://host:9000/a@v1", "", "")),
        ("webhdfs://user:secret@host:50070/a", ("webhdfs://host:50070/a", "user", "secret")),
        ("webhdfs://user:se@cr/et@host/a", ("webhdfs://host/a", "user", "se@cr/et")),
        ("webhdfs://user:se/cret@host", ("webhdfs://host", "user", "se/cret")),
        ("s3://key:a%2Fb%40c:d@bucket/a", ("s3://bucket/a", "key", "a/b@c:d")),
        ("hdfs://user@host/a", ("hdfs://host/a", "user", "")),
        ("/a/folder@home:x", ("/a/folder@home:x", "", "")),
        ("", ("", "", "")),
    ],
)
def test_an_address_is_taken_apart(url, parts):
    assert split_address(url) == Address(*parts)
    if parts[2]:
        assert without_passwords(f"cannot reach {url}: refused") == (
            f"cannot reach {parts[0].replace('://', f'://{parts[1]}:***@', 1)}: refused"
        )
    assert without_passwords("said pass,word twice: pass,word", "pass,word", "") == "said *** twice: ***"


def test_no_record_holds_the_password(monkeypatch):
    config = replace(Config(), fs_name="webhdfs://user:hid/den@host/a", fs_ugi="name,se@cret")
    assert config.as_dict()["fs_name"] == "webhdfs://host/a"
    monkeypatch.setattr(sys, "argv", ["train.py", f"--fs_name={config.fs_name}", "--fs_ugi", config.fs_ugi])
    for text in (json.dumps(config.as_dict()), command_line(config.fs_ugi)):
        assert "den" not in text and "se@cret" not in text


def test_no_line_shows_it(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    setup_logging(stream=stream)
    logging.getLogger("any").warning("gone: %s", "webhdfs://user:hid/den@host/a")
    assert stream.getvalue() == "gone: webhdfs://user:***@host/a\n"
