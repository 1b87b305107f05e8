"""Training steps on the emulated NPU beside the same steps on the CPU."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from small_training import SmallTraining

from checkpoint import store
from optim import load_optimizer_state, optimizer_state, sgd_kind
from runtime.device import Device
from runtime.loss_scale import LossScaling
from runtime.precision import POLICIES

pytestmark = pytest.mark.npu

NPU, CPU = Device("npu"), Device("cpu")


@pytest.fixture(scope="module")
def plain_cpu():
    """Twenty fp32 steps on the CPU."""
    return SmallTraining(CPU).run(20)


def _same_weights(one, other):
    return all(torch.equal(t, other[name]) for name, t in one.items())


@pytest.mark.parametrize("sgd", ["npu_fused_sgd", "sgd_foreach", "sgd_plain"])
def test_fp32_steps_are_bit_identical_to_the_cpu_s(plain_cpu, sgd):
    npu = SmallTraining(NPU, sgd=sgd).run(20)
    assert npu.losses == plain_cpu.losses and len(set(npu.losses)) == 20
    assert _same_weights(npu.weights(), plain_cpu.weights())
    assert torch.equal(npu.head.centers.weight.cpu(), plain_cpu.head.centers.weight)


@pytest.mark.parametrize("net_mode, margin", [("mobilefacenet", "cosface"), ("iresnet", "arcface_straight_through")])
def test_other_nets_and_margins_are_too(net_mode, margin):
    npu, cpu = (SmallTraining(device, net_mode=net_mode, margin=margin).run(3) for device in (NPU, CPU))
    assert npu.losses == cpu.losses and _same_weights(npu.weights(), cpu.weights())
    assert torch.equal(npu.embed(), cpu.embed())


def test_clipping_too():
    npu, cpu = (SmallTraining(device).run(3, max_norm=0.5) for device in (NPU, CPU))
    assert npu.losses == cpu.losses and _same_weights(npu.weights(), cpu.weights())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "O0"])
def test_half_precision_learns_the_batches(policy):
    npu = SmallTraining(NPU, policy, dropout=0.0).run(20)
    exact = SmallTraining(CPU, dropout=0.0).run(1)
    # The first loss differs by the rounding of one forward pass; the logits' scale is 64.
    assert 0 < abs(npu.losses[0] - exact.losses[0]) < 64 * torch.finfo(POLICIES[policy].compute).eps
    assert npu.precision.skipped == 0 and max(npu.losses[-4:]) < 0.05 * npu.losses[0]


@pytest.mark.parametrize("policy", ["bf16", "bf16_master"])
def test_bfloat16_steps_are_bit_identical_to_the_cpu_s(policy):
    # In fp16 they are not: there a CPU's convolution sums up in fp16, an NPU's in fp32.
    npu, cpu = (SmallTraining(device, policy).run(5) for device in (NPU, CPU))
    assert npu.losses == cpu.losses and _same_weights(npu.weights(), cpu.weights())


@pytest.mark.parametrize("policy", ["O1", "O2", "fp16"])
def test_an_overflow_skips_the_step(policy):
    scaling = LossScaling(init_loss_scaling=2.0**40, decr_every_n_nan_or_inf=1, decr_ratio=2.0**-8)
    npu = SmallTraining(NPU, policy, scaling=scaling)
    before = npu.weights()
    npu.step()
    after = npu.weights()
    assert npu.precision.skipped == 1 and npu.precision.scale == 2.0**32
    trained = [name for name, _ in npu.net.named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in trained)
    npu.run(6)
    assert 1 < npu.precision.skipped < 6 and npu.precision.scale == 2.0 ** (40 - 8 * npu.precision.skipped)
    assert all(map(math.isfinite, npu.losses))


@pytest.mark.parametrize("mark", ["is_fused_optimizer", "is_npu_fused_optimizer"])
def test_the_fused_sgd_of_every_version_takes_the_plain_one_s_steps(plain_cpu, emulated_npu, monkeypatch, mark):
    """torch_npu 1.8.1, 1.11 and 2.0.1 call their mark by the second name. Cut off from its gradients, it would go on
    with those of the first step."""
    monkeypatch.setattr(emulated_npu.optim.NpuFusedSGD, "MARK", mark)
    npu = SmallTraining(NPU, sgd="npu_fused_sgd").run(6)
    assert hasattr(npu.optimizer, mark) and npu.losses == plain_cpu.losses[:6]
    assert sgd_kind(npu.optimizer) == "npu_fused_sgd"


def test_a_chip_that_saturates(npu_python):
    """It has no inf and no nan: what is not finite shows as a flag of the chip, which nothing that the program does in
    a good step may raise, and nothing before the step may leave behind."""
    code = """
