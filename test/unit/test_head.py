"""The head on one rank: its SGD is torch's, in every form of its state; updates, skips, checkpoints, bad input."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F

from head import margins
from head.centers import Centers, Update
from head.head import MarginHead
from head.offload import HostTable
from head.ops import chunked
from head.storage import ByteTable, bytes_per_row, make_table, noise_like, round_stochastically
from runtime.errors import ModelError
from runtime.shard import RowShard

pytestmark = pytest.mark.core

C, D, B = 30, 8, 6


def batch(seed=0, dtype=torch.float64, classes=C, size=B, dim=D):
    generator = torch.Generator().manual_seed(seed)
    emb_BD = torch.randn(size, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return emb_BD, torch.randint(classes, (size,), generator=generator)


def make(**kw):
    kw.setdefault("dtype", torch.float64)
    return MarginHead(C, D, s=16.0, seed=2, **kw)


def train(head, steps=3, lr=0.1, first=0, **step):
    for seed in range(first, first + steps):
        emb_BD, label_B = batch(seed, torch.float64 if head.centers.dtype == torch.float64 else torch.float32)
        head(emb_BD, label_B).loss.backward()
        head.step(lr, **step)
    return head


# --- SGD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["reference", "chunked"])
@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 5e-2), (0.9, 0.0), (0.0, 1e-2), (0.0, 0.0)])
def test_it_is_torchs_sgd(op, momentum, weight_decay):
    head = make(op=op, momentum=momentum, weight_decay=weight_decay)
    dense_CD = torch.nn.Parameter(head.centers.weight.clone())
    optimizer = torch.optim.SGD([dense_CD], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for seed in range(4):
        emb_BD, label_B = batch(seed)
        lr = 0.1 / (1 + seed)
        out = head(emb_BD, label_B)
        out.loss.backward()
        head.step(lr)
        leaf_BD = emb_BD.detach().clone().requires_grad_()
        cos_BC = F.linear(F.normalize(leaf_BD), F.normalize(dense_CD))
        target_B = cos_BC.gather(1, label_B[:, None])[:, 0]
        value_B, slope_B = margins.arcface(target_B.detach())
        value_B = value_B + slope_B * (target_B - target_B.detach())
        loss = F.cross_entropy(16 * cos_BC.scatter(1, label_B[:, None], value_B[:, None]), label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert float(out.loss) == pytest.approx(float(loss), abs=1e-12)
        assert (emb_BD.grad - leaf_BD.grad).abs().max() < 1e-13
        assert (head.centers.weight - dense_CD).abs().max() < 1e-13
    assert (head.centers.momentum is None) == (momentum == 0)


def test_plsc_softmax_is_a_linear_layer_with_bias():
    head = make(margin="linear_softmax", weight_decay=1e-2)
    layer = torch.nn.Linear(D, C).double()
    with torch.no_grad():
        layer.weight.copy_(head.centers.weight[:, :D])
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for seed in range(3):
        emb_BD, label_B = batch(seed)
        out = head(emb_BD, label_B)
        out.loss.backward()
        head.step(0.1)
        logits_BC = layer(emb_BD.detach())
        optimizer.zero_grad()
        F.cross_entropy(logits_BC, label_B).backward()
        optimizer.step()
        assert int(out.correct) == int((logits_BC.argmax(1) == label_B).sum())
    assert (head.centers.weight[:, :D] - layer.weight).abs().max() < 1e-13
    assert (head.centers.weight[:, D] - layer.bias).abs().max() < 1e-13
    assert head.gathered_kernel().shape == (D, C) and head.gathered_training_state()["bias"].shape == (1, C)


def test_accumulated_gradients_are_those_of_one_batch():
    whole, parts = make(), make()
    emb_BD, label_B = batch()
    whole(emb_BD, label_B).loss.backward()
    for half in (slice(0, 3), slice(3, 6)):
        (parts(emb_BD[half], label_B[half]).loss / 2).backward()
    for head in (whole, parts):
        head.step(0.1)
    assert (whole.centers.weight - parts.centers.weight).abs().max() < 1e-14


@pytest.mark.parametrize("inv_scale", [1 / 1024, torch.tensor(1 / 1024)])
def test_loss_scaling_leaves_the_update_as_it_is(inv_scale):
    plain, scaled = train(make(), 1), make()
    emb_BD, label_B = batch()
    (scaled(emb_BD, label_B).loss * 1024).backward()
    scaled.step(0.1, inv_scale)
    assert (plain.centers.weight - scaled.centers.weight).abs().max() < 1e-15


@pytest.mark.parametrize("kw", [{}, dict(sample_rate=0.5), dict(momentum_on_host=True)])
def test_a_step_with_found_inf_moves_nothing_and_drops_the_gradient(kw):
    head = train(make(**kw), 2)
    weight_CD, momentum_CD = head.centers.weight.clone(), head.centers.momentum_table().read(slice(0, C)).clone()
    emb_BD, label_B = batch(5)
    assert float(head.found_inf()) == 0
    (head(emb_BD, label_B).loss * float("inf")).backward()
    assert float(head.found_inf()) == 1
    head.step(0.1, found_inf=head.found_inf())
    assert torch.equal(head.centers.weight, weight_CD)
    assert torch.equal(head.centers.momentum_table().read(slice(0, C)), momentum_CD)
    assert not head._pending and float(head.found_inf()) == 0
    train(head, 1, found_inf=torch.zeros(()))
    assert not torch.equal(head.centers.weight, weight_CD)


@pytest.mark.parametrize("kw", [{}, dict(momentum=0.0), dict(dtype=torch.bfloat16, momentum_dtype=torch.int8)])
def test_the_update_on_a_device_that_is_not_asked_whether_it_counts(kw):
    """There found_inf stays a tensor: the same numbers where it is 0, not a bit changed where it is 1."""
    known, asked = (train(make(**{"dtype": torch.float32, **kw}), 2) for _ in range(2))
    before = {name: t.clone() for name, t in asked.centers.state().items() if torch.is_tensor(t)}
    before["inverse"] = asked.centers.inverse_C.clone()
    grad_CW = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
    Update(asked.centers, 0.1, keep=torch.tensor(False))(0, C, grad_CW * float("nan"))
    after = {**asked.centers.state(), "inverse": asked.centers.inverse_C}
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    Update(known.centers, 0.1)(0, C, grad_CW.clone())
    Update(asked.centers, 0.1, keep=torch.tensor(True))(0, C, grad_CW.clone())
    assert torch.equal(known.centers.weight, asked.centers.weight)
    assert torch.equal(known.centers.inverse_C, asked.centers.inverse_C)


@pytest.mark.parametrize(
    "kw", [{}, dict(sample_rate=0.4), dict(sample_rate=0.4, update_rows="all"), dict(op="reference")]
)
def test_no_gradient_of_all_rows_exists_and_micro_batches_are_more_images(kw):
    """Against one dense gradient: k forward passes, each over its own sample, then one second pass."""
    head = make(momentum=0.9, weight_decay=0.05, **kw)
    dense_CD = torch.nn.Parameter(head.centers.weight.clone())
    moved_C = torch.zeros(C, dtype=torch.bool)
    total_CD = torch.zeros_like(dense_CD)
    for seed in range(3):
        emb_BD, label_B = batch(seed)
        out = head(emb_BD, label_B)
        (out.loss / 3).backward()
        sample, _ = head._pending[-1]
        index_R = torch.arange(C) if sample.index_R is None else sample.index_R
        moved_C[index_R] = True
        leaf_BD = emb_BD.detach().clone().requires_grad_()
        cos_BR = F.linear(F.normalize(leaf_BD), F.normalize(dense_CD[index_R]))
        target_B = cos_BR.gather(1, sample.place_B[:, None])[:, 0]
        value_B, derivative_B = margins.arcface(target_B.detach())
        value_B = value_B + derivative_B * (target_B - target_B.detach())
        loss = F.cross_entropy(16 * cos_BR.scatter(1, sample.place_B[:, None], value_B[:, None]), sample.place_B)
        grad_BD, grad_CD = torch.autograd.grad(loss / 3, [leaf_BD, dense_CD])
        assert (grad_BD - emb_BD.grad).abs().max() < 1e-14
        total_CD += grad_CD
    head.step(0.1)
    if kw.get("update_rows") == "all":
        moved_C[:] = True
    expected_CD = dense_CD.detach() - 0.1 * (total_CD + 0.05 * dense_CD.detach()) * moved_C[:, None]
    assert (head.centers.weight - expected_CD).abs().max() < 1e-14
    assert (head.centers.inverse_C - 1 / head.centers.weight.norm(dim=1)).abs().max() < 1e-14


def test_a_forward_from_before_a_step_is_refused_after_it():
    head = make()
    emb_BD, label_B = batch()
    first, second = head(emb_BD, label_B).loss, head(emb_BD, label_B).loss
    second.backward()
    head.step(0.1)
    with pytest.raises(ModelError, match="updated between this forward and its backward"):
        first.backward()


# --- forms of state --------------------------------------------------------------------------------------------------

FORMS = {
    "bf16 + fp32": dict(dtype=torch.bfloat16),
    "fp32 + bf16": dict(momentum_dtype=torch.bfloat16),
    "fp32 + int8": dict(momentum_dtype=torch.int8),
    "bf16 + int8": dict(dtype=torch.bfloat16, momentum_dtype=torch.int8),
    "bf16 + none": dict(dtype=torch.bfloat16, momentum=0.0),
    "bf16 + host bf16": dict(dtype=torch.bfloat16, momentum_dtype=torch.bfloat16, momentum_on_host=True),
    "fp32 + host int8": dict(momentum_dtype=torch.int8, momentum_on_host=True),
}


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rounding_is_unbiased_and_to_a_neighbour():
    rows_KW, source = torch.linspace(-3, 3, 4000).reshape(1000, 4), noise()
    for dtype, unit in [(torch.bfloat16, 2.0**-8)]:
        total_KW, count = torch.zeros(1000, 4, dtype=torch.float64), 200
        for _ in range(count):
            rounded_KW = round_stochastically(rows_KW, dtype, noise_like(rows_KW, source))
            assert ((rounded_KW.float() - rows_KW).abs() <= 2 * unit * rows_KW.abs()).all()
            total_KW += rounded_KW.double()
        # the error of a mean of `count` roundings, over all entries: one in ten thousand may lie beyond four spreads
        error_KW = (total_KW / count - rows_KW) / (2 * unit * rows_KW.abs() / math.sqrt(count) / 2)
        assert error_KW.abs().max() < 5 and error_KW.mean().abs() < 4 / math.sqrt(4000)
        exact_KW = rows_KW.to(dtype)
        assert torch.equal(round_stochastically(exact_KW.float(), dtype, noise_like(rows_KW, source)), exact_KW)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_rounding_leaves_what_is_not_finite(dtype):
    """0x7FFFFFFF is the nan that CUDA's arithmetic gives: added to, it ran over into -0."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32)
    most = torch.full_like(bits, 0x7FFFFFFF)
    rounded = round_stochastically(bits.view(torch.float32), dtype, most)
    assert torch.isnan(rounded[:4]).all() and rounded[4:].tolist() == [math.inf, -math.inf]


