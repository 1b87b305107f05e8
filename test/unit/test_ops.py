"""The margin loss: the eager reference against a naive float64 formulation and gradcheck, the others against it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from head_tools import loss_and_gradients, rows_gradient

from head import margins
from head.ops import LossSpec, Rows, accumulate_dtype, choose, chunked, find_op, inverse_of, margin_loss
from head.ops.choose import choose_op
from head.ops.reference import eager_loss
from runtime.dist import ALONE
from runtime.errors import ModelError

pytestmark = pytest.mark.core

MARGINS = {
    "arcface": lambda c, n: margins.arcface(c, 0.5),
    "arcface_straight_through": lambda c, n: margins.arcface_straight_through(c, 0.5),
    "cosface": lambda c, n: margins.cosface(c, 0.35),
    "combined": lambda c, n: margins.combined(c, 1.1, 0.3, 0.2),
    "softmax": lambda c, n: margins.softmax(c),
    "adaface": lambda c, n: margins.adaface(c, ((n - 3) / 2).clamp(-1, 1), 0.4),
}
OPS = ["reference", "chunked"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Walks of several chunks, the last one ragged, in small problems too."""
    monkeypatch.setattr(chunked, "chunk_rows", lambda batch, dim, device_type, rows: min(rows, 5))


def problem(batch=6, classes=13, dim=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    emb_BD = torch.randn(batch, dim, generator=generator, dtype=torch.float64) * 1.3
    weight_CD = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    label_B = torch.randint(classes, (batch,), generator=generator)
    label_B[1] = label_B[0]  # a class twice in the batch
    return emb_BD.to(dtype), weight_CD.to(dtype), label_B


def make_rows(weight_CD, normalise=True):
    length_C = weight_CD.to(accumulate_dtype(weight_CD.dtype)).norm(dim=1)
    return Rows(weight_CD.clone(), inverse_of(length_C) if normalise else None)


def run(op, emb_BD, weight_CD, label_B, grad_B=None, **spec):
    """(loss_B, d emb, d weight, result) for the sum of grad_B * loss_B."""
    spec = LossSpec(**{"margin": MARGINS["arcface"], **spec})
    rows = make_rows(weight_CD, spec.normalise)
    result, grad_BD, grad_CD = loss_and_gradients(find_op(op, emb_BD.device), emb_BD, rows, label_B, spec, grad_B)
    return result.loss_B.detach(), grad_BD, grad_CD, result


def naive(emb_BD, weight_CD, label_B, margin, s=64.0, normalise=True, filter_above=0.0, grad_B=None):
    """The definition in one piece, with autograd through everything but the margin's slope."""
    emb_BD, weight_CD = emb_BD.detach().clone().requires_grad_(), weight_CD.detach().clone().requires_grad_()
    cos_BC = F.linear(F.normalize(emb_BD), F.normalize(weight_CD)) if normalise else emb_BD @ weight_CD.t()
    target_B1 = cos_BC.gather(1, label_B[:, None])
    value_B, slope_B = margin(target_B1.detach()[:, 0], emb_BD.detach().norm(dim=1))
    value_B1 = value_B[:, None] + slope_B[:, None] * (target_B1 - target_B1.detach())
    if filter_above:
        cos_BC = torch.where(cos_BC > filter_above, torch.zeros_like(cos_BC), cos_BC)
    loss_B = F.cross_entropy(s * cos_BC.scatter(1, label_B[:, None], value_B1), label_B, reduction="none")
    loss_B.backward(torch.ones_like(loss_B) if grad_B is None else grad_B)
    return loss_B.detach(), emb_BD.grad, weight_CD.grad


def assert_close(mine, truth, tolerance):
    for name, a, b in zip(("loss", "d embeddings", "d centers"), mine, truth):
        assert torch.isfinite(a).all(), name
        assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, float(b.abs().max())), name