import torch
from runtime.device import parse_device
from runtime.loss_scale import LossScaling
from small_training import SmallTraining
npu = parse_device("npu")
assert npu.saturates
for policy in ("O0", "O2", "fp16"):
    training = SmallTraining(npu, policy).run(1)
    torch.full((1,), 65504.0).npu().half().mul_(2)  # what a verification may do between two steps
    training.run(2)
    assert training.precision.skipped == 0, (policy, training.precision.skipped)
    assert torch.npu.utils.get_npu_overflow_flag() is False

for policy in ("O1", "O2", "fp16"):
    scaling = LossScaling(init_loss_scaling=2.0**40, decr_every_n_nan_or_inf=1)
    training = SmallTraining(npu, policy, scaling=scaling)
    before = training.weights()["body.0.res_layer.1.weight"].clone()
    training.step()
    assert training.precision.skipped == 1 and training.precision.scale == 2.0**39
    assert torch.equal(before, training.weights()["body.0.res_layer.1.weight"])

static = SmallTraining(npu, "O2")
static.forward = npu.compiled(static.net)  # recording takes gradients of what stands in fresh memory
assert static.run(2).precision.skipped == 0
"""
    done = npu_python("-c", code, NPU_SIM_SATURATE="1", NPU_SIM_NAME="Ascend910A")
    assert done.returncode == 0, done.stderr


def test_fp32_is_fp32_on_the_first_chips_too(npu_python, plain_cpu):
    code = """
