"""runtime/precision.py: the policies, one step, the scale, overflow, checkpoints between policies."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from workers_precision import CPU, STATIC, AnyType, Head, Net, Run, same

import optim
from runtime.device import Cpu, Device
from runtime.dist import ALONE
from runtime.divergence import first_non_finite
from runtime.errors import DeviceError, PrecisionError
from runtime.loss_scale import LossScale, LossScaling, parse_loss_scale
from runtime.precision import (
    POLICIES,
    Precision,
    make_precision,
    unscale_and_check_,
)

pytestmark = pytest.mark.core
OLD_TORCH = int(torch.__version__.split(".")[0]) < 2
# torch 1.8 has no autocast on cpu; the others run there with half products that its cpu happens to have
RUNNABLE = [n for n, p in POLICIES.items() if not (OLD_TORCH and p.autocast)]
SCALED = [n for n in RUNNABLE if POLICIES[n].scaled]
WITH_MASTERS = ["O2", "bf16_master"]
KINDS = ["sgd_plain", *sorted(Device("cpu").fused_optimizers())]


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_the_policies_by_name():
    assert list(POLICIES) == ["O0", "O1", "O2", "fp16", "bf16", "bf16_master"]
    compute = {name: str(policy.compute).replace("torch.", "") for name, policy in POLICIES.items()}
    assert compute == {"O0": "float32", "O1": "float16", "O2": "float16", "fp16": "float16", "bf16": "bfloat16",
                       "bf16_master": "bfloat16"}  # fmt: skip


def test_an_unknown_policy_or_backend_names_the_choices():
    with pytest.raises(PrecisionError) as caught:
        Precision("O5", CPU)
    assert one_line(caught) == "opt_level 'O5': choose from O0, O1, O2, fp16, bf16, bf16_master"
    with pytest.raises(PrecisionError) as caught:
        make_precision("O2", CPU, amp_backend="cuda")
    assert one_line(caught) == "amp_backend 'cuda': choose from auto, native, apex"


def test_loss_scale_is_a_number_or_dynamic():
    assert parse_loss_scale("128.0") == LossScaling(init_loss_scaling=128.0, use_dynamic_loss_scaling=False)
    assert parse_loss_scale(1024) == LossScaling(init_loss_scaling=1024.0, use_dynamic_loss_scaling=False)
    assert parse_loss_scale("dynamic") == LossScaling()
    six = {"init_loss_scaling": 1.0, "incr_every_n_steps": 10, "decr_every_n_nan_or_inf": 3, "incr_ratio": 4.0,
           "decr_ratio": 0.25, "use_dynamic_loss_scaling": True}  # fmt: skip
    assert parse_loss_scale("dynamic", **six) == LossScaling(**six)
    assert parse_loss_scale("128.0", **six).init_loss_scaling == 128.0


@pytest.mark.parametrize("text", ["0", "0.0", "-128", "nan", "inf", "static", "", None])
def test_any_other_loss_scale_is_one_line(text):
    with pytest.raises(PrecisionError) as caught:
        parse_loss_scale(text)
    assert one_line(caught) == f"loss_scale '{text}': give a positive number such as 128.0, or 'dynamic'"


@pytest.mark.parametrize(
    "name, value",
    [("init_loss_scaling", 0), ("init_loss_scaling", -1.0), ("incr_every_n_steps", 0), ("decr_every_n_nan_or_inf", 0),
     ("incr_ratio", 1.0), ("decr_ratio", 1.0), ("decr_ratio", 0.0)],
)  # fmt: skip
def test_each_of_the_six_parameters_is_checked(name, value):
    with pytest.raises(PrecisionError, match=f"^{name} {value}: give "):
        LossScaling(**{name: value})


class OnlyFp32(Cpu):
    def supports(self, dtype):
        return dtype in (torch.float32, torch.float64)


class NoBf16(Cpu):
    def supports(self, dtype):
        return dtype != torch.bfloat16


@pytest.mark.parametrize("name", [n for n in POLICIES if n != "O0"])
def test_a_type_that_the_device_lacks_is_one_line_with_the_cure(name):
    with pytest.raises(DeviceError) as caught:
        Precision(name, OnlyFp32("cpu"))
    text = one_line(caught)
    assert text.startswith(f"opt_level {name} computes in ")
    assert "cpu cannot train" in text and "choose from O0 " in text
    Precision("O0", OnlyFp32("cpu"))


def test_bf16_where_there_is_only_fp16():
    with pytest.raises(DeviceError, match="^opt_level bf16 computes in bfloat16.* choose from O0, O1, O2, fp16 here"):
        Precision("bf16", NoBf16("cpu"))


def test_this_machines_cpu():
    """torch 2 trains in half on cpu, slowly; torch 1.8 has no half convolution or batch norm there and says so."""
    if not OLD_TORCH:
        for name in POLICIES:
            Precision(name, Device("cpu"))
        return
    Precision("O0", Device("cpu"))
    for name in ("O1", "O2", "fp16", "bf16", "bf16_master"):
        with pytest.raises(DeviceError) as caught:
            Precision(name, Device("cpu"))
        assert "choose from O0 here" in one_line(caught)


# --- what is kept in which type --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_batch_norm_stays_fp32_and_the_rest_follows_the_policy(name):
    run = Run(name)
    run.step(1)
    weights = POLICIES[name].weights
    for key, value in run.model.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if key.startswith("bn.") else weights), key
    assert run.precision.cast_input(torch.zeros(1, 6)).dtype == weights
    optimised = {name: p.dtype for name, p in run.precision.names.items()}
    assert list(optimised) == [name for name, _ in run.model.named_parameters()]
    own = torch.float32 if POLICIES[name].masters else weights
    assert optimised == {key: torch.float32 if key.startswith("bn.") else own for key in optimised}


@pytest.mark.parametrize("name", RUNNABLE)
def test_inference_casts_and_optimises_nothing(name):
    model, precision = Net().eval(), Precision(name, CPU)
    assert precision.prepare(model) is None
    with precision.autocast(), torch.no_grad():
        out_B4 = model(precision.cast_input(torch.ones(2, 6)))
    assert out_B4.dtype == POLICIES[name].weights  # autocast adds the fp32 shift at the end
    assert {v.dtype for v in precision.model_state(model).values()} == {torch.float32, torch.int64}


@pytest.mark.skipif(OLD_TORCH, reason="half convolutions on cpu need torch 2")
@pytest.mark.parametrize("name", POLICIES)
def test_a_convolutional_net_trains(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(8 * 36, 4),
                          nn.BatchNorm1d(4))  # fmt: skip
    precision = Precision(name, Device("cpu"), scaling=STATIC)
    groups = optim.parameter_groups(model, "ir")
    optimizer = precision.prepare(model, lambda g: optim.make_sgd(g, 0.05, 0.9, Device("cpu")), groups)
    x, y = torch.randn(16, 3, 8, 8), torch.randn(16, 4)
    losses = []
    for _ in range(15):
        with precision.autocast():
            out = model(precision.cast_input(x))
        losses.append((out.float() - y).pow(2).mean())
        precision.backward(losses[-1])
        precision.step(optimizer)
    assert precision.skipped == 0 and losses[-1] < 0.7 * losses[0]


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_MASTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_sgd_on_fp32_masters_from_half_gradients(name, kind):
    """O2's truth, in float64: m = 0.9 m + (g / scale + wd w), w = w - lr m, from the half gradients g."""
    run = Run(name, kind=kind)
    lr, scale = 0.125, run.precision.scale
    assert scale == (128.0 if name == "O2" else 1.0)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    truth = {key: (w.detach().double(), torch.zeros(w.shape).double()) for key, w in run.precision.names.items()}
    bound = {key: w.detach().abs().double() for key, w in run.precision.names.items()}
    for seed in range(1, 6):
        run.precision.backward(run.loss(seed))
        for key, p in run.model.named_parameters():
            assert p.grad.dtype == (torch.float32 if key.startswith("bn.") else POLICIES[name].weights)
            weight, momentum = truth[key]
            momentum = 0.9 * momentum + (p.grad.double() / scale + decay[id(run.precision.names[key])] * weight)
            truth[key] = weight - lr * momentum, momentum
            bound[key] = bound[key] + momentum.abs() + weight.abs()
        run.precision.step(run.optimizer, head=run.head)
        for key, p in run.model.named_parameters():
            master = run.precision.names[key].detach()
            assert master.dtype == torch.float32
            # a handful of fp32 roundings a step, of numbers no larger than the bound
            assert ((master.double() - truth[key][0]).abs() <= 4 * 2.0**-24 * bound[key]).all(), key
            assert torch.equal(p.detach(), master.to(p.dtype)), key  # the half weight is the master, rounded


