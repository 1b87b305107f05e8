"""The head on one rank: its SGD is torch's, in every form of its state; updates, skips, checkpoints, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from head import margins
from head.centers import Centers
from head.head import MarginHead
from head.storage import ByteTable, Noise, bytes_per_row, make_table, round_stochastically
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
        head.set_lr(lr)
        head(emb_BD, label_B).loss.backward()
        head.step(lr, **step)
    return head


# --- SGD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("op", ["reference", "chunked"])
@pytest.mark.parametrize("momentum, weight_decay", [(0.9, 5e-2), (0.9, 0.0), (0.0, 1e-2), (0.0, 0.0)])
def test_it_is_torchs_sgd(update, op, momentum, weight_decay):
    head = make(op=op, momentum=momentum, weight_decay=weight_decay, update=update)
    dense_CD = torch.nn.Parameter(head.centers.weight.clone())
    optimizer = torch.optim.SGD([dense_CD], lr=0.1, momentum=momentum, weight_decay=weight_decay)
    for seed in range(4):
        emb_BD, label_B = batch(seed)
        lr = 0.1 / (1 + seed)
        head.set_lr(lr)
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
    assert (head.centers.velocity is None) == (momentum == 0)


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


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("inv_scale", [1 / 1024, torch.tensor(1 / 1024)])
def test_loss_scaling_leaves_the_update_as_it_is(update, inv_scale):
    plain, scaled = train(make(update=update), 1), make(update=update)
    emb_BD, label_B = batch()
    scaled.set_lr(0.1, inv_scale)
    (scaled(emb_BD, label_B).loss * 1024).backward()
    scaled.step(0.1, inv_scale)
    assert (plain.centers.weight - scaled.centers.weight).abs().max() < 1e-15


@pytest.mark.parametrize("kw", [{}, dict(sample_rate=0.5), dict(momentum_on_host=True)])
def test_a_step_with_found_inf_moves_nothing_and_drops_the_gradient(kw):
    head = train(make(**kw), 2)
    weight_CD, velocity_CD = head.centers.weight.clone(), head.centers.momentum_rows(0, C).clone()
    emb_BD, label_B = batch(5)
    assert float(head.found_inf()) == 0
    (head(emb_BD, label_B).loss * float("inf")).backward()
    assert float(head.found_inf()) == 1
    head.step(0.1, found_inf=head.found_inf())
    assert torch.equal(head.centers.weight, weight_CD)
    assert torch.equal(head.centers.momentum_rows(0, C), velocity_CD)
    assert not head.centers.pending and float(head.found_inf()) == 0
    train(head, 1, found_inf=torch.zeros(()))
    assert not torch.equal(head.centers.weight, weight_CD)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_update_on_a_device_that_is_not_asked_whether_it_counts(momentum):
    """There found_inf stays a tensor: the same numbers where it is 0, not a bit changed where it is 1."""
    from head.centers import Update

    generator = torch.Generator().manual_seed(0)
    weight_KW, velocity_KW, grad_KW = (torch.randn(5, 4, generator=generator) for _ in range(3))
    velocity_KW = velocity_KW if momentum else None
    expected = [None if t is None else t.clone() for t in (weight_KW, velocity_KW, grad_KW)]
    Update(0.1, momentum, 0.01, 0.5)(*expected)
    mine = [None if t is None else t.clone() for t in (weight_KW, velocity_KW, grad_KW)]
    Update(0.1, momentum, 0.01, 0.5, keep=torch.tensor(True))(*mine)
    still = [None if t is None else t.clone() for t in (weight_KW, velocity_KW)]
    Update(0.1, momentum, 0.01, 0.5, keep=torch.tensor(False))(*still, grad_KW * float("nan"))
    assert torch.allclose(mine[0], expected[0], rtol=1e-6, atol=1e-7) and torch.equal(still[0], weight_KW)
    if momentum:
        assert torch.allclose(mine[1], expected[1], rtol=1e-6, atol=1e-7) and torch.equal(still[1], velocity_KW)


@pytest.mark.parametrize("op", ["reference", "chunked"])
@pytest.mark.parametrize("where", ["embeddings", "gradient"])
@pytest.mark.parametrize("kw", [{}, dict(sample_rate=0.5), dict(dtype=torch.bfloat16, momentum_dtype=torch.int8)])
def test_what_is_not_finite_cannot_reach_centers_updated_inside_backward(op, where, kw):
    head = train(make(op=op, update="backward", **kw), 2)
    weight_CD, velocity_CD = head.centers.weight.clone(), head.centers.momentum_rows(0, C).clone()
    emb_BD, label_B = batch(4, head.centers.work_dtype)
    if where == "embeddings":
        with torch.no_grad():
            emb_BD[3, 1] = float("nan")
    head.set_lr(0.1)
    loss = head(emb_BD, label_B).loss
    (loss if where == "embeddings" else loss * float("inf")).backward()
    head.step(0.1)
    assert torch.equal(head.centers.weight, weight_CD)
    assert torch.equal(head.centers.momentum_rows(0, C), velocity_CD)
    assert not torch.isfinite(emb_BD.grad).all()
    train(head, 1)
    assert torch.isfinite(head.centers.weight).all() and not torch.equal(head.centers.weight, weight_CD)


def test_inside_backward_there_is_no_gradient_to_hold():
    head = make(update="backward")
    emb_BD, label_B = batch()
    with pytest.raises(ModelError, match="needs set_lr before every forward"):
        head(emb_BD, label_B)
    head.set_lr(0.1)
    head(emb_BD, label_B).loss.backward()
    assert not head.centers.pending
    head.set_lr(0.1)
    first = head(emb_BD, label_B).loss
    head.set_lr(0.1)
    second = head(emb_BD, label_B).loss
    second.backward()
    with pytest.raises(ModelError, match="updated between this forward and its backward"):
        first.backward()


# --- forms of state --------------------------------------------------------------------------------------------------

FORMS = {
    "bf16 + fp32": dict(dtype=torch.bfloat16),
    "fp16 + fp32": dict(dtype=torch.float16),
    "fp32 + bf16": dict(momentum_dtype=torch.bfloat16),
    "fp32 + int8": dict(momentum_dtype=torch.int8),
    "bf16 + int8": dict(dtype=torch.bfloat16, momentum_dtype=torch.int8),
    "bf16 + none": dict(dtype=torch.bfloat16, momentum=0.0),
    "bf16 + host bf16": dict(dtype=torch.bfloat16, momentum_dtype=torch.bfloat16, momentum_on_host=True),
    "fp32 + host int8": dict(momentum_dtype=torch.int8, momentum_on_host=True),
}


def test_rounding_is_unbiased_and_to_a_neighbour():
    rows_KW = torch.linspace(-3, 3, 4000).reshape(1000, 4)
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        total_KW, count = torch.zeros(1000, 4, dtype=torch.float64), 200
        for key in range(count):
            bits = Noise(key, slice(0, 1000), 0, "cpu").bits(4)
            rounded_KW = round_stochastically(rows_KW, dtype, bits)
            assert ((rounded_KW.float() - rows_KW).abs() <= 2 * unit * rows_KW.abs()).all()
            total_KW += rounded_KW.double()
        # the error of a mean of `count` draws, over all entries: one in ten thousand may lie beyond four of its spreads
        error_KW = (total_KW / count - rows_KW) / (2 * unit * rows_KW.abs() / math.sqrt(count) / 2)
        assert error_KW.abs().max() < 5 and error_KW.mean().abs() < 4 / math.sqrt(4000)
        exact_KW = rows_KW.to(dtype)
        bits = Noise(7, slice(0, 1000), 0, "cpu").bits(4)
        assert torch.equal(round_stochastically(exact_KW.float(), dtype, bits), exact_KW)


def test_noise_is_a_function_of_key_row_and_column():
    whole = Noise(5, slice(0, 64), 100, "cpu").bits(16)
    assert torch.equal(Noise(5, slice(4, 9), 110, "cpu").bits(16), whole[14:19])
    assert torch.equal(Noise(5, torch.tensor([63, 2]), 100, "cpu").bits(16), whole[[63, 2]])
    for other in (Noise(6, slice(0, 64), 100, "cpu"), Noise(5, slice(0, 64), 100, "cpu").other()):
        assert (other.bits(16) == whole).float().mean() < 0.01
    low = (Noise(5, slice(0, 2000), 0, "cpu").bits(64) & 0xFFFF).double()
    assert abs(low.mean() / 32767.5 - 1) < 0.01
    assert abs(torch.tensor([low[:, 0].sub(32767.5).mul(low[:, 1] - 32767.5).mean() / 32768**2])).max() < 0.05


def test_eight_bits_keep_small_values_on_average():
    """Rounding to the nearest would keep an entry of a few 127ths of its block's peak for ever: momentum must fade."""
    table = make_table(50, 256, torch.int8, torch.float32, "cpu")
    start_KW = torch.full((50, 256), 3.0 / 127)
    start_KW[:, ::128] = 1.0
    table.write(slice(0, 50), start_KW, Noise(0, slice(0, 50), 0, "cpu"))
    for step in range(1, 21):
        rows_KW = table.read(slice(0, 50))
        rows_KW[:, 1:128] *= 0.9
        rows_KW[:, 129:] *= 0.9
        table.write(slice(0, 50), rows_KW, Noise(step, slice(0, 50), 0, "cpu"))
    small = table.read(slice(0, 50))[:, 1:128].mean()
    assert float(small) == pytest.approx(3.0 / 127 * 0.9**20, rel=0.1)
    assert (table.read(slice(0, 50))[:, 0] == 1).all()


