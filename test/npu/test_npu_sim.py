"""The emulated NPU itself: what it refuses, and that what it computes is what the CPU computes."""

from __future__ import annotations

import gc
import io
import multiprocessing
import pickle

import pytest
import torch
import torch.nn.functional as F
from npu_sim import build, no_cuda
from torch import nn

pytestmark = pytest.mark.npu

NPU = "npu:0"  # not a torch.device: there is none of that name until the fixture has run


@pytest.fixture
def matrix_46():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


# What must fail on it, because it would on the real one.

MIXED = {
    "add": lambda x, X: X + x,
    "add, the other way round": lambda x, X: x + X,
    "matrix product": lambda x, X: X @ x.t(),
    "in place": lambda x, X: X.add_(x),
    "in place on the host": lambda x, X: x.clone().add_(X),
    "linear, input on the host": lambda x, X: nn.Linear(6, 2).npu()(x),
    "linear, weights on the host": lambda x, X: nn.Linear(6, 2)(X),
    "convolution, input on the host": lambda x, X: nn.Conv2d(1, 1, 3).npu()(x[None, None]),
    "convolution, weights on the host": lambda x, X: nn.Conv2d(1, 1, 3)(X[None, None]),
    "batch norm": lambda x, X: nn.BatchNorm1d(6)(X),
    "cross entropy": lambda x, X: F.cross_entropy(X, torch.zeros(4, dtype=torch.long)),
    "cat": lambda x, X: torch.cat([X, x]),
    "where": lambda x, X: torch.where(X > 0, X, x),
    "scatter": lambda x, X: X.scatter_(1, torch.zeros(4, 1, dtype=torch.long), 1.0),
    "gather": lambda x, X: X.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    "embedding": lambda x, X: F.embedding(torch.tensor([0]), X),
    "index on the npu into the host": lambda x, X: x[torch.tensor([0]).npu()],
    "the other npu": lambda x, X: X + X.to("npu:1"),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_on_two_devices_are_refused(name, matrix_46):
    with pytest.raises(RuntimeError, match="same device|indices should be|device"):
        MIXED[name](matrix_46, matrix_46.to(NPU))


@pytest.mark.parametrize(
    "what",
    [
        lambda X: X.numpy(),
        lambda X: X.cuda(),
        lambda X: X.pin_memory(),
        lambda X: torch.zeros(1, device="npu:7"),
        lambda X: X.double() @ X.double().t(),
    ],
    ids=["numpy()", "cuda()", "pin_memory()", "npu:7", "float64 product"],
)
def test_other_things_that_an_npu_cannot(what, matrix_46):
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        what(matrix_46.to(NPU))


def test_fresh_memory_is_nan():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.empty(5, device=NPU, dtype=dtype).cpu().isnan().all()


def _touch_in_fork(pipe):
    try:
        torch.zeros(1, device="npu")
    except RuntimeError as error:
        pipe.send(str(error))


def test_a_forked_worker_cannot_use_it():
    torch.zeros(1, device=NPU)
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_touch_in_fork, args=(theirs,))
    worker.start()
    assert ours.poll(30), "the worker used the device, or hangs"
    assert "forked subprocess" in ours.recv()
    worker.join()


def test_a_denied_operator_does_not_exist(npu_python):
    code = "import torch, torch_npu; print((torch.ones(3).npu() + 1).cpu()); torch.ones(3).npu().topk(1)"
    done = npu_python("-c", code, NPU_SIM_DENY="aten::topk,aten::cumsum")
    assert "tensor([2., 2., 2.])" in done.stdout
    assert "Could not run 'aten::topk" in done.stderr


def test_the_number_of_devices(npu_python):
    code = "import torch, torch_npu; print(torch.npu.device_count())"
    assert npu_python("-c", code, NPU_SIM_DEVICES="5").stdout == "5\n"


