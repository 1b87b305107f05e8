"""The Triton kernels against the chunked passes in plain torch: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from head_tools import loss_and_gradients

from head import margins
from head.centers import Centers, Update
from head.head import MarginHead
from head.ops import LossSpec, chunked, find_op
from runtime.errors import ModelError
from runtime.shard import RowShard

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM = 40  # ragged: no multiple of a block


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    """Our kernels look when they are first imported, in this file's first test; Triton's own, in conftest.py."""
    if DEVICE == "cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda batch, dim, device_type, rows: min(rows, 37))


@pytest.fixture
def half_products(monkeypatch):
    """Half operands on a CPU too, with products in float32, as a GPU gives them."""
    monkeypatch.setattr(chunked, "operand_dtype", lambda wanted, device, dtype: wanted)
    monkeypatch.setattr(chunked, "wide_products", lambda device: True)
    monkeypatch.setattr(chunked, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))


def run(op, dtype=torch.float32, batch=19, classes=90, index_R=None, operand=torch.float16, zero=False, **spec):
    """(loss_B, top1_B, top5_B, d emb, d centers before the projection) in float32."""
    generator = torch.Generator().manual_seed(0)
    emb_BD = torch.randn(batch, DIM, generator=generator).to(DEVICE)
    label_B = torch.randint(classes if index_R is None else len(index_R), (batch,), generator=generator).to(DEVICE)
    normalise = spec.get("normalise", True)
    centers = Centers(RowShard.of(classes), DIM, dtype=dtype, seed=1, normalise=normalise, device=torch.device(DEVICE))
    if zero:
        emb_BD[2], centers.weight[5] = 0, 0
        centers.measure()
    rows = centers.rows(None if index_R is None else index_R.to(DEVICE))
    spec.setdefault("margin", lambda c, n: margins.arcface(c, 0.5))
    spec = LossSpec(operand=operand, top5=True, **{"s": 16.0, **spec})
    grad_B = torch.linspace(0.5, 2, batch, device=DEVICE)
    result, grad_BD, grad_RD = loss_and_gradients(
        find_op(op, emb_BD.device), emb_BD, rows, label_B, spec, grad_B, False
    )
    return result.loss_B.detach(), result.top1_B, result.top5_B, grad_BD, grad_RD


CASES = {
    "plain": {},
    "sampled rows": dict(index_R=torch.randperm(90, generator=torch.Generator().manual_seed(2))[:50]),
    "bf16 rows": dict(dtype=torch.bfloat16),
    "softmax with bias": dict(margin=lambda c, n: margins.softmax(c), normalise=False, s=1.0),
    "filtered": dict(filter_above=0.2),
    "rows of zeros": dict(zero=True),
    "one sample": dict(batch=1),
    "scale of 64": dict(s=64.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16])
def test_it_is_the_chunked_pass(name, operand, half_products):
    """Within two units of the operands' rounding (the interpreter cuts bfloat16's bits off)."""
    if name == "filtered" and operand == torch.bfloat16:
        return  # so coarse that cosines near the threshold fall to either side
    mine = run("triton", operand=operand, **CASES[name])
    theirs = run("chunked", operand=operand, **CASES[name])
    exact = run("chunked", operand=torch.float32, **CASES[name])
    for a, b in zip(mine[1:3], theirs[1:3]):
        assert (a == b).float().mean() >= 0.9
    for i in (0, 3, 4):
        size = exact[i].abs().max()
        assert (mine[i] - theirs[i]).abs().max() <= 2 * torch.finfo(operand).eps * size
        assert (mine[i] - exact[i]).abs().max() <= 4 * torch.finfo(operand).eps * size


def test_float32_operands_and_wide_rows_take_the_chunked_pass(monkeypatch, half_products):
    for a, b in zip(run("triton", operand=torch.float32), run("chunked", operand=torch.float32)):
        assert torch.equal(a, b)
    from head.ops import triton as passes

    monkeypatch.setattr(passes, "WIDEST", 32)
    for a, b in zip(run("triton"), run("chunked")):
        assert torch.equal(a, b)


def test_tiles_that_do_not_matter_are_left_out(half_products):
    """Embeddings near their own centers: the others' probabilities lie below what is kept. What it changes is below
    SKIP_BELOW times the number of classes."""
    from head.ops import triton as passes

    classes = 160
    centers = Centers(RowShard.of(classes), DIM, seed=1, device=torch.device(DEVICE))
    label_B = torch.arange(0, 16, device=DEVICE)
    emb_BD = centers.weight[label_B].clone()
    grads = {}
    for skip in (True, False):
        spec = LossSpec(lambda c, n: margins.softmax(c), s=40.0, operand=torch.float16, skip=skip)
        op = find_op("triton", emb_BD.device)
        grads[skip] = loss_and_gradients(op, emb_BD, centers.rows(), label_B, spec, None, False)
    loss, exact = grads[True][0].loss_B, grads[False][0].loss_B
    assert torch.equal(loss, exact)  # the sums of the loss count every class
    bound = passes.SKIP_BELOW * 40 * classes
    for a, b in zip(grads[True][1:], grads[False][1:]):
        assert 0 < (a - b).abs().max() <= bound
    far_R = torch.arange(classes, device=DEVICE) >= 16
    assert (grads[True][2][far_R] == 0).all() and (grads[False][2][far_R] != 0).any()


def test_micro_batches_over_different_samples(half_products):
    """Which rows took part in whose pass reaches the kernel."""
    heads = [
        MarginHead(90, DIM, op=op, sample_rate=0.3, operand=torch.float16, device=DEVICE)
        for op in ("triton", "chunked")
    ]
    for head in heads:
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            emb_BD = torch.randn(8, DIM, generator=generator).to(DEVICE).requires_grad_()
            head(emb_BD, torch.randint(90, (8,), generator=generator)).loss.backward()
        head.step(0.1)
    error = (heads[0].centers.weight - heads[1].centers.weight).abs().max()
    assert error < 1e-3 * (heads[1].centers.weight - MarginHead(90, DIM, device=DEVICE).centers.weight).abs().max()


FORMS = {
    "fp32 + fp32": dict(),
    "bf16 + fp32": dict(dtype=torch.bfloat16),
    "bf16 + bf16": dict(dtype=torch.bfloat16, momentum_dtype=torch.bfloat16),
    "bf16 + int8": dict(dtype=torch.bfloat16, momentum_dtype=torch.int8),
    "fp32, no momentum": dict(momentum=0.0),
    "host int8": dict(momentum_dtype=torch.int8, momentum_on_host=True),
}


def train(op, steps=2, sample_rate=1.0, **kw):
    head = MarginHead(24, 130, s=16.0, seed=3, op=op, sample_rate=sample_rate, device=DEVICE, **kw)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        emb_BD = torch.randn(6, 130, generator=generator).to(DEVICE).requires_grad_()
        label_B = torch.randint(24, (6,), generator=generator).to(DEVICE)
        (head(emb_BD, label_B).loss * 8).backward()
        head.step(0.1, torch.tensor(1 / 8, device=DEVICE) if step else 1 / 8)
    return head.centers


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_is_the_plain_one_up_to_the_noise(form, sample_rate):
    """The kernel's noise is its own: rounded numbers may differ by a unit each step, and not on average."""
    mine, plain = (train(op, sample_rate=sample_rate, **FORMS[form]) for op in ("triton", "chunked"))
    difference = mine.weight.float() - plain.weight.float()
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-5}[mine.dtype]
    rounded = mine.momentum is not None and mine.momentum_table().read(slice(0, 1)).dtype != torch.float32
    limit = unit * plain.weight.float().abs() + 1e-5
    if "int8" in form or "bf16" in form.split("+")[-1] or rounded:
        limit = limit + 0.01 * plain.weight.float().abs().max()
    assert (difference.abs() <= limit).float().mean() > 0.99
    assert difference.mean().abs() < 1e-4
    if mine.momentum is not None:
        momentum = plain.momentum_table().read(slice(0, 24))
        error = (mine.momentum_table().read(slice(0, 24)) - momentum).abs() / momentum.abs().max()
        assert (error <= 0.03).float().mean() > 0.99
    stored = mine.weight.float().norm(dim=1).reciprocal()
    assert ((mine.inverse_C - stored).abs() / stored).max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_an_update_that_does_not_count_changes_no_bit(form):
    centers = train("triton", 1, **FORMS[form])
    kernel = find_op("triton", centers.device).update_rows
    before = {name: t.clone() for name, t in centers.state().items() if torch.is_tensor(t)}
    before["inverse"] = centers.inverse_C.clone()
    skip = Update(centers, 0.1, keep=torch.tensor(False, device=DEVICE), kernel=kernel)
    skip(0, 24, torch.full((24, 130), float("nan"), device=DEVICE))
    after = {**centers.state(), "inverse": centers.inverse_C}
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    version = centers.weight._version
    keep = torch.tensor(True, device=DEVICE)
    Update(centers, 0.1, keep=keep, kernel=kernel)(0, 24, torch.zeros(24, 130, device=DEVICE))
    assert centers.weight._version > version


def test_a_nan_stays_one():
    centers = train("triton", 1, dtype=torch.bfloat16)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    kernel = find_op("triton", centers.device).update_rows
    Update(centers, 0.1, kernel=kernel)(0, 24, torch.full((24, 130), float(nan), device=DEVICE))
    assert torch.isnan(centers.weight).all()


def test_where_it_cannot_run(monkeypatch):
    with pytest.raises(ModelError, match="'triton' computes in float32: choose chunked for float64"):
        head = MarginHead(9, 8, op="triton", dtype=torch.float64, device=DEVICE)
        head(torch.zeros(2, 8, dtype=torch.float64, device=DEVICE), torch.tensor([0, 1], device=DEVICE))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match="'triton' cannot run on cpu: its kernels are for cuda; choose auto"):
        MarginHead(9, 8, op="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="triton is not installed; choose auto"):
        MarginHead(9, 8, op="triton")
