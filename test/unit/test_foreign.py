"""Weights of other projects: recognised by keys and shapes, complete or refused in one line."""

from __future__ import annotations

import pickle
import resource
from collections import OrderedDict

import pytest
import torch
from plain_nets import plain_forward, randomise_

import model
from checkpoint.store import load_pth, save_pth
from model import BACKBONES, create_model
from model.foreign import recognise
from runtime.errors import CheckpointError

pytestmark = pytest.mark.core

NETS = [(mode, depth) for mode, backbone in BACKBONES.items() for depth in backbone.depths or (None,)]
UPSTREAM = {
    "ir": ("InsightFace_Pytorch", "bgr"),
    "ir_se": ("InsightFace_Pytorch", "bgr"),
    "mobilefacenet": ("InsightFace_Pytorch", "bgr"),
    "iresnet": ("arcface_torch", "rgb"),
    "mbf": ("arcface_torch", "rgb"),
    "mbf_large": ("arcface_torch", "rgb"),
    "resnet": ("PLSC", "rgb"),
    "resnet_basic": ("PLSC", "rgb"),
    "resnet_narrow": ("PLSC", "rgb"),
}


def shapes_of(net_mode, net_depth, embedding_size):
    """{key: shape} of our own net; without memory where torch can do that."""
    if not hasattr(torch, "compile"):  # torch 1.x has no device context
        if net_depth not in (18, 50, None):
            pytest.skip("too large a net to build just for its shapes")
        return {k: v.shape for k, v in create_model(net_mode, net_depth, embedding_size).state_dict().items()}
    with torch.device("meta"):
        return {k: v.shape for k, v in create_model(net_mode, net_depth, embedding_size).state_dict().items()}


@pytest.fixture(scope="module")
def small():
    """A state dict of ir_se 18 with embedding size 8, which has every kind of key."""
    return dict(create_model("ir_se", 18, embedding_size=8).state_dict())  # without the notes that ours carry


@pytest.mark.parametrize("net_mode, net_depth", NETS)
def test_every_net_is_recognised(net_mode, net_depth):
    shapes = shapes_of(net_mode, net_depth, 96)
    # expanded from one number: a state dict of the right shapes without the memory
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    foreign = recognise(state)
    assert (foreign.net_mode, foreign.net_depth, foreign.embedding_size) == (net_mode, net_depth, 96)
    assert (foreign.upstream, foreign.channel_order) == UPSTREAM[net_mode]
    assert {key: value.shape for key, value in foreign.state_dict.items()} == shapes
    assert foreign.head_kernel is None


def test_the_keys_are_those_of_the_published_files(small):
    # as listed by the upstream projects' own programs: none of these strings comes from our modules
    assert {
        "input_layer.0.weight", "input_layer.1.running_var", "input_layer.2.weight", "body.0.res_layer.0.bias",
        "body.2.shortcut_layer.0.weight", "body.2.shortcut_layer.1.num_batches_tracked",
        "body.7.res_layer.5.fc1.weight", "body.7.res_layer.5.fc2.weight",
        "output_layer.0.weight", "output_layer.3.bias", "output_layer.4.running_mean",
    } <= set(small)  # fmt: skip
    assert not {"body.0.shortcut_layer.0.weight", "body.0.res_layer.5.fc1.bias"} & set(small)
    assert {
        "conv1.conv.weight", "conv2_dw.prelu.weight", "conv_23.conv_dw.bn.weight", "conv_3.model.3.project.conv.weight",
        "conv_4.model.5.conv.prelu.weight", "conv_5.model.1.conv_dw.conv.weight", "conv_6_sep.bn.bias",
        "conv_6_dw.conv.weight", "linear.weight", "bn.running_var",
    } <= set(shapes_of("mobilefacenet", None, 8))  # fmt: skip
    assert {
        "conv1.weight", "bn1.bias", "prelu.weight", "layer1.0.downsample.0.weight", "layer4.1.downsample.1.weight",
        "layer2.1.prelu.weight", "layer3.0.bn3.running_mean", "bn2.weight", "fc.bias", "features.weight",
    } - set(shapes_of("iresnet", 18, 8)) == {"layer4.1.downsample.1.weight"}  # fmt: skip


