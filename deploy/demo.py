"""Whose faces are in a photo, a folder of photos or a video: the commands and the Python use of insight-face-paddle.

    python tools/test_recognition.py --det --rec --index=index.bin --input=friends2.jpg --output=./output

    import insightface_paddle as face
    args = face.parser().parse_args(["--det", "--rec", "--index=gallery.db", "--rec_model=model.onnx"])
    for result in face.InsightFace(args).predict("friends2.jpg"):
        print(result["labels"])

What the original does otherwise, `--like_original` brings back: faces are cut out and stretched instead of aligned,
the vote of the nearest entries by |cosine| decides instead of the nearest, the detection's score is drawn instead of
the similarity, videos are written with 30 frames a second and read in BGR.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image

from deploy.alignment import align_faces
from deploy.backends import load_recognizer
from deploy.detection import Faces, check_size, open_detector
from deploy.drawing import colour, draw_faces
from deploy.gallery import UNKNOWN, Gallery, Match, check_name, open_gallery, similarity_threshold
from deploy.photos import SUFFIXES, list_photos, read_photo
from deploy.video import SUFFIXES as VIDEO_SUFFIXES
from deploy.video import VideoReader, VideoWriter
from runtime.errors import ConfigError, DamagedItem, GalleryError, UserError, printable
from runtime.files import atomic_file, atomic_path
from runtime.log import Parser

log = logging.getLogger(__name__)

DEFAULT_SIMILARITY = 0.45  # the original's, where no calibration says better
COLOURS = 100
PADDLE_MODELS = ("BlazeFace", "MobileFace", "ArcFace")  # the original's, by name
_WRITTEN = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def _word(text: str) -> bool:
    """The original's booleans: true, t and 1 in any case are true, every other word is false."""
    return text.lower() in ("true", "t", "1")


def parser() -> Parser:
    """The options, by the original's names and defaults."""
    options = Parser(description=__doc__.splitlines()[0])
    add = options.add_argument
    add("--det", action="store_true", help="find the faces; without it a picture is a face")
    add("--rec", action="store_true", help="say whose they are")
    add("--det_model", default="", help="an ONNX detector (YuNet, SCRFD, RetinaFace); else MTCNN")
    add("--rec_model", default="work_space", help="a checkpoint or ONNX file, or a folder: its newest")
    add("--use_gpu", type=_word, default=True, help="the first of npu, cuda, cpu that is there; False: cpu")
    add("--enable_mkldnn", type=_word, default=False, help="taken for compatibility: the CPU always uses oneDNN")
    add("--cpu_threads", type=int, default=1, help="threads of the recognizer on the CPU")
    add("--input", default=None, help="an image, a folder of images, or a video")
    add("--output", default="./output/", help="folder of the results")
    add("--det_thresh", type=float, default=0.8, help="least score of a face")
    add(
        "--det_size",
        type=int,
        default=0,
        help="long side to which photos are reduced to find faces: more for tiny ones",
    )
    add("--index", default=None, help="a gallery of ours, an index.bin or a facebank")
    add("--cdd_num", type=int, default=5, help="how many of the nearest entries the JSON file lists")
    add(
        "--rec_thresh", type=float, default=None, help="least similarity (cosine); default: the calibrated one, or 0.45"
    )
    add("--max_batch_size", type=int, default=1, help="faces embedded at a time")
    add("--build_index", default=None, help="write a gallery of --img_dir there")
    add("--img_dir", default=None, help="photos for the gallery: <person>/<photo>, or as --label says")
    add("--label", default=None, help="lines <path below img_dir><tab><name>")
    add("--font", default="", help="a font file for the names; found by itself where the system has one with Chinese")
    add("--like_original", action="store_true", help="insight-face-paddle's own rules")
    return options


class Found(NamedTuple):
    """One picture: boxes and landmarks in pixels, embeddings [N, D] or None, nearest entries by face."""

    faces: Faces
    emb_ND: Optional[np.ndarray]
    people: list
    candidates: list


