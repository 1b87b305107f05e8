"""A folder of photos to a folder of aligned faces: every core, restartable, with a report of what was not found.

The record, `align.jsonl` in the output folder, has a line for each photo that was looked at; a photo whose line is
there, and which has not changed since, is not looked at again. Its faces are the only files that a later run replaces.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw

from data import format_of
from data.folder import class_names
from data.images import image_size, read_file
from deploy.alignment import SIZE, align_faces
from deploy.detection import open_detector
from deploy.photos import SUFFIXES, list_photos, read_photo
from runtime.errors import DamagedItem, DataError, UserError, printable
from runtime.files import atomic_file, write_text

RECORD = "align.jsonl"
REPORT = "align_report.html"
FACES = ("largest", "all")
JPEG_QUALITY = 95
_AT_ONCE = 256  # photos handed to the processes before their results are written down
_SHOWN = 120  # faces, and photos without one, on the report's contact sheets


class Settings(NamedTuple):
    """What decides which faces come out; another value looks at every photo again."""

    det_model: str = ""
    det_thresh: float = 0.6
    faces: str = "largest"
    min_face: int = 20
    size: int = SIZE
    det_size: int = 0


def align_folder(source, target, settings: Settings = Settings(), workers: int = 0, say=print) -> Counter:  # noqa: B008
    """Aligns every photo below `source` into the same place below `target`; returns how many ended how.

    A photo `a/b.jpg` becomes `a/b.jpg`, `a/c.png` becomes `a/c.png.jpg`; with faces="all" `a/b_1.jpg` and so on, the
    best first. workers: processes, 0 for every core. Raises DataError for folders that cannot be used and ModelError
    for a detector that cannot; a photo that cannot be used is a line of the report.
    """
    source, target = Path(source), Path(target)
    _check_folders(source, target)
    open_detector(
        settings.det_model, settings.det_thresh, settings.det_size
    )  # a wrong one is said once, not by every process
    target.mkdir(parents=True, exist_ok=True)
    record_path = target / RECORD
    if os.path.lexists(record_path) and not os.path.isfile(record_path):
        raise DataError(f"{record_path}: is there and is no file: remove it, or choose another --output")
    known = _read_record(record_path)
    todo = [
        photo for photo in list_photos(source) if not _done(known.get(str(photo)), source / photo, target, settings)
    ]
    if known:
        say(f"{len(known)} photos were looked at before, {len(todo)} are left")
    torn = record_path.exists() and not record_path.read_bytes().endswith(b"\n")
    with open(record_path, "a", encoding="utf-8") as record:
        if torn:  # the run before was killed in the middle of a line: ours are not glued to it
            record.write("\n")
        for done in _each(source, target, todo, settings, workers, known):
            known[done["photo"]] = done
            record.write(json.dumps(done) + "\n")
            record.flush()
    shown = {name: done for name, done in known.items() if os.path.isfile(source / name)}
    write_text(target / REPORT, report_page(source, target, shown), DataError)
    return Counter(done["why"] or "aligned" for done in shown.values())


def unaligned(folder) -> bool:
    """Whether a folder holds people's photos as they were taken, <person>/<photo>, and no training set: of the first
    photos of a hundred people one has another size than an aligned face."""
    folder = Path(folder)
    if not folder.is_dir() or format_of(folder) not in (None, "folders", "label.txt"):
        return False
    people = [folder / name for name in class_names(folder)[:100]]
    photos = [[one for one in sorted(person.iterdir()) if one.suffix.lower() in SUFFIXES] for person in people]
    first = [of_one[0] for of_one in photos if of_one]
    return len(first) > 1 and not all(_is_aligned(one) for one in first)


def _is_aligned(photo: Path) -> bool:
    try:
        return image_size(read_file(photo)) == (SIZE, SIZE)
    except DamagedItem:
        return photo.suffix.lower() not in (".heic", ".heif")  # a damaged one says nothing about the others


def _check_folders(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise DataError(f"{source}: no such folder of photos")
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is no folder: choose another --output")
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise DataError(f"{target}: lies in the folder of photos, where its faces would be taken for photos")


def _read_record(path: Path) -> dict:
    known = {}
    if path.exists():
        for line in read_file(path).decode("utf-8", "replace").splitlines():
            try:
                done = json.loads(line)
                done = {key: done[key] for key in ("photo", "stamp", "settings", "faces", "why")}
                if _is_ours(done["photo"], done["faces"]) and isinstance(done["why"], str):
                    known[done["photo"]] = done
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # the run was killed in the middle of this line
    return known


def _is_ours(photo: str, faces: list) -> bool:
    """Whether a line of the record is one that `_look` writes: it may lead nowhere else."""
    folder = os.path.dirname(photo)
    inside = not os.path.isabs(photo) and ".." not in Path(photo).parts
    return inside and isinstance(faces, list) and all(os.path.dirname(face) == folder for face in faces)


def _stamp(path: Path) -> list:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _done(done: Optional[dict], photo: Path, target: Path, settings: Settings) -> bool:
    if done is None or done["settings"] != list(settings):
        return False
    try:
        return done["stamp"] == _stamp(photo) and all(os.path.isfile(target / name) for name in done["faces"])
    except OSError:
        return False


def _each(source, target, todo, settings, workers, known) -> Iterator[dict]:
    # torch's own threads would share the cores with the other processes
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(todo) // 4, 1))
    look = functools.partial(_look, source, target, settings)
    jobs = ((photo, tuple((known.get(str(photo)) or {"faces": ()})["faces"])) for photo in todo)
    if workers == 1:
        _start(settings)
        yield from map(look, jobs)
        return
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _start, (settings, 1)) as pool:
            while chunk := list(islice(jobs, _AT_ONCE)):
                yield from pool.map(look, chunk, chunksize=4)
    except BrokenProcessPool:
        raise DataError(
            "a process of the alignment was killed (out of memory?): run the command again with fewer --workers; "
            "what is done stays done"
        ) from None


_detector = None  # of this process


def _start(settings: Settings, threads: Optional[int] = None) -> None:
    global _detector
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    _detector = open_detector(settings.det_model, settings.det_thresh, settings.det_size)


def _look(source: Path, target: Path, settings: Settings, job) -> dict:
    photo, ours = job
    done = {"photo": str(photo), "stamp": None, "settings": list(settings), "faces": [], "why": ""}
    try:
        done["stamp"] = _stamp(source / photo)
        image_HWC = read_photo(source / photo)
        faces = _choose(_detector.detect(image_HWC), settings)
        aligned_NSS3 = align_faces(image_HWC, faces.points_N52, settings.size)
        for number, face_SS3 in enumerate(aligned_NSS3, start=1):
            name = _face_name(photo, number if settings.faces == "all" else 0)
            if (target / name).exists() and str(name) not in ours:
                raise DamagedItem(f"{target / name} is there already and is not this command's")
            _write_face(target / name, face_SS3)
            done["faces"].append(str(name))
    except (UserError, OSError) as error:
        done["why"] = printable(error)
    return done


def _choose(faces, settings: Settings):
    if not len(faces):
        raise DamagedItem("no face was found")
    side_N = (faces.boxes_N4[:, 2:] - faces.boxes_N4[:, :2]).min(axis=1)
    if side_N.max() < settings.min_face:
        raise DamagedItem(f"its largest face is {side_N.max():.0f} pixels, less than {settings.min_face}")
    rows = [faces.largest()] if settings.faces == "largest" else np.flatnonzero(side_N >= settings.min_face)
    return faces.rows(rows)


def _face_name(photo: Path, number: int) -> Path:
    stem = photo.name[: -len(".jpg")] if photo.name.endswith(".jpg") else photo.name
    return photo.with_name(f"{stem}_{number}.jpg" if number else f"{stem}.jpg")


def _write_face(path: Path, face_SS3: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, DataError) as file:
        # without chroma subsampling: at this size it costs colour where eyes and lips are
        Image.fromarray(face_SS3).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)


# --- the report -------------------------------------------------------------------------------------------------------


def report_page(source: Path, target: Path, known: dict) -> str:
    """One HTML page without links to anything: counts, a sheet of aligned faces, photos without one and the reasons."""
    faces = [target / name for done in known.values() for name in done["faces"]]
    missed = [done for done in known.values() if not done["faces"]]
    reasons = Counter(done["why"] for done in missed)
    rows = "".join(f"<tr><td>{count}<td>{html.escape(why)}" for why, count in reasons.most_common(50))
    listed = "".join(
        f"<tr><td>{html.escape(printable(done['photo']))}<td>{html.escape(done['why'])}" for done in missed[:2000]
    )
    step = max(len(faces) // _SHOWN, 1)
    return f"""<!doctype html><meta charset="utf-8"><title>Aligned faces</title>
<style>body{{font:15px sans-serif;margin:2em}}
td{{padding:2px 12px;border:1px solid #ddd}}img{{max-width:100%}}</style>
<h1>{len(known)} photos, {len(known) - len(missed)} with a face, {len(faces)} aligned faces</h1>
<h2>Aligned (every {step}.)</h2>{_sheet(faces[::step][:_SHOWN])}
<h2>{len(missed)} photos without a face</h2><table>{rows}</table>
{_sheet([source / done["photo"] for done in missed[:_SHOWN]])}<table>{listed}</table>
"""


def _sheet(paths, side: int = 112, columns: int = 12) -> str:
    if not paths:
        return "<p>none</p>"
    sheet = Image.new("RGB", (columns * side, -(-len(paths) // columns) * side), "white")
    for number, path in enumerate(paths):
        corner = number % columns * side, number // columns * side
        try:
            picture = Image.fromarray(read_photo(path))
            picture.thumbnail((side, side))
            sheet.paste(picture, corner)
        except DamagedItem:
            ImageDraw.Draw(sheet).text((corner[0] + 8, corner[1] + side // 2), "cannot be shown", "black")
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return f'<p><img alt="contact sheet" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