@pytest.mark.parametrize("net_mode", ["ir_se", "iresnet", "mobilefacenet", "mbf"])
@pytest.mark.parametrize("wrapped", ["bare", "module.", "training", "legacy"])
def test_files_give_the_outputs_that_their_own_keys_say(tmp_path, net_mode, wrapped):
    state = randomise_(create_model(net_mode, 18, embedding_size=8)).state_dict()
    path = tmp_path / "foreign.pth"
    if wrapped == "bare":
        save_pth(path, state)
    elif wrapped == "module.":
        save_pth(path, {"module." + key: value for key, value in state.items()})
    elif wrapped == "training":
        content = {"model": state, "head": {"kernel": torch.ones(8, 3)}, "optimizer": {}, "epoch": 3, "config": {}}
        save_pth(path, content)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    foreign = recognise(load_pth(path), place=path)
    net = create_model(foreign.net_mode, foreign.net_depth, foreign.embedding_size, l2_norm=False).eval()
    net.load_state_dict(foreign.state_dict)
    x_BCHW = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        truth_BD = plain_forward(net_mode, {k: v.double() for k, v in state.items()}, x_BCHW.double())
        plain_error = (plain_forward(net_mode, state, x_BCHW) - truth_BD).abs().max()
        assert (net(x_BCHW) - truth_BD).abs().max() <= 4 * plain_error
    assert (foreign.head_kernel is None) == (wrapped != "training")


def test_a_training_checkpoint_of_arcface_torch(small):
    state = create_model("iresnet", 18, embedding_size=8).state_dict()
    content = {"epoch": 1, "global_step": 5, "state_dict_backbone": state, "state_dict_softmax_fc": {}}
    foreign = recognise(content)
    assert (foreign.upstream, foreign.net_mode, foreign.net_depth) == ("arcface_torch", "iresnet", 18)


def test_it_says_what_it_found(small):
    content = {"model": small, "head": {"module.kernel": torch.ones(8, 10)}}
    assert str(recognise(content)) == (
        "InsightFace_Pytorch ir_se 18, embedding size 8, head of 10 classes, bgr (assumed)"
    )
    assert str(recognise(small, "rgb")) == ("InsightFace_Pytorch ir_se 18, embedding size 8, no head, rgb (as told)")


def test_whose_word_the_channel_order_is(small):
    def order(content, told=None):
        foreign = recognise(content, channel_order=told)
        return foreign.channel_order, foreign.channel_order_from

    assert order(small) == ("bgr", "upstream")
    assert order({"model": small, "meta": {"channel_order": "rgb"}}) == ("rgb", "file")
    assert order({"model": small, "meta": {"channel_order": "rgb"}}, "bgr") == ("bgr", "option")
    assert order({"model": small, "meta": {"channel_order": None}}) == ("bgr", "upstream")
    with pytest.raises(CheckpointError, match="^channel_order 'grb': choose from rgb, bgr$"):
        recognise(small, "grb")


def test_a_bare_state_dict_of_ours_says_its_channel_order(tmp_path):
    """Its keys are those of InsightFace_Pytorch, whose nets want BGR."""
    net = create_model("mobilefacenet", embedding_size=8)
    for wrap in (lambda net: net, torch.nn.DataParallel):
        for order in ("rgb", "bgr"):
            net.channel_order = order
            torch.save(wrap(net).state_dict(), tmp_path / "bare.pth")
            foreign = recognise(load_pth(tmp_path / "bare.pth"))
            assert (foreign.channel_order, foreign.channel_order_from, foreign.assumed) == (order, "file", "")
    theirs = recognise(dict(net.state_dict()))
    assert "bgr is assumed, as InsightFace_Pytorch trains; pass --weights_channel_order=rgb" in theirs.assumed


def test_weights_of_a_registered_net_are_known_by_what_the_file_says(own_net):
    state = create_model("own_net", embedding_size=8).state_dict()
    meta = model.describe("own_net", embedding_size=8)
    foreign = recognise({"model": state, "meta": {**meta, "channel_order": "rgb"}})
    assert (foreign.net_mode, foreign.net_depth, foreign.embedding_size) == ("own_net", None, 8)
    assert str(foreign) == "own_net, embedding size 8, no head, rgb (as the file says)"
    with pytest.raises(CheckpointError, match="^a.pth: like the own_net, but without 1.weight"):
        recognise({"model": {k: v for k, v in state.items() if k != "1.weight"}, "meta": meta}, place="a.pth")
    with pytest.raises(CheckpointError, match="^a.pth: net_mode 'yours': choose from ir, "):
        recognise({"model": state, "meta": {**meta, "net_mode": "yours"}}, place="a.pth")


@pytest.fixture
def own_net(monkeypatch):
    monkeypatch.setattr(model, "BACKBONES", dict(model.BACKBONES))

    @model.register("own_net")
    def make(embedding_size):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, embedding_size))