def test_O0_is_plain_sgd_bit_for_bit():
    run = Run("O0", kind="sgd_plain")
    torch.manual_seed(0)
    model, head = Net(), Head()
    optimizer = torch.optim.SGD(optim.parameter_groups(model, "ir", 5e-4), lr=0.125, momentum=0.9)
    for seed in range(4):
        loss = run.loss(seed)
        run.precision.backward(loss)
        run.precision.step(run.optimizer, head=run.head)
        generator = torch.Generator().manual_seed(seed)
        x, target = torch.randn(16, 6, generator=generator), torch.randn(16, 5, generator=generator)
        plain = head.loss(model(x), target)
        optimizer.zero_grad()
        plain.backward()
        optimizer.step()
        head.step(0.125, 1.0, 0.0)
        assert torch.equal(loss, plain)
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), model.parameters()))


@pytest.mark.parametrize("name", RUNNABLE)
def test_gradients_accumulate_over_backward_calls(name):
    """Two halves of one loss: the same step within the roundings of one sum in the gradients' type."""
    whole, halves = Run(name), Run(name)
    whole.step(3)
    halves.precision.backward(halves.loss(3) / 2)
    halves.precision.backward(halves.loss(3) / 2)
    halves.precision.step(halves.optimizer, head=halves.head)
    eps = torch.finfo(POLICIES[name].weights).eps
    for key, value in whole.everything().items():
        assert (halves.everything()[key].float() - value.float()).abs().max() <= 4 * eps, key


