"""The gallery: known people's embeddings with their names, and whose face a new one is.

A gallery is one SQLite file: vectors, names, the fingerprint of the model that made them and its threshold. Every
change is one transaction, so a kill at any moment leaves the gallery before it or after it. The search itself runs in
memory (`SearchIndex`), follows changes that other processes make, and is exact.

Shapes: B new faces, M entries, D embedding size, K results. Similarity is the cosine of unit embeddings, -1..1; squared
L2 distance, the unit of thresholds, is 2 - 2 * similarity.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from data import safe_pickle
from data.images import read_file
from data.npy import read_npy
from runtime import host
from runtime.errors import CheckpointError, DamagedItem, DataError, GalleryError, printable
from runtime.files import open_regular, temporary_path

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
FORMAT = "face gallery 1"
LONGEST_NAME = 200
STORAGE = ("fp32", "int8")
_MOST_INDEX_BYTES = 4 << 30
MOST_CHECKED = 1 << 30  # bytes of a file whose every page is looked at when it is opened; the entries have sums anyway
_MAGIC = b"SQLite format 3\0"
_SCHEMA = {
    "meta": "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # ids are never used again, so "id > the last one seen" is what is new
    "entries": "CREATE TABLE entries (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, vector BLOB NOT NULL, "
    "crc INTEGER NOT NULL)",
    "removed": "CREATE TABLE removed (number INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL)",
    "by_name": "CREATE INDEX by_name ON entries (name)",
}


class Match(NamedTuple):
    """One entry near a face: similarity is the cosine."""

    name: str
    similarity: float


def similarity_threshold(distance: float) -> float:
    """The cosine that belongs to a squared L2 distance of unit vectors."""
    return 1 - distance / 2


def check_name(name) -> str:
    """`name` itself without blanks around it; GalleryError for what cannot be shown on one line."""
    if not isinstance(name, str) or not name.strip():
        raise GalleryError("a person's name is empty")
    name = name.strip()
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise GalleryError(
            f"name {printable(repr(name), 60)}: a name is one line of at most {LONGEST_NAME} printable characters"
        )
    return name


def unit_vectors(vectors_ND) -> np.ndarray:
    """float32 rows of length one; GalleryError where a row is not finite or has no direction."""
    vectors_ND = np.atleast_2d(np.asarray(vectors_ND, np.float32))
    if vectors_ND.ndim != 2:
        raise GalleryError(f"embeddings have shape {vectors_ND.shape}: one row a face is expected")
    norm_N = np.linalg.norm(vectors_ND.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norm_N) | (norm_N < 1e-6))
    if len(bad):
        raise GalleryError(f"embedding {bad[0]} is not finite or zero, and says nothing about a face: it is not stored")
    return (vectors_ND / norm_N[:, None]).astype(np.float32)


class Gallery:
    """One open gallery. Use `Gallery.create`, `Gallery.open`, `open_gallery`; close it, or use it in a `with`."""

    def __init__(self, connection: sqlite3.Connection, path: str, storage: str = "fp32"):
        self._db, self.path = connection, path
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        try:
            self.fingerprint = meta["fingerprint"]
            self.dimension = int(meta["dimension"])
            threshold = float(meta["threshold"]) if meta["threshold"] else None
            if meta["format"] != FORMAT or not 1 <= self.dimension <= 65536:
                raise ValueError
            if threshold is not None and not math.isfinite(threshold):
                raise ValueError
        except (KeyError, ValueError):
            raise GalleryError(f"{path}: is no gallery of this project, or a damaged one") from None
        self.threshold: Optional[float] = threshold
        self._index = SearchIndex(self.dimension, storage)
        self._last_id = self._last_removed = 0
        self._version = None
        self._follow()

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path, fingerprint: str, dimension: int, threshold: Optional[float] = None, storage="fp32"):
        """A new, empty gallery; ":memory:" for one without a file. GalleryError where a file is there already."""
        if str(path) != ":memory:":
            if Path(path).exists():
                raise GalleryError(f"{path}: is there already: remove it first, or choose another name")
            temporary = temporary_path(path)
            try:
                with _connect(temporary) as db:
                    _set_up(db, fingerprint, dimension, threshold)
                db.close()
                os.link(temporary, path)  # unlike a rename it never replaces
            except FileExistsError:
                raise GalleryError(f"{path}: is there already: remove it first, or choose another name") from None
            except (OSError, sqlite3.Error) as error:
                raise GalleryError(f"{path}: cannot be written ({error})") from None
            finally:
                temporary.unlink(missing_ok=True)
            return cls(_connect(path), str(path), storage)
        db = _connect(path)
        with db:
            _set_up(db, fingerprint, dimension, threshold)
        return cls(db, str(path), storage)

    @classmethod
    def open(cls, path, fingerprint: Optional[str] = None, storage: str = "fp32") -> Gallery:
        """The gallery in a file. fingerprint: of the model in use; a gallery of another model is a GalleryError."""
        if storage not in STORAGE:
            raise GalleryError(f"storage {storage!r}: choose from {', '.join(STORAGE)}")
        path = Path(path)
        try:
            with open_regular(path) as file:
                if file.read(16) != _MAGIC:
                    raise GalleryError(f"{path}: is no gallery of this project")
                size = os.fstat(file.fileno()).st_size
            db = _connect(path)
            if size <= MOST_CHECKED:
                _check(db, path)
            # a foreign database may bring triggers and views of its own
            found = dict(db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))
            if found != _SCHEMA:
                raise GalleryError(f"{path}: is a database, but no gallery of this project")
            gallery = cls(db, str(path), storage)
        except FileNotFoundError:
            raise GalleryError(f"{path}: no such gallery: make one with --build_index") from None
        except (OSError, sqlite3.Error) as error:
            raise GalleryError(f"{path}: the gallery cannot be read ({error})") from None
        if fingerprint is not None and gallery.fingerprint != fingerprint:
            gallery.close()
            raise GalleryError(
                f"{path}: made with another model ({gallery.fingerprint[:16]}, in use is {fingerprint[:16]}), whose "
                "embeddings cannot be compared: make it anew with --build_index"
            )
        return gallery

    def close(self) -> None:
        self._db.close()
        self._index.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # --- people -------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with _reading(self.path):
            self._follow()
        return len(self._index)

    def people(self) -> dict[str, int]:
        """{name: number of entries}, sorted by name."""
        with _reading(self.path):
            return dict(self._db.execute("SELECT name, count(*) FROM entries GROUP BY name ORDER BY name"))

    def add(self, name: str, vectors_ND) -> int:
        """Stores embeddings of one person, all or none; returns how many. More faces of a known name are the same
        person's. Raises GalleryError for a name or an embedding that cannot be stored."""
        return self.add_many([(name, vector_D) for vector_D in np.atleast_2d(vectors_ND)])

    def add_many(self, entries: Iterable[tuple]) -> int:
        """The same for (name, embedding [D]) of many people, in one transaction."""
        entries = list(entries)
        if not entries:
            return 0
        vectors_ND = unit_vectors(np.stack([vector for _, vector in entries]))
        if vectors_ND.shape[1] != self.dimension:
            raise GalleryError(
                f"embeddings of {vectors_ND.shape[1]} numbers do not fit the gallery's {self.dimension}: another model"
            )
        rows = []
        for (name, _), vector_D in zip(entries, vectors_ND):
            name, blob = check_name(name), vector_D.astype("<f4").tobytes()
            rows.append((name, blob, _crc(name, blob)))
        with self._writing() as db:
            db.executemany("INSERT INTO entries (name, vector, crc) VALUES (?, ?, ?)", rows)
        return len(rows)

    def remove(self, name: str) -> int:
        """Forgets a person; returns how many entries went."""
        with self._writing() as db:
            db.execute("INSERT INTO removed (id) SELECT id FROM entries WHERE name = ?", (name,))
            return db.execute("DELETE FROM entries WHERE name = ?", (name,)).rowcount

    def _writing(self):
        return _Transaction(self._db, self.path)

    # --- search -------------------------------------------------------------------------------------------------------

    def search(self, emb_BD, count: int = 1) -> list[list[Match]]:
        """For each face its `count` nearest entries, the nearest first. A face whose embedding is not finite, and an
        empty gallery, match nothing. Raises GalleryError for embeddings of another width."""
        emb_BD = np.atleast_2d(np.asarray(emb_BD, np.float32))
        if emb_BD.shape[1] != self.dimension:
            raise GalleryError(
                f"embeddings of {emb_BD.shape[1]} numbers do not fit the gallery's {self.dimension}: another model"
            )
        with _reading(self.path):
            return self._search(emb_BD, count)

    def _search(self, emb_BD, count: int) -> list[list[Match]]:
        self._follow()
        matches: list[list[Match]] = [[] for _ in emb_BD]
        count = min(count, len(self._index))
        norm_B = np.linalg.norm(emb_BD.astype(np.float64), axis=1)
        good = np.flatnonzero(np.isfinite(norm_B) & (norm_B > 1e-6))
        if not count or not len(good):
            return matches
        unit_BD = (emb_BD[good] / norm_B[good, None]).astype(np.float32)
        id_BK, similarity_BK = self._index.search(unit_BD, count)
        for row, unit_D, ids, similarities in zip(good, unit_BD, id_BK, similarity_BK):
            if self._index.storage == "int8":  # candidates, to be put in order exactly
                found = [self._exact(int(id_), unit_D) for id_ in ids]
                found = sorted((one for one in found if one), key=lambda match: -match.similarity)
                matches[row] = found[:count]
            else:
                matches[row] = [Match(self._name(int(id_)), float(s)) for id_, s in zip(ids, similarities) if id_ >= 0]
        return matches

    def identify(self, emb_BD, threshold: Optional[float] = None) -> list[Match]:
        """For each face the nearest person, or "unknown" where none is nearer than `threshold` (squared L2 distance;
        None takes the gallery's own, and without one the nearest counts whatever its distance)."""
        threshold = self.threshold if threshold is None else threshold
        least = -2.0 if threshold is None else similarity_threshold(threshold)
        found = (matches[0] if matches else Match(UNKNOWN, -1.0) for matches in self.search(emb_BD))
        return [match if match.similarity > least else Match(UNKNOWN, match.similarity) for match in found]

    def _name(self, id_: int) -> str:
        row = self._db.execute("SELECT name FROM entries WHERE id = ?", (id_,)).fetchone()
        return row[0] if row else UNKNOWN  # removed by another process this very moment

    def _exact(self, id_: int, unit_D) -> Optional[Match]:
        row = self._db.execute("SELECT name, vector FROM entries WHERE id = ?", (id_,)).fetchone() if id_ >= 0 else None
        return Match(row[0], float(np.frombuffer(row[1], "<f4") @ unit_D)) if row else None

    def _follow(self) -> None:
        """Brings the index up to what the file holds now."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0], self._db.total_changes
        if version == self._version:
            return
        gone = [id_ for (id_,) in self._db.execute("SELECT id FROM removed WHERE number > ?", (self._last_removed,))]
        if gone:
            self._last_removed = self._db.execute("SELECT max(number) FROM removed").fetchone()[0]
            self._index.remove(np.array(gone, np.int64))
        rows = self._db.execute("SELECT id, name, vector, crc FROM entries WHERE id > ? ORDER BY id", (self._last_id,))
        while chunk := rows.fetchmany(65536):
            for id_, name, blob, crc in chunk:
                if len(blob) != 4 * self.dimension or crc != _crc(name, blob):
                    raise GalleryError(f"{self.path}: the entry of {name!r} (row {id_}) is damaged: make it anew")
            vectors_ND = np.frombuffer(b"".join(row[2] for row in chunk), "<f4").reshape(len(chunk), -1)
            self._index.add(np.array([row[0] for row in chunk], np.int64), vectors_ND)
            self._last_id = chunk[-1][0]
        self._version = version


@contextmanager
def _reading(path: str):
    try:
        yield
    except sqlite3.Error as error:
        raise GalleryError(f"{path}: the gallery cannot be read ({error})") from None


class _Transaction:
    """All or nothing, and sqlite's own errors as one line."""

    def __init__(self, db: sqlite3.Connection, path: str):
        self._db, self._path = db, path

    def __enter__(self):
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise GalleryError(f"{self._path}: cannot be written ({error})") from None
        return self._db

    def __exit__(self, kind, error, _):
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        except sqlite3.Error as failure:
            raise GalleryError(f"{self._path}: cannot be written ({failure}); it is as it was") from None
        if isinstance(error, sqlite3.Error):
            raise GalleryError(f"{self._path}: cannot be written ({error}); it is as it was") from None


