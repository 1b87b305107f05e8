"""Checkpoints in a remote store: any URL that fsspec knows (hdfs://, webhdfs://, s3://, file://).

Uploads run beside the training and try again while the store is away; downloads come before it. A checkpoint is a file
or a directory; `<its name>.manifest.json` with the size and SHA-256 of each of its files goes up last, after the store
has given every byte back as it was sent. What comes down is compared with the manifest, where there is one.

A store's listing is not trusted: names that lead out of the folder are refused, and nothing is opened or run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import queue
import shutil
import threading
import time
import uuid
from pathlib import Path

from runtime.address import split_address, without_passwords
from runtime.errors import CheckpointError, DamagedCheckpoint, printable
from runtime.files import atomic_file, file_checksum

log = logging.getLogger(__name__)

MANIFEST = ".manifest.json"
BLOCK_BYTES = 32 << 20  # a request's worth; also what a transfer holds in memory
TIMEOUT_S = 60.0  # for a server to answer at all
SILENCE_S = 180.0  # after which a store that does nothing is given up, whatever its client thinks
LONGEST_WAIT_S = 60.0
MOST_FILES = 100_000
MOST_MANIFEST_BYTES = 64 << 20
# What name and password of "name,passwd" are called; hdfs:// knows a user only.
_CREDENTIALS = {"webhdfs": ("user", "password"), "hdfs": ("user",), "s3": ("key", "secret"), "s3a": ("key", "secret")}
_PACKAGES = {"hdfs": "pyarrow (and Hadoop's libhdfs; webhdfs:// needs neither)", "webhdfs": "requests", "s3": "s3fs"}


class Store:
    """A folder of a remote store.

    url: protocol://host/folder. ugi: "name,passwd", as PLSC's fs_ugi; it appears in no message. options: more for the
    protocol's fsspec class. Opening connects to nothing.
    """

    def __init__(self, url: str, ugi: str = "", **options):
        protocol = url.split("://")[0] if "://" in url else "file"
        address = split_address(url)
        name, _comma, password = ugi.partition(",")
        name, self._secret = name or address.user, password or address.password
        given = zip(_CREDENTIALS.get(protocol, ()), (name, self._secret))
        options = {**{key: value for key, value in given if value}, **options}
        self.url = address.url.rstrip("/")
        self.moved_at = time.monotonic()  # when the store last did something
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(
                address.url, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except ImportError as error:
            package = _PACKAGES.get(protocol, "fsspec")
            raise CheckpointError(
                f"{self.url}: {protocol}:// is not available here ({self.said(error)}): pip install {package}"
            ) from None
        except (ValueError, TypeError, OSError) as error:
            raise CheckpointError(f"{self.url}: cannot be opened ({self.said(error)}): check the address") from None
        self._root = root.rstrip("/")
        # Object stores have no folders; asked for one, some make a bucket of a mistyped name.
        self._has_folders = protocol in ("file", "hdfs", "webhdfs")
        _set_timeout(self._fs)

    def said(self, error) -> str:
        """The first line of an error's text (Hadoop's are followed by where they arose), without the password."""
        return printable(without_passwords(_text(error).split("\n", 1)[0][:4000], self._secret))

    def try_out(self, give_up_s: float = 30.0, first_wait_s: float = 1.0) -> None:
        """Writes a small file there, reads it back and removes it, so that a wrong address or login is known now and
        not after hours. Raises CheckpointError."""
        name = f".tried-{uuid.uuid4().hex[:12]}"

        def attempt():
            if self._has_folders:
                self._fs.makedirs(self._root, exist_ok=True)
            self.send_text(name, name)
            if self.read_text(name) != name:
                raise _Damaged("it gives back other bytes than it was sent")
            self.remove(name)

        try:
            _patiently(self, self.url, attempt, give_up_s, first_wait_s)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.url}: nothing can be kept there ({self.said(error)}): check the address and the login"
            ) from None

    def list(self) -> dict:
        """Every file below the folder: relative path -> size in bytes. Raises CheckpointError for a hostile listing."""
        found, folders = {}, [self._root]
        while folders:
            folder = folders.pop()
            try:
                entries = self._fs.ls(folder, detail=True)
            except FileNotFoundError:
                continue
            self.moved_at = time.monotonic()
            for entry in entries:
                name = entry["name"].rstrip("/")
                if name.lstrip("/") == folder.lstrip("/"):
                    continue  # the folder itself, which some stores list
                relative = _inside(name, self._root, self.url)
                if entry["type"] == "directory":
                    folders.append(posixpath.join(self._root, relative))
                elif entry["type"] == "file":
                    found[relative] = int(entry["size"] or 0)
                if len(found) + len(folders) > MOST_FILES:
                    raise CheckpointError(f"{self.url}: more than {MOST_FILES} files: give the checkpoint's own folder")
        return found

    def send(self, source, relative: str) -> tuple:
        """Copies a local file there and reads it back: (bytes, sha256). Raises if it did not arrive whole."""
        target = posixpath.join(self._root, relative)
        if self._has_folders:
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        with open(source, "rb") as file, self._fs.open(target, "wb", block_size=BLOCK_BYTES) as out:
            sent = self._copy(file, out)
        held = int(self._fs.info(target)["size"])
        if held != sent[0]:
            raise _Damaged(f"{relative}: {sent[0]} bytes sent, the store holds {held}")
        with self._fs.open(target, "rb", block_size=BLOCK_BYTES) as file:
            if self._copy(file) != sent:
                raise _Damaged(f"{relative}: the store gives back other bytes than it was sent")
        return sent

    def send_text(self, text: str, relative: str) -> None:
        with self._fs.open(posixpath.join(self._root, relative), "wb") as out:
            out.write(text.encode())

    def read_text(self, relative: str) -> str:
        with self._fs.open(posixpath.join(self._root, relative), "rb") as file:
            return file.read(MOST_MANIFEST_BYTES).decode()

    def remove(self, relative: str) -> None:
        target = posixpath.join(self._root, relative)
        try:
            self._fs.info(target)
        except FileNotFoundError:
            return
        self._fs.rm_file(target)

    def receive(self, relative: str, target: Path, size: int, sha256=None) -> None:
        """Copies a file from there to `target`, whole or not at all."""
        with self._fs.open(posixpath.join(self._root, relative), "rb", block_size=BLOCK_BYTES) as file:
            with atomic_file(target, CheckpointError) as out:
                got = self._copy(file, out, at_most=size)
                if got[0] != size or sha256 not in (None, got[1]):
                    raise _Damaged(f"{relative}: {got[0]} bytes of {size} arrived, or other ones than were saved")

    def _copy(self, file, out=None, at_most: int = 1 << 62) -> tuple:
        """(bytes, sha256) of what was read, and written to `out`."""
        digest, count = hashlib.sha256(), 0
        while count <= at_most:
            try:
                block = file.read(BLOCK_BYTES)
            except OSError as error:
                raise (_Refused if _is_refusal(error) else _Away)(_text(error)) from error
            self.moved_at = time.monotonic()
            if not block:
                break
            digest.update(block)
            count += len(block)
            if out is not None:
                out.write(block)
                self.moved_at = time.monotonic()
        return count, digest.hexdigest()


class EmptyStore(CheckpointError):
    """A store's folder that holds nothing, or is not there."""


