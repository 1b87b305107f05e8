"""The Triton kernels against the chunked walk in plain torch: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from head import margins
from head.centers import Centers, Update
from head.head import MarginHead
from head.ops import LossSpec, choose_op, chunked
from runtime.dist import ALONE
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
def small_blocks(monkeypatch):
    from head.ops import triton as cuda

    monkeypatch.setattr(cuda, "BLOCK_B", 16)
    monkeypatch.setattr(cuda, "BLOCK_K", 16)
    monkeypatch.setattr(cuda, "BLOCK_D", 16)
    monkeypatch.setattr(cuda, "SCAN_TILES", 2)
    monkeypatch.setattr(chunked, "chunk_rows", lambda batch, dim, device_type, rows: min(rows, 37))


def run(op, dtype=torch.float32, batch=19, classes=90, index_R=None, operand=torch.float32, zero=False, **spec):
    """(loss_B, top1_B, top5_B, d emb, d centers) in float32."""
    generator = torch.Generator().manual_seed(0)
    emb_BD = torch.randn(batch, DIM, generator=generator).to(DEVICE)
    label_B = torch.randint(classes if index_R is None else len(index_R), (batch,), generator=generator).to(DEVICE)
    centers = Centers(RowShard.of(classes), DIM, dtype=dtype, seed=1, device=torch.device(DEVICE))
    if zero:
        emb_BD[2], centers.weight[5] = 0, 0
    emb_BD.requires_grad_()
    rows = centers.rows(None if index_R is None else index_R.to(DEVICE))
    spec.setdefault("margin", lambda c, n: margins.arcface(c, 0.5))
    spec = LossSpec(operand=operand, top5=True, **{"s": 16.0, **spec})
    result = choose_op(op, emb_BD.device).run(emb_BD, rows, label_B, spec, ALONE)
    (result.loss_B * torch.linspace(0.5, 2, batch, device=DEVICE)).sum().backward()
    return result.loss_B.detach(), result.top1_B, result.top5_B, emb_BD.grad, rows.grad


CASES = {
    "plain": {},
    "drawn rows": dict(index_R=torch.randperm(90, generator=torch.Generator().manual_seed(2))[:50]),
    "bf16 rows": dict(dtype=torch.bfloat16),
    "fp16 rows": dict(dtype=torch.float16),
    "softmax with bias": dict(margin=lambda c, n: margins.softmax(c), normalise=False, s=1.0),
    "filtered": dict(filter_above=0.2),
    "rows of zeros": dict(zero=True),
    "one sample": dict(batch=1),
    "scale of 64": dict(s=64.0),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_chunked_walk(name):
    mine, theirs = run("triton", **CASES[name]), run("chunked", **CASES[name])
    for a, b in zip(mine[1:3], theirs[1:3]):
        assert torch.equal(a, b)
    for what, a, b in zip(("loss", "d embeddings", "d centers"), (mine[0], *mine[3:]), (theirs[0], *theirs[3:])):
        # the same float32 sums in another order, of logits up to s
        tolerance = CASES[name].get("s", 16.0) * 16 * torch.finfo(torch.float32).eps
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), what


@pytest.mark.parametrize("name", ["plain", "drawn rows", "bf16 rows", "softmax with bias", "filtered"])
@pytest.mark.parametrize("operand", [torch.float16, torch.bfloat16])
def test_half_precision_operands(name, operand, monkeypatch):
    """Within two units of the operands' rounding of float32 ones (the interpreter cuts bfloat16's bits off)."""
    exact = run("chunked", **CASES[name])
    monkeypatch.setattr(chunked, "operand_dtype", lambda wanted, device, dtype: wanted)
    monkeypatch.setattr(chunked, "_product", lambda a, b, out: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(chunked, "_add_product", lambda a, b, out: out.add_(a.float() @ b.float()))
    mine = run("triton", operand=operand, **CASES[name])
    for i in (0, 3, 4):
        error = (mine[i] - exact[i]).abs().max() / exact[i].abs().max()
        assert 0 < error <= 2 * torch.finfo(operand).eps


FORMS = {
    "fp32 + fp32": dict(),
    "bf16 + fp32": dict(dtype=torch.bfloat16),
    "fp16 + bf16": dict(dtype=torch.float16, momentum_dtype=torch.bfloat16),
    "bf16 + int8": dict(dtype=torch.bfloat16, momentum_dtype=torch.int8),
    "fp32, no momentum": dict(momentum=0.0),
    "host int8": dict(momentum_dtype=torch.int8, momentum_on_host=True),
}


def train(op, steps=3, sample_rate=1.0, **kw):
    head = MarginHead(70, 130, s=16.0, seed=3, op=op, sample_rate=sample_rate, device=DEVICE, **kw)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        emb_BD = torch.randn(6, 130, generator=generator).to(DEVICE).requires_grad_()
        label_B = torch.randint(70, (6,), generator=generator).to(DEVICE)
        head.set_lr(0.1, torch.tensor(1 / 8, device=DEVICE) if step else 1 / 8)
        (head(emb_BD, label_B).loss * 8).backward()
        head.step(0.1, 1 / 8)
    return head.centers


@pytest.mark.parametrize("sample_rate", [1.0, 0.4])
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_is_the_plain_one_with_the_same_noise(form, update, sample_rate):
    mine, plain = (train(op, sample_rate=sample_rate, update=update, **FORMS[form]) for op in ("triton", "chunked"))
    difference = (mine.weight.float() - plain.weight.float()).abs()
    # a last bit of float32 may tip a rounding to fewer bits over, now and then
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[mine.dtype]
    assert (difference <= unit * plain.weight.float().abs() + 1e-5).float().mean() > 0.995
    if mine.dtype != torch.float32:
        assert (difference == 0).float().mean() > 0.98
    if mine.velocity is not None:
        velocity = plain.momentum_rows(0, 70)
        error = (mine.momentum_rows(0, 70) - velocity).abs() / velocity.abs().max()
        assert (error <= 1e-5).float().mean() > 0.97 and error.max() < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_an_update_that_does_not_count_changes_no_bit(form):
    kw = {"momentum": 0.9, **FORMS[form]}
    kw.pop("momentum_on_host", None)
    centers = Centers(RowShard.of(9), 130, device=torch.device(DEVICE), **kw)
    centers.update_kernel = choose_op("triton", centers.device).update_rows
    rows = centers.rows()
    rows.update(0, 9, torch.randn(9, 130, device=DEVICE), Update(0.1, centers.momentum, 5e-4, noise_key=4))
    before = {name: t.clone() for name, t in centers.state().items() if torch.is_tensor(t)}
    skip = Update(0.1, centers.momentum, 5e-4, keep=torch.tensor(False, device=DEVICE), noise_key=5)
    rows.update(0, 9, torch.full((9, 130), float("nan"), device=DEVICE), skip)
    assert all(torch.equal(t, before[name]) for name, t in centers.state().items() if torch.is_tensor(t))
    version = rows.version
    keep = torch.tensor(True, device=DEVICE)
    rows.update(0, 9, torch.zeros(9, 130, device=DEVICE), Update(0.1, centers.momentum, 5e-4, keep=keep, noise_key=6))
    assert rows.version > version


def test_what_is_not_finite_does_not_get_through():
    head = MarginHead(70, 130, op="triton", update="backward", device=DEVICE)
    before_CD = head.centers.weight.clone()
    head.set_lr(0.1)
    emb_BD = torch.full((3, 130), float("nan"), device=DEVICE).requires_grad_()
    head(emb_BD, torch.tensor([1, 2, 3], device=DEVICE)).loss.backward()
    assert torch.equal(head.centers.weight, before_CD) and torch.isnan(emb_BD.grad).all()


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