def test_half_precision_comes_as_float32(small):
    half = {key: value.half() if value.is_floating_point() else value for key, value in small.items()}
    foreign = recognise({"model": half, "head": {"kernel": torch.ones(8, 3).half()}})
    assert foreign.state_dict["body.0.res_layer.1.weight"].dtype == torch.float32
    assert foreign.state_dict["body.0.res_layer.0.num_batches_tracked"].dtype == torch.int64
    assert foreign.head_kernel.dtype == torch.float32
    assert torch.equal(foreign.state_dict["output_layer.3.weight"], half["output_layer.3.weight"].float())


def test_one_array_under_many_names_is_not_multiplied(small):
    big = torch.zeros(1 << 20, dtype=torch.float16)  # 2 MB in the file; 4 GB if each name got its own float32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="another architecture"):
        recognise({**small, **{f"extra.{i}": big for i in range(1000)}})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_files_from_before_batches_were_counted(small):
    old = {key: value for key, value in small.items() if "num_batches_tracked" not in key}
    create_model("ir_se", 18, embedding_size=8).load_state_dict(recognise(old).state_dict)


def changed(state, drop=(), **new):
    return {**{key: value for key, value in state.items() if key not in drop}, **new}


def test_what_is_refused_and_how(small):
    bare_head = {"kernel": torch.ones(8, 3)}
    no_unit_7 = [key for key in small if key.startswith("body.7.")]
    first = "body.4.res_layer.1.weight"
    for content, message in (
        (
            {"backbone.conv.weight": torch.ones(1), "backbone.conv.bias": torch.ones(1)},
            "state dict: no known face net: it holds backbone.conv.weight, backbone.conv.bias, which is in none of "
            "ir, ir_se, mobilefacenet, iresnet, mbf, mbf_large, resnet",
        ),
        ({}, "state dict: no known face net: it holds nothing, which is in none of "),
        (bare_head, "state dict: it is a head alone: pass the file of the backbone (model_*.pth)"),
        (
            {"weights": [1, 2], "epoch": 3},
            "state dict: no state dict in it: it holds weights, epoch, where a backbone is tensors by name, "
            "at the top or under 'model' or 'state_dict_backbone'",
        ),
        (
            changed(small, drop=[first]),
            f"state dict: like InsightFace_Pytorch ir_se 18, but without {first}: cut off, or another architecture",
        ),
        (
            changed(small, drop=no_unit_7),
            "state dict: like InsightFace_Pytorch ir_se 18, but without body.7.res_layer.0.weight, ",
        ),
        (
            changed(small, **{"body.0.res_layer.6.weight": torch.ones(1)}),
            "state dict: like InsightFace_Pytorch ir_se 18, but with body.0.res_layer.6.weight: another architecture",
        ),
        (
            changed(small, **{first: torch.ones(256, 128, 1, 1)}),
            f"state dict: like InsightFace_Pytorch ir_se 18, but {first} of another shape "
            "((256, 128, 1, 1) for (256, 128, 3, 3)): another architecture",
        ),
        (
            {"model": small, "head": {"kernel": torch.ones(3, 8)}},
            "state dict: head kernel (3, 8) where [8, classes] belongs: the file is inconsistent",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            recognise(content)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)


def test_a_state_that_was_read_already_is_named_as_told():
    with pytest.raises(CheckpointError, match="^runs/a.pth: it is a head alone"):
        recognise({"kernel": torch.ones(8, 3)}, place="runs/a.pth")


def test_keys_of_odd_shape_are_refused_in_one_line(small):
    for key in small:
        odd = changed(small, **{key: torch.ones(()) if small[key].dim() else torch.ones(2)})
        with pytest.raises(CheckpointError) as caught:
            recognise(odd)
        assert "\n" not in str(caught.value)


def test_every_single_missing_key_is_noticed(small):
    for key in small:
        if "num_batches_tracked" not in key:
            with pytest.raises(CheckpointError):
                recognise(changed(small, drop=[key]))


class RunsCode:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_files_that_cannot_be_read(tmp_path, small, capsys):
    whole = tmp_path / "whole.pth"
    save_pth(whole, OrderedDict(small))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-5000])
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    listing = tmp_path / "listing.pth"
    torch.save([1, 2], listing)
    for path in (cut, hostile, listing, tmp_path / "absent.pth"):
        with pytest.raises(CheckpointError) as caught:
            recognise(load_pth(path), place=path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""
