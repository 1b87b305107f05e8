"""The Recognizer: one preparation of images for everything, whoever wrote the weights; any number of ranks."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_set import make_tiny_set
from workers_verify import evaluated_by_recognizer

from checkpoint import sharded, store
from config import Config, replace
from data import open_dataset, pairs
from learner import Learner
from recognizer import Recognizer
from runtime.device import Device
from runtime.errors import CheckpointError, DataError, PairError

pytestmark = pytest.mark.core
CPU = Device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_set(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(3)
    recognizer = Recognizer.create("mobilefacenet", embedding_size=16, device=CPU)
    # an untrained net hardly tells the channels apart: let the first one count
    with torch.no_grad():
        recognizer.backbone.conv1.conv.weight[:, 0] *= 4
    return recognizer


@pytest.fixture
def faces():
    return np.random.RandomState(0).randint(0, 256, (3, 112, 112, 3)).astype(np.uint8)


@pytest.fixture
def base(tiny, tmp_path):
    return Config(
        net_mode="mobilefacenet",
        embedding_size=16,
        data_path=str(tiny),
        batch_size=4,
        epochs=1,
        max_iter=2,
        lr=1e-3,
        work_path=str(tmp_path / "work"),
        device_type="cpu",
        num_workers=0,
        with_test=False,
        tensorboard=False,
    )


def upstream_file(net, path):
    """As InsightFace_Pytorch saves it: a bare dict of tensors, which says nothing of itself."""
    torch.save({name: value.clone() for name, value in net.state_dict().items()}, path)
    return path


def test_what_is_saved_is_loaded(net, faces, tmp_path):
    net.threshold = 1.25
    again = Recognizer.load(net.save(tmp_path / "net.pth"), CPU)
    np.testing.assert_array_equal(again.embed(faces), net.embed(faces))
    assert again.meta == net.meta and again.fingerprint == net.fingerprint and again.threshold == 1.25
    other = Recognizer.load(tmp_path / "net.pth", CPU, channel_order="bgr")
    assert other.fingerprint != net.fingerprint
    np.testing.assert_array_equal(other.embed(faces[..., ::-1]), net.embed(faces))
    with torch.no_grad():
        again.backbone.conv1.conv.weight[0, 0, 0, 0] += 1e-6
    assert again.fingerprint != net.fingerprint


def test_a_folder_is_its_newest_file(net, tmp_path):
    store.save_pth(
        tmp_path / "model_2026-01-01-00-00_epoch:0_0.50000.pth", {"model": net.state_dict(), "meta": net.meta}
    )
    assert Recognizer.load(tmp_path, "cpu").fingerprint == net.fingerprint
    with pytest.raises(CheckpointError, match="holds no whole"):
        (tmp_path / "empty").mkdir()
        Recognizer.load(tmp_path / "empty", CPU)


def test_images_come_as_arrays_lists_paths_and_anything_with_slices(net, tiny, faces, tmp_path):
    expected = net.embed(faces)
    assert expected.dtype == np.float32 and expected.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(net.embed(list(faces)), expected)
    from PIL import Image

    paths = []
    for number, face in enumerate(faces):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(face).save(paths[-1])
    np.testing.assert_array_equal(net.embed(paths), expected)
    np.testing.assert_array_equal(net.embed(str(paths[0])), net.embed(faces[:1]))
    images, _ = pairs.load_pairs(tiny / "lfw.bin")
    assert net.embed(images).shape == (20, 16)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 160, 160, 3), np.uint8),
        np.zeros((2, 112, 112, 3), np.float32),
        np.zeros((112, 112, 3), np.uint8),
        np.zeros((2, 3, 112, 112), np.uint8),
        [np.zeros((112, 112, 3), np.uint8), np.zeros((111, 112, 3), np.uint8)],
    ],
)
def test_other_images_are_one_line(net, images):
    with pytest.raises(DataError, match=r"the network takes uint8 RGB \[112, 112, 3\]") as caught:
        net.embed(images)
    assert "\n" not in str(caught.value)


def test_a_missing_photo_is_named(net, tmp_path):
    with pytest.raises(DataError, match="absent.jpg: cannot be read"):
        net.embed([tmp_path / "absent.jpg"])


def test_training_and_verification_prepare_images_alike_for_upstreams_weights(net, base, tmp_path):
    """Those nets take BGR: fine-tuning on RGB and verifying on BGR was the fault."""
    path = upstream_file(net, tmp_path / "upstream.pth")
    learner = Learner.from_config(replace(base, pth_path=str(path), is_finetune=True))
    assert learner.recognizer.channel_order == "bgr"
    batch = next(iter(learner.loader))
    trained_on = learner._to_device(batch)[0]
    flipped = torch.where(batch.flip_B[:, None, None, None], batch.images_BHWC.flip(2), batch.images_BHWC)
    assert torch.equal(trained_on, learner.recognizer.to_input(flipped))
    assert torch.equal(trained_on, Recognizer.create("mobilefacenet", device=CPU).to_input(flipped.flip(-1)))


@pytest.mark.parametrize("kind", ["pth", "sharded"])
def test_the_order_of_weights_survives_every_checkpoint(net, base, tmp_path, kind):
    if kind == "sharded" and not sharded.available():
        pytest.skip("sharded checkpoints need torch 2.3")
    path = upstream_file(net, tmp_path / "upstream.pth")
    base = replace(base, checkpoint=kind)
    Learner.from_config(replace(base, pth_path=str(path), is_finetune=True)).train()
    assert Learner.from_config(replace(base, resume="newest")).recognizer.channel_order == "bgr"
    told = replace(base, resume="newest", weights_channel_order="rgb")
    assert Learner.from_config(told).recognizer.channel_order == "rgb"
    folder = f"{base.work_path}/{'models' if kind == 'pth' else 'sharded'}"
    assert Recognizer.load(folder, CPU).channel_order == "bgr"
    assert Recognizer.load(folder, CPU, channel_order="rgb").channel_order == "rgb"


def test_the_order_of_data_is_another_option(base, tiny, faces):
    """Data said to be BGR is turned to RGB when it is read; the net's own order does not change."""
    learner = Learner.from_config(replace(base, channel_order="bgr"))
    assert learner.recognizer.channel_order == "rgb"
    np.testing.assert_array_equal(learner.dataset[0][0][..., ::-1], open_dataset(tiny)[0][0])


