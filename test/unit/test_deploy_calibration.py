"""A threshold for a false-accept rate: from pairs, from people, and into the model file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiny_deploy import tiny_onnx

from deploy import calibration
from deploy.calibration import calibrate, calibrate_pairs, calibrate_people, far_threshold
from runtime.errors import ConfigError, DataError, PairError


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def pairs_at(distances, rng):
    """Unit embeddings [2P, 8] whose pairs are exactly so far apart (squared)."""
    first = unit(rng.standard_normal((len(distances), 8)))
    other = rng.standard_normal((len(distances), 8))
    other = unit(other - (other * first).sum(1, keepdims=True) * first)
    cos = 1 - np.asarray(distances)[:, None] / 2
    return np.stack([first, cos * first + np.sqrt(1 - cos**2) * other], 1).reshape(-1, 8)


def test_the_threshold_accepts_the_share_and_no_more():
    rng = np.random.default_rng(0)
    distances = np.concatenate([rng.uniform(1, 2, 5000), rng.uniform(0, 1.5, 700)])
    same = np.arange(5700) >= 5000
    result = calibrate_pairs(pairs_at(distances, rng), same, 1e-3, "x.bin")
    assert (distances[:5000] < result.threshold).sum() == 5
    assert result.tar == pytest.approx((distances[5000:] < result.threshold).mean())
    assert result.threshold_low <= result.threshold <= result.threshold_high
    assert "squared L2" in str(result) and "0.001" in str(result)


def test_the_interval_holds_the_true_threshold_nineteen_times_in_twenty():
    """Distances are uniform, so that the true threshold of a rate is known: the rate itself."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        distances = np.sort(rng.uniform(0, 1, 1000))
        exact = calibrate_pairs(pairs_at(distances, rng), np.zeros(1000, bool), 0.01)
        held += exact.threshold_low <= 0.01 <= exact.threshold_high
    assert held >= 88  # fewer has a probability of 0.1 %


def test_people_give_all_pairs_and_an_interval_that_knows_they_share_people():
    rng = np.random.default_rng(2)
    centers = unit(rng.standard_normal((12, 16)))
    emb = unit(np.repeat(centers, 5, 0) + 0.1 * rng.standard_normal((60, 16)))
    people = np.repeat(np.arange(12), 5)
    result = calibrate_people(emb, people, 0.01)
    assert result.different == 12 * 11 // 2 * 25 and result.same == 12 * 10
    distance = np.square(emb[:, None] - emb[None]).sum(-1)[np.triu_indices(60, 1)]
    different = (people[:, None] != people[None])[np.triu_indices(60, 1)]
    assert (distance[different] < result.threshold).sum() <= 0.01 * result.different
    assert result.tar > 0.95
    independent = calibrate_pairs(pairs_at(distance[different], rng), np.zeros(different.sum(), bool), 0.01)
    assert result.threshold_high - result.threshold_low > independent.threshold_high - independent.threshold_low


def test_ties_and_rounding_of_the_rate():
    assert far_threshold(np.arange(3000.0), 0.001) == 3
    assert far_threshold(np.zeros(10), 0.5) == 0  # "below 0" accepts nobody


@pytest.mark.parametrize("far, words", [(1e-3, "needs 1000 pairs"), (0, "between 0 and 1"), (float("nan"), "between"),
                                        (1, "between 0 and 1")])  # fmt: skip
def test_a_rate_that_cannot_be_had(far, words):
    emb = pairs_at(np.full(30, 1.5), np.random.default_rng(0))
    with pytest.raises(PairError, match=words):
        calibrate_pairs(emb, np.zeros(30, bool), far)
    assert calibrate_pairs(emb, np.zeros(30, bool), [1e-3, 0.1, 0.2]).far == 0.1  # the first that is possible


def test_broken_embeddings_are_refused():
    emb = pairs_at(np.full(30, 1.5), np.random.default_rng(0))
    emb[3] = np.nan
    with pytest.raises(PairError, match="not finite"):
        calibrate_pairs(emb, np.zeros(30, bool), 0.1)
    with pytest.raises(PairError, match="not finite"):
        calibrate_people(emb, np.arange(60) % 3, 0.1)
    with pytest.raises(PairError, match="at least two people"):
        calibrate_people(emb[10:], np.zeros(50), 0.1)


class Colours:
    """A recognizer whose embedding is the mean colour."""

    threshold, fingerprint = None, "colours"

    def embed(self, images):
        return unit(images.mean((1, 2)) + 1e-3).astype(np.float32)