def test_eight_bits_keep_small_values_on_average():
    """Rounding to the nearest would keep an entry of a few 127ths of its block's peak for ever: momentum must fade."""
    table = make_table(50, 256, torch.int8, torch.float32, "cpu")
    start_KW = torch.full((50, 256), 3.0 / 127)
    start_KW[:, ::128] = 1.0
    table.write(slice(0, 50), start_KW, noise())
    for step in range(1, 21):
        rows_KW = table.read(slice(0, 50))
        rows_KW[:, 1:128] *= 0.9
        rows_KW[:, 129:] *= 0.9
        table.write(slice(0, 50), rows_KW, noise(step))
    small = table.read(slice(0, 50))[:, 1:128].mean()
    assert float(small) == pytest.approx(3.0 / 127 * 0.9**20, rel=0.1)
    assert (table.read(slice(0, 50))[:, 0] == 1).all()


def test_eight_bit_rows_by_number_and_odd_widths():
    table = ByteTable(torch.zeros(9, 130, dtype=torch.int8), torch.zeros(9, 2), torch.float32)
    rows_KW = torch.randn(2, 130, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([7, 1])
    table.write(where, rows_KW, noise())
    assert ((table.read(where) - rows_KW).abs() <= rows_KW.abs().max(1, keepdim=True)[0] / 127).all()
    assert (table.read(slice(2, 7)) == 0).all()
    assert bytes_per_row(130, torch.int8) == 130 + 8 and bytes_per_row(512, torch.int8) == 528
    assert bytes_per_row(512, torch.float32) == 2048 and bytes_per_row(512, torch.bfloat16) == 1024
    assert bytes_per_row(512, None) == 0


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_follows_float32(form, sample_rate):
    """One step: within one unit in the last place of each form; and the loss falls as float32's does."""
    kw = {"dtype": torch.float32, "sample_rate": sample_rate, "weight_decay": 5e-4}
    plain, stored = make(**{**kw, "momentum": FORMS[form].get("momentum", 0.9)}), make(**{**kw, **FORMS[form]})
    plain.load_kernel(stored.gathered_kernel())
    train(plain, 1)
    train(stored, 1)
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[stored.centers.dtype]
    difference_CD = stored.centers.weight.float() - plain.centers.weight
    assert (difference_CD.abs() <= unit * plain.centers.weight.abs() + 6e-8).all()
    if stored.centers.momentum is not None:
        momentum_CD = plain.centers.momentum.data
        peak_C1 = momentum_CD.abs().max(1, keepdim=True)[0]
        assert ((stored.centers.momentum_table().read(slice(0, C)) - momentum_CD).abs() <= peak_C1 / 100 + 1e-6).all()
    emb_BD, label_B = batch(0, torch.float32)
    losses = []
    for _ in range(30):
        out = stored(emb_BD, label_B)
        losses.append(float(out.loss))
        out.loss.backward()
        stored.step(0.05)
    assert losses[-1] < 0.2 * losses[0]


def on_host(**kw):
    """On a CPU there are no streams: the same steps in the same order."""
    head = make(**kw)
    head.centers.momentum = HostTable(head.centers.momentum, torch.device("cpu"), threads=1)
    return head


@pytest.mark.parametrize("kw", [{}, dict(sample_rate=0.5), dict(dtype=torch.float32, momentum_dtype=torch.int8)])
def test_momentum_on_the_host_is_momentum(kw, monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda batch, dim, device_type, rows: min(rows, 4))
    plain, host = make(**kw), on_host(**kw)
    for head in (plain, host):
        for step in range(3):
            for seed in range(2):
                emb_BD, label_B = batch(10 * step + seed, head.centers.work_dtype)
                head.prepare(label_B)
                head(emb_BD, label_B).loss.backward()
            head.step(0.1)
    assert torch.equal(plain.centers.weight, host.centers.weight)
    assert torch.equal(
        plain.centers.momentum_table().read(slice(0, C)), host.centers.momentum_table().read(slice(0, C))
    )


def test_a_failure_of_the_host_thread_is_not_lost(monkeypatch):
    head = train(on_host(), 1)
    monkeypatch.setattr(head.centers.momentum, "_write_back", lambda *args: 1 / 0)
    train(head, 1, first=1)
    with pytest.raises(ZeroDivisionError):
        head.local_state()


# --- fresh rows and checkpoints --------------------------------------------------------------------------------------


def test_a_fresh_row_depends_on_its_number_only(monkeypatch):
    from head import centers

    monkeypatch.setattr(centers, "INIT_ROWS", 7)
    whole = Centers(RowShard.of(40), D, seed=5).weight
    parts = [Centers(RowShard.of(40, rank, 3), D, seed=5).weight for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(Centers(RowShard.of(40), D, seed=6).weight, whole)
    assert len({tuple(row.tolist()) for row in whole}) == 40
    small = Centers(RowShard.of(4000), 64, init_norm=0.08).weight
    assert float(small.std()) == pytest.approx(0.01, rel=0.02)
    assert (Centers(RowShard.of(9), D + 1, bias=True).weight[:, D] == 0).all()


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(sample_rate=0.4),
        dict(margin="adaface"),
        dict(margin="linear_softmax"),
        *FORMS.values(),
        dict(sample_rate=0.4, **FORMS["bf16 + int8"]),
    ],
)
def test_resuming_changes_no_bit(kw, tmp_path):
    kw = {"dtype": torch.float32, **kw}
    straight = train(make(**kw), 5)
    first = train(make(**kw), 3)
    torch.save(first.local_state(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", **({"weights_only": True} if hasattr(torch, "autocast") else {}))
    second = make(**{**kw})
    second.load_local_state(loaded)
    train(second, 2, first=3)
    assert torch.equal(straight.centers.weight, second.centers.weight)


@pytest.mark.parametrize("kw", [{}, dict(margin="adaface", sample_rate=0.4), dict(margin="linear_softmax")])
def test_one_file_holds_all_of_it(kw):
    first = train(make(dtype=torch.float32, **kw), 3)
    kernel_DC, state = first.gathered_kernel(), first.gathered_training_state()
    assert kernel_DC.shape == (D, C) and kernel_DC.dtype == torch.float32
    second = make(dtype=torch.float32, **kw)
    second.load_kernel(kernel_DC)
    second.load_training_state(state)
    for head in (first, second):
        train(head, 2, first=3)
    assert torch.equal(first.centers.weight, second.centers.weight)


def test_centers_of_an_older_version_in_fp16_are_converted_aloud(caplog):
    first, second = train(make(dtype=torch.float32), 3), make(dtype=torch.float32)
    old = {**first.local_state(), "weight": first.centers.weight.half()}
    with caplog.at_level(logging.INFO):
        second.load_local_state(old)
    assert torch.equal(second.centers.weight, first.centers.weight.half().float())
    assert "class centers: torch.float16 in the checkpoint, torch.float32 here" in caplog.text


def test_a_state_in_another_form_is_converted():
    first = train(make(dtype=torch.float32), 3)
    second = make(dtype=torch.bfloat16, momentum_dtype=torch.int8)
    second.load_local_state(first.local_state())
    assert torch.equal(second.centers.weight, first.centers.weight.to(torch.bfloat16))
    momentum_CD = first.centers.momentum.data
    error_CD = (second.centers.momentum_table().read(slice(0, C)) - momentum_CD).abs()
    assert (error_CD <= momentum_CD.abs().max(1, keepdim=True)[0] / 127).all()
    third = make(dtype=torch.float32)
    third.load_local_state(second.local_state())
    assert torch.equal(third.centers.momentum.data, second.centers.momentum_table().read(slice(0, C)))


# --- in a training step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_a_lower_policy(dtype):
    head = make(dtype=torch.float32)
    emb_BD, label_B = batch(0, torch.float32)
    low_BD = emb_BD.detach().to(dtype).requires_grad_()
    out = head(low_BD, label_B)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and low_BD.grad.dtype == dtype
    exact = make(dtype=torch.float32)
    exact_BD = low_BD.detach().float().requires_grad_()
    expected = exact(exact_BD, label_B)
    expected.loss.backward()
    assert float(out.loss) == float(expected.loss)
    assert torch.equal(low_BD.grad, exact_BD.grad.to(dtype))


def test_embeddings_without_gradient_still_move_the_centers():
    head = make()
    before_CD = head.centers.weight.clone()
    emb_BD, label_B = batch()
    head(emb_BD.detach(), label_B).loss.backward()
    head.step(0.1)
    assert not torch.equal(head.centers.weight, before_CD)
    with torch.no_grad():
        head(emb_BD, label_B)
    assert not head._pending


def test_the_head_hides_its_rows_from_the_optimizer_and_from_casts():
    head = make(dtype=torch.float32)
    assert not list(head.parameters()) and not list(head.buffers())
    head.half()
    assert head.centers.weight.dtype == torch.float32
    assert "classes 0:30 of 30" in repr(head)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(margin="sphere"), "margin 'sphere': choose from"),
        (dict(op="triton9"), "head_op 'triton9': choose from auto"),
        (dict(sample_rate=0.0), "sample_rate 0.0: must be above 0"),
        (dict(update_rows="some"), "update_rows 'some': choose from sampled, all"),
        (dict(margin="linear_softmax", interclass_filtering_threshold=0.4), "has none"),
        (dict(dtype=torch.int8), "centers in torch.int8: choose from"),
        (dict(momentum_dtype=torch.float16), "momentum in torch.float16: choose from"),
    ],
)
def test_arguments_that_do_not_work(kw, message):
    with pytest.raises(ModelError, match=message) as error:
        make(**kw)
    assert "\n" not in str(error.value)


def test_inputs_that_do_not_fit():
    head = make()
    emb_BD, label_B = batch()
    for bad, message in (
        ((emb_BD[:, :5], label_B), r"takes embeddings \[B, 8\].* got \[6, 5\]"),
        ((emb_BD, label_B[:4]), r"got \[6, 8\] and \[4\]"),
        ((emb_BD, label_B + C), "the head has classes 0 to 29"),
        ((emb_BD, label_B - C), "label -.*the head has classes 0 to 29"),
    ):
        with pytest.raises(ModelError, match=message):
            head(*bad)
    with pytest.raises(ModelError, match=r"head kernel: expected \[8, 30\].* got \[8, 31\]"):
        head.load_kernel(torch.zeros(8, 31))
    with pytest.raises(ModelError, match="the checkpoint's total is 31, this rank's is 30; reshard"):
        head.load_local_state({**head.local_state(), "total": 31})
    with pytest.raises(ModelError, match=r"expected \[30, 8\], got \[30, 9\]"):
        head.load_local_state({**head.local_state(), "weight": torch.zeros(30, 9)})
