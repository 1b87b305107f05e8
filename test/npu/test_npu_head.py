"""The head on the emulated NPU is the head on the CPU, bit for bit, in every form of its state."""

from __future__ import annotations

import pytest
import torch

from head.head import MarginHead

pytestmark = pytest.mark.npu

CASES = {
    "plain": {},
    "reference": dict(op="reference"),
    "sampled": dict(sample_rate=0.2),
    "sampled, dense optimizer": dict(sample_rate=0.3, update_rows="all"),
    "adaface": dict(margin="adaface"),
    "softmax with bias": dict(margin="linear_softmax"),
    "filtered": dict(interclass_filtering_threshold=0.3),
    "bf16": dict(dtype=torch.bfloat16),
    "bf16 + int8": dict(dtype=torch.bfloat16, momentum_dtype=torch.int8, sample_rate=0.3),
    "momentum on the host": dict(momentum_on_host=True, sample_rate=0.3),
    "bf16 + host bf16": dict(dtype=torch.bfloat16, momentum_dtype=torch.bfloat16, momentum_on_host=True),
}


def train(device, emb_dtype=torch.float32, scale=1.0, **kw):
    head = MarginHead(300, 16, device=device, top5=True, operand=emb_dtype, **kw)
    history = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        emb_BD = torch.randn(8, 16, generator=generator).to(device=device, dtype=emb_dtype).requires_grad_()
        label_B = torch.randint(300, (8,), generator=generator).to(device)
        head.prepare(label_B)
        out = head(emb_BD, label_B)
        (out.loss * scale).backward()
        head.step(0.1, 1 / scale, head.found_inf())
        history.append((float(out.loss), int(out.correct), int(out.correct_top5)))
    return history, head.centers.weight.cpu(), emb_BD.grad.cpu()


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(name):
    here, there = train(torch.device("cpu"), **CASES[name]), train(torch.device("npu:0"), **CASES[name])
    assert here[0] == there[0]
    assert torch.equal(here[1], there[1]) and torch.equal(here[2], there[2])


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_half_precision_operands(scale):
    """float16 products, as the NPU gives them: within their rounding of the exact ones, and no overflow when scaled."""
    exact = train(torch.device("cpu"), torch.float16, scale)
    low = train(torch.device("npu:0"), torch.float16, scale)
    for (loss, *_), (loss_low, *_) in zip(exact[0], low[0]):
        assert abs(loss - loss_low) < 64 * 2.0**-10
    assert torch.isfinite(low[2]).all() and (exact[1] - low[1]).abs().max() < 0.02


def test_a_bad_batch_moves_nothing_without_asking_the_host():
    head = MarginHead(300, 16, device=torch.device("npu:0"))
    before_CD = head.centers.weight.clone()
    emb_BD = torch.full((4, 16), float("inf"), device="npu:0").requires_grad_()
    head(emb_BD, torch.arange(4, device="npu:0")).loss.backward()
    head.step(0.1, found_inf=head.found_inf())
    assert torch.equal(head.centers.weight.cpu(), before_CD.cpu())
    assert not torch.isfinite(emb_BD.grad).any()


def test_nothing_in_a_good_step_raises_a_saturating_chip_s_flag_and_an_unknown_label_does(npu_python):
    code = """
import test_npu_head, torch, torch_npu
from head.head import MarginHead
from head.ops import LossSpec, Rows, find_op
from runtime.dist import World
flag = torch.npu.utils.get_npu_overflow_flag
torch.npu.clear_npu_overflow_flag()
for name, options in test_npu_head.CASES.items():
    test_npu_head.train(torch.device("npu:0"), **options)
    assert not flag(), name

class Two(World):
    def all_reduce_(self, t, op="sum"):
        return t
    def all_gather(self, t):
        return torch.cat([t, t])

rows = Rows(torch.randn(30, 16).npu(), torch.ones(30).npu())
spec = LossSpec(lambda target_B, norm_B: (target_B, torch.ones_like(target_B)))
first = find_op("reference", torch.device("npu")).first
first(torch.randn(4, 16).npu(), rows, torch.arange(4).npu(), spec, Two(size=2), True)
assert not flag(), "two ranks"
head = MarginHead(300, 16, device=torch.device("npu:0"))
labels = torch.tensor([1, 2, 300, 4]).npu()
head.prepare(labels)
head(torch.randn(4, 16).npu(), labels)
assert flag()
"""
    done = npu_python("-c", code, NPU_SIM_SATURATE="1")
    assert done.returncode == 0, done.stderr


def test_a_step_keeps_off_the_chip_s_slow_cpu(emulated_npu):
    """The AICPU and the host's CPU answer some operators in hundreds of microseconds a call and more, whatever their
    size: none in a step of any storage, sampler and update."""
    import npu_sim

    assert npu_sim.slow({"aten::__rshift__": {"Int"}, "aten::cumsum": {"Float"}}) == {"aten::__rshift__": {"Int"}}
    for name, options in CASES.items():
        npu_sim.forget_operators()
        train(torch.device("npu:0"), **options)
        assert not npu_sim.slow(npu_sim.operators()), name


def test_host_momentum_leaves_the_other_npus_alone(npu_python):
    """A thread has no device until it sets one; its first question opens NPU 0, which belongs to another rank."""
    code = """
import test_npu_head, torch, torch_npu
torch.npu.set_device(1)
test_npu_head.train(torch.device("npu:1"), **test_npu_head.CASES["momentum on the host"])
assert torch.ops.npu_sim.opened() == [1], torch.ops.npu_sim.opened()
"""
    done = npu_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kw", [{}, dict(sample_rate=0.3), dict(dtype=torch.bfloat16, momentum_dtype=torch.int8)])
def test_no_step_waits_for_the_device(kw):
    """What asks a device for a value is counted: nothing may, with the labels in host memory."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"):
                asked.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    head = MarginHead(300, 16, device=torch.device("npu:0"), operand=torch.float16, **kw)
    emb_BD = torch.randn(8, 16).to("npu:0").requires_grad_()
    labels_B = torch.arange(8)
    scale = torch.tensor(1 / 128, device="npu:0")

    def step():
        head.prepare(labels_B)
        head(emb_BD, on_device_B).loss.backward()
        head.step(0.1, scale, head.found_inf())

    on_device_B = labels_B.to("npu:0")
    step()  # the first one looks what the device has
    with Counting():
        # the labels in host memory are looked at there, twice: smallest and largest
        step()
    assert asked.count("_local_scalar_dense") == len(asked) == 2, asked