@pytest.mark.parametrize("name", RUNNABLE)
def test_clipping_sees_the_true_gradient(name):
    """The norm is of the unscaled gradient of the backbone: after it, the momentum has at most that norm."""
    free, clipped = Run(name), Run(name)
    free.step(3), clipped.step(3, max_norm=0.01)

    def momentum(run):
        state = optim.optimizer_state(run.optimizer, run.precision.names)["state"]
        decayed = {id(p) for p in run.optimizer.param_groups[0]["params"]}
        torch.manual_seed(0)
        start = dict(Net().named_parameters())
        parts = [v["momentum_buffer"] - 5e-4 * start[k].detach() * (id(run.precision.names[k]) in decayed)
                 for k, v in state.items()]  # fmt: skip
        return torch.cat([part.flatten() for part in parts])

    assert momentum(free).norm() > 0.05
    half = POLICIES[name].weights != torch.float32 and not POLICIES[name].masters
    assert float(momentum(clipped).norm()) == pytest.approx(0.01, rel=5e-3 if half else 1e-4)
    assert torch.nn.functional.cosine_similarity(momentum(free), momentum(clipped), dim=0) > 1 - 1e-3


def test_the_head_gets_its_rate_and_the_inverse_scale():
    run = Run("O2")
    run.step(1)
    run.step(2, lr=0.5)
    assert run.head.steps == [(0.125, 1 / 128, 0.0), (0.5, 1 / 128, 0.0)]
    assert run.head.weight.grad is None


