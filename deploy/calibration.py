"""A threshold from data: the largest distance that lets no more than a share `far` of different people pass for one.

Distances are squared L2 of unit embeddings, 0 to 4; a pair is accepted below the threshold. Shapes: N images, P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np

from checkpoint import store
from data.pairs import load_pairs
from deploy.photos import list_photos, read_photo
from runtime.errors import ConfigError, DamagedItem, DataError, ModelError, PairError, printable
from runtime.files import atomic_file
from verify.protocol import pair_distances

UNIT = "squared L2 distance of unit embeddings"
CONFIDENCE = 0.95
RESAMPLES = 1000  # of people, for the interval of a folder's threshold
MOST_IMAGES = 5_000  # of a folder: 12 million pairs


@dataclass(frozen=True)
class Calibration:
    """A threshold and how far to trust it: with 95 % confidence the threshold for `far` lies between threshold_low and
    threshold_high. tar: the share of pairs of one person that it accepts (None without such pairs)."""

    threshold: float
    threshold_low: float
    threshold_high: float
    far: float
    tar: Optional[float]
    different: int
    same: int
    data: str
    unit: str = UNIT

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        tar = "" if self.tar is None else f", accepts {100 * self.tar:.2f} % of {self.same} pairs of one person"
        return (
            f"threshold {self.threshold:.4f} ({self.unit}; 95 % confidence {self.threshold_low:.4f} to "
            f"{self.threshold_high:.4f}) for a false-accept rate of {self.far:g} on {self.different} pairs of "
            f"different people{tar}"
        )


def far_threshold(different_P: np.ndarray, far: float) -> float:
    """The largest threshold that accepts (distance < threshold) at most far * P of the sorted distances."""
    allowed = int(far * len(different_P) + 1e-9)  # the slack keeps 0.001 * 3000 at 3 whatever its rounding
    return float(different_P[min(allowed, len(different_P) - 1)])


def _possible(far, different: int) -> float:
    """The rate, or of several the first, that so many pairs of different people are enough for."""
    rates = np.atleast_1d(far).tolist()
    for rate in rates:
        if not 0 < rate < 1:
            raise PairError(f"--far {rate}: a rate between 0 and 1, for example 1e-3")
    far = next((rate for rate in rates if rate * different >= 1 - 1e-9), None)
    if far is None:
        far = rates[-1]
        raise PairError(
            f"--far {far:g} needs {round(1 / far)} pairs of different people, there are {different}: "
            f"bring more, or take --far {1 / max(different, 1):.2g}"
        )
    return far


def calibrate_pairs(emb_2PD: np.ndarray, issame_P, far, data: str = "") -> Calibration:
    """From pairs: rows 2i and 2i+1 are pair i. The interval is that of a quantile of independent pairs: the order
    statistics at the binomial distribution's 2.5 and 97.5 % points, whatever the distances' distribution.

    Raises PairError for a rate that the set is too small for, and for embeddings that are not finite.
    """
    distance_P, same_P = pair_distances(np.asarray(emb_2PD)), np.asarray(issame_P, bool)
    different_P = np.sort(distance_P[~same_P])
    far = _possible(far, len(different_P))
    return _result(different_P, distance_P[same_P], far, data, _interval(different_P, far))


def _interval(different_P: np.ndarray, far: float) -> np.ndarray:
    """[low, high] of the threshold, from sorted distances of independent pairs."""
    counts = np.random.default_rng(0).binomial(len(different_P), far, size=20_000)
    low_high = np.percentile(counts, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2]).astype(int)
    return different_P[low_high.clip(max=len(different_P) - 1)]


def calibrate_people(emb_ND: np.ndarray, person_N, far, data: str = "") -> Calibration:
    """From images of known people: every pair of images. Pairs that share a person are not independent, so the interval
    comes from drawing the people anew, with replacement, a thousand times. Raises as `calibrate_pairs`."""
    emb_ND, person_N = np.asarray(emb_ND, np.float64), np.asarray(person_N)
    if not np.isfinite(emb_ND).all():
        raise PairError("an embedding is not finite: the model's output is broken")
    names, person_N = np.unique(person_N, return_inverse=True)
    if len(names) < 2:
        raise PairError(f"{data}: a folder for each of at least two people is needed")
    first, second = np.triu_indices(len(emb_ND), k=1)
    distance_P = (2 - 2 * (emb_ND @ emb_ND.T)[first, second]).clip(0)
    same_P = person_N[first] == person_N[second]
    order = np.argsort(distance_P[~same_P], kind="stable")
    different_P = distance_P[~same_P][order]
    far = _possible(far, len(different_P))
    one_P, other_P = person_N[first[~same_P]][order], person_N[second[~same_P]][order]
    drawn, rng = [], np.random.default_rng(0)
    for _ in range(min(RESAMPLES, 2 * 10**9 // len(different_P) + 20)):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        weight_P = times[one_P] * times[other_P]  # how often the pair occurs among the people that were drawn
        if total := weight_P.sum():
            place = np.searchsorted(np.cumsum(weight_P), int(far * total + 1e-9), side="right")
            drawn.append(different_P[min(place, len(different_P) - 1)])
    low_high = np.percentile(drawn, [100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2])
    # two people drawn anew are the same two: the interval is at least that of independent pairs
    alone = _interval(different_P, far)
    low_high = min(low_high[0], alone[0]), max(low_high[1], alone[1])
    return _result(different_P, distance_P[same_P], far, data, low_high)


def _result(different_P, same_P, far, data, low_high) -> Calibration:
    threshold = far_threshold(different_P, far)
    return Calibration(
        threshold=threshold,
        threshold_low=float(low_high[0]),
        threshold_high=float(low_high[1]),
        far=far,
        tar=float((same_P < threshold).mean()) if len(same_P) else None,
        different=len(different_P),
        same=len(same_P),
        data=data,
    )


def calibrate(recognizer, path, far, channel_order: Optional[str] = None, say=print, people=None) -> Calibration:
    """The threshold of a recognizer on a pair set (.bin, bcolz, pair folder) or on a folder of people's aligned faces
    (<person>/<image>), all of them or those named in `people`. far: a rate, or several: the first that there are enough
    pairs for. An image of the folder that cannot be used is said and left out."""
    path = Path(path)
    if path.is_file() or (path / "label.txt").is_file() or (path / "meta").is_dir():
        images, issame_P = load_pairs(path, channel_order)
        return calibrate_pairs(_embed_slices(recognizer, images), issame_P, far, path.name)
    size, faces, names = getattr(recognizer, "size", 112), [], []
    for photo in list_photos(path):
        if len(photo.parts) < 2 or (people is not None and photo.parts[0] not in people):
            continue
        try:
            face_SS3 = read_photo(path / photo, max_pixels=4096 * 4096)
            if face_SS3.shape[:2] != (size, size):
                raise DamagedItem(
                    f"is {face_SS3.shape[1]}x{face_SS3.shape[0]}: align it first (tools.align --size={size})"
                )
        except DamagedItem as error:
            say(f"{printable(path / photo)}: {error}: left out")
            continue
        faces.append(face_SS3)
        names.append(photo.parts[0])
    if not faces:
        raise DataError(f"{path}: is no pair set, and holds no <person>/<aligned face>: see tools.align")
    if len(faces) > MOST_IMAGES:
        raise DataError(f"{path}: {len(faces)} images make too many pairs: {MOST_IMAGES} images are enough")
    return calibrate_people(_embed_slices(recognizer, np.stack(faces)), names, far, path.name)


def _embed_slices(recognizer, images: Sequence, at_once: int = 128) -> np.ndarray:
    return np.concatenate([recognizer.embed(images[i : i + at_once]) for i in range(0, len(images), at_once)])


def write_calibration(recognizer, path, calibration: Calibration, output=None) -> Path:
    """Writes the threshold into the recognizer's file (or a copy, `output`), whole or not at all; returns which.

    All else in the file stays: a training checkpoint can be resumed afterwards. A file of another project is left as it
    is, and needs an `output`. Raises ConfigError, ModelError, CheckpointError.
    """
    path, record = Path(path), calibration.as_dict()
    target = Path(output) if output else path
    if target != path and target.exists():
        raise ConfigError(f"--output {target}: is there already: choose another name")
    if path.suffix == ".onnx":
        _write_onnx(path, target, record, recognizer.fingerprint)
        return target
    state = store.load_pth(path) if path.is_file() else None
    if not isinstance(state, dict) or not isinstance(state.get("meta"), dict):
        if target == path:
            raise ConfigError(f"{path}: is no .pth file of this project, and stays as it is: give --output=NAME.pth")
        recognizer.threshold, recognizer.calibration = calibration.threshold, record
        return recognizer.save(target)
    state["meta"].update(threshold=calibration.threshold, calibration=record)
    store.save_pth(target, state)
    return target


def _write_onnx(path: Path, target: Path, record: dict, fingerprint: str) -> None:
    try:
        import onnx
    except ImportError:
        raise ModelError(f"{path}: writing into an ONNX file needs the package onnx: pip install onnx") from None
    model = onnx.load(path)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    # the fingerprint names the weights, so that galleries made before stay this model's
    properties.update(fingerprint=fingerprint, calibration=json.dumps(record))
    onnx.helper.set_model_props(model, properties)
    with atomic_file(target, ModelError) as file:
        file.write(model.SerializeToString())