class _Damaged(Exception):
    """Bytes changed on their way."""


class _Hangs(Exception):
    """A store that neither answers nor fails."""


class _Refused(Exception):
    """A read from a file was refused."""


class _Away(Exception):
    """A read from a file failed. Not an OSError, which is what the local disk says when it refuses a write."""


def _text(error) -> str:
    """What the server's answer says where there is one (WebHDFS), else the error's own text."""
    try:
        said = error.response.json()["RemoteException"]["message"]
    except Exception:  # no answer, or one that is no WebHDFS
        said = error
    return f"{type(error).__name__}: {said}"


def _is_refusal(error) -> bool:
    """Whether the store says no: login or right are missing, or a quota is full. Safe mode ends by itself."""
    text = _text(error).lower()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "safe mode" in text:
        return False
    return isinstance(error, PermissionError) or status in (401, 403) or "quota" in text and "exceeded" in text


def _inside(name: str, root: str, url: str) -> str:
    """The path of a listed name relative to the root."""
    prefix = root.lstrip("/") + "/"
    name = name.lstrip("/")
    relative = name[len(prefix) :] if name.startswith(prefix) else ""
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise CheckpointError(f"{url}: lists {name[:80]!r}, which lies outside: do not use this store")
    return relative


def _set_timeout(fs) -> None:
    """webhdfs:// asks without a time limit: a server that hangs would hold the upload for ever."""
    session = getattr(fs, "session", None)
    if not hasattr(session, "mount"):
        return
    from requests.adapters import HTTPAdapter

    class Limited(HTTPAdapter):
        def send(self, request, **kwargs):
            return super().send(request, **{**kwargs, "timeout": kwargs.get("timeout") or TIMEOUT_S})

    session.mount("http://", Limited())
    session.mount("https://", Limited())


