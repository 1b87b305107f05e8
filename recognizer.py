"""A trained network as one value: the net, how images are prepared for it, and what is known of it.

    recognizer = Recognizer.load("model.pth")
    emb_ND = recognizer.embed(["a.jpg", "b.jpg"])        # unit rows
    same = ((emb_ND[0] - emb_ND[1]) ** 2).sum() < recognizer.threshold

Shapes: N, B images, D embedding size. Images are aligned 112x112 faces, uint8 RGB [N, H, W, 3].
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

import model
from checkpoint import run, store
from data import pairs, transforms
from data.images import decode_image, read_file
from model import foreign
from runtime import log as runlog
from runtime.device import Device, parse_device
from runtime.dist import ALONE, World
from runtime.errors import CheckpointError, DamagedItem, DataError, PairError
from runtime.precision import POLICIES, Precision
from verify import embed
from verify.protocol import PairResult

log = logging.getLogger(__name__)

INPUT_SIZE = (112, 112)
NORMALISATION = "(x / 255 - 0.5) / 0.5"
# What the usual one's result is multiplied with: PLSC's nets take (x - 127.5) / 128.
NORMALISATIONS = {NORMALISATION: 1.0, "(x - 127.5) / 128": 127.5 / 128}


class Recognizer:
    """backbone: the net, on `device`. architecture: what `model.describe` says of it.

    channel_order: "rgb" or "bgr", what the net takes; images are RGB everywhere, `to_input` makes the difference.
    threshold: squared L2 distance of unit embeddings below which two faces are one person; None until one is known.
    calibration: how the threshold was found, as plain values (`deploy.calibration`); None where verification chose it.
    precision: how it computes; fp32 unless said otherwise. normalisation: of pixels, one of NORMALISATIONS.
    as_quickest: embed as the device does it quickest without a loss (`Device.embedding_policy`), where `precision` is
    fp32 only because nobody said otherwise.
    """

    def __init__(
        self,
        backbone: torch.nn.Module,
        architecture: dict,
        device: Device,
        channel_order: str = "rgb",
        threshold: Optional[float] = None,
        memory_format: str = "auto",
        precision: Optional[Precision] = None,
        calibration: Optional[dict] = None,
        normalisation: str = NORMALISATION,
    ):
        self.device, self.architecture = device, architecture
        if normalisation not in NORMALISATIONS:
            raise CheckpointError(f"normalisation {normalisation!r}: choose from {', '.join(NORMALISATIONS)}")
        self.normalisation, self.input_factor = normalisation, NORMALISATIONS[normalisation]
        self.threshold, self.calibration = threshold, calibration
        self.as_quickest = precision is None
        self.memory_format = device.layout(memory_format)
        self.backbone = backbone.to(device=device.torch, memory_format=self.memory_format)
        self.channel_order = channel_order
        self.precision = precision or Precision("O0", device)

    # --- where it comes from -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        net_mode: str,
        net_depth: Optional[int] = 100,
        embedding_size: int = 512,
        dropout: Optional[float] = None,
        l2_norm: Optional[bool] = None,
        device: Optional[Device] = None,
        channel_order: str = "rgb",
        memory_format: str = "auto",
        normalisation: str = NORMALISATION,
    ) -> Recognizer:
        """One that has learnt nothing yet; arguments as for `model.create_model`. Raises ModelError, DeviceError."""
        device = _opened(device)
        architecture = model.describe(net_mode, net_depth, embedding_size, dropout, l2_norm)
        backbone = model.create_model(**architecture)
        return cls(
            backbone, architecture, device, channel_order, memory_format=memory_format, normalisation=normalisation
        )

    @classmethod
    def load(
        cls,
        path,
        device: Optional[Device] = None,
        channel_order: Optional[str] = None,
        opt_level: str = "auto",
        memory_format: str = "auto",
        world: World = ALONE,
    ) -> Recognizer:
        """The network of a file of ours, a sharded directory, a folder of either (the newest), or a known upstream
        project's file. All ranks of `world` call it.

        device: a Device or its name; the first of npu, cuda, cpu if None. channel_order: what the net takes, where the
        file does not say it right. opt_level: the precision policy that it computes by; auto: `as_quickest`.
        Raises CheckpointError, one line, for what is no such file.
        """
        device = _opened(device)
        path, state = run.read(path, world)
        recognizer = cls.from_state(state, path, device, channel_order, memory_format=memory_format)
        recognizer.as_quickest = opt_level == "auto"
        recognizer.precision = Precision("O0" if recognizer.as_quickest else opt_level, device, world)
        recognizer.precision.prepare(recognizer.backbone)
        return recognizer

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        place="checkpoint",
        device: Optional[Device] = None,
        channel_order: Optional[str] = None,
        dropout: Optional[float] = None,
        l2_norm: Optional[bool] = None,
        memory_format: str = "auto",
    ) -> Recognizer:
        """The same of what such a file holds. dropout, l2_norm: for training on, other than the file's."""
        device = _opened(device)
        found = foreign.recognise(state, channel_order, place)
        meta = state.get("meta") or {}
        architecture = model.describe(
            found.net_mode,
            found.net_depth,
            found.embedding_size,
            meta.get("dropout") if dropout is None else dropout,
            meta.get("l2_norm") if l2_norm is None else l2_norm,
        )
        backbone = model.create_model(**architecture)
        backbone.load_state_dict(found.state_dict)
        log.info("%s: %s", place, found)
        if found.assumed:
            log.warning("%s: %s", place, found.assumed)
        return cls(
            backbone,
            architecture,
            device,
            found.channel_order,
            meta.get("threshold"),
            memory_format,
            calibration=meta.get("calibration"),
            normalisation=meta.get("normalisation", NORMALISATION),
        )

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """ir_se_100, mobilefacenet: for reports."""
        return model.name_of(self.architecture)

    @property
    def channel_order(self) -> str:
        return self.backbone.channel_order

    @channel_order.setter
    def channel_order(self, order: str) -> None:
        self.backbone.channel_order = order  # where the net's own state dict looks for it

    @property
    def meta(self) -> dict:
        """All but the weights, as plain values: what a checkpoint records."""
        return {
            **self.architecture,
            "normalisation": self.normalisation,
            "channel_order": self.channel_order,
            "threshold": self.threshold,
            "calibration": self.calibration,
        }

    @property
    def fast_paths(self) -> dict:
        """What only speed depends on in a training, for reports."""
        layout = "channels_last" if self.memory_format == torch.channels_last else "contiguous"
        return {"opt_level": self.precision.policy.name, "memory_format": layout}

    @property
    def embedding_policy(self) -> str:
        """The precision policy of `embed` and `verify`."""
        policy = self.precision.policy.name
        return self.device.embedding_policy() if self.as_quickest and policy == "O0" else policy

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of weights and preprocessing: embeddings of two recognizers can be
        compared where these are the same. Takes a second for a large net."""
        digest = hashlib.sha256(f"{self.name} {self.channel_order} {self.normalisation}".encode())
        for name, value in sorted(self.state_dict().items()):
            if value.is_floating_point():  # the count of a batch norm's batches changes nothing
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights in fp32, under any policy."""
        return self.precision.model_state(self.backbone)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.precision.load_model_state(self.backbone, state)

    def save(self, path) -> Path:
        """Writes weights and `meta` as a `.pth` that `load` reads, whole or not at all. Raises CheckpointError."""
        store.save_pth(path, {"model": self.state_dict(), "meta": {**self.meta, "versions": runlog.versions()}})
        return Path(path)

    # --- what it does ------------------------------------------------------------------------------------------------

    def to_input(self, images_BHWC: torch.Tensor, flip_B: Optional[torch.Tensor] = None) -> torch.Tensor:
        """uint8 RGB [B, H, W, 3] on the device -> what the backbone takes. The one way to prepare images, in training
        and everywhere else. flip_B: bool [B], the images to mirror."""
        input_BCHW = transforms.to_input(
            images_BHWC, flip_B, memory_format=self.memory_format, channel_order=self.channel_order
        )
        if self.input_factor != 1.0:
            input_BCHW.mul_(self.input_factor)
        return self.precision.cast_input(input_BCHW)

    def embed(self, images, world: World = ALONE, batch_size: int = 128, flip_sum: bool = False, **watch) -> np.ndarray:
        """Unit embeddings, float32 [N, D], the same on every rank of `world`.

        images: uint8 RGB [N, 112, 112, 3], a list of such images or of image files' paths, or anything with len() whose
        slices are such arrays. flip_sum: of an image and its mirror together. watch: see `verify.embed.embed_images`.
        Raises DataError, one line, for images of another size or type, PairError where there is none.
        """
        return embed.embed_images(self.backbone, _Images(images), **self._how(world, batch_size, flip_sum), **watch)

    def verify(
        self,
        sets,
        world: World = ALONE,
        batch_size: int = 128,
        flip_sum: bool = False,
        channel_order: Optional[str] = None,
        **watch,
    ) -> dict[str, PairResult]:
        """Evaluates pair sets: {name: path}, or a path of one set or of a folder of them. {name: PairResult}.

        channel_order: what the sets' files hold, where it is not recorded beside them. Raises DataError for a
        file that is none, PairError where nothing is to be verified.
        """
        if not isinstance(sets, Mapping):
            place, sets = sets, pairs.find_pair_sets(sets)
            if not sets:
                raise PairError(f"{place}: no pair set is there: give a file such as lfw.bin, or the folder of some")
        results = {}
        for name, path in sets.items():
            images, issame_N = pairs.load_pairs(path, channel_order)
            one = {name: (_Images(images), issame_N)}
            results.update(embed.verify(self.backbone, one, **self._how(world, batch_size, flip_sum), **watch))
        return results

    def _how(self, world, batch_size, flip_sum) -> dict:
        autocast = self.precision.autocast
        if self.embedding_policy != self.precision.policy.name:  # the weights stay as they are: they may be in training
            autocast = functools.partial(self.device.autocast, POLICIES[self.embedding_policy].autocast)
        return {
            "device": self.device,
            "world": world,
            "batch_size": batch_size,
            "flip_sum": flip_sum,
            "autocast": autocast,
            "to_input": self.to_input,
        }