def test_saturating_chips(npu_python):
    code = """
import torch, torch_npu
flag, clear = torch.npu.utils.get_npu_overflow_flag, torch.npu.clear_npu_overflow_flag
assert not torch.npu.utils.is_support_inf_nan()
x = torch.tensor([60000.0, -60000.0]).npu().half()
assert not flag()
assert (x * 2).tolist() == [65504, -65504] and flag()
clear()
assert not flag() and x.mul_(2).tolist() == [65504, -65504] and flag()
assert torch.full((1,), 1e9).npu().half().item() == 65504
clear()
zero = torch.zeros(1).npu()
largest = torch.finfo(torch.float32).max
assert (1 / zero).item() == largest and flag()
assert (zero / zero).item() == 0 and zero.log().item() == -largest and torch.isfinite(zero.log()).all()
# The check of gradients reads the flag, and leaves them scaled where it is set; they themselves are not looked at.
grad, found, inv = torch.full((2,), 8.0).npu(), torch.zeros(()).npu(), torch.full((), 0.5).npu()
torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inv)
assert grad.tolist() == [8, 8] and found.item() == 1 and not flag()
torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inv)
assert grad.tolist() == [4, 4] and found.item() == 1
x.mul_(2)
torch._amp_foreach_non_finite_check_and_unscale_([grad], found, inv)
assert found.item() == 2
"""
    done = npu_python("-c", code, NPU_SIM_SATURATE="1")
    assert done.returncode == 0, done.stderr


def test_fp32_of_the_first_chips_is_fp16_unless_told(npu_python):
    code = """
import torch, torch_npu
a = torch.full((1, 1), 1 + 2.0**-14)
assert (a.npu() @ a.npu()).item() == 1
assert torch.conv2d(a.reshape(1, 1, 1, 1).npu(), a.reshape(1, 1, 1, 1).npu()).item() == 1
torch.npu.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})
assert (a.npu() @ a.npu()).item() == (a @ a).item() > 1
"""
    done = npu_python("-c", code, NPU_SIM_FP32_AS_FP16="1")
    assert done.returncode == 0, done.stderr


def test_only_contiguous_layouts():
    x = torch.ones(2, 3, 4, 4, device=NPU)
    for make in (
        lambda: x.to(memory_format=torch.channels_last),
        lambda: x.contiguous(memory_format=torch.channels_last),
        lambda: torch.empty(2, 3, 4, 4, device=NPU, memory_format=torch.channels_last),
        lambda: nn.Conv2d(3, 3, 1).to(NPU, memory_format=torch.channels_last),
    ):
        with pytest.raises(RuntimeError, match="Only support contiguous_format or preserve_format"):
            make()


# Where it cannot be had.


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.Unavailable, match="needs a C\\+\\+ compiler"):
        build.library()


def test_an_older_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(build.Unavailable, match="needs torch 2.13 or newer, this is 2.9.1"):
        build.library()


def test_a_failed_build_shows_the_compiler_s_words_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "CACHE", tmp_path)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "--no-such-flag"))
    with pytest.raises(RuntimeError, match="no-such-flag"):
        build.library()
    assert list(tmp_path.glob("*.so")) == []


# What is silent without a GPU.


@pytest.mark.parametrize("name", [n for n in no_cuda.SILENT if hasattr(torch.cuda, n)])
def test_functions_of_cuda_are_refused(name):
    with pytest.raises(no_cuda.CudaCalled, match=name):
        getattr(torch.cuda, name)(0)


def test_every_function_of_the_list_exists():
    assert [n for n in no_cuda.SILENT if not hasattr(torch.cuda, n)] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.autocast("cuda"),
        lambda: torch.amp.autocast("cuda", torch.half),
        lambda: torch.cuda.amp.autocast(),
        lambda: torch.amp.GradScaler(),
        lambda: torch.amp.GradScaler("cuda"),
        lambda: torch.cuda.amp.GradScaler(),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mixed_precision_for_cuda_is_refused(make):
    with pytest.raises(no_cuda.CudaCalled):
        make()


def test_torch_itself_may_still_seed_every_device():
    torch.manual_seed(7)
    first = torch.rand(3, device=NPU).cpu()
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(3, device=NPU).cpu())


# What it computes.


def _in_place_on_views(t):
    t = t.clone()
    t[1:3, ::2].mul_(3).add_(1)
    t.t()[0].zero_()
    t.index_fill_(0, torch.tensor([1], device=t.device), 9.0)
    return t.masked_fill_(t > 8, -1)