def test_a_folder_of_people_with_broken_photos(tmp_path):
    for person, colour in (("ann", (250, 0, 0)), ("bob", (0, 250, 0)), ("eve", (0, 0, 250))):
        (tmp_path / person).mkdir()
        for shot in range(4):
            Image.new("RGB", (112, 112), tuple(min(c + shot, 255) for c in colour)).save(
                tmp_path / person / f"{shot}.png"
            )
    Image.new("RGB", (200, 112)).save(tmp_path / "ann" / "wide.png")
    (tmp_path / "bob" / "text.jpg").write_text("x")
    said = []
    result = calibrate(Colours(), tmp_path, 0.05, say=said.append)
    assert result.same == 3 * 6 and result.different == 3 * 16 and result.tar == 1 and len(said) == 2
    two = calibrate(Colours(), tmp_path, 0.2, say=said.append, people=["bob", "eve"])
    assert two.different == 16 and two.threshold_low < two.threshold < two.threshold_high  # though nobody else is drawn
    with pytest.raises(DataError, match="is no pair set"):
        calibrate(Colours(), tmp_path / "ann", 0.05)


def test_into_an_onnx_file_which_stays_the_same_model(tmp_path):
    pytest.importorskip("onnxruntime")
    from deploy.backends import load_recognizer

    path, recognizer = load_recognizer(tiny_onnx(tmp_path / "tiny.onnx"))
    assert recognizer.threshold is None
    result = calibration.Calibration(1.25, 1.2, 1.3, 1e-3, 0.9, 5000, 100, "lfw.bin")
    assert calibration.write_calibration(recognizer, path, result) == path
    _, again = load_recognizer(tmp_path)  # the folder holds one model
    assert again.threshold == 1.25 and again.calibration == result.as_dict()
    assert again.fingerprint == recognizer.fingerprint
    image = np.full((2, 112, 112, 3), 10, np.uint8)
    assert np.array_equal(again.embed(image), recognizer.embed(image))
    with pytest.raises(ConfigError, match="is there already"):
        calibration.write_calibration(recognizer, path, result, output=__file__)


def test_an_onnx_model_of_another_form_is_told(tmp_path):
    pytest.importorskip("onnxruntime")
    from deploy.backends import OnnxRecognizer
    from runtime.errors import ModelError

    recognizer = OnnxRecognizer(tiny_onnx(tmp_path / "tiny.onnx"))
    with pytest.raises(ModelError, match="takes aligned faces of 112x112"):
        recognizer.embed(np.zeros((1, 96, 96, 3), np.uint8))
    assert recognizer.embed(np.zeros((0, 112, 112, 3), np.uint8)).shape == (0, 3)
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), "red").save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    assert recognizer.embed([tmp_path / "red.png"]).shape == (1, 3)


def test_a_fixed_batch_of_one_serves_any_number(shared):
    pytest.importorskip("onnxruntime")
    from deploy.backends import OnnxRecognizer

    recognizer = OnnxRecognizer(shared / "models" / "mobilefacenet_128.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    together = recognizer.embed(images)
    assert recognizer.batch == 1 and together.shape == (3, 128)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    assert np.array_equal(together[2:], recognizer.embed(images[2:]))


def test_into_a_training_checkpoint_of_which_all_else_stays(tmp_path):
    import torch

    from checkpoint import store
    from deploy.backends import load_recognizer
    from recognizer import Recognizer

    path = Recognizer.create("mobilefacenet", embedding_size=16, device="cpu").save(tmp_path / "model.pth")
    state = store.load_pth(path)
    store.save_pth(path, {**state, "head": {"kernel": torch.ones(16, 3)}, "epoch": 4})
    place, recognizer = load_recognizer(path, "cpu")
    result = calibration.Calibration(1.25, 1.2, 1.3, 1e-3, None, 5000, 0, "lfw.bin")
    assert calibration.write_calibration(recognizer, place, result) == path
    after = store.load_pth(path)
    assert after["epoch"] == 4 and torch.equal(after["head"]["kernel"], torch.ones(16, 3))
    assert all(torch.equal(after["model"][name], value) for name, value in state["model"].items())
    _, again = load_recognizer(path, "cpu")
    assert again.threshold == 1.25 and again.calibration == result.as_dict()
    assert again.fingerprint == recognizer.fingerprint

    torch.save(recognizer.backbone.state_dict(), tmp_path / "bare.pth")
    _, foreign = load_recognizer(tmp_path / "bare.pth", "cpu")
    with pytest.raises(ConfigError, match="stays as it is: give --output"):
        calibration.write_calibration(foreign, tmp_path / "bare.pth", result)
    calibration.write_calibration(foreign, tmp_path / "bare.pth", result, output=tmp_path / "ours.pth")
    assert load_recognizer(tmp_path / "ours.pth", "cpu")[1].calibration == result.as_dict()


def test_on_the_cpu_the_fastest_way_is_near_enough(tmp_path):
    from deploy.backends import load_recognizer
    from recognizer import Recognizer

    path = Recognizer.create("mobilefacenet", embedding_size=64, device="cpu").save(tmp_path / "model.pth")
    images = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    exact, (_, fast) = Recognizer.load(path, "cpu", opt_level="O0"), load_recognizer(path, "cpu")
    assert fast.fingerprint == exact.fingerprint
    assert (exact.embed(images) * fast.embed(images)).sum(1).min() > 0.999
