"""Uploads and downloads over real sockets: WebHDFS, S3 and files; stores that fail, damage, lie and stay away."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time

import pytest
from remote_stores import S3, WebHDFS, serve

from checkpoint import remote
from runtime.errors import CheckpointError

pytest.importorskip("fsspec", reason="remote stores need fsspec")

LOGIN = "name,pass,word"


@pytest.fixture(autouse=True)
def quick(monkeypatch, caplog):
    # several requests for each file, as for large ones
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    caplog.set_level(logging.INFO)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hdfs():
    pytest.importorskip("requests", reason="webhdfs:// needs requests")
    with serve(WebHDFS) as disk:
        disk.password = ("name", "pass,word")
        yield disk


@pytest.fixture
def s3(monkeypatch):
    pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5 << 20)  # S3 takes no smaller parts
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serve(S3) as disk:
        yield disk


def hdfs_store(disk, folder="models", ugi=LOGIN):
    return remote.Store(f"webhdfs://{disk.url}/{folder}", ugi)


def s3_store(disk):
    return remote.Store("s3://bucket/models", "name,secret", client_kwargs={"endpoint_url": f"http://{disk.url}"})


def checkpoints(tmp_path) -> tuple:
    """A file of several blocks, and a directory with an empty file and a folder in it."""
    file = tmp_path / "here" / "model_2026-11-20-16-05_epoch:3_0.99817.pth"
    folder = tmp_path / "here" / "000001-step_5"
    (folder / "deep").mkdir(parents=True)
    file.write_bytes(os.urandom(4321))
    (folder / "rank_00000.bin").write_bytes(os.urandom(2000))
    (folder / "index.json").write_text("{}")
    (folder / "deep" / "empty").write_bytes(b"")
    return file, folder


def files_below(folder) -> dict:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def upload(store, *paths, **options) -> list:
    uploader = remote.Uploader(store, first_wait_s=0.01, **options)
    for step, path in enumerate(paths):
        uploader.put(path, step)
    return uploader.close()


def download(store, folder, give_up_s=0.5):
    return remote.download(store, folder, give_up_s=give_up_s, first_wait_s=0.01)


# --- there and back --------------------------------------------------------------------------------------------------


def there_and_back(store, tmp_path):
    file, folder = checkpoints(tmp_path)
    assert upload(store, file, folder) == []
    assert download(store, tmp_path / "back") == tmp_path / "back" / folder.name
    here = files_below(tmp_path / "here")
    assert files_below(tmp_path / "back") == {name: here[name] for name in here if name != file.name}
    assert upload(store, folder, file) == []
    assert download(store, tmp_path / "back") == tmp_path / "back" / file.name
    assert files_below(tmp_path / "back") == here


def test_webhdfs(hdfs, tmp_path):
    there_and_back(hdfs_store(hdfs), tmp_path)
    assert max(len(query) for _method, _path, query, _headers in hdfs.requests) < 8


def test_s3(s3, tmp_path):
    there_and_back(s3_store(s3), tmp_path)
    big = tmp_path / "here" / "big.pth"
    big.write_bytes(os.urandom(100_000) * 120)  # more than one part
    assert upload(s3_store(s3), big) == []
    assert s3.files["/bucket/models/big.pth"] == big.read_bytes()
    assert any("partNumber" in query for _method, _path, query, _headers in s3.requests)


def test_files(tmp_path):
    there_and_back(remote.Store(f"file://{tmp_path}/store"), tmp_path)
    there_and_back(remote.Store(str(tmp_path / "store2")), tmp_path / "again")


def test_an_upload_goes_over_an_older_one(hdfs, tmp_path):
    file, _folder = checkpoints(tmp_path)
    for content in (b"old" * 900, b"new" * 700):
        file.write_bytes(content)
        assert upload(hdfs_store(hdfs), file) == []
    download(hdfs_store(hdfs), tmp_path / "back")
    assert (tmp_path / "back" / file.name).read_bytes() == b"new" * 700


def test_what_is_here_is_not_fetched_again(hdfs, tmp_path):
    file, folder = checkpoints(tmp_path)
    upload(hdfs_store(hdfs), file, folder)
    download(hdfs_store(hdfs), tmp_path / "back")
    damaged = tmp_path / "back" / folder.name / "rank_00000.bin"
    damaged.write_bytes(b"?" + damaged.read_bytes()[1:])
    hdfs.requests.clear()
    download(hdfs_store(hdfs), tmp_path / "back")
    opened = {path for _method, path, query, _headers in hdfs.requests if query.get("op") == "OPEN"}
    assert {path.rsplit("/", 1)[1] for path in opened if not path.endswith(".json")} == {"rank_00000.bin"}
    assert files_below(tmp_path / "back" / folder.name) == files_below(folder)


def test_a_users_own_files_need_no_manifest(hdfs, tmp_path):
    hdfs.files["/models/a.pth"] = b"abc"
    hdfs.files["/models/sub/b.pth"] = b"defg" * 999
    download(hdfs_store(hdfs), tmp_path / "back")
    assert files_below(tmp_path / "back") == {"a.pth": b"abc", "sub/b.pth": b"defg" * 999}


# --- stores that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusals", [1, 5])
def test_a_store_that_fails_for_a_while_delays_the_upload(hdfs, tmp_path, refusals, caplog):
    file, folder = checkpoints(tmp_path)
    hdfs.refusals = refusals
    assert upload(hdfs_store(hdfs), file, folder, give_up_s=30) == []
    assert "again in" in caplog.text
    hdfs.refusals = refusals
    download(hdfs_store(hdfs), tmp_path / "back", give_up_s=30)
    assert files_below(tmp_path / "back" / folder.name) == files_below(folder)


def test_putting_returns_while_the_store_is_away(hdfs, tmp_path):
    file, _folder = checkpoints(tmp_path)
    hdfs.refusals = 10**9
    uploader = remote.Uploader(hdfs_store(hdfs), give_up_s=30, first_wait_s=0.01)
    uploader.put(file, 1)
    uploader.put(file, 2)
    assert hdfs.files == {}
    hdfs.refusals = 0
    assert uploader.close() == []
    assert hdfs.files[f"/models/{file.name}"] == file.read_bytes()


def test_a_store_that_stays_away_is_a_warning_with_the_local_path(tmp_path, caplog):
    pytest.importorskip("requests")
    file, folder = checkpoints(tmp_path)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound but not listening: refused
        store = remote.Store(f"webhdfs://127.0.0.1:{nobody.getsockname()[1]}/models", LOGIN)
        assert upload(store, file, folder, give_up_s=0.1) == [file, folder]
        with pytest.raises(CheckpointError, match="not downloaded.*check the address"):
            download(store, tmp_path / "back", give_up_s=0.1)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and str(file) in warnings[0] and "stays here" in warnings[0]
    assert file.exists() and folder.exists()


def test_a_server_that_hangs_is_one_that_is_away(tmp_path, monkeypatch):
    pytest.importorskip("requests")
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = remote.Store(f"webhdfs://127.0.0.1:{silent.getsockname()[1]}/models")
        with pytest.raises(CheckpointError, match="time"):
            download(store, tmp_path / "back", give_up_s=0.0)


def test_a_refused_login_is_not_asked_again(hdfs, tmp_path):
    file, _folder = checkpoints(tmp_path)
    store = hdfs_store(hdfs, ugi="name,wrong")
    assert upload(store, file, give_up_s=30) == [file]
    assert len(hdfs.requests) < 5
    with pytest.raises(CheckpointError, match="login"):
        download(store, tmp_path / "back", give_up_s=30)


DENIED = 'Permission denied: user=name, access=WRITE, inode="/models":hdfs:hdfs:drwxr-xr-x\n\tat org.apache.hadoop...'
QUOTA = "The DiskSpace quota of /models is exceeded: quota = 10 B = 10 B but diskspace consumed = 4321 B\n\tat org..."


@pytest.mark.parametrize(
    "operation,on_data_node,status,exception,message,says",
    [
        ("CREATE", False, 403, "AccessControlException", DENIED, "Permission denied: user=name, access=WRITE"),
        ("CREATE", True, 403, "AccessControlException", DENIED, "Permission denied: user=name, access=WRITE"),
        ("MKDIRS", False, 401, None, "<html>Authentication required</html>", "401 Client Error"),
        ("MKDIRS", False, 403, None, "<html>GSSException: Defective token detected</html>", "403 Client Error"),
        ("APPEND", True, 403, "DSQuotaExceededException", QUOTA, "DiskSpace quota of /models is exceeded"),
        ("CREATE", False, 403, "NSQuotaExceededException", QUOTA, "DiskSpace quota of /models is exceeded"),
        ("CREATE", False, 403, "SafeModeException", "Cannot create file. Name node is in safe mode.", "safe mode"),
    ],
)
def test_a_store_that_refuses_a_write(
    hdfs, tmp_path, caplog, operation, on_data_node, status, exception, message, says
):
    file, _folder = checkpoints(tmp_path)
    hdfs.refuse = lambda op, data: (status, exception, message) if (op, data) == (operation, on_data_node) else None
    before, asked = file.read_bytes(), says == "safe mode"
    store = hdfs_store(hdfs)
    with pytest.raises(CheckpointError, match=f"nothing can be kept there.*{says}") as caught:
        store.try_out(give_up_s=0.1 if asked else 30, first_wait_s=0.01)
    assert len(hdfs.requests) < 12 or asked  # what no waiting cures is asked once
    assert upload(store, file, give_up_s=0.1 if asked else 30) == [file]
    assert "\n" not in str(caught.value) and "pass,word" not in caplog.text + str(caught.value)
    assert says in caplog.text and file.read_bytes() == before
    hdfs.refuse = None
    assert upload(store, file) == []


@pytest.mark.parametrize(
    "operation,status,exception,message,says",
    [
        ("LISTSTATUS", 403, "AccessControlException", DENIED, "Permission denied"),
        ("LISTSTATUS", 401, None, "<html>Authentication required</html>", "401 Client Error"),
        ("OPEN", 403, "AccessControlException", DENIED, "Permission denied"),
    ],
)
def test_a_store_that_refuses_a_read(hdfs, tmp_path, operation, status, exception, message, says):
    file, _folder = checkpoints(tmp_path)
    store = hdfs_store(hdfs)
    assert upload(store, file) == []
    hdfs.refuse = lambda op, data: (status, exception, message) if op == operation else None
    hdfs.requests.clear()
    with pytest.raises(CheckpointError, match=f"not downloaded.*{says}") as caught:
        download(store, tmp_path / "back", give_up_s=30)
    assert "\n" not in str(caught.value) and len(hdfs.requests) < 12
    assert files_below(tmp_path / "back") == {}


def test_no_password_in_any_message(hdfs, tmp_path, caplog):
    file, _folder = checkpoints(tmp_path)
    hdfs.password = ("name", "other")
    caplog.set_level(logging.DEBUG)
    store = hdfs_store(hdfs)
    upload(store, file, give_up_s=0.05)
    with pytest.raises(CheckpointError) as caught:
        download(store, tmp_path / "back")
    assert store.said(RuntimeError("pass,word is wrong")) == "RuntimeError: *** is wrong"
    assert remote.Store(f"webhdfs://user:hidden@{hdfs.url}/models").url == f"webhdfs://{hdfs.url}/models"
    assert "pass,word" not in caplog.text + str(caught.value)


def test_a_pruned_checkpoint_is_no_failure(hdfs, tmp_path, caplog):
    file, folder = checkpoints(tmp_path)
    file.unlink()
    assert upload(hdfs_store(hdfs), file, folder) == []
    assert "pruned before its upload" in caplog.text
    assert f"/models/{folder.name}/index.json" in hdfs.files


# --- stores that damage and lie --------------------------------------------------------------------------------------


def test_bytes_damaged_on_the_way_up_are_sent_again(hdfs, tmp_path):
    file, _folder = checkpoints(tmp_path)
    once = []

    def damage(path, content):
        if path.endswith(".pth") and len(content) > 4000 and not once:
            once.append(path)
            return content[:-1] + b"?"
        return content

    hdfs.damage = damage
    assert upload(hdfs_store(hdfs), file) == []
    assert once and hdfs.files[f"/models/{file.name}"] == file.read_bytes()


def test_a_store_that_loses_bytes_gets_no_manifest(hdfs, tmp_path, caplog):
    file, _folder = checkpoints(tmp_path)
    hdfs.damage = lambda path, content: content[:4000]
    assert upload(hdfs_store(hdfs), file) == [file]
    assert "4321 bytes sent, the store holds 4000" in caplog.text
    assert not any(path.endswith(remote.MANIFEST) for path in hdfs.files)


def test_bytes_damaged_in_the_store_are_found(hdfs, tmp_path):
    _file, folder = checkpoints(tmp_path)
    upload(hdfs_store(hdfs), folder)
    path = f"/models/{folder.name}/rank_00000.bin"
    hdfs.files[path] = b"?" + hdfs.files[path][1:]
    with pytest.raises(CheckpointError, match="rank_00000.bin.*other ones than were saved"):
        download(hdfs_store(hdfs), tmp_path / "back")
    hdfs.files[path] = hdfs.files[path][:-1]
    with pytest.raises(CheckpointError, match="000001-step_5 is not whole there"):
        download(hdfs_store(hdfs), tmp_path / "back")
    assert not (tmp_path / "back" / folder.name / "rank_00000.bin").exists()
    assert not list((tmp_path / "back").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["../../evil", "..", ".", "", "/etc/evil", "a\\..\\evil", "a/../../evil", "nul\0"])
@pytest.mark.parametrize("kind", ["FILE", "DIRECTORY"])
def test_names_that_lead_outside_are_refused(hdfs, tmp_path, name, kind):
    hdfs.files["/models/a.pth"] = b"abc"
    hdfs.listing = lambda path, entries: [*entries, {"pathSuffix": name, "type": kind, "length": 3}]
    (tmp_path / "in").mkdir()
    if name == "":  # the folder itself, which some stores list
        download(hdfs_store(hdfs), tmp_path / "in" / "back")
    else:
        with pytest.raises(CheckpointError, match="lies outside"):
            download(hdfs_store(hdfs), tmp_path / "in" / "back")
    assert set(files_below(tmp_path)) <= {"in/back/a.pth"}


def test_a_manifest_cannot_name_files_that_the_listing_lacks(hdfs, tmp_path):
    hdfs.files["/models/a.pth"] = b"abc"
    for files in ({"../evil": [3, "x"]}, {"b.pth": [3, "x"]}, {}):
        hdfs.files["/models/a.pth.manifest.json"] = json.dumps({"files": files}).encode()
        with pytest.raises(CheckpointError, match="is not whole there|names no files"):
            download(hdfs_store(hdfs), tmp_path / "in" / "back")
    for text in ("{", "[]", '{"files": 3}', '{"files": {"a.pth": 3}}', "[" * 100_000, '{"files": {}, "step": 1e999}'):
        hdfs.files["/models/a.pth.manifest.json"] = text.encode()
        with pytest.raises(CheckpointError, match="manifest.json is damaged"):
            download(hdfs_store(hdfs), tmp_path / "in" / "back")
    assert files_below(tmp_path) == {}


def test_the_newest_whole_one_alone_comes_down(hdfs, tmp_path, caplog):
    """Each fresh disk numbers from the beginning: the step counts, then the time, and never the name."""
    paths = {}
    for name, step in [("000005-step_50", 50), ("000001-step_60", 60), ("000002-step_70", 70)]:
        paths[step] = tmp_path / "here" / name
        paths[step].mkdir(parents=True)
        (paths[step] / "index.json").write_text(str(step) * 1000)
        uploader = remote.Uploader(hdfs_store(hdfs))
        uploader.put(paths[step], step)
        assert uploader.close() == []
    back = tmp_path / "back"
    assert download(hdfs_store(hdfs), back) == back / "000002-step_70"
    assert files_below(back) == {"000002-step_70/index.json": b"70" * 1000}
    hdfs.files["/models/000002-step_70/index.json"] = b"?" * 2000  # damaged there
    (back / "000002-step_70" / "index.json").unlink()
    assert download(hdfs_store(hdfs), back) == back / "000001-step_60"
    del hdfs.files["/models/000001-step_60/index.json"]  # and a manifest whose data is gone
    assert download(hdfs_store(hdfs), back) == back / "000005-step_50"
    del hdfs.files["/models/000005-step_50/index.json"]
    with pytest.raises(CheckpointError, match="not whole there|other ones than were saved") as caught:
        download(hdfs_store(hdfs), back)
    assert not isinstance(caught.value, remote.EmptyStore)


def test_a_store_is_tried_before_the_training(hdfs, tmp_path):
    hdfs_store(hdfs, "new/folder").try_out()
    assert hdfs.files == {}
    with pytest.raises(CheckpointError, match="nothing can be kept there.*check the address and the login"):
        hdfs_store(hdfs, ugi="name,wrong").try_out()
    with pytest.raises(CheckpointError, match="webhdfs://127.0.0.1:9/a: nothing can be kept there"):
        remote.Store("webhdfs://127.0.0.1:9/a").try_out(give_up_s=0)


def test_a_run_whose_uploads_fail_does_not_end_well(hdfs, tmp_path):
    file, folder = checkpoints(tmp_path)
    hdfs.refusals = 10**9
    with pytest.raises(CheckpointError, match=r"1 checkpoint\(s\) did not reach .* are only here: .*0.99817.pth"):
        with remote.Uploader(hdfs_store(hdfs), 0.05, 0.01) as uploader:
            uploader.put(file, 1)
    with pytest.raises(KeyError):  # what ended the run is what is told
        with remote.Uploader(hdfs_store(hdfs), 0.05, 0.01) as uploader:
            uploader.put(file, 1)
            raise KeyError


def test_a_store_that_hangs_does_not_keep_the_process(tmp_path, monkeypatch, caplog):
    """Not even where its client can wait for ever, and cannot be interrupted."""
    monkeypatch.setattr(remote, "SILENCE_S", 0.2)
    file, _folder = checkpoints(tmp_path)
    store = remote.Store(f"file://{tmp_path}/store")
    never = threading.Event()
    monkeypatch.setattr(store._fs, "open", lambda *_args, **_options: never.wait())
    assert upload(store, file, give_up_s=1000) == [file]
    assert "nothing came for 0 s" in caplog.text
    with pytest.raises(CheckpointError, match="nothing came"):
        store.try_out()
    monkeypatch.setattr(store._fs, "ls", lambda *_args, **_options: never.wait())
    with pytest.raises(CheckpointError, match="not downloaded .*nothing came"):
        download(store, tmp_path / "back", give_up_s=1000)
    never.set()


def test_an_upload_that_gets_on_is_not_given_up(hdfs, tmp_path):
    """Each file comes after some failures that are, all together, longer than the patience with one."""
    folder = tmp_path / "000001-step_5"
    folder.mkdir()
    for number in range(4):
        (folder / f"rank_{number:05d}.bin").write_bytes(b"x" * 100)
    store = hdfs_store(hdfs)
    send, failures = store.send, []

    def send_at_the_third_try(source, relative):
        failures.append(relative)
        if failures.count(relative) < 3:
            time.sleep(0.1)
            raise OSError("away")
        return send(source, relative)

    store.send = send_at_the_third_try
    assert upload(store, folder, give_up_s=0.5) == []
    assert len(failures) == 12


def test_a_listing_without_end_is_refused(hdfs, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "MOST_FILES", 50)
    hdfs.files["/models/a.pth"] = b"abc"
    hdfs.listing = lambda path, entries: [{"pathSuffix": str(i), "type": "FILE", "length": 1} for i in range(60)]
    with pytest.raises(CheckpointError, match="more than 50 files"):
        download(hdfs_store(hdfs), tmp_path / "back")


def test_more_than_the_disk_holds_is_refused_before_it_starts(hdfs, tmp_path):
    hdfs.files["/models/a.pth"] = b"abc"
    hdfs.listing = lambda path, entries: [{**entry, "length": 1 << 60} for entry in entries]
    with pytest.raises(CheckpointError, match="GB to download.*free space"):
        download(hdfs_store(hdfs), tmp_path / "back")


def test_a_file_longer_than_listed_is_cut_short(hdfs, tmp_path):
    hdfs.files["/models/a.pth"] = b"a" * 100_000
    hdfs.listing = lambda path, entries: [{**entry, "length": 10} for entry in entries]
    with pytest.raises(CheckpointError, match="bytes of 10 arrived"):
        download(hdfs_store(hdfs), tmp_path / "back")
    assert files_below(tmp_path / "back") == {}


def test_a_link_below_the_folder_is_not_followed(hdfs, tmp_path):
    hdfs.files["/models/sub/a.pth"] = b"abc"
    (tmp_path / "outside").mkdir()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link"):
        download(hdfs_store(hdfs), tmp_path / "back")
    assert list((tmp_path / "outside").iterdir()) == []


# --- what the user can mistype ---------------------------------------------------------------------------------------


def test_an_empty_or_missing_folder(hdfs, tmp_path):
    with pytest.raises(CheckpointError, match="holds no files"):
        download(hdfs_store(hdfs, "missing"), tmp_path / "back")


def test_an_unknown_protocol(tmp_path):
    with pytest.raises(CheckpointError, match="ftpx"):
        remote.Store("ftpx://host/models")


def test_a_protocol_whose_package_is_missing(monkeypatch):
    def missing(*_args, **_options):
        raise ImportError("No module named 'pyarrow'")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(CheckpointError, match="hdfs:// is not available here.*pip install pyarrow.*webhdfs://"):
        remote.Store("hdfs://namenode:9000/models", LOGIN)