# --- against the naive formulation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", sorted(MARGINS))
def test_the_definition_in_float64(op, name):
    emb_BD, weight_CD, label_B = problem()
    grad_B = torch.linspace(-1, 2, 6, dtype=torch.float64)
    mine = run(op, emb_BD, weight_CD, label_B, grad_B, margin=MARGINS[name])
    assert_close(mine, naive(emb_BD, weight_CD, label_B, MARGINS[name], grad_B=grad_B), 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_plain_products(op):
    emb_BD, weight_CD, label_B = problem()
    mine = run(op, emb_BD, weight_CD, label_B, margin=MARGINS["softmax"], s=1.0, normalise=False)
    assert_close(mine, naive(emb_BD, weight_CD, label_B, MARGINS["softmax"], 1.0, normalise=False), 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_noisy_negatives_are_filtered(op):
    emb_BD, weight_CD, label_B = problem()
    plain = run(op, emb_BD, weight_CD, label_B)
    mine = run(op, emb_BD, weight_CD, label_B, filter_above=0.3)
    assert_close(mine, naive(emb_BD, weight_CD, label_B, MARGINS["arcface"], filter_above=0.3), 1e-12)
    assert (mine[0] < plain[0]).any()
    everything = run(op, emb_BD, weight_CD, label_B, filter_above=1e-9)
    assert_close(everything, naive(emb_BD, weight_CD, label_B, MARGINS["arcface"], filter_above=1e-9), 1e-12)


# a mild scale for gradcheck: at 64 the softmax saturates and there is nothing to check
TRUE_SLOPES = ["arcface", "cosface", "combined", "softmax"]


@pytest.mark.parametrize("name", TRUE_SLOPES)
def test_gradcheck_of_the_specification(name):
    emb_BD, weight_CD, label_B = problem(batch=3, classes=7, dim=4)
    spec = LossSpec(margin=MARGINS[name], s=4.0)
    leaves = [emb_BD.requires_grad_(), weight_CD.requires_grad_()]
    assert torch.autograd.gradcheck(lambda e, w: eager_loss(e, w, label_B, spec, ALONE)[0], leaves)


@pytest.mark.parametrize("name", TRUE_SLOPES)
@pytest.mark.parametrize("op", [op for op in OPS if op != "reference"])
def test_gradcheck(op, name):
    emb_BD, weight_CD, label_B = problem(batch=3, classes=7, dim=4)
    spec = LossSpec(margin=MARGINS[name], s=4.0)
    operator = find_op(op, emb_BD.device)

    def loss(emb_BD, weight_CD=weight_CD):
        return margin_loss(operator, emb_BD, make_rows(weight_CD), label_B, spec, ALONE, lambda kept: None).loss_B

    assert torch.autograd.gradcheck(loss, emb_BD.clone().requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-7)

    grad_CD = run(op, emb_BD, weight_CD, label_B, margin=MARGINS[name], s=4.0)[2]
    numeric_CD = torch.empty_like(grad_CD)
    with torch.no_grad():
        for place in range(weight_CD.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved_CD = weight_CD.clone()
                moved_CD.view(-1)[place] += step
                values.append(loss(emb_BD, moved_CD).sum())
            numeric_CD.view(-1)[place] = (values[0] - values[1]) / 2e-6
    assert (grad_CD - numeric_CD).abs().max() < 1e-8


# --- each dtype, against float64 -------------------------------------------------------------------------------------


def eager(emb_BD, weight_CD, label_B, s=64.0):
    """What a training script without care does: everything in the operands' dtype."""
    dtype = emb_BD.dtype
    emb_BD, weight_CD = (t.detach().clone().requires_grad_() for t in (emb_BD, weight_CD))
    cos_BC = F.linear(F.normalize(emb_BD), F.normalize(weight_CD))
    target_B1 = cos_BC.gather(1, label_B[:, None])
    value_B, slope_B = margins.arcface(target_B1.detach()[:, 0].float(), 0.5)
    value_B1 = (value_B.to(dtype) + slope_B.to(dtype) * (target_B1 - target_B1.detach())[:, 0])[:, None]
    loss_B = F.cross_entropy(s * cos_BC.scatter(1, label_B[:, None], value_B1), label_B, reduction="none")
    loss_B.sum().backward()
    return loss_B.detach(), emb_BD.grad, weight_CD.grad


AS_ON_CUDA, AS_ON_NPU = "chunked, products in float32", "chunked, products in float16"


@pytest.mark.parametrize(
    "op, dtype",
    [
        *[(op, dtype) for op in [*OPS, AS_ON_CUDA] for dtype in (torch.float32, torch.bfloat16, torch.float16)],
        (AS_ON_NPU, torch.float16),
    ],
)  # bfloat16 operands are not used there: see operand_dtype
def test_no_less_exact_than_eager_at_the_same_dtype(op, dtype, monkeypatch):
    if op in (AS_ON_CUDA, AS_ON_NPU):
        monkeypatch.setattr(chunked, "operand_dtype", lambda wanted, device, dtype: wanted)
    if op == AS_ON_CUDA:
        monkeypatch.setattr(chunked, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
        monkeypatch.setattr(chunked, "wide_products", lambda device: True)
    op = op.split(",")[0]
    if dtype != torch.float32 and not hasattr(torch, "autocast"):
        pytest.skip("torch 1.8 has no half precision softmax on a CPU to compare with")
    emb_BD, weight_CD, label_B = problem(batch=16, classes=203, dim=32, dtype=dtype)
    truth = naive(emb_BD.double(), weight_CD.double(), label_B, MARGINS["arcface"])
    careless = eager(emb_BD, weight_CD, label_B)
    spec = LossSpec(margin=MARGINS["arcface"], operand=dtype)
    result, *grads = loss_and_gradients(find_op(op, emb_BD.device), emb_BD.float(), make_rows(weight_CD), label_B, spec)
    # float32: the same sums in another order; s * eps on the logits is the unit in the last place
    margin = {torch.float32: 64 * torch.finfo(torch.float32).eps}.get(dtype, 0.0)
    for name, a, b, t in zip("loss emb centers".split(), (result.loss_B.detach(), *grads), careless, truth):
        scale = t.abs().max()
        error, allowed = (a.double() - t).abs().max() / scale, (b.double() - t).abs().max() / scale
        assert error <= allowed + margin, (name, float(error), float(allowed))


# --- corners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_far_from_every_center(op, dtype, tolerance):
    """All cosines at -1: with a fixed shift of s the exponentials of float32 vanish and the loss is log 0."""
    weight_CD = torch.zeros(9, 4, dtype=dtype)
    weight_CD[:, 0] = -1
    weight_CD[:, 1] = torch.linspace(-0.01, 0.01, 9, dtype=dtype)
    emb_BD = torch.zeros(3, 4, dtype=dtype)
    emb_BD[:, 0] = 2
    label_B = torch.tensor([0, 4, 8])
    truth = naive(emb_BD.double(), weight_CD.double(), label_B, MARGINS["arcface"])
    mine = run(op, emb_BD, weight_CD, label_B)
    assert (mine[0].double() - truth[0]).abs().max() <= tolerance * 64
    assert torch.isfinite(mine[1]).all() and torch.isfinite(mine[2]).all()


@pytest.mark.parametrize("op", OPS)
def test_the_target_far_behind_and_far_ahead_in_float32(op):
    """Where the margin's own logit decides the loss: correcting a plain softmax afterwards cancels here."""
    emb_BD = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    weight_CD = torch.tensor([[0.8, 0.6, 0.0], [-0.5, 0.5, 0.7], [0.4, -0.9, 0.1]])
    for label_B in (torch.tensor([0, 0]), torch.tensor([1, 2])):
        truth = naive(emb_BD.double(), weight_CD.double(), label_B, MARGINS["arcface"])
        mine = run(op, emb_BD, weight_CD, label_B)
        assert (mine[0].double() - truth[0]).abs().max() <= 64 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", sorted(MARGINS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_of_one(op, name, dtype):
    """Embeddings exactly on and opposite to centers, their own and others'."""
    weight_CD = torch.eye(6, dtype=dtype) * 3
    emb_BD = torch.cat([torch.eye(6, dtype=dtype), -torch.eye(6, dtype=dtype)]) * 2
    label_B = torch.tensor([0, 1, 2, 3, 4, 4, 0, 1, 2, 3, 4, 4])
    mine = run(op, emb_BD, weight_CD, label_B, margin=MARGINS[name])
    assert all(torch.isfinite(t).all() for t in mine[:3])
    truth = naive(emb_BD.double(), weight_CD.double(), label_B, MARGINS[name])
    assert (mine[0].double() - truth[0]).abs().max() <= 64 * 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("op", OPS)
def test_rows_of_zeros_get_no_gradient(op):
    emb_BD, weight_CD, label_B = problem()
    emb_BD[2], weight_CD[3] = 0, 0
    loss_B, grad_BD, grad_CD, result = run(op, emb_BD, weight_CD, label_B, top5=True)
    assert torch.isfinite(loss_B).all() and torch.isfinite(grad_BD).all() and torch.isfinite(grad_CD).all()
    assert (grad_BD[2] == 0).all() and (grad_CD[3] == 0).all()
    # all classes tie at 0: that is no hit
    assert not result.top1_B[2] and not result.top5_B[2]


@pytest.mark.parametrize("op", OPS)
def test_a_label_without_a_center_is_no_number(op):
    emb_BD, weight_CD, label_B = problem()
    label_B[2] = -1  # as if another rank held it, and there is none
    loss_B = run(op, emb_BD, weight_CD, label_B)[0]
    assert torch.isnan(loss_B[2]) and torch.isfinite(loss_B[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("op", OPS)
def test_top_1_and_top_5_are_counted_without_margin(op):
    emb_BD, weight_CD, label_B = problem(batch=200, classes=23, dim=5)
    cos_BC = F.linear(F.normalize(emb_BD), F.normalize(weight_CD))
    place_B = (cos_BC >= cos_BC.gather(1, label_B[:, None])).sum(1)
    result = run(op, emb_BD, weight_CD, label_B, top5=True)[3]
    assert torch.equal(result.top1_B, place_B <= 1) and torch.equal(result.top5_B, place_B <= 5)
    assert 0 < int(result.top1_B.sum()) < int(result.top5_B.sum()) < 200
    assert run(op, emb_BD, weight_CD, label_B)[3].top5_B is None
    filtered = run(op, emb_BD, weight_CD, label_B, filter_above=0.2)[3]
    assert torch.equal(filtered.top1_B, place_B <= 1)


@pytest.mark.parametrize("chunk", [1, 2, 13, 64])
def test_any_chunk(monkeypatch, chunk):
    monkeypatch.setattr(chunked, "chunk_rows", lambda batch, dim, device_type, rows: chunk)
    emb_BD, weight_CD, label_B = problem()
    assert_close(run("chunked", emb_BD, weight_CD, label_B), run("reference", emb_BD, weight_CD, label_B), 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_autocast_does_not_reach_inside(op):
    if not hasattr(torch, "autocast"):
        pytest.skip("torch 1.8 has no autocast on a CPU")
    emb_BD, weight_CD, label_B = problem(dtype=torch.float32)
    plain = run(op, emb_BD, weight_CD, label_B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = run(op, emb_BD, weight_CD, label_B)
    for a, b in zip(plain[:3], under[:3]):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_two_backwards_through_one_forward_add_up(op):
    emb_BD, weight_CD, label_B = problem()
    once = run(op, emb_BD, weight_CD, label_B)
    rows, leaf_BD, kept, op = make_rows(weight_CD), emb_BD.clone().requires_grad_(), [], find_op(op, emb_BD.device)
    spec = LossSpec(MARGINS["arcface"])
    loss_B = margin_loss(op, leaf_BD, rows, label_B, spec, ALONE, kept.append).loss_B
    for _ in range(3):
        loss_B.sum().backward(retain_graph=True)
    assert len(kept) == 1 and (leaf_BD.grad - 3 * once[1]).abs().max() < 1e-12
    assert (rows_gradient(op, kept[0], rows, spec) - 3 * once[2]).abs().max() < 1e-12


def test_centers_that_moved_before_backward_are_refused():
    emb_BD, weight_CD, label_B = problem()
    rows, spec = make_rows(weight_CD), LossSpec(MARGINS["arcface"])
    op = find_op("chunked", emb_BD.device)
    loss_B = margin_loss(op, emb_BD.requires_grad_(), rows, label_B, spec, ALONE, lambda kept: None).loss_B
    rows.weight_CW.add_(1)
    with pytest.raises(ModelError, match="updated between this forward and its backward"):
        loss_B.sum().backward()


def test_evaluation_leaves_the_gradient_out(monkeypatch):
    emb_BD, weight_CD, label_B = problem()
    spec, op = LossSpec(MARGINS["arcface"]), find_op("chunked", emb_BD.device)
    with torch.no_grad():
        passed = op.first(emb_BD, make_rows(weight_CD), label_B, spec, ALONE, False)
    assert passed.grad_BD is None and passed.kept is None
    assert torch.equal(passed.loss_B, run("chunked", emb_BD, weight_CD, label_B)[0])


def test_what_devices_round_operands_to(monkeypatch):
    cpu, device, low, full = torch.device("cpu"), torch.device("cuda"), torch.float16, torch.float32
    for wide, expected in ((False, full), (True, torch.bfloat16)):
        monkeypatch.setattr(chunked, "wide_products", lambda device, wide=wide: wide)
        assert chunked.operand_dtype(torch.bfloat16, device, full) == expected
        assert chunked.operand_dtype(low, device, full) == low
        assert chunked.operand_dtype(low, cpu, full) == full
    assert chunked.operand_dtype(full, device, full) == full


def test_choosing_an_op():
    cpu = torch.device("cpu")
    assert find_op("reference", cpu).name == "reference"
    with pytest.raises(ModelError, match="head_op 'fast': choose from auto, .*chunked.*reference"):
        find_op("fast", cpu)


def auto(monkeypatch, *ops):
    """What auto takes of these."""
    monkeypatch.setattr(choose, "candidates", lambda device: list(ops))
    rows, spec = make_rows(problem(classes=400)[1].float()), LossSpec(MARGINS["arcface"])
    op, trials = choose_op("auto", torch.device("cpu"), rows, spec, ALONE, 4)
    return op.name, trials


def test_auto_takes_the_quickest_that_agrees(monkeypatch):
    good = find_op("chunked", torch.device("cpu"))

    def slow(*args):
        time.sleep(0.3)
        return good.first(*args)

    def wrong(*args):
        passed = good.first(*args)
        return passed._replace(grad_BD=passed.grad_BD * 1.1)

    def broken(*args):
        raise RuntimeError("out of\nresources")

    slow, wrong, broken = (replace(good, name=f.__name__, first=f) for f in (slow, wrong, broken))
    name, trials = auto(monkeypatch, slow, good, wrong, broken)
    assert name == "chunked" and trials["chunked"]["seconds"] < trials["slow"]["seconds"]
    assert trials["chunked"]["difference"] == 0 and trials["wrong"]["difference"] > 0.05
    assert trials["broken"] == {"left_out": "RuntimeError: out of resources"}
    assert auto(monkeypatch, slow, broken)[0] == "slow"
    assert auto(monkeypatch, good) == ("chunked", {})
    json.dumps(trials)


# --- half operands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", ["in float32", "in float16"])
def test_a_whole_batch_on_one_wrong_center_stays_in_range(products, monkeypatch):
    """The largest sums that there can be: 4,096 images on one wrong center, by float16 operands."""
    if products == "in float16" and not hasattr(torch, "autocast"):
        pytest.skip("torch 1.8 sums half precision products on a CPU in half precision, which no accelerator does")
    monkeypatch.setattr(chunked, "operand_dtype", lambda wanted, device, dtype: wanted)
    if products == "in float32":
        monkeypatch.setattr(chunked, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
        monkeypatch.setattr(chunked, "wide_products", lambda device: True)
    generator = torch.Generator().manual_seed(0)
    weight_CD = torch.randn(64, 16, generator=generator)
    weight_CD[1:] -= weight_CD[1:] @ weight_CD[:1].T * weight_CD[:1] / weight_CD[0].square().sum()  # all others far off
    emb_BD = weight_CD[:1].expand(4096, -1) * 100
    label_B = torch.randint(1, 64, (4096,), generator=generator)
    grad_B = torch.full((4096,), 65536.0)  # as a loss scale makes it
    truth = run("chunked", emb_BD.double(), weight_CD.double(), label_B, grad_B.double())
    mine = run("chunked", emb_BD, weight_CD, label_B, grad_B, operand=torch.float16)
    # of the wrong center's gradient nearly all lies along its row and is projected out: the rounding of that stays
    largest = (64.0, float(truth[1].abs().max()), 4096 * 65536.0 * 64 / float(weight_CD[0].norm()))
    for a, b, size in zip(mine[:3], truth[:3], largest):
        assert torch.isfinite(a).all() and (a - b).abs().max() <= 2.0**-9 * size


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="torch 1.8 has no bfloat16 policy on a CPU")
@pytest.mark.parametrize("normalise", [True, False])
def test_bfloat16_sums_on_a_cpu_that_has_them_are_off_by_its_rounding(normalise, monkeypatch):
    """Logits and loss stay float32's to the bit; gradients err by two roundings of operands and one of a sum. On other
    CPUs, and under other policies, nothing changes."""
    generator = torch.Generator().manual_seed(0)
    emb_BD, weight_CD = torch.randn(24, 32, generator=generator), torch.randn(700, 32, generator=generator) / 32**0.5
    label_B = torch.randint(700, (24,), generator=generator)
    spec = dict(s=16.0 if normalise else 1.0, normalise=normalise)

    def results(has, operand):
        monkeypatch.setattr(chunked, "cpu_has_bfloat16", lambda: has)
        return run("chunked", emb_BD, weight_CD, label_B, torch.full((24,), 1 / 24), operand=operand, **spec)[:3]

    exact = results(False, torch.float32)
    for other in (results(False, torch.bfloat16), results(True, torch.float16), results(True, torch.float32)):
        assert all(torch.equal(a, b) for a, b in zip(other, exact))
    loss_B, *grads = results(True, torch.bfloat16)
    assert torch.equal(loss_B, exact[0])
    for mine, truth in zip(grads, exact[1:]):
        assert not torch.equal(mine, truth) and (mine - truth).norm() <= 3 * 2.0**-9 * truth.norm()