@pytest.mark.parametrize("name", RUNNABLE)
def test_no_gradient_outlives_the_step(name):
    run = Run(name)
    run.step(1)
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.skipif(OLD_TORCH, reason="the fused SGD needs torch 2")
def test_the_host_waits_once_a_step_or_never():
    """Every read of a tensor's value by the host is one _local_scalar_dense."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    for kind, expected in (("sgd_fused", 0), ("sgd_foreach", 1), ("sgd_plain", 1)):
        run = Run("O2", LossScaling(), kind, patience=4)
        run.step(0)
        for _ in range(2):
            run.precision.backward(run.loss(1))
            with Reads() as reads:
                run.precision.step(run.optimizer, lr=0.125, max_norm=1.0)
            assert reads.count == expected, kind
        run.precision.backward(run.loss(1))
        with Reads() as reads:
            run.precision.step(run.optimizer, lr=0.125)
        assert reads.count == expected + 1  # the fourth step looks whether training is stuck


# --- the scale -------------------------------------------------------------------------------------------------------


def plscs_scale(rules, founds):
    """PLSC's six parameters in plain Python: the scale after each step."""
    scale, good, bad, scales = rules.init_loss_scaling, 0, 0, []
    for found in founds:
        good, bad = (0, bad + 1) if found else (good + 1, 0)
        if bad == rules.decr_every_n_nan_or_inf:
            scale, bad = max(scale * rules.decr_ratio, min(1.0, rules.init_loss_scaling)), 0
        if good == rules.incr_every_n_steps:
            scale, good = scale * rules.incr_ratio, 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize(
    "rules",
    [LossScaling(init_loss_scaling=8.0, incr_every_n_steps=3),
     LossScaling(init_loss_scaling=1.0, incr_every_n_steps=5, decr_every_n_nan_or_inf=1, incr_ratio=4.0),
     LossScaling(init_loss_scaling=64.0, incr_every_n_steps=2, decr_every_n_nan_or_inf=3, decr_ratio=0.125),
     LossScaling(init_loss_scaling=0.25, incr_every_n_steps=4)],
)  # fmt: skip
@pytest.mark.parametrize("share_bad", [0.1, 0.5, 0.9])
def test_the_scale_follows_the_six_parameters(rules, share_bad):
    founds = (torch.rand(200, generator=torch.Generator().manual_seed(1)) < share_bad).float()
    scale, scales = LossScale(rules, torch.device("cpu")), []
    for found in founds:
        scale.adjust(found)
        scales.append(float(scale.value))
    assert scales == plscs_scale(rules, founds.tolist())
    assert len(set(scales)) > 1 or share_bad == 0.9  # one bad step after another keeps a small scale where it is


def test_the_scale_does_not_grow_to_inf_and_a_static_one_does_not_move():
    scale = LossScale(LossScaling(init_loss_scaling=2.0**127, incr_every_n_steps=1), torch.device("cpu"))
    scale.adjust(torch.tensor(0.0))
    assert float(scale.value) == 2.0**127
    scale = LossScale(STATIC, torch.device("cpu"))
    for found in (0.0, 1.0, 1.0, 1.0):
        scale.adjust(torch.tensor(found))
    assert float(scale.value) == 128.0


@pytest.mark.skipif(not hasattr(getattr(torch, "amp", None), "GradScaler"), reason="torch.amp.GradScaler needs 2.3")
def test_dynamic_scaling_equals_torchs():
    """Weights, scale and skips over 40 steps, some of them bad, where decr_every_n_nan_or_inf is 1 as in torch."""
    rules = LossScaling(init_loss_scaling=2.0**10, incr_every_n_steps=3, decr_every_n_nan_or_inf=1)
    run = Run("O1", rules, "sgd_plain")
    torch.manual_seed(0)
    model, head = Net(), Head()
    optimizer = torch.optim.SGD(optim.parameter_groups(model, "ir", 5e-4), lr=0.125, momentum=0.9, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    bad = {0, 4, 5, 12, 13, 14, 30}
    for seed in range(40):
        factor = float("inf") if seed in bad else 1.0
        run.precision.backward(run.loss(seed, factor))
        run.precision.step(run.optimizer)
        generator = torch.Generator().manual_seed(seed)
        x, target = torch.randn(16, 6, generator=generator), torch.randn(16, 5, generator=generator)
        with torch.autocast("cpu", dtype=torch.float16):
            emb = model(x)
        optimizer.zero_grad()
        scaler.scale(head.loss(emb, target) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        run.head.weight.grad = head.weight.grad = None
        assert run.precision.scale == scaler.get_scale()
        assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), model.parameters())), seed
    assert run.precision.skipped == len(bad)


def test_policies_without_fp16_do_not_scale():
    for name in ("O0", "bf16_master"):
        run = Run(name, LossScaling())
        assert run.precision.scale == 1.0
        run.step(0, factor=float("inf"))
        assert run.precision.scale == 1.0 and run.precision.skipped == 1


# --- overflow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_one_bad_element_is_found_and_the_rest_unscaled(bad, dtype):
    grads = [torch.full((3, 5), 64.0).to(dtype), torch.full((7,), -32.0).to(dtype)]
    assert float(unscale_and_check_(grads, torch.tensor(1 / 64))) == 0.0
    assert torch.equal(grads[0], torch.ones(3, 5).to(dtype)) and torch.equal(grads[1], torch.full((7,), -0.5).to(dtype))
    grads[1][6] = bad
    assert float(unscale_and_check_(grads, torch.tensor(1.0))) == 1.0