def _out_into_a_view(t):
    out = torch.zeros(8, 8, device=t.device)
    torch.mul(t, 2, out=out[:4, :6])
    return out


SAME = {
    "in place on views": _in_place_on_views,
    "out= into a view": _out_into_a_view,
    "out= that grows": lambda t: torch.add(t, 1, out=torch.empty(0, device=t.device)),
    "transposed view": lambda t: t.t(),
    "unfold": lambda t: t.unfold(1, 3, 2),
    "sort": lambda t: t.sort(1)[1],
    "topk": lambda t: t.topk(2)[0],
    "unique": lambda t: t.unique(),
    "nonzero": lambda t: (t > 0).nonzero(),
    "masked": lambda t: t[t > 0],
    "index with a host tensor": lambda t: t[torch.tensor([0, 2])],
    "index_put": lambda t: t.clone().index_put_(
        (torch.tensor([0, 0], device=t.device),), torch.ones(6, device=t.device), accumulate=True
    ),
    "scatter_add": lambda t: torch.zeros_like(t).scatter_add(0, (t > 0).long(), t),
    "conjugate": lambda t: torch.fft.fft(t).conj().imag,
    "complex": lambda t: torch.view_as_real(torch.fft.fft(t)),
    "resize_": lambda t: t.clone().resize_(3, 4),
    "copy of another dtype": lambda t: torch.zeros(4, 6, dtype=torch.half, device=t.device).copy_(t),
    "foreach": lambda t: torch.stack(torch._foreach_add([t, t], 1.0)),
    "split": lambda t: torch.cat(t.split(2)[::-1]),
    "norm": lambda t: t.norm(2, 1, True),
    "channels_last convolution": lambda t: F.conv2d(
        t[None, None].contiguous(memory_format=torch.channels_last), torch.ones(2, 1, 3, 3, device=t.device)
    ),
    "grouped convolution": lambda t: F.conv2d(t.view(1, 4, 2, 3), torch.ones(4, 1, 2, 2, device=t.device), groups=4),
    "transposed convolution": lambda t: F.conv_transpose2d(
        t[None, None], torch.ones(1, 2, 3, 3, device=t.device), stride=2
    ),
    "random with a generator": lambda t: torch.randperm(
        9, device=t.device, generator=torch.Generator(t.device).manual_seed(1)
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_bits_are_the_cpu_s(name, matrix_46):
    result = SAME[name](matrix_46.to(NPU))
    assert str(result.device) == NPU
    assert torch.equal(result.cpu(), SAME[name](matrix_46))


def test_a_convolution_s_gradients_are_the_cpu_s(matrix_46):
    def gradients(device):
        torch.manual_seed(0)
        layer = nn.Conv2d(1, 3, 3, padding=1).to(device)
        x = matrix_46[None, None].to(device).requires_grad_()
        layer(x).square().sum().backward()
        return [g.cpu() for g in (x.grad, layer.weight.grad, layer.bias.grad)]

    for ours, cpu in zip(gradients(NPU), gradients("cpu")):
        assert torch.equal(ours, cpu)


def test_moving_a_module_keeps_its_parameters():
    layer = nn.Linear(2, 2)
    weight = layer.weight
    assert layer.npu(1).weight is weight and weight.device == torch.device("npu:1")


@pytest.mark.parametrize("place", [None, "cpu", "npu:0", "npu:1"])
def test_saved_tensors_go_where_they_are_mapped(place, matrix_46):
    file = io.BytesIO()
    torch.save({"x": matrix_46.to(NPU)}, file)
    file.seek(0)
    x = torch.load(file, map_location=place, weights_only=True)["x"]
    assert x.device == torch.device(place or "npu:0") and torch.equal(x.cpu(), matrix_46)


def test_pickled_tensors_come_back(matrix_46):
    assert torch.equal(pickle.loads(pickle.dumps(matrix_46.to(NPU))).cpu(), matrix_46)


def test_memory_is_counted_and_given_back():
    gc.collect()
    before = torch.npu.memory_allocated(NPU)
    torch.npu.reset_peak_memory_stats(NPU)
    x = torch.zeros(1000, device=NPU)
    assert torch.npu.memory_allocated(NPU) == before + 4000
    del x
    assert torch.npu.memory_allocated(NPU) == before
    assert torch.npu.max_memory_allocated(NPU) == before + 4000
    free, total = torch.npu.mem_get_info(NPU)
    assert total - free == before


def test_autocast_takes_half_precision_where_torch_says():
    x, layer = torch.ones(2, 3, device=NPU), nn.Linear(3, 3).npu()
    with torch.autocast("npu", dtype=torch.float16):
        assert layer(x).dtype == torch.float16 and F.softmax(layer(x), 1).dtype == torch.float32
    with torch.npu.amp.autocast(dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_a_static_scaler_keeps_its_scale():
    weight = nn.Parameter(torch.ones(2, device=NPU))
    optimizer = torch.optim.SGD([weight], 1.0)
    for dynamic, expected in ((False, 8.0), (True, 4.0)):
        scaler = torch.npu.amp.GradScaler(init_scale=8.0, dynamic=dynamic)
        scaler.scale(weight.sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == expected and weight.tolist() == [1, 1]
        optimizer.zero_grad()


# NpuFusedSGD: torch's arithmetic, and what the real one cannot.


def _fused(emulated_npu, *parameters):
    return emulated_npu.optim.NpuFusedSGD(list(parameters), lr=0.5, momentum=0.9, weight_decay=0.1)


def _after_steps(device, make, steps=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5))
    net.to(device)
    optimizer = make(net.parameters())
    for i in range(steps):
        images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(i)).to(device)
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().cpu() for p in net.parameters()], optimizer


def test_the_fused_sgd_s_update_is_sgd_s(emulated_npu):
    plain, _ = _after_steps("cpu", lambda params: torch.optim.SGD(params, 0.1, 0.9, weight_decay=0.1))
    fused, optimizer = _after_steps(NPU, lambda params: emulated_npu.optim.NpuFusedSGD(params, 0.1, 0.9, 0.0, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(fused, plain))
    assert all(p.grad.count_nonzero() == 0 for p in optimizer.param_groups[0]["params"])  # kept, and zero


def test_the_fused_sgd_moves_everything_into_one_piece_of_memory(emulated_npu):
    _, optimizer = _after_steps(NPU, lambda params: emulated_npu.optim.NpuFusedSGD(params, 0.1, 0.9))
    params = optimizer.param_groups[0]["params"]
    for tensors in (params, [p.grad for p in params], [optimizer.state[p]["momentum_buffer"] for p in params]):
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1


def _with_gradient(t):
    parameter = nn.Parameter(t)
    parameter.grad = torch.ones_like(t)
    return parameter


@pytest.mark.parametrize(
    "replace",
    [
        lambda p: setattr(p, "grad", torch.full_like(p, 7.0)),
        lambda p: setattr(p, "grad", None),
        lambda p: setattr(p, "data", torch.full_like(p, 7.0)),
    ],
    ids=["gradient replaced", "gradient dropped", "parameter replaced"],
)
def test_the_fused_sgd_goes_on_with_its_old_memory_without_a_word(emulated_npu, replace):
    parameter, kept = (_with_gradient(torch.ones(3, device=NPU)) for _ in range(2))
    optimizers = [_fused(emulated_npu, p) for p in (parameter, kept)]
    for optimizer in optimizers:
        optimizer.step()
    old = parameter.detach()
    replace(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(old.cpu(), kept.detach().cpu())


def test_the_fused_sgd_s_other_restrictions(emulated_npu):
    with pytest.raises(ValueError, match="set_to_none"):
        _fused(emulated_npu, _with_gradient(torch.ones(3, device=NPU))).zero_grad(set_to_none=True)
    with pytest.raises(TypeError, match="bfloat16"):
        _fused(emulated_npu, _with_gradient(torch.ones(3, device=NPU, dtype=torch.bfloat16))).step()
    with pytest.raises(RuntimeError, match="must be on NPU"):
        _fused(emulated_npu, _with_gradient(torch.ones(3))).step()