def test_eight_bit_rows_by_number_and_odd_widths():
    table = ByteTable(torch.zeros(9, 130, dtype=torch.int8), torch.zeros(9, 2), torch.float32)
    rows_KW = torch.randn(2, 130, generator=torch.Generator().manual_seed(0))
    where = torch.tensor([7, 1])
    table.write(where, rows_KW, Noise(0, where, 0, "cpu"))
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
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[stored.centers.dtype]
    difference_CD = stored.centers.weight.float() - plain.centers.weight
    # of the smallest float16 numbers the distance does not shrink any more
    assert (difference_CD.abs() <= unit * plain.centers.weight.abs() + 6e-8).all()
    if stored.centers.velocity is not None:
        velocity_CD = plain.centers.velocity.data
        peak_C1 = velocity_CD.abs().max(1, keepdim=True)[0]
        assert ((stored.centers.momentum_rows(0, C) - velocity_CD).abs() <= peak_C1 / 100 + 1e-6).all()
    emb_BD, label_B = batch(0, torch.float32)
    losses = []
    for _ in range(30):
        out = stored(emb_BD, label_B)
        losses.append(float(out.loss))
        out.loss.backward()
        stored.step(0.05)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("form", FORMS)
def test_inside_backward_is_the_same_in_every_form(form, update):
    """The same walk, the same noise: not a bit differs between updating at once and at the step."""
    at_step = train(make(**{"dtype": torch.float32, **FORMS[form]}))
    other = train(make(**{"dtype": torch.float32, **FORMS[form]}, update=update))
    assert torch.equal(at_step.centers.weight, other.centers.weight)