def test_the_assumed_order_is_said_with_how_to_say_otherwise(net, tmp_path, caplog):
    caplog.set_level("INFO")
    Recognizer.load(upstream_file(net, tmp_path / "upstream.pth"), CPU)
    assert "bgr is assumed" in caplog.text and "--weights_channel_order" in caplog.text


def test_any_number_of_ranks_gives_the_same_bits(net, tiny, tmp_path):
    path = net.save(tmp_path / "net.pth")
    images, _ = pairs.load_pairs(tiny / "lfw.bin")
    alone = Recognizer.load(path, CPU)
    result = alone.verify({"lfw": tiny / "lfw.bin"}, batch_size=3)["lfw"]
    expected = (alone.embed(images, batch_size=3).tobytes(), result.accuracy, result.threshold, alone.fingerprint)
    for ranks in (2, 3, 8):
        assert run_ranks(evaluated_by_recognizer, ranks, str(path), str(tiny / "lfw.bin")) == [expected] * ranks


def test_whatever_a_user_saves_of_it_keeps_its_channel_order(net, tmp_path):
    """Its keys are those of InsightFace_Pytorch, whose nets want BGR."""
    ours = net.save(tmp_path / "ours.pth")
    for name, state in (("state.pth", net.state_dict()), ("model.pth", torch.load(ours)["model"])):
        torch.save(state, tmp_path / name)
        loaded = Recognizer.load(tmp_path / name, CPU)
        assert (loaded.channel_order, loaded.fingerprint) == ("rgb", net.fingerprint)


def test_a_folder_stands_for_its_newest_weights_of_any_name(net, tmp_path):
    with pytest.raises(CheckpointError, match="no whole sharded checkpoint.*no .pth file"):
        Recognizer.load(tmp_path, CPU)
    torch.save({}, tmp_path / "older.pth")
    os.utime(tmp_path / "older.pth", (1, 1))
    net.save(tmp_path / "backbone.pth")
    (tmp_path / "gone.pth").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.pth").mkdir()
    assert Recognizer.load(tmp_path, CPU).fingerprint == net.fingerprint
    with pytest.raises(PairError, match="no pair set is there"):
        net.verify(tmp_path)