class Npu(AnyType):
    """An NPU by name, computing on the cpu."""

    @property
    def torch(self):
        return torch.device("cpu")

    def fused_sgd_class(self):
        return Restricted

    def fused_optimizers(self):
        return {"npu_fused_sgd"}

    def autocast(self, dtype, enabled=True):
        return Device("cpu").autocast(dtype, enabled)


@pytest.mark.parametrize("name, kind", [(n, k) for n, k in itertools.product(RUNNABLE, KINDS)
                                        if not (n == "fp16" and k == "sgd_fused")])  # fmt: skip
@pytest.mark.parametrize("where", ["backbone", "head"])
def test_an_overflow_anywhere_skips_everything(name, kind, where):
    """Also in the very first step, whose momentum torch's fused SGD would leave uninitialised."""
    run, clean = Run(name, kind=kind), Run(name, kind=kind)
    before = run.everything()
    run.precision.backward(run.loss(1))
    grad = run.head.weight.grad if where == "head" else run.model.out.weight.grad
    grad[0, 0] = float("inf")
    run.precision.step(run.optimizer, head=run.head, max_norm=1.0)
    assert same(before, run.everything()) and run.precision.skipped == 1
    assert run.head.steps[-1][-1] == 1.0 and run.head.weight.grad is None
    run.step(2), clean.step(2)
    assert same(run.everything(), clean.everything()) and run.precision.skipped == 1
    assert not same(before, run.everything())


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_is_too_large_comes_down_and_training_goes_on(name):
    run = Run(name, LossScaling(init_loss_scaling=2.0**40, decr_every_n_nan_or_inf=1))
    before = run.everything()
    for seed in range(40):
        run.step(seed)
    assert 0 < run.precision.skipped < 40 and run.precision.scale == 2.0 ** (40 - run.precision.skipped)
    assert not same(before, run.everything())
    assert all(torch.isfinite(value).all() for value in run.everything().values())


class Restricted(torch.optim.SGD):
    """NpuFusedSGD's rules: the memory of parameters and gradients that it has seen stays theirs."""

    is_params_grads_combined = True
    seen = None

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        super().zero_grad(set_to_none=False)

    def step(self, closure=None):
        tensors = [p for group in self.param_groups for p in group["params"]]
        memory = [(p.data_ptr(), p.grad.data_ptr()) for p in tensors]
        assert self.seen in (None, memory), "a parameter or its gradient was replaced"
        assert all(p.dtype in (torch.float32, torch.float16) for p in tensors)
        self.seen = memory
        return super().step(closure)


@pytest.mark.parametrize("name", [n for n in RUNNABLE if n != "fp16"])
def test_npu_fused_sgd_keeps_its_memory(name):
    run, plain = Run(name, device=Npu("npu")), Run(name, kind="sgd_plain")
    assert type(run.optimizer) is Restricted
    for seed in range(3):
        run.step(seed), plain.step(seed)
    run.step(9, factor=float("inf")), plain.step(9, factor=float("inf"))
    state = {key: value.clone() for key, value in run.precision.model_state(run.model).items()}
    momentum = optim.optimizer_state(run.optimizer, run.precision.names)
    run.precision.load_model_state(run.model, state)
    optim.load_optimizer_state(run.optimizer, momentum, run.precision.names)
    run.step(4), plain.step(4)
    assert same(run.everything(), plain.everything())


# --- stuck -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, scaling", [("O0", STATIC), ("O2", STATIC), ("O2", LossScaling(init_loss_scaling=2.0))])
def test_a_training_without_usable_gradients_stops_and_names_the_module(name, scaling):
    run = Run(name, scaling, patience=5)
    run.step(0)
    with torch.no_grad():
        run.precision.names["slope"][3] = run.model.slope[3] = float("nan")
    before = run.everything()
    with pytest.raises(PrecisionError) as caught:
        for seed in range(1, 30):
            run.step(seed, diagnose=lambda: first_non_finite(run.model, lambda: run.loss(0)))
    text = one_line(caught)
    assert "loss not finite for the last" in text and "first not finite: output of out (Linear) on rank 0" in text
    assert all(cure in text for cure in ("--lr", "--warmup_epochs", "--clip_grad_norm", "--loss_scale"))
    assert seed < 10 and not run.precision.finite()
    after = run.everything()
    assert all(torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before)


