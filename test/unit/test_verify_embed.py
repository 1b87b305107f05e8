"""Images to unit embeddings, on one rank."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from workers_verify import CPU, Recorded, noise_images, small_net, to_input

from runtime.errors import PairError
from verify.embed import as_record, embed_images, verify

pytestmark = pytest.mark.core


def directly(net, images):
    with torch.no_grad():
        return net.eval()(to_input(torch.from_numpy(images))).double().numpy()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_embeddings_are_the_models_normalised():
    images = noise_images(21)
    emb = embed_images(small_net(), images, CPU, batch_size=8, to_input=to_input)
    assert emb.dtype == np.float32 and emb.shape == (21, 16)
    np.testing.assert_allclose(emb, unit(directly(small_net(), images)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(emb, axis=1), 1, rtol=0, atol=1e-6)


def test_flip_sum_adds_the_mirrored_images_embedding_before_normalising():
    images = noise_images(9)
    emb = embed_images(small_net(), images, CPU, flip_sum=True, to_input=to_input)
    both = directly(small_net(), images) + directly(small_net(), np.ascontiguousarray(images[:, :, ::-1]))
    np.testing.assert_allclose(emb, unit(both), rtol=0, atol=1e-6)


def test_images_are_asked_for_batch_by_batch():
    images = Recorded(noise_images(10))
    embed_images(small_net(), images, CPU, batch_size=4, to_input=to_input)
    assert images.asked == list(range(10))


def test_every_module_keeps_its_mode_and_its_statistics():
    net = small_net().train()
    net[1].eval()  # a batch norm that was frozen on purpose
    before = {name: value.clone() for name, value in net.state_dict().items()}
    embed_images(net, noise_images(4), CPU, to_input=to_input)
    assert [module.training for module in net.modules()] == [True, True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_mode_comes_back_after_an_error():
    net = small_net().train()
    with pytest.raises(RuntimeError):
        embed_images(net, noise_images(4), CPU, to_input=lambda images: images.float())  # [B, H, W, 3] does not fit
    assert net.training and net[3].training


class Watching(nn.Module):
    def forward(self, images):
        self.gradient, self.inside = torch.is_grad_enabled(), Watching.entered
        return images.flatten(1)[:, :4] + 2

    entered = False


def test_forward_runs_without_gradient_and_inside_the_given_context():
    @contextmanager
    def autocast():
        Watching.entered = True
        yield
        Watching.entered = False

    net = Watching()
    embed_images(net, noise_images(2), CPU, autocast=autocast, to_input=to_input)
    assert (net.gradient, net.inside, Watching.entered) == (False, True, False)


def test_half_precision_output_becomes_unit_rows():
    class Half(nn.Module):
        def forward(self, images):
            return (images.flatten(1)[:, :8] * 100 + 3).half()

    emb = embed_images(Half(), noise_images(5), CPU, to_input=to_input)
    assert emb.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(emb, axis=1), 1, rtol=0, atol=1e-6)


def test_verify_names_the_set_that_cannot_be_evaluated():
    net = small_net()
    good = (noise_images(20), [True, False] * 5)
    results = verify(net, {"a": good, "b": (noise_images(24), [True] * 12)}, CPU, to_input=to_input)
    assert list(results) == ["a", "b"] and results["b"].pairs == 12
    with torch.no_grad():
        net[5].bias[3] = float("nan")
    with pytest.raises(PairError, match=r"^a: the embedding of image 0 \(pair 0\) is not finite"):
        verify(net, {"a": good}, CPU, to_input=to_input)
    with pytest.raises(PairError, match="^empty: there are no images"):
        verify(net, {"empty": (noise_images(0), [])}, CPU, to_input=to_input)


def test_a_record_is_plain_values():
    import json

    result = verify(small_net(), {"a": (noise_images(20), [True, False] * 5)}, CPU, to_input=to_input)["a"]
    record = json.loads(json.dumps(as_record(result)))
    assert record["accuracy"] == result.accuracy and record["pairs"] == 10 and record["same"] == 5
    assert record["tar_at_far"] == {"0.001": None, "0.0001": None}
    assert record["tar_at_far_why_not"]["0.001"] == "needs 1000 different pairs, the set has 5"
    assert len(record["roc"]["fpr"]) == len(record["roc"]["tpr"]) == 400
