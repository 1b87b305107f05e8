"""Images to embeddings over all ranks, and sets of pairs to results.

Shapes: N images, D embedding size, B images of a batch.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from runtime.dist import ALONE
from runtime.errors import PairError
from runtime.shard import RowShard
from runtime.signals import Stopped
from verify import plot
from verify.protocol import PairResult, evaluate_pairs

log = logging.getLogger(__name__)

# torch 1.8 has no inference_mode
without_gradient = getattr(torch, "inference_mode", torch.no_grad)


@contextmanager
def evaluating(model):
    """The model in eval mode; afterwards every module is in its own mode again, batch norms frozen on purpose too."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training_modules:
            module.training = True


def embed_images(
    model,
    images,
    device,
    world=ALONE,
    batch_size=128,
    flip_sum=False,
    autocast=nullcontext,
    *,
    to_input,
    stop_signal=lambda: 0,
    progress=lambda done, total: None,
) -> np.ndarray:
    """Unit embeddings of all images, float32 [N, D], the same on every rank. The model is the same on every rank.

    images: `len()`, and slices `[i:j]` that give uint8 [n, H, W, 3]; only this rank's slices are asked for.
    device: a `runtime.device.Device`; to_input: uint8 [B, H, W, 3] on it -> what the model takes.
    flip_sum: add the embedding of the mirrored image before normalising.
    autocast: makes the context of a forward pass, for example `Precision.autocast`.
    stop_signal: asked between batches; the number of a signal ends the work, on all ranks, with `Stopped`.
    progress: told (images of a batch, images of this rank).

    The unit handed to ranks is a batch, not an image: its content, and so every rounding in it, is the same whatever
    the number of ranks. Raises PairError where there are no images.
    """
    count = len(images)
    if not count:
        raise PairError("there are no images to embed")
    if isinstance(model, DistributedDataParallel):
        # its forward pass waits for the other ranks, which have another number of batches
        model = model.module

    batches = -(-count // batch_size)
    shards = [RowShard.of(batches, rank, world.size) for rank in range(world.size)]
    bounds = [(min(s.start * batch_size, count), min(s.stop * batch_size, count)) for s in shards]
    start, stop = bounds[world.rank]

    def forward(images_BHWC):
        with autocast():
            return model(to_input(images_BHWC)).float()

    parts = []
    with evaluating(model), without_gradient():
        slices = (torch.from_numpy(images[i : min(i + batch_size, stop)]) for i in range(start, stop, batch_size))
        for images_BHWC in device.prefetch(slices, lambda batch: batch.to(device.torch, non_blocking=True)):
            emb_BD = forward(images_BHWC)
            if flip_sum:
                emb_BD = emb_BD + forward(images_BHWC.flip(2))
            parts.append(F.normalize(emb_BD))
            progress(len(images_BHWC), stop - start)
            if stop_signal():
                break
        # a rank without a batch learns the width from the others, and one without a signal that it has to leave
        told = torch.tensor([parts[0].shape[1] if parts else 0, stop_signal()], device=world.device)
        width, signal_number = world.all_reduce_(told, "max").tolist()
        if signal_number:
            raise Stopped(signal_number)
        mine_ND = torch.cat(parts) if parts else torch.zeros(0, width, device=world.device)
        return world.gather_rows(mine_ND, [stop - start for start, stop in bounds]).cpu().numpy()


def verify(model, pair_sets, *args, folds=10, **kwargs) -> dict[str, PairResult]:
    """Evaluates each set of `pair_sets`, {name: (images of 2N, issame_N)}; other arguments as for `embed_images`.

    Raises PairError that begins with the set's name, for example where the model's output is not finite.
    """
    results = {}
    for name, (images, issame_N) in pair_sets.items():
        try:
            emb_2ND = embed_images(model, images, *args, **kwargs)
            results[name] = evaluate_pairs(emb_2ND, issame_N, folds)
            if results[name].caution:
                log.warning("%s: %s", name, results[name].caution)
        except PairError as error:
            raise PairError(f"{name}: {error}") from error
    return results


def as_record(result: PairResult) -> dict:
    """A result as plain values: the fields of a `verify` line in metrics.jsonl."""
    return {
        "accuracy": result.accuracy,
        "std": result.std,
        "threshold": result.threshold,
        "tar_at_far": {f"{far:g}": tar for far, tar in result.tar_at_far.items()},
        "tar_at_far_why_not": {f"{far:g}": reason for far, reason in result.why_not.items()},
        # six digits are more than any number of pairs in use resolves
        "roc": {"fpr": result.roc.fpr.round(6).tolist(), "tpr": result.roc.tpr.round(6).tolist()},
        "folds": [fold._asdict() for fold in result.folds],
        "pairs": result.pairs,
        "same": result.same,
        "caution": result.caution,
    }


def roc_figure(result: PairResult, name: str):
    """The ROC of one set as a matplotlib figure. Raises ImportError without matplotlib."""
    return plot.roc_figure({name: (result.roc.fpr, result.roc.tpr)})