def test_momentum_on_the_host_is_momentum():
    plain = train(make(sample_rate=0.5), 5)
    host = make(sample_rate=0.5, momentum_on_host=True)
    for seed in range(5):
        emb_BD, label_B = batch(seed)
        if seed % 2:
            host.prepare(label_B)  # ahead of the backbone, or not
        host(emb_BD, label_B).loss.backward()
        host.step(0.1)
    assert torch.equal(plain.centers.weight, host.centers.weight)
    assert torch.equal(plain.centers.velocity.data, host.centers.momentum_rows(0, C))


def test_momentum_on_the_host_over_several_forwards():
    plain, host = make(sample_rate=0.5), make(sample_rate=0.5, momentum_on_host=True)
    for head in (plain, host):
        for step in range(3):
            for seed in range(2):
                emb_BD, label_B = batch(10 * step + seed)
                head(emb_BD, label_B).loss.backward()
            head.step(0.1)
    assert torch.equal(plain.centers.weight, host.centers.weight)


def test_a_failure_of_the_host_thread_is_not_lost(monkeypatch):
    head = train(make(momentum_on_host=True), 1)
    monkeypatch.setattr(head.centers.velocity, "_put", lambda *args: 1 / 0)
    train(head, 1, first=1)
    with pytest.raises(ZeroDivisionError):
        train(head, 1, first=2)


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


def test_a_state_in_another_form_is_converted():
    first = train(make(dtype=torch.float32), 3)
    second = make(dtype=torch.bfloat16, momentum_dtype=torch.int8)
    second.load_local_state(first.local_state())
    assert torch.equal(second.centers.weight, first.centers.weight.to(torch.bfloat16))
    velocity_CD = first.centers.velocity.data
    error_CD = (second.centers.momentum_rows(0, C) - velocity_CD).abs()
    assert (error_CD <= velocity_CD.abs().max(1, keepdim=True)[0] / 127).all()
    third = make(dtype=torch.float32)
    third.load_local_state(second.local_state())
    assert torch.equal(third.centers.velocity.data, second.centers.momentum_rows(0, C))


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
    assert not head.centers.pending


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
        (dict(update_rows="some"), "update_rows 'some': choose from drawn, all"),
        (dict(update="now"), "update 'now': choose from step, backward"),
        (dict(update="backward", update_rows="all", sample_rate=0.5), "no backward walk visits"),
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