from runtime.device import parse_device
from small_training import SmallTraining
npu = parse_device("npu")
losses = SmallTraining(npu).run(3).losses
print(npu.tune(), losses)
"""
    done = npu_python("-c", code, NPU_SIM_FP32_AS_FP16="1", NPU_SIM_NAME="Ascend910A")
    said = {"tf32": False, "autotune": False, "precision_mode": "must_keep_origin_dtype", "internal_format": False}
    assert done.stdout.strip() == f"{said} {plain_cpu.losses[:3]}", done.stderr


def _static(monkeypatch, policy, **options):
    """Timing chooses between replay and eager on a real machine; in these tests replay is taken."""
    training = SmallTraining(NPU, policy, **options)
    training.forward = NPU.compiled(training.net)
    seconds = itertools.cycle([2.0, 1.0])
    monkeypatch.setattr(training.forward, "_seconds", lambda run, images: run(images) is None or next(seconds))
    return training


@pytest.mark.parametrize("sgd", ["npu_fused_sgd", "sgd_foreach"])
@pytest.mark.parametrize("policy", ["O0", "O1", "O2"])
def test_static_replays_a_recorded_step_and_takes_the_eager_one_s_steps(monkeypatch, policy, sgd):
    """Where torch_npu has no compiler. The fused SGD moves the weights (O2: batch norm's) at its first step, away from
    what was recorded: then it is recorded anew, which is one trial more. O1's casts must not come from a cache."""
    eager, training = SmallTraining(NPU, policy, sgd=sgd).run(4), _static(monkeypatch, policy, sgd=sgd)
    before = torch.npu.replays
    training.run(4)
    assert training.losses == eager.losses and _same_weights(training.weights(), eager.weights())
    assert torch.npu.replays == before + 5 + (sgd == "npu_fused_sgd")


def test_static_adds_up_gradients(monkeypatch):
    """A replay hands its gradients out in memory that the next one writes to."""

    def accumulated(training):
        for _ in range(2):
            training.precision.backward(training.forward(training.images()).float().square().mean())
        return [p.grad.float().cpu() for p in training.net.parameters()]

    eager = accumulated(SmallTraining(NPU, "O2"))
    assert all(torch.equal(a, b) for a, b in zip(accumulated(_static(monkeypatch, "O2")), eager))


def test_static_takes_the_quicker_of_replay_and_eager(caplog):
    training = SmallTraining(NPU)
    training.forward = NPU.compiled(training.net)
    with caplog.at_level("INFO"):
        training.step()
    assert re.search(r"static: forward and backward take [\d.]+ ms replayed and [\d.]+ ms eager", caplog.text)
    assert training.losses == SmallTraining(CPU).run(1).losses


def test_static_without_compiler_and_graphs_is_one_line(npu_python):
    code = """
from runtime.device import parse_device
from runtime.errors import DeviceError
import torch
try:
    parse_device("npu").compiled(torch.nn.Linear(2, 2))
except DeviceError as error:
    print(error)
"""
    done = npu_python("-c", code, NPU_SIM_GRAPHS="0")
    assert done.stdout == (
        "static mode (torch.compile) on npu:0: torch.compile needs torch_npu._inductor (torch_npu 2.6 or newer), and "
        "NPU graphs need torch_npu 2.5; install them, or leave --static out\n"
    ), done.stderr


def _checkpoint(training):
    return {
        "model": training.precision.model_state(training.net),
        "head": training.head.local_state(),
        "optimizer": optimizer_state(training.optimizer, training.precision.names),
        "precision": training.precision.state_dict(),
        "steps": training.steps,
    }


def _continued(path, device, policy="O0"):
    state = store.load_pth(path)
    training = SmallTraining(device, policy, dropout=0.0)
    training.precision.load_model_state(training.net, state["model"])
    training.head.load_local_state(state["head"])
    load_optimizer_state(training.optimizer, state["optimizer"], training.precision.names)
    training.precision.load_state_dict(state["precision"])
    training.steps = state["steps"]
    return training


def test_a_checkpoint_moves_from_npu_to_cpu_and_back(tmp_path):
    """Three stretches on three devices are one training, to the bit."""
    whole = SmallTraining(CPU, dropout=0.0).run(9)
    first = SmallTraining(NPU, dropout=0.0).run(3)
    store.save_pth(tmp_path / "1.pth", _checkpoint(first))
    second = _continued(tmp_path / "1.pth", CPU).run(3)
    store.save_pth(tmp_path / "2.pth", _checkpoint(second))
    third = _continued(tmp_path / "2.pth", NPU).run(3)
    assert first.losses + second.losses + third.losses == whole.losses
    assert _same_weights(third.weights(), whole.weights())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_checkpoint_of_o2_continues_under_every_policy(tmp_path, policy):
    first = SmallTraining(NPU, "O2").run(2)
    store.save_pth(tmp_path / "1.pth", _checkpoint(first))
    second = _continued(tmp_path / "1.pth", NPU, policy)
    weights, exact = second.weights(), first.weights()
    if policy == "fp16":  # it has no masters: its half weights are rounded, and batch norm stays as it is
        exact = {name: t if _is_batch_norm(second.net, name) else t.half().to(t.dtype) for name, t in exact.items()}
    assert _same_weights(weights, exact) and all(t.dtype == exact[name].dtype for name, t in weights.items())
    assert all(map(math.isfinite, second.run(2).losses))


def _is_batch_norm(net, name):
    return isinstance(net.get_submodule(name.rpartition(".")[0]), torch.nn.modules.batchnorm._BatchNorm)
