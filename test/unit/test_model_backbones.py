"""The backbones: parameter counts, outputs and gradients against a plain formulation, choices and their errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_nets import plain_forward, randomise_
from torch import nn

from model import BACKBONES, create_model, describe, register
from runtime.errors import ModelError

pytestmark = pytest.mark.core

# the cheapest net of each kind; resnet has plain units at 50 and bottlenecks at 101
SMALLEST = [("ir", 18), ("ir_se", 18), ("iresnet", 18), ("mobilefacenet", None), ("mbf", None)]
SMALLEST += [("mbf_large", None), ("resnet", 50), ("resnet", 101)]

PARAMETERS = [
    ("ir", 50, 43_574_976),
    ("ir", 100, 65_129_792),
    ("ir", 152, 70_737_600),
    ("ir_se", 50, 43_797_696),
    ("ir_se", 100, 65_502_016),
    ("ir_se", 152, 71_148_736),
    ("mobilefacenet", None, 1_200_512),
    ("mbf", None, 2_059_520),
    ("mbf_large", None, 6_314_880),
    ("iresnet", 50, 43_590_848),
    ("iresnet", 100, 65_156_160),
]


def largest_difference(one, other):
    return float((one - other).detach().abs().max())


def images(count, dtype=torch.float64, seed=0):
    return torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("net_mode, net_depth, count", PARAMETERS)
def test_parameter_counts(net_mode, net_depth, count):
    net = create_model(net_mode, net_depth)
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("net_mode, net_depth", SMALLEST)
@pytest.mark.slow
def test_output_is_that_of_the_plain_formulation(net_mode, net_depth):
    net = randomise_(create_model(net_mode, net_depth, embedding_size=32, l2_norm=False, dtype=torch.float64)).eval()
    x_BCHW = images(1 if net_mode == "resnet" else 2)
    with torch.no_grad():
        truth_BD = plain_forward(net_mode, net.state_dict(), x_BCHW)
        assert 0.01 < truth_BD.std() < 100  # a comparison of nothing with nothing would hold
        assert largest_difference(net(x_BCHW), truth_BD) < 1e-11
        unit_net = create_model(net_mode, net_depth, embedding_size=32, l2_norm=True, dtype=torch.float64).eval()
        unit_net.load_state_dict(net.state_dict())
        assert largest_difference(unit_net(x_BCHW), truth_BD / truth_BD.norm(dim=1, keepdim=True)) < 1e-11


@pytest.mark.parametrize("net_mode, net_depth", [("ir_se", 18), ("iresnet", 18), ("mobilefacenet", None)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_is_as_near_to_float64_as_the_plain_formulation_is(net_mode, net_depth, memory_format):
    net = randomise_(create_model(net_mode, net_depth, embedding_size=32, l2_norm=False)).eval()
    x_BCHW = images(2, torch.float32)
    with torch.no_grad():
        state = net.state_dict()
        truth_BD = plain_forward(net_mode, {key: value.double() for key, value in state.items()}, x_BCHW.double())
        plain_error = (plain_forward(net_mode, state, x_BCHW) - truth_BD).abs().max()
        net = net.to(memory_format=memory_format)
        error = (net(x_BCHW.contiguous(memory_format=memory_format)) - truth_BD).abs().max()
    assert error <= 4 * plain_error


@pytest.mark.parametrize(
    "net_mode, net_depth", [("ir_se", 18), ("iresnet", 18), ("mobilefacenet", None), ("mbf", None)]
)
@pytest.mark.slow
def test_gradients_are_those_of_the_plain_formulation(net_mode, net_depth):
    dropout = None if net_depth is None else 0.0
    net = randomise_(create_model(net_mode, net_depth, 8, dropout=dropout, l2_norm=False, dtype=torch.float64))
    x_BCHW, weight_BD = images(3), torch.randn(3, 8, dtype=torch.float64)
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
    (plain_forward(net_mode, leaves, x_BCHW, training=True) * weight_BD).sum().backward()
    (net(x_BCHW) * weight_BD).sum().backward()
    largest = max(float(leaf.grad.abs().max()) for leaf in leaves.values())
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert largest_difference(parameter.grad, leaves[name].grad) < 1e-9 * largest, name
        else:
            assert name == "features.weight" and parameter.grad is None


def dropouts(net):
    return [module.p for module in net.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("net_mode", BACKBONES)
def test_each_upstream_projects_own_defaults(net_mode):
    own = {
        "ir": 0.6,
        "ir_se": 0.6,
        "iresnet": 0.0,
        "resnet": 0.4,
        "mobilefacenet": None,
        "mbf": None,
        "mbf_large": None,
        "resnet_basic": 0.4,
        "resnet_narrow": 0.4,
    }
    depth = 101 if net_mode in ("resnet_basic", "resnet_narrow") else 50
    net = create_model(net_mode, depth, embedding_size=16)
    assert dropouts(net) == ([] if own[net_mode] is None else [own[net_mode]])
    with torch.no_grad():
        norm_B = net.eval()(images(2, torch.float32)).norm(dim=1)
    assert net.l2_norm == (net_mode in ("ir", "ir_se", "mobilefacenet"))
    assert torch.allclose(norm_B, torch.ones(2), rtol=0, atol=1e-6) == net.l2_norm
    if own[net_mode] is not None:
        assert dropouts(create_model(net_mode, depth, 16, dropout=0.25)) == [0.25]


def test_initial_weights():
    arcface_torch = create_model("iresnet", 18, embedding_size=16)
    assert arcface_torch.layer4[1].conv2.weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert [name for name, p in arcface_torch.named_parameters() if not p.requires_grad] == ["features.weight"]
    plsc = create_model("resnet", 50)
    assert plsc.layer4[1].conv2.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert plsc.fc.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.01)
    assert not plsc.fc.bias.detach().any()
    assert {tuple(m.weight.shape) for m in plsc.modules() if isinstance(m, nn.PReLU)} == {(1,)}


def test_a_seed_gives_one_net():
    def make(seed, **kw):
        torch.manual_seed(seed)
        return create_model("mobilefacenet", **kw).state_dict()

    one, again, other, wide = make(1), make(1), make(2), make(1, dtype=torch.float64)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert all(torch.equal(one[key].double(), wide[key].double()) for key in one)
    assert not torch.equal(one["linear.weight"], other["linear.weight"])
    assert wide["linear.weight"].dtype == torch.float64


@pytest.mark.parametrize("net_mode", BACKBONES)
def test_a_description_builds_the_same_net(net_mode):
    depth = 101 if net_mode in ("resnet_basic", "resnet_narrow") else 50
    description = describe(net_mode, depth, embedding_size=16, l2_norm=True)
    assert list(description) == ["net_mode", "net_depth", "embedding_size", "dropout", "l2_norm"]
    assert all(value is None or type(value) in (str, int, float, bool) for value in description.values())
    assert describe(**description) == description
    first, second = create_model(net_mode, depth, embedding_size=16, l2_norm=True), create_model(**description)
    assert str(first) == str(second)
    assert second.l2_norm is True


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"net_mode": "irse"}, "net_mode 'irse': choose from " + ", ".join(BACKBONES)),
        ({"net_mode": "ir", "net_depth": 101}, "net_depth 101: ir has 18, 34, 50, 100, 152, 200"),
        ({"net_mode": "resnet_basic"}, "net_depth 100: resnet_basic has 101, 152"),
        ({"net_mode": "ir", "embedding_size": 0}, "embedding_size 0: give a whole number of at least 1 (512 is usual)"),
        ({"net_mode": "ir", "dropout": 1.0}, "dropout 1.0: give a probability from 0 up to, but not including, 1"),
        (
            {"net_mode": "mobilefacenet", "dropout": 0.6},
            "dropout 0.6: mobilefacenet has no dropout layer; leave it out or give 0",
        ),
    ],
)
def test_choices_that_do_not_exist(arguments, message):
    with pytest.raises(ModelError) as caught:
        create_model(**arguments)
    assert str(caught.value) == message


def test_mobilefacenet_takes_any_depth_and_a_dropout_of_nothing():
    assert describe("mobilefacenet", 100, dropout=0)["net_depth"] is None
    assert describe("mobilefacenet", None, dropout=0)["dropout"] is None


def test_half_precision_rows_come_out_in_float32_with_length_one():
    if torch.__version__.startswith("1."):
        pytest.skip("torch 1.x has no bfloat16 convolution on the CPU")
    net = create_model("mobilefacenet", embedding_size=16).to(torch.bfloat16).eval()
    with torch.no_grad():
        emb_BD = net(images(2, torch.bfloat16))
    assert emb_BD.dtype == torch.float32
    assert largest_difference(emb_BD.norm(dim=1), torch.ones(2)) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_a_trace_holds_torchs_own_operators_alone(training):
    net = create_model("mobilefacenet", embedding_size=8).train(training)
    graph = str(torch.jit.trace(net, torch.zeros(2, 3, 112, 112), check_trace=False).inlined_graph)
    assert "aten::prelu" in graph and "PythonOp" not in graph


def test_importing_the_package_imports_torch_and_nothing_heavy():
    heavy = ("torchvision", "torch_npu", "apex", "PIL", "cv2", "triton")
    code = f"import sys, torch; old = set(sys.modules); import model; print(set({heavy}) & (set(sys.modules) - old))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_rows_of_zero_stay_finite():
    net = create_model("mobilefacenet", embedding_size=8).eval()
    with torch.no_grad():
        net.bn.weight.zero_()
        assert torch.equal(net(images(1, torch.float32)), torch.zeros(1, 8))


def test_a_registered_backbone_is_built_as_it_says(monkeypatch):
    monkeypatch.setattr("model.BACKBONES", dict(BACKBONES))

    @register("plain_net")
    class Plain(nn.Module):
        def __init__(self, embedding_size):
            super().__init__()
            self.fc = nn.Linear(3, embedding_size)

        def forward(self, x_BCHW):
            return self.fc(x_BCHW.mean((2, 3)))

    @register("deep_net", depths=(1, 2), dropout=0.1, l2_norm=True)
    def make(depth, embedding_size, dropout, l2_norm):
        return nn.Sequential(
            *(nn.Dropout(dropout) for _ in range(depth)), nn.Flatten(), nn.Identity() if l2_norm else nn.ReLU()
        )

    assert create_model("plain_net", embedding_size=5)(images(2, torch.float32)).shape == (2, 5)
    assert describe("plain_net", l2_norm=False)["l2_norm"] is None
    assert dropouts(create_model("deep_net", 2, dropout=0.3)) == [0.3, 0.3]
    assert isinstance(create_model("deep_net", 1, l2_norm=False)[-1], nn.ReLU)
    with pytest.raises(ModelError, match="net_depth 100: deep_net has 1, 2"):
        create_model("deep_net")
    with pytest.raises(ModelError, match="net_mode 'ir': there is one of this name already"):
        register("ir")(make)