def _patiently(store: Store, what: str, action, give_up_s: float, first_wait_s: float, progress=lambda: 0):
    """action() until it succeeds; raises the last error when give_up_s have passed since the first failure, or since
    progress() last grew.

    What no waiting cures (a refused login or right, a quota that is full, a hostile listing, a full local disk, a store
    that does nothing at all for SILENCE_S) is raised at once, and damaged bytes at their third time: a whole file went
    over the wire for each.
    """
    wait_s, since, damaged, got = first_wait_s, None, 0, progress()
    while True:
        try:
            return _watched(store, action)
        except (CheckpointError, _Hangs, _Refused):
            raise
        except Exception as error:  # each protocol has its own classes for a store that is away
            if _is_refusal(error):
                raise
            if progress() > got:
                wait_s, since, got = first_wait_s, None, progress()
            since = since or time.monotonic()
            damaged += isinstance(error, _Damaged)
            if damaged == 3 or time.monotonic() + wait_s - since > give_up_s:
                raise
            log.info("%s: %s, again in %.0f s", what, store.said(error), wait_s)
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _watched(store: Store, action):
    """action(), in a thread that is left behind when the store does nothing for SILENCE_S: most clients can wait for
    ever, and nothing can interrupt them."""
    answer: dict = {}

    def run():
        try:
            answer["value"] = action()
        except BaseException as error:  # handed to whoever waits
            answer["error"] = error

    store.moved_at = time.monotonic()
    thread = threading.Thread(target=run, name="store", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(min(1.0, SILENCE_S / 4))
        if thread.is_alive() and time.monotonic() - store.moved_at > SILENCE_S:
            raise _Hangs(f"nothing came for {SILENCE_S:.0f} s")
    if "error" in answer:
        raise answer["error"]
    return answer["value"]


# --- up --------------------------------------------------------------------------------------------------------------


class Uploader:
    """Uploads checkpoints one after another from a thread of its own.

    give_up_s: how long the store may stay away before a checkpoint is left here, with a warning. As a context it waits
    for all uploads at its end, and raises CheckpointError where some did not get there.
    """

    def __init__(self, store: Store, give_up_s: float = 300.0, first_wait_s: float = 1.0):
        self._store, self._give_up_s, self._first_wait_s = store, give_up_s, first_wait_s
        self._queue = queue.Queue()
        self._left = []
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, kind, error, trace) -> None:
        left = self.close()
        if left and kind is None:
            raise CheckpointError(
                f"{len(left)} checkpoint(s) did not reach {self._store.url} and are only here: "
                f"{', '.join(map(str, left[-3:]))}"
            )

    def put(self, path, step: int = -1) -> None:
        """Uploads the checkpoint (file or directory) `path` of that step when its turn comes; returns at once."""
        self._queue.put((Path(path), step, time.time()))

    def close(self) -> list:
        """Waits for all uploads; the paths that did not get there."""
        self._queue.put(None)
        self._thread.join()
        return self._left

    def _run(self) -> None:
        for path, step, when in iter(self._queue.get, None):
            try:
                self._upload(path, step, when)
                log.info("%s uploaded to %s", path, self._store.url)
            except Exception as error:
                if not path.exists():
                    log.info("%s was pruned before its upload", path)
                    continue
                self._left.append(path)
                log.warning("%s stays here: not uploaded to %s (%s)", path, self._store.url, self._store.said(error))

    def _upload(self, path: Path, step: int, when: float) -> None:
        done: dict = {}

        def attempt():
            if not path.exists():
                raise CheckpointError(f"{path}: pruned before its upload")
            manifest = path.name + MANIFEST
            if not done:
                self._store.remove(manifest)  # of an older checkpoint of this name
            for file in _files(path):
                relative = file.relative_to(path.parent).as_posix()
                if relative not in done:
                    done[relative] = self._store.send(file, relative)
            text = json.dumps({"files": done, "step": step, "time": when})
            self._store.send_text(text, manifest)
            if self._store.read_text(manifest) != text:
                raise _Damaged(f"{manifest}: the store gives back other bytes than it was sent")

        _patiently(self._store, str(path), attempt, self._give_up_s, self._first_wait_s, lambda: len(done))