def test_a_scale_that_can_still_fall_is_not_stuck():
    run = Run("O2", LossScaling(init_loss_scaling=2.0**16, decr_every_n_nan_or_inf=2), patience=4)

    def overflow(seed):
        run.precision.backward(run.loss(seed))
        run.model.out.weight.grad[0, 0] = float("inf")
        run.precision.step(run.optimizer, head=run.head)

    for seed in range(32):
        overflow(seed)
        assert run.precision.finite()
    assert run.precision.scale == 1.0 and run.precision.skipped == 32
    with pytest.raises(PrecisionError, match="gradients not finite for the last 4 of 36 steps"):
        for seed in range(4):
            overflow(seed)


@pytest.mark.parametrize("name", RUNNABLE)
def test_what_is_not_finite_is_not_to_be_saved(name):
    """Under every policy: a loss that is not finite at once, gradients after a few steps in a row, weights at once."""
    run = Run(name)
    run.step(0)
    run.precision.divergence.check(at_end=True)
    assert run.precision.finite()
    run.step(1, factor=float("nan"))
    assert not run.precision.finite() and run.precision.skipped == 1
    run.step(2)
    assert run.precision.finite()
    for seed in range(3):
        assert run.precision.finite()
        run.precision.backward(run.loss(seed))
        run.head.weight.grad[0, 0] = float("inf")
        run.precision.step(run.optimizer, head=run.head)
    assert not run.precision.finite()
    with pytest.raises(PrecisionError, match="gradients not finite for the last 3 of 6 steps: try a lower --lr"):
        run.precision.divergence.check(at_end=True)
    run.step(3)
    assert run.precision.finite() and not run.precision.finite([torch.tensor([1.0, float("inf")])])
    with torch.no_grad():
        run.precision.names["slope"][0] = float("nan")
    assert not run.precision.finite()


def test_good_steps_between_bad_ones_are_not_stuck():
    run = Run("O2", patience=4)
    for seed in range(40):
        run.step(seed, factor=1.0 if seed % 4 == 3 else float("nan"))
    assert run.precision.skipped == 30


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Root(nn.Module):
    """Finite at 0, with an infinite slope there."""

    def forward(self, x):
        return torch.sqrt(x)


def filled(*weights):
    model = nn.Sequential(nn.Linear(2, 3), Square(), nn.Linear(3, 3), Root())
    with torch.no_grad():
        for index, weight in zip((0, 2), weights):
            model[index].weight.fill_(weight), model[index].bias.zero_()
    return model


def test_the_first_module_that_is_not_finite_is_named():
    x = torch.ones(4, 2)
    model = filled(1.0, 1.0)
    assert first_non_finite(model, lambda: model(x).sum()) == ""
    assert first_non_finite(model, lambda: model(x).sum() * float("nan")) == "the loss"
    assert first_non_finite(model, lambda: model(x * float("inf")).sum()) == "output of 0 (Linear)"
    model = filled(1e30, 1.0)
    assert first_non_finite(model, lambda: model(x).sum()) == "output of 1 (Square)"
    model = filled(1.0, 0.0)
    assert first_non_finite(model, lambda: model(x).sum()) == "gradient of the output of 2 (Linear)"
    # finite outputs with finite gradients, of which a weight's gradient is too large a product
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 1e-30)
    found = first_non_finite(model, lambda: (model(torch.full((2, 1), 1e30)) * 1e30).sum())
    assert found == "gradient of 0.weight"
    assert not model[0]._forward_hooks  # nothing stays behind


# --- checkpoints -----------------------------------------------------------------------------------------------------


def saved(run):
    def copy(tree):
        if isinstance(tree, dict):
            return {key: copy(value) for key, value in tree.items()}
        return tree.clone() if isinstance(tree, torch.Tensor) else tree

    return (
        copy(run.precision.model_state(run.model)),
        copy(optim.optimizer_state(run.optimizer, run.precision.names)),
        run.precision.state_dict(),
    )


def loaded(run, state):
    model, optimizer, precision = state
    run.precision.load_model_state(run.model, model)
    optim.load_optimizer_state(run.optimizer, optimizer, run.precision.names)
    run.precision.load_state_dict(precision)
    return run