def _opened(device) -> Device:
    device = device if isinstance(device, Device) else parse_device(device or "auto")
    device.set()
    return device


class _Images:
    """What `embed` takes, checked slice by slice."""

    def __init__(self, images):
        if isinstance(images, (str, Path)):
            images = [images]
        if isinstance(images, torch.Tensor):
            images = images.numpy()
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: slice) -> np.ndarray:
        images = self._images[rows]
        if isinstance(images, Sequence):
            images = [_decoded(one) if isinstance(one, (str, Path)) else np.asarray(one) for one in images]
            if len({image.shape for image in images}) != 1:
                self._refuse(sorted({image.shape for image in images})[0], images[0].dtype)
            images = np.stack(images)
        if images.dtype != np.uint8 or images.shape[1:] != (*INPUT_SIZE, 3):
            self._refuse(images.shape[1:], images.dtype)
        return np.ascontiguousarray(images)

    def _refuse(self, shape, dtype):
        raise DataError(
            f"images {list(shape)} of {dtype}: the network takes uint8 RGB {[*INPUT_SIZE, 3]}: "
            "align and crop the faces to 112x112 first"
        )


def _decoded(path) -> np.ndarray:
    try:
        return decode_image(read_file(path))
    except DamagedItem as error:
        raise DataError(f"{path}: {error}") from None