def _files(path: Path) -> list:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path]


# --- down ------------------------------------------------------------------------------------------------------------


def download(store: Store, folder, give_up_s: float = 300.0, first_wait_s: float = 1.0, above: int = -1) -> Path | None:
    """Brings the newest whole checkpoint of the store's folder into the local `folder`; its path there.

    above: only one of a higher step; None comes back, and nothing down, where there is none.

    The newest is the one of the highest step, and the last saved of those: names begin anew with each fresh disk. Where
    nothing has a manifest (files that somebody put there), all of them come, and `folder` is returned. Files that are
    here already, as they should be, are not fetched again. Raises CheckpointError if the store stays away, holds
    nothing (EmptyStore) or nothing whole, has a hostile listing, or gives damaged files, and if the disk is too small.
    """
    folder = Path(folder)

    def patiently(action):
        try:
            return _patiently(store, store.url, action, give_up_s, first_wait_s)
        except CheckpointError:
            raise
        except Exception as error:
            kind = DamagedCheckpoint if isinstance(error, _Damaged) else CheckpointError
            raise kind(
                f"{store.url}: not downloaded ({store.said(error)}): check the address and the login, or try later"
            ) from None

    def fetch(files: dict) -> None:
        wanted = {name: entry for name, entry in files.items() if not _is_here(folder / name, *entry)}
        need, free = sum(size for size, _sha256 in wanted.values()), shutil.disk_usage(folder).free
        if need > free:
            raise CheckpointError(f"{folder}: {need / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free: free space")
        for name, (size, sha256) in wanted.items():
            _make_folder((folder / name).parent, folder)
            patiently(lambda name=name, size=size, sha256=sha256: store.receive(name, folder / name, size, sha256))

    sizes = patiently(store.list)
    if not sizes:
        raise EmptyStore(f"{store.url}: holds no files: check the address")
    _make_folder(folder, folder)
    manifests = {name for name in sizes if name.endswith(MANIFEST)}
    if not manifests and above >= 0:
        return None
    if not manifests:
        fetch({name: (size, None) for name, size in sizes.items()})
        return folder
    found, problems = [], []
    for name in sorted(manifests):
        try:
            text = patiently(lambda name=name: store.read_text(name))
            found.append((*_read_manifest(name, text, store.url, sizes), name[: -len(MANIFEST)]))
        except DamagedCheckpoint as error:
            log.warning("skipped %s", error)
            problems.append(error)
    if above >= 0:
        found = [one for one in found if one[0] > above]
        if not found:
            return None
    for _step, _time, files, name in sorted(found, key=lambda one: (one[:2], one[3]), reverse=True):
        try:
            fetch(files)
            return folder / name
        except DamagedCheckpoint as error:
            log.warning("skipped %s", error)
            problems.append(error)
    raise problems[0]


def _read_manifest(name: str, text: str, url: str, sizes: dict) -> tuple:
    """(step, time, {file: (bytes, sha256)}) of a checkpoint that is whole there."""
    try:
        content = json.loads(text)
        files = {str(file): (int(size), str(sha256)) for file, (size, sha256) in content["files"].items()}
        step, when = int(content.get("step", -1)), float(content.get("time", 0))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedCheckpoint(f"{url}: {name} is damaged: delete it there, or upload the checkpoint again") from error
    checkpoint = name[: -len(MANIFEST)]
    for file, (size, _sha256) in files.items():
        if sizes.get(file) != size or (file != checkpoint and not file.startswith(checkpoint + "/")):
            raise DamagedCheckpoint(
                f"{url}: {checkpoint} is not whole there ({file} is missing or of another size): upload it again"
            )
    if not files:
        raise DamagedCheckpoint(f"{url}: {name} names no files: upload the checkpoint again")
    return step, when, files


def _is_here(path: Path, size: int, sha256) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return False
    if sha256 is None:
        return True
    return file_checksum(path) == sha256


def _make_folder(path: Path, root: Path) -> None:
    """Makes `path` below `root`, through folders only: a link would lead the download elsewhere."""
    for part in [path, *path.parents]:
        if part == root:
            break
        if part.is_symlink():
            raise CheckpointError(f"{part}: is a link, which leads the download out of {root}: remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be made ({error.strerror}): choose another folder") from error
