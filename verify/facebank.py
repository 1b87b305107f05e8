"""The face bank: known people as embeddings, and whose face a new one is.

Shapes: B new faces, M people, D embedding size.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from runtime.errors import GalleryError

UNKNOWN = "Unknown"
FILE_NAME = "facebank.npz"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")


def build_facebank(folder, embed, read_image) -> tuple[np.ndarray, list[str]]:
    """Embeddings of the people in `folder`, one sub-folder of aligned faces each: (float32 [M, D], M + 1 names).

    embed: uint8 [n, 112, 112, 3] -> unit embeddings [n, D]; read_image: path -> uint8 [H, W, 3].
    A person's embedding is the mean of their images' (not normalised again, as thresholds in use expect). Names begin
    with "Unknown", so that `names[index + 1]` names what `nearest` found. Raises GalleryError where nobody is found or
    an image is not 112x112.
    """
    folder = Path(folder)
    people = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    embeddings, names = [], [UNKNOWN]
    for person in people:
        paths = sorted(path for path in person.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
        if not paths:
            continue
        images = [read_image(path) for path in paths]
        for path, image in zip(paths, images):
            if image.shape != (112, 112, 3):
                raise GalleryError(
                    f"{path} is {image.shape[1]}x{image.shape[0]}: align and crop faces to 112x112 first"
                )
        mean_D = embed(np.stack(images)).mean(axis=0)
        if not np.isfinite(mean_D).all():
            raise GalleryError(f"{person}: the embedding of an image is not finite: the model's output is broken")
        embeddings.append(mean_D)
        names.append(person.name)
    if not embeddings:
        raise GalleryError(f"{folder} holds no face bank: expected {folder}/<person>/<image>.jpg")
    return np.stack(embeddings).astype(np.float32), names


def save_facebank(folder, embeddings_MD, names) -> Path:
    """Write embeddings and names as one file, whole or not at all; returns its path."""
    path = Path(folder) / FILE_NAME
    partial = path.with_name(f"{FILE_NAME}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, embeddings=np.asarray(embeddings_MD, np.float32), names=np.array(names, dtype=str))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_facebank(folder) -> tuple[np.ndarray, list[str]]:
    """What `save_facebank` wrote; pickled content is refused. Raises GalleryError."""
    path = Path(folder) / FILE_NAME
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise GalleryError("it is compressed, which ours never are")  # a small file may unpack to terabytes
        with np.load(path, allow_pickle=False) as bank:
            embeddings_MD, names = bank["embeddings"], bank["names"].tolist()
    except FileNotFoundError:
        raise GalleryError(f"{path} does not exist: build the face bank first") from None
    except Exception as error:  # numpy lets zipfile's, zlib's and its own errors through
        raise GalleryError(f"{path} is not a face bank: {error}") from error
    if embeddings_MD.ndim != 2 or len(names) != len(embeddings_MD) + 1:
        raise GalleryError(f"{path} is not a face bank: {embeddings_MD.shape} embeddings, {len(names)} names")
    return embeddings_MD, names


def nearest(source_BD, target_MD, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The person nearest to each face: (index_B int64, distance_B), tensors on the source's device.

    The distance is the squared L2 distance of the embeddings; the index is -1 where it is above `threshold`.
    """
    source_BD = torch.as_tensor(source_BD)
    target_MD = torch.as_tensor(target_MD).to(source_BD)
    if target_MD.ndim != 2 or not len(target_MD):
        raise GalleryError("the face bank is empty")
    if source_BD.ndim != 2 or source_BD.shape[1] != target_MD.shape[1]:
        raise GalleryError(
            f"faces' embeddings {tuple(source_BD.shape)} and face bank's {tuple(target_MD.shape)} do not fit: "
            "they come from different models"
        )
    # |s - t|^2 without |s|^2 finds the nearest in one product; its distance is then taken exactly
    score_BM = target_MD.square().sum(dim=1) - 2 * source_BD @ target_MD.T
    index_B = score_BM.topk(1, dim=1, largest=False).indices[:, 0]  # min() of torch 1.8 refuses B = 0
    distance_B = (source_BD - target_MD[index_B]).square().sum(dim=1)
    # not "distance > threshold": an embedding that is not finite has a distance of nan, and is nobody's
    return index_B.masked_fill(~(distance_B <= threshold), -1), distance_B