@pytest.mark.parametrize("old, new", list(itertools.product(RUNNABLE, RUNNABLE)))
def test_a_checkpoint_of_any_policy_goes_on_under_any_other(old, new):
    first = Run(old, seed=1)
    for seed in range(3):
        first.step(seed)
    state = saved(first)
    assert {v.dtype for v in state[0].values()} == {torch.float32, torch.int64}
    second = loaded(Run(new, seed=2), state)
    own = POLICIES[new].weights if not POLICIES[new].masters else torch.float32
    for key, value in state[0].items():
        got = second.precision.model_state(second.model)[key]
        expected = value if key.startswith("bn.") else value.to(own)
        if POLICIES[new].rounded and not key.startswith("bn."):
            expected = value.to(POLICIES[new].weights)
        if key == "shift":
            expected = value.to(POLICIES[new].weights)
        assert torch.equal(got, expected.to(got.dtype)), key
    for key, values in state[1]["state"].items():
        buffer = second.optimizer.state[second.precision.names[key]]["momentum_buffer"]
        assert torch.equal(buffer, values["momentum_buffer"].to(buffer.dtype))
    assert second.precision.skipped == 0
    before = second.everything()
    second.step(7)
    assert not same(before, second.everything()) and second.precision.skipped == 0


@pytest.mark.parametrize("name", RUNNABLE)
def test_resuming_under_the_same_policy_is_bit_identical(name):
    rules = LossScaling(init_loss_scaling=2.0**8, incr_every_n_steps=4, decr_every_n_nan_or_inf=2)
    through, stopped = Run(name, rules), Run(name, rules)
    for seed in range(6):
        factor = float("inf") if seed == 5 else 1.0
        through.step(seed, factor), stopped.step(seed, factor)
    resumed = loaded(Run(name, rules, seed=5), saved(stopped))
    resumed.head = stopped.head
    for seed in range(6, 14):
        factor = float("inf") if seed == 6 else 1.0
        through.step(seed, factor), resumed.step(seed, factor)
        assert resumed.precision.scale == through.precision.scale
    assert same(through.everything(), resumed.everything())
    assert resumed.precision.skipped == through.precision.skipped == 2
    assert resumed.precision.state_dict() == through.precision.state_dict()


def test_exported_weights_are_the_masters_and_not_the_half_ones():
    run = Run("O2")
    run.step(1)
    state = run.precision.model_state(run.model)
    assert torch.equal(state["fc.weight"], run.precision.names["fc.weight"])
    assert not torch.equal(state["fc.weight"], run.model.fc.weight.float())
    assert (state["fc.weight"] - run.model.fc.weight.float()).abs().max() < 2.0**-11


def test_the_state_is_plain_numbers_and_a_static_scale_is_not_taken_over():
    state = Run("O2").precision.state_dict()
    assert all(type(v) in (str, bool, int, float) for v in state.values())
    precision = Run("O2", LossScaling()).precision
    precision.load_state_dict(state)
    assert precision.scale == 2.0**16
    precision.load_state_dict({**state, "dynamic": True, "scale": 512.0})
    assert precision.scale == 512.0
    precision = Run("O0").precision
    precision.load_state_dict({**state, "dynamic": True, "scale": 512.0})
    assert precision.scale == 1.0


def test_frozen_half_weights_keep_their_fp32_value():
    torch.manual_seed(0)
    model = Net()
    model.fc.weight.requires_grad_(False)
    exact = model.fc.weight.detach().clone()
    precision = Precision("O2", CPU, ALONE, STATIC)
    groups = optim.parameter_groups(model, "ir")
    optimizer = precision.prepare(model, lambda g: optim.make_sgd(g, 0.1, 0.9, CPU), groups)
    assert "fc.weight" not in precision.names
    precision.backward(model(precision.cast_input(torch.ones(4, 6))).float().sum())
    precision.step(optimizer)
    assert torch.equal(precision.model_state(model)["fc.weight"], exact)


def test_fp16_gradients_are_divided_by_the_scale_in_fp32():
    """2^-20 is a gradient of 2^-27 at a scale of 128: in fp16 it would become zero. What is kept is fp16's weight."""
    net = nn.Linear(1, 1, bias=False)
    precision = Precision("fp16", CPU, scaling=LossScaling(128.0, use_dynamic_loss_scaling=False))
    optimizer = precision.prepare(net, lambda groups: torch.optim.SGD(groups, 2.0**20), [{"params": [net.weight]}])
    start = float(net.weight)
    net.weight.grad = torch.full_like(net.weight, 2.0**-20)
    precision.step(optimizer)
    assert net.weight.dtype == torch.float16 and float(net.weight) == float(torch.tensor(start - 2.0**-7).half())
    assert float(precision.names["weight"]) == float(net.weight)
