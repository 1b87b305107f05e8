"""The pieces of the backbones that differ from torch's own modules: same values, same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.iresnet import IRUnit
from model.layers import BatchNorm2d, DepthwiseConv2d, PReLU, Subsample
from model.mobilefacenet import Bottleneck

pytestmark = pytest.mark.core

SHAPES = [(3, 5, 7, 6), (4, 5)]


def pair(channels, dtype=torch.float32, per_channel=True):
    """torch's module and ours, with the same slopes."""
    torch.manual_seed(channels)
    theirs, ours = (cls(channels if per_channel else 1).to(dtype) for cls in (nn.PReLU, PReLU))
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.uniform_(-0.5, 1.5))
    return theirs, ours


def gradients(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    return y.detach(), x.grad, module.weight.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prelu_has_torchs_gradients(shape, per_channel, memory_format, dtype):
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for images")
    theirs, ours = pair(shape[1], dtype, per_channel)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    x[(0,) * x.dim()] = 0  # where torch takes the slope's side
    grad = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    expected, got = gradients(theirs, x, grad), gradients(ours, x, grad)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    assert got[1].stride() == expected[1].stride()
    # the slope's gradient is one long sum: hold it to the truth, no farther off than torch's own
    channel_sum = [dim for dim in range(x.dim()) if dim != 1]
    truth = (grad.double() * x.double().clamp(max=0)).sum(channel_sum)
    truth = truth if per_channel else truth.sum().view(1)
    error, torchs_error = ((one.double() - truth).abs().max() for one in (got[2], expected[2]))
    assert error <= torchs_error + torch.finfo(dtype).eps * truth.abs().max()
    if not torch.__version__.startswith("1."):  # the sum is torch's own from 2.0 on, to the bit
        assert torch.equal(got[2], expected[2])


def test_prelu_passes_gradcheck():
    _, ours = pair(3, torch.float64)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, _slope: ours(x), (x, ours.weight))


def test_prelu_is_torchs_own_operator_outside_training():
    _, ours = pair(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert "PReLUFromVectorOps" in type(ours.train()(x).grad_fn).__name__
    assert "PReLUFromVectorOps" not in type(ours.eval()(x).grad_fn).__name__


@pytest.mark.skipif(torch.__version__.startswith("1."), reason="torch 1.x has no bfloat16 autocast on the CPU")
def test_prelu_under_autocast():
    theirs, ours = pair(4)
    x = torch.randn(2, 4, 8, 8).bfloat16()
    grads = []
    for module in (theirs, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x.clone().requires_grad_())
        y.float().square().sum().backward()
        grads.append(module.weight.grad)
    assert y.dtype == torch.bfloat16 and grads[1].dtype == torch.float32
    assert torch.equal(*grads)


def batch_norm_results(layer, x, grad):
    """Output, gradients, and the running statistics of a training step."""
    x = x.detach().clone().requires_grad_()
    y = layer.train()(x)
    y.backward(grad)
    return [t.detach().double() for t in (y, x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers())]


@pytest.mark.parametrize("shape", [(16, 32, 56, 56), (64, 3, 28, 7), (2, 5, 1, 2), (3, 4, 3, 1)])
def test_batch_norm_in_channels_last_is_as_exact_as_in_the_other_layout(shape):
    torch.manual_seed(0)
    x, grad = torch.randn(shape) * 1.5 + 3, torch.randn(shape) + 0.3
    layers = [cls(shape[1]) for cls in (BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.linspace(-1, 2, shape[1]))
            layer.bias.copy_(torch.linspace(1, 3, shape[1]))
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    ours, contiguous = batch_norm_results(layers[0], *last), batch_norm_results(layers[1], x, grad)
    truth = batch_norm_results(layers[2].double(), x.double(), grad.double())
    unit = F.batch_norm(x.double(), None, None, training=True)
    terms = [(grad.double() * other).abs().sum((0, 2, 3)).max() for other in (unit, 1)]  # of the parameters' gradients
    for i, (mine, theirs, exact) in enumerate(zip(ours, contiguous, truth)):
        scale = terms[i - 2] if i in (2, 3) else exact.abs().max()
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 5e-7 * scale, i
    if torch.__version__.startswith("1."):
        return  # it stays torch's own there
    taken = [layers[0](t.requires_grad_()).grad_fn.name() for t in (last[0], x)]
    assert [name == "_BatchNormInPiecesBackward" for name in taken] == [True, False]
    assert layers[0].num_batches_tracked == 3
    if shape[2] == 56:  # torch's own sums would not pass
        own = batch_norm_results(nn.BatchNorm2d(shape[1]), *last)
        exact = batch_norm_results(nn.BatchNorm2d(shape[1]).double(), x.double(), grad.double())
        assert (own[0] - exact[0]).abs().max() > 3e-6 * exact[0].abs().max()


def test_batch_norm_elsewhere_is_torchs_own():
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(4), nn.BatchNorm2d(4)
    for x in (torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5).contiguous(memory_format=torch.channels_last).double()):
        for training in (True, False):
            pair = [layer.to(x.dtype).train(training) for layer in (ours, theirs)]
            assert torch.equal(*(layer(x) for layer in pair))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize("size", [7, 8])
def test_subsample_is_a_max_pool_of_one_pixel(size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    ours, pool = Subsample(2)(x), F.max_pool2d(x, 1, 2)
    assert torch.equal(ours, pool)
    grad = torch.randn_like(pool)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, pool)))


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
@pytest.mark.parametrize(
    "unit",
    [IRUnit(16, 16, 2, squeeze_excite=True), IRUnit(16, 32, 1, squeeze_excite=False), Bottleneck(16, 16, 32, stride=1)],
    ids=["ir_se", "ir", "mobilefacenet"],
)
def test_units_compile_as_one_graph_to_the_same_gradients(unit):
    unit = unit.double()
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    unit(x).square().sum().backward()
    eager = [parameter.grad.clone() for parameter in unit.parameters()]
    unit.zero_grad()
    torch.compile(unit, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for parameter, grad in zip(unit.parameters(), eager):
        assert (parameter.grad - grad).abs().max() <= 1e-10 * grad.abs().max().clamp(min=1)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8, 28])
def test_depthwise_convolutions_have_the_gradients_of_exact_arithmetic(stride, size):
    """Whole numbers small enough for fp32 to be exact: it must agree with float64 to the bit, in every torch."""

    def results(dtype):
        layer = DepthwiseConv2d(8, 3, stride, padding=1).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(8 * 9).view(8, 1, 3, 3) % 5)
        x = (torch.arange(2 * 8 * size * size, dtype=dtype).view(2, 8, size, size) % 7).requires_grad_()
        y = layer(x)
        y.backward(torch.arange(y.numel(), dtype=dtype).view_as(y) % 3)
        return [t.double() for t in (y.detach(), x.grad, layer.weight.grad)]

    assert all(torch.equal(ours, exact) for ours, exact in zip(results(torch.float32), results(torch.float64)))