class InsightFace:
    """args: the namespace of `parser()`. Raises ConfigError for options that do not go together."""

    def __init__(self, args, print_info: bool = False):
        self.args = args
        self._check()
        if print_info:
            print(_table(vars(args)))
        self._gallery: Optional[Gallery] = None
        self._colours: dict[str, tuple] = {}
        self._recognizer = None
        self._detector = None
        if args.det or args.build_index:
            self._detector = open_detector(args.det_model, args.det_thresh, args.det_size)
        if args.rec or args.build_index:
            self._open_recognizer()
        if args.rec and args.index:
            self._gallery = open_gallery(args.index, self._fingerprint, self._dimension)
            self._similarity = self._least_similarity()
            if not len(self._gallery):
                log.warning("%s: is an empty gallery: everybody is unknown", printable(args.index))
        elif args.rec and not args.build_index:
            log.warning("--rec without --index: nobody is known, so faces are only found")

    def _check(self) -> None:
        args = self.args
        for option, cure in (("det_model", "leave it out for MTCNN"), ("rec_model", "export a checkpoint")):
            given = getattr(args, option)
            if given in PADDLE_MODELS or os.path.isfile(os.path.join(given, "inference.pdmodel")):
                raise ConfigError(
                    f"--{option} {given}: models of Paddle are not read here: give an ONNX file, or {cure}"
                )
        if not (args.det or args.rec or args.build_index):
            raise ConfigError("nothing to do: give --det, --rec or --build_index")
        if args.build_index and (args.det or args.index):
            raise ConfigError("--build_index goes without --det and --index: build first, recognise then")
        if args.build_index and not args.img_dir:
            raise ConfigError("--build_index needs --img_dir, and --label where its folders are not the people")
        if args.rec and not args.det and not args.index and not args.build_index:
            raise ConfigError("--rec needs --index, the gallery of known people: make one with --build_index")
        if args.rec_thresh is not None and not -1 <= args.rec_thresh <= 1:
            raise ConfigError(f"--rec_thresh {args.rec_thresh}: a cosine, from -1 to 1")
        check_size(args.det_size)
        for name in ("max_batch_size", "cdd_num", "cpu_threads"):
            if getattr(args, name) < 1:
                raise ConfigError(f"--{name} {getattr(args, name)}: must be at least 1")

    def _open_recognizer(self) -> None:
        args = self.args
        try:
            _, self._recognizer = load_recognizer(
                args.rec_model, None if args.use_gpu else "cpu", threads=args.cpu_threads
            )
        except UserError as error:
            raise ConfigError(f"--rec_model: {error}") from None
        self._size = getattr(self._recognizer, "size", 112)
        self._fingerprint = self._recognizer.fingerprint
        blank = np.zeros((1, self._size, self._size, 3), np.uint8)
        self._dimension = self._recognizer.embed(blank).shape[1]

    def _least_similarity(self) -> float:
        if self.args.rec_thresh is not None:
            return self.args.rec_thresh
        if self.args.like_original:
            return DEFAULT_SIMILARITY
        for threshold in (self._gallery.threshold, self._recognizer.threshold):
            if threshold is not None:
                return similarity_threshold(threshold)
        log.warning(
            "no threshold is calibrated: similarity %.2f decides; python -m tools.calibrate finds one from data",
            DEFAULT_SIMILARITY,
        )
        return DEFAULT_SIMILARITY

    # --- recognising --------------------------------------------------------------------------------------------------

    def predict(self, input, print_info: bool = False) -> Iterator[dict]:
        """A generator over images or frames of {"box_list", "features", "labels", "similarities"}.

        input: the path of an image, a folder or a video, or one RGB array uint8 [H, W, 3]. box_list: float [n, 6], each
        (0, score, xmin, ymin, xmax, ymax) in pixels, or None without --det; features: float [n, 1, D], or None without
        --rec; labels: names, "unknown", or "face" where nobody is known. Pictures and JSON go to --output.
        """
        if isinstance(input, np.ndarray):
            yield self._one_image(input, "tmp.png", None)
            return
        path = Path(input)
        if path.is_dir():
            # as the original: not the folders below
            names = sorted(one.name for one in path.iterdir() if one.is_file())
            for name in names:
                if Path(name).suffix.lower() in VIDEO_SUFFIXES:
                    yield from self._tried(self._video(path / name), path / name)
                elif Path(name).suffix.lower() in SUFFIXES:
                    yield from self._tried(self._image_file(path / name), path / name)
                else:
                    log.warning("%s: is no image, skipped", printable(path / name))
        elif path.is_file():
            read = self._video if path.suffix.lower() in VIDEO_SUFFIXES else self._image_file
            yield from self._tried(read(path), path)
        else:
            raise ConfigError(f"--input {path}: no such file or folder")
        if print_info:
            log.info('Predict complete! All prediction result(s) have been saved in "%s".', self.args.output)

    def _tried(self, results, path) -> Iterator[dict]:
        """The results as far as the file can be read; what is wrong with it is one line."""
        try:
            yield from results
        except DamagedItem as error:
            log.warning("%s: %s", printable(path), error)

    def _image_file(self, path: Path) -> Iterator[dict]:
        yield self._one_image(read_photo(path), path.name, path)

    def _one_image(self, image_HWC: np.ndarray, name: str, source: Optional[Path]) -> dict:
        found = self._recognise(image_HWC)
        log.info("File: %s, predict label(s): %s", printable(name), self._labels(found))
        if self.args.det:
            target = self._target(name, source)
            drawn_HWC = self._draw(image_HWC, found)
            with atomic_file(target) as file:
                Image.fromarray(drawn_HWC).save(file, Image.registered_extensions()[target.suffix.lower()])
            self._write_json(target, [self._record(found, None)])
        return self._result(found)

    def _video(self, path: Path) -> Iterator[dict]:
        frames = VideoReader(path)
        target = self._target(path.name if path.suffix.lower() == ".mp4" else f"{path.name}.mp4", path)
        rate, records, damage = 30 if self.args.like_original else frames.rate, [], None
        with atomic_path(target) as partial:
            writer = VideoWriter(partial, rate)
            try:
                for number, frame in enumerate(frames, start=1):
                    found = self._recognise(frame.image_HWC[..., ::-1] if self.args.like_original else frame.image_HWC)
                    log.info("File: %s, frame %d, predict label(s): %s", path.name, number, self._labels(found))
                    records.append(self._record(found, frame.seconds))
                    seconds = None if self.args.like_original else frame.seconds
                    writer.write(self._draw(frame.image_HWC, found), seconds)
                    yield self._result(found)
            except DamagedItem as error:
                damage = error
            if not records:
                raise damage or DamagedItem(f"{path}: holds no frames")
            writer.close()  # what could be read is kept
        self._write_json(target, records)
        if damage:
            raise damage

    def _recognise(self, image_HWC: np.ndarray) -> Found:
        height, width = image_HWC.shape[:2]
        if self._detector is not None and self.args.det:
            faces = self._detector.detect(np.ascontiguousarray(image_HWC))
        else:  # the picture is the face
            whole = np.array([[0, 0, width, height]], np.float32)
            faces = Faces(whole, np.ones(1, np.float32), np.zeros((1, 5, 2), np.float32))
        if self._gallery is None:
            return Found(faces, None, [Match("face", -1.0)] * len(faces), [[] for _ in range(len(faces))])
        emb_ND = self._embed(image_HWC, faces, aligned=self.args.det and not self.args.like_original)
        decide = self._vote if self.args.like_original else self._nearest
        people, candidates = decide(emb_ND)
        return Found(faces, emb_ND, people, candidates)

    def _embed(self, image_HWC, faces: Faces, aligned: bool) -> np.ndarray:
        if aligned:
            crops_NSS3 = align_faces(image_HWC, faces.points_N52, self._size)
        else:
            crops_NSS3 = np.zeros((len(faces), self._size, self._size, 3), np.uint8)
            for row, box in enumerate(faces.boxes_N4):
                x1, y1, x2, y2 = np.round(box).astype(int).tolist()
                cut = Image.fromarray(np.ascontiguousarray(image_HWC[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]))
                crops_NSS3[row] = np.asarray(cut.resize((self._size, self._size), Image.BILINEAR))
        at_once = self.args.max_batch_size
        parts = [self._recognizer.embed(crops_NSS3[i : i + at_once]) for i in range(0, len(faces), at_once)]
        return np.concatenate(parts) if parts else np.zeros((0, self._dimension), np.float32)

    def _nearest(self, emb_ND):
        candidates = self._gallery.search(emb_ND, self.args.cdd_num) if len(emb_ND) else []
        best = [matches[0] if matches else Match(UNKNOWN, -1.0) for matches in candidates]
        people = [match if match.similarity >= self._similarity else match._replace(name=UNKNOWN) for match in best]
        return people, candidates

    def _vote(self, emb_ND):
        """The original's rule: of the cdd_num entries with the largest |cosine|, those above the threshold vote."""
        people, candidates = [], []
        for emb_1D in np.split(emb_ND, len(emb_ND)) if len(emb_ND) else []:
            count = self.args.cdd_num
            both = self._gallery.search(emb_1D, count)[0] + self._gallery.search(-emb_1D, count)[0]
            near = sorted(both, key=lambda match: -match.similarity)[:count]
            voters = Counter(match.name for match in near if match.similarity >= self._similarity)
            people.append(Match(voters.most_common(1)[0][0] if voters else UNKNOWN, near[0].similarity if near else -1))
            candidates.append(near)
        return people, candidates

    # --- what is left behind ------------------------------------------------------------------------------------------

    def _labels(self, found: Found) -> list:
        return [match.name for match in found.people]

    def _result(self, found: Found) -> dict:
        faces = found.faces
        boxes = np.column_stack([np.zeros(len(faces)), faces.scores_N, faces.boxes_N4]) if self.args.det else None
        return {
            "box_list": boxes,
            "features": None if found.emb_ND is None else found.emb_ND[:, None],
            "labels": self._labels(found),
            "similarities": [match.similarity for match in found.people],
        }

    def _record(self, found: Found, seconds: Optional[float]) -> dict:
        faces = [
            {
                "box": [round(float(v), 1) for v in box],
                "score": round(float(score), 4),
                "landmarks": np.round(points.astype(float), 1).tolist(),
                "label": match.name,
                "similarity": round(match.similarity, 4) if self._gallery is not None else None,
                "candidates": [{"label": one.name, "similarity": round(one.similarity, 4)} for one in near],
            }
            for box, score, points, match, near in zip(*found.faces, found.people, found.candidates)
        ]
        return {"faces": faces} if seconds is None else {"seconds": round(seconds, 4), "faces": faces}

    def _draw(self, image_HWC, found: Found) -> np.ndarray:
        scores = [match.similarity for match in found.people]
        if self.args.like_original or self._gallery is None:
            scores = found.faces.scores_N
        texts = [f"{name} {score:.4f}" for name, score in zip(self._labels(found), scores)]
        for name in self._labels(found):
            self._colours.setdefault(name, colour(len(self._colours) % COLOURS))
        colours = [self._colours[name] for name in self._labels(found)]
        return draw_faces(image_HWC, found.faces.boxes_N4, texts, colours, self.args.font)

    def _target(self, name: str, source: Optional[Path]) -> Path:
        """Where a picture goes. What is there is replaced only where the JSON beside it says that it is ours."""
        folder = Path(self.args.output)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = Path(name).suffix.lower()
        target = folder / (name if suffix in (*_WRITTEN, ".mp4") else f"{name}.png")
        if source is not None and target.exists() and target.samefile(source):
            raise ConfigError(
                f"--output {folder}: is the input's own folder, and {name} would be replaced: name another"
            )
        if target.exists() and not self._json_path(target).exists():
            raise ConfigError(f"{target}: is there already and is not this command's: name another --output")
        return target

    def _json_path(self, target: Path) -> Path:
        return target.with_name(f"{target.name}.json")

    def _write_json(self, target: Path, records: list) -> None:
        with atomic_file(self._json_path(target)) as file:
            file.write(json.dumps(records if len(records) != 1 else records[0], ensure_ascii=False, indent=1).encode())

    # --- a gallery ----------------------------------------------------------------------------------------------------

    def build_index(self) -> None:
        """Writes a gallery of --img_dir; a photo that cannot be used is a warning. Raises GalleryError where none is
        left. In a photo with several faces the largest is the person's; one without a face is left out, or, with
        --like_original, is taken as the face."""
        args = self.args
        entries, folders = [], {}
        for number, (photo, name) in enumerate(self._labelled(), start=1):
            if folders.setdefault(name.strip(), photo.parent) != photo.parent:
                log.warning(
                    "%s: is of %s, as photos in %s are: both are taken for one person; give two people two names",
                    *map(printable, (photo, name, folders[name.strip()])),
                )
                folders[name.strip()] = photo.parent
            try:
                entries.append((check_name(name), self._person(read_photo(Path(args.img_dir) / photo))))
            except (DamagedItem, GalleryError) as error:
                log.warning("%s: %s, left out", printable(photo), error)
            if number % 100 == 0:
                log.info("Build idx: %d", number)
        if not entries:
            raise GalleryError(f"{args.img_dir}: no photo gave a face, so there is no gallery")
        target = Path(args.build_index)
        if target.exists():
            Gallery.open(target).close()  # only a gallery of ours is replaced
        with atomic_path(target, GalleryError) as partial:
            with Gallery.create(partial, self._fingerprint, self._dimension, self._recognizer.threshold) as gallery:
                gallery.add_many(entries)
        log.info('Build done. Total %d. Index file has been saved in "%s"', len(entries), target)

    def _person(self, image_HWC: np.ndarray) -> np.ndarray:
        faces = self._detector.detect(image_HWC)
        if not len(faces) and not self.args.like_original:
            raise DamagedItem("no face was found")
        if not len(faces):
            height, width = image_HWC.shape[:2]
            whole = Faces(np.array([[0, 0, width, height]], np.float32), np.ones(1), np.zeros((1, 5, 2)))
            emb_1D = self._embed(image_HWC[..., ::-1], whole, aligned=False)
        else:
            largest = faces.rows([faces.largest()])
            emb_1D = self._embed(image_HWC, largest, aligned=not self.args.like_original)
        if not np.isfinite(emb_1D).all():
            raise DamagedItem("its embedding is not finite")
        return emb_1D[0]

    def _labelled(self) -> Iterator[tuple]:
        folder = Path(self.args.img_dir)
        if not self.args.label:
            yield from ((photo, photo.parts[0]) for photo in list_photos(folder) if len(photo.parts) > 1)
            return
        lines = Path(self.args.label).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            fields = line.split("\t")
            if not line.strip():
                continue
            if len(fields) != 2 or Path(fields[0]).is_absolute() or ".." in Path(fields[0]).parts:
                log.warning("%s line %d: is not <path below img_dir><tab><name>, left out", self.args.label, number)
            else:
                yield Path(fields[0]), fields[1]


def _table(values: dict) -> str:
    width = max(len(name) for name in values)
    rows = [f"| {name:<{width}} | {printable(value, 60):<60} |" for name, value in {"Param": "Value", **values}.items()]
    rule = f"+{'-' * (width + 2)}+{'-' * 62}+"
    return "\n".join([f"{'PaddleFace':^{width + 67}}", rule, rows[0], rule, *rows[1:], rule])


def main(argv: Optional[list] = None) -> int:
    """The command. Raises UserError, one line, also where nothing could be read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    args = parser().parse_args(argv)
    demo = InsightFace(args, print_info=True)
    if args.build_index:
        demo.build_index()
        return 0
    if args.input is None:
        raise ConfigError("--input: name an image, a folder or a video")
    if not sum(1 for _ in demo.predict(args.input, print_info=True)):
        raise ConfigError(f"--input {args.input}: holds no image or video that can be read")
    return 0