def _connect(path) -> sqlite3.Connection:
    # a server's requests are answered by several threads, one at a time
    db = sqlite3.connect(str(path), timeout=10, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    return db


def _check(db, path) -> None:
    (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise GalleryError(f"{path}: the gallery is damaged ({verdict}): make it anew, or take a copy")


def _set_up(db, fingerprint, dimension, threshold) -> None:
    db.execute("BEGIN")
    for statement in _SCHEMA.values():
        db.execute(statement)
    meta = {"format": FORMAT, "fingerprint": fingerprint, "dimension": dimension}
    meta["threshold"] = "" if threshold is None else repr(float(threshold))
    db.executemany("INSERT INTO meta VALUES (?, ?)", [(key, str(value)) for key, value in meta.items()])
    db.execute("COMMIT")


def _crc(name: str, blob: bytes) -> int:
    return zlib.crc32(blob, zlib.crc32(name.encode("utf-8", "surrogatepass")))


# --- the search -------------------------------------------------------------------------------------------------------


class SearchIndex:
    """Unit vectors by id, and the nearest of them by cosine: faiss where it is installed, else numpy.

    storage: "fp32", or "int8" at a quarter of the memory: whole numbers over six standard deviations of a unit
    vector's components, of which `search` gives more candidates than asked for, to be compared exactly.
    threads: of a search; None takes every core. Vectors lie in blocks: faiss searches a block on one core for one
    face, so the blocks are what the cores share; and neither growing nor removing copies more than a block.
    """

    BLOCK = 1 << 16

    def __init__(self, dimension: int, storage: str = "fp32", threads: Optional[int] = None):
        self.dimension, self.storage = dimension, storage
        self._scale = 127 * math.sqrt(dimension) / 6
        self._blocks: list = []
        try:
            logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it tells every library that it tries
            import faiss

            self._faiss = faiss
        except ImportError:
            log.warning("faiss is not installed: galleries are searched with numpy (pip install faiss-cpu)")
            self._faiss = None
        # a thread's own loops stay on it: its blocks are its share
        alone = (lambda: self._faiss.omp_set_num_threads(1)) if self._faiss else None
        self._threads = ThreadPoolExecutor(threads or len(host.allowed_cores()), "search", initializer=alone)

    def _new_block(self):
        faiss = self._faiss
        if faiss is None:
            return _NumpyIndex(self.dimension, np.int8 if self.storage == "int8" else np.float32)
        if self.storage == "fp32":
            return faiss.IndexIDMap(faiss.IndexFlatIP(self.dimension))
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        return faiss.IndexIDMap(faiss.IndexScalarQuantizer(self.dimension, kind, faiss.METRIC_INNER_PRODUCT))

    def __len__(self) -> int:
        return sum(block.ntotal for block in self._blocks)

    def _stored(self, vectors_ND: np.ndarray) -> np.ndarray:
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)
        return vectors_ND if self.storage == "fp32" else np.rint(vectors_ND * self._scale).clip(-127, 127)

    def add(self, id_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        start = 0
        while start < len(id_N):
            if not self._blocks or self._blocks[-1].ntotal >= self.BLOCK:
                self._blocks.append(self._new_block())
            stop = start + self.BLOCK - self._blocks[-1].ntotal
            self._blocks[-1].add_with_ids(self._stored(vectors_ND[start:stop]), id_N[start:stop])
            start = stop

    def close(self) -> None:
        self._threads.shutdown()

    def remove(self, id_N: np.ndarray) -> None:
        for block in self._blocks:
            block.remove_ids(id_N)
        self._blocks = [block for block in self._blocks if block.ntotal]

    def search(self, unit_BD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, K], similarity [B, K]), -1 where there are fewer; with int8 K is 4 * count + 16."""
        if self.storage == "int8":
            count, unit_BD = 4 * count + 16, self._stored(unit_BD)  # faiss rounds the faces too
        unit_BD = np.ascontiguousarray(unit_BD, np.float32)
        found = self._threads.map(lambda block: block.search(unit_BD, min(count, block.ntotal)), list(self._blocks))
        similarity_BN, id_BN = (np.concatenate(part, axis=1) for part in zip(*found))
        best_BK = np.argsort(-similarity_BN, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(id_BN, best_BK, 1), np.take_along_axis(similarity_BN, best_BK, 1)


class _NumpyIndex:
    """The part of faiss's interface that is used here, as one product of matrices."""

    def __init__(self, dimension: int, dtype):
        self._vectors_MD = np.zeros((0, dimension), dtype)
        self._id_M = np.zeros(0, np.int64)
        self.ntotal = 0

    def add_with_ids(self, vectors_ND, id_N) -> None:
        total = self.ntotal + len(id_N)
        if total > len(self._id_M):  # doubling keeps adding one by one linear
            room = max(total, 2 * len(self._id_M)) - len(self._id_M)
            self._vectors_MD = np.concatenate(
                [self._vectors_MD, np.zeros((room, self._vectors_MD.shape[1]), self._vectors_MD.dtype)]
            )
            self._id_M = np.concatenate([self._id_M, np.zeros(room, np.int64)])
        self._vectors_MD[self.ntotal : total] = vectors_ND
        self._id_M[self.ntotal : total] = id_N
        self.ntotal = total

    def remove_ids(self, id_N) -> None:
        keep = np.flatnonzero(~np.isin(self._id_M[: self.ntotal], id_N))
        self._vectors_MD[: len(keep)] = self._vectors_MD[keep]
        self._id_M[: len(keep)] = self._id_M[keep]
        self.ntotal = len(keep)

    def search(self, unit_BD, count) -> tuple[np.ndarray, np.ndarray]:
        score_BM = np.empty((len(unit_BD), self.ntotal), np.float32)
        for start in range(0, self.ntotal, 65536):
            stop = min(start + 65536, self.ntotal)
            score_BM[:, start:stop] = unit_BD @ self._vectors_MD[start:stop].astype(np.float32, copy=False).T
        best_BK = np.argpartition(-score_BM, count - 1, axis=1)[:, :count]
        score_BK = np.take_along_axis(score_BM, best_BK, 1)
        order_BK = np.argsort(-score_BK, axis=1, kind="stable")
        best_BK = np.take_along_axis(best_BK, order_BK, 1)
        return np.take_along_axis(score_BK, order_BK, 1), self._id_M[best_BK]


# --- galleries of other projects --------------------------------------------------------------------------------------


def open_gallery(path, fingerprint: str, dimension: int, storage: str = "fp32") -> Gallery:
    """A gallery of ours, or another project's, told apart by content.

    insight-face-paddle's `index.bin` and InsightFace_Pytorch's `facebank.pth` with `names.npy` (either file, or their
    folder) name no model: they are read into memory with a warning, and only their vectors' length is checked.
    Raises GalleryError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "facebank.pth"
    if not path.is_file():
        raise GalleryError(f"{path}: no such gallery: make one with --build_index")
    try:
        with open_regular(path) as file:
            start = file.read(16)
    except OSError as error:
        raise GalleryError(f"{path}: cannot be read ({error.strerror})") from None
    if start == _MAGIC:
        return Gallery.open(path, fingerprint, storage)
    if path.suffix in (".pth", ".npy"):
        entries = read_facebank(path.parent)
    elif path.suffix == ".npz":
        entries = read_npz(path)
    else:
        entries = read_index_bin(path)
    width = len(entries[0][1])
    if width != dimension:
        raise GalleryError(f"{path}: holds vectors of {width} numbers, the model's have {dimension}: another model")
    log.warning("%s names no model: it is taken as this model's, which only its vectors' length speaks for", path)
    gallery = Gallery.create(":memory:", fingerprint, dimension, storage=storage)
    gallery.add_many(entries)
    return gallery


def read_index_bin(path) -> list[tuple[str, np.ndarray]]:
    """(name, vector [D]) of each entry of insight-face-paddle's index.bin: a pickle {"label", "feature"}, read without
    running anything that it names. Raises GalleryError."""
    try:
        value = safe_pickle.load(read_file(path, _MOST_INDEX_BYTES), str(path))
    except DamagedItem as error:
        raise GalleryError(f"{path}: {error}") from None
    except DataError as error:
        raise GalleryError(str(error)) from None
    labels, features = (value.get("label"), value.get("feature")) if isinstance(value, dict) else (None, None)
    if not isinstance(labels, list) or not isinstance(features, list) or len(labels) != len(features) or not labels:
        raise GalleryError(f"{path}: is no index: a pickle of as many labels as features is expected")
    vectors = [np.asarray(safe_pickle.as_array(feature)) for feature in features]
    if any(v.dtype != np.float32 or v.size != vectors[0].size or v.ndim not in (1, 2) for v in vectors):
        raise GalleryError(f"{path}: is no index: its features are not float32 vectors of one length")
    return [(check_name(label), vector.reshape(-1)) for label, vector in zip(labels, vectors)]


def read_facebank(folder) -> list[tuple[str, np.ndarray]]:
    """(name, vector [D]) of InsightFace_Pytorch's facebank.pth (a tensor [M, D]) and names.npy (M + 1 names, the first
    of which is "Unknown"). Raises GalleryError, CheckpointError."""
    import torch

    from checkpoint import store

    folder = Path(folder)
    for name in ("facebank.pth", "names.npy"):
        if not os.path.isfile(folder / name):
            raise GalleryError(f"{folder / name}: is missing: a facebank is facebank.pth and names.npy")
    try:
        vectors_MD = store.load_pth(folder / "facebank.pth")
        names = read_npy(read_file(folder / "names.npy"), folder / "names.npy").tolist()
    except (CheckpointError, DataError) as error:
        raise GalleryError(
            f"{folder}: its facebank cannot be read ({error}): it is facebank.pth and names.npy"
        ) from None
    if not isinstance(vectors_MD, torch.Tensor) or vectors_MD.ndim != 2:
        raise GalleryError(f"{folder}/facebank.pth: is no facebank: one tensor of people's embeddings is expected")
    return _named(names, vectors_MD.float().numpy(), folder)


def read_npz(path) -> list[tuple[str, np.ndarray]]:
    """The same of the facebank.npz that this project wrote before it had galleries."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise GalleryError("it is compressed, which ours never are")  # a small file may unpack to terabytes
            vectors_MD, names = (read_npy(archive.read(f"{n}.npy"), n) for n in ("embeddings", "names"))
            names = names.tolist()
    except Exception as error:  # zipfile lets errors of many kinds through
        raise GalleryError(f"{path}: is no facebank ({error})") from None
    return _named(names, vectors_MD, path)


def _named(names, vectors_MD, place) -> list[tuple[str, np.ndarray]]:
    if vectors_MD.ndim != 2 or not len(vectors_MD) or len(names) != len(vectors_MD) + 1:
        raise GalleryError(f"{place}: is no facebank: {len(names)} names for {vectors_MD.shape} embeddings")
    return [(check_name(str(name)), vector) for name, vector in zip(names[1:], vectors_MD)]
