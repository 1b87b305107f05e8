"""The Triton kernels of `head.ops.triton`. Importing this needs triton; with TRITON_INTERPRET=1 they run on a CPU.

Row and column numbers are widened to int64 before they become addresses: 10^8 rows of 512 pass 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(
    left,
    weight,
    index,
    row_K,
    in_rows_K,
    b_B,
    in_batch_B,
    D,
    GATHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of left @ weight.T [BLOCK_B, BLOCK_K] in float32, and the rows' inverse norms (1 without NORMALISE)."""
    operand = left.dtype.element_ty
    stored_K = row_K.to(tl.int64)
    if GATHER:
        stored_K = tl.load(index + stored_K, mask=in_rows_K, other=0)
    z_BK = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    square_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left_BD = tl.load(left + b_B[:, None] * D + d[None, :], mask=in_batch_B[:, None] & (d < D)[None, :], other=0.0)
        weight_KD = tl.load(
            weight + stored_K[:, None] * D + d[None, :], mask=in_rows_K[:, None] & (d < D)[None, :], other=0.0
        )
        weight_KD = weight_KD.to(operand)
        if WIDEN:  # the interpreter multiplies bfloat16's bits as integers
            left_BD, weight_KD = left_BD.to(tl.float32), weight_KD.to(tl.float32)
        z_BK = tl.dot(left_BD, tl.trans(weight_KD), z_BK, input_precision=PRECISION)
        if NORMALISE:
            wide_KD = weight_KD.to(tl.float32)
            square_K += tl.sum(wide_KD * wide_KD, axis=1)
    inverse_K = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
    if NORMALISE:
        # a row of zeros has no direction; padding beyond the last row is masked by the caller
        inverse_K = tl.where(square_K == 0, 0.0, 1.0 / tl.sqrt(tl.where(square_K == 0, 1.0, square_K)))
    return z_BK, inverse_K


@triton.jit
def scan_kernel(
    left,
    left_scale,
    weight,
    index,
    inverse,
    column,
    plain,
    top,
    total,
    best,
    better,
    B,
    K,
    D,
    filter_above,
    TILES,
    GATHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    FILTER: tl.constexpr,
    TOP5: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of the batch over TILES tiles of rows, with a running maximum: top, total, best, better are
    [programs, B]."""
    b_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch_B = b_B < B
    scale_B = tl.load(left_scale + b_B, mask=in_batch_B, other=0.0)
    column_B = tl.load(column + b_B, mask=in_batch_B, other=-1)
    plain_B = tl.load(plain + b_B, mask=in_batch_B, other=0.0)
    lowest = -8.5e37  # finite, so that a tile without a column gives no inf - inf
    top_B = tl.full((BLOCK_B,), lowest, dtype=tl.float32)
    best_B = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
    total_B = tl.zeros((BLOCK_B,), dtype=tl.float32)
    better_B = tl.zeros((BLOCK_B,), dtype=tl.float32)
    for tile in range(0, TILES):
        row_K = (tl.program_id(1) * TILES + tile) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_rows_K = row_K < K
        z_BK, inverse_K = _logits(
            left,
            weight,
            index,
            row_K,
            in_rows_K,
            b_B,
            in_batch_B,
            D,
            GATHER,
            NORMALISE,
            WIDEN,
            PRECISION,
            BLOCK_B,
            BLOCK_K,
            BLOCK_D,
        )
        if NORMALISE:
            if tl.program_id(0) == 0:
                tl.store(inverse + row_K, inverse_K, mask=in_rows_K)
        z_BK = z_BK * scale_B[:, None] * inverse_K[None, :]
        other_BK = in_rows_K[None, :] & (row_K[None, :] != column_B[:, None])
        z_BK = tl.where(other_BK, z_BK, float("-inf"))
        tile_top_B = tl.max(z_BK, axis=1)
        best_B = tl.maximum(best_B, tile_top_B)
        if TOP5:
            better_B += tl.sum((z_BK >= plain_B[:, None]).to(tl.float32), axis=1)
        if FILTER:
            z_BK = tl.where(z_BK > filter_above, 0.0, z_BK)
            tile_top_B = tl.max(z_BK, axis=1)
        new_top_B = tl.maximum(top_B, tile_top_B)
        total_B = total_B * tl.exp(top_B - new_top_B) + tl.sum(tl.exp(z_BK - new_top_B[:, None]), axis=1)
        top_B = new_top_B
    place = tl.program_id(1) * B + b_B
    tl.store(top + place, top_B, mask=in_batch_B)
    tl.store(total + place, total_B, mask=in_batch_B)
    tl.store(best + place, best_B, mask=in_batch_B)
    if TOP5:
        tl.store(better + place, better_B, mask=in_batch_B)


@triton.jit
def probability_kernel(
    left,
    left_scale,
    weight,
    index,
    inverse,
    column,
    shift,
    minus,
    grad,
    p,
    along,
    first,
    B,
    K,
    D,
    filter_above,
    GATHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    FILTER: tl.constexpr,
    DIVIDE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of exp(logit - shift) of rows first..first + K, [B, K], in p's dtype, and its part of Σ g logit p,
    [batch tiles, K]. DIVIDE: by the rows' lengths."""
    b_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch_B = b_B < B
    k_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows_K = k_K < K
    row_K = first + k_K
    scale_B = tl.load(left_scale + b_B, mask=in_batch_B, other=0.0)
    column_B = tl.load(column + b_B, mask=in_batch_B, other=-1)
    shift_B = tl.load(shift + b_B, mask=in_batch_B, other=0.0)
    minus_B = tl.load(minus + b_B, mask=in_batch_B, other=0.0)
    grad_B = tl.load(grad + b_B, mask=in_batch_B, other=0.0)
    # the norms of forward, so that both walks have the same logits
    z_BK, _ = _logits(
        left,
        weight,
        index,
        row_K,
        in_rows_K,
        b_B,
        in_batch_B,
        D,
        GATHER,
        False,
        WIDEN,
        PRECISION,
        BLOCK_B,
        BLOCK_K,
        BLOCK_D,
    )
    inverse_K = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
    if NORMALISE:
        inverse_K = tl.load(inverse + row_K, mask=in_rows_K, other=0.0)
    z_BK = z_BK * scale_B[:, None] * inverse_K[None, :]
    valid_BK = in_batch_B[:, None] & in_rows_K[None, :]
    p_BK = tl.where(valid_BK, tl.exp(z_BK - shift_B[:, None]), 0.0)
    if FILTER:
        p_BK = tl.where(z_BK > filter_above, 0.0, p_BK)
    p_BK = tl.where(row_K[None, :] == column_B[:, None], minus_B[:, None], p_BK)
    if NORMALISE:
        part_K = tl.sum(tl.where(valid_BK, grad_B[:, None] * z_BK * p_BK, 0.0), axis=0)
        tl.store(along + tl.program_id(0) * K + k_K, part_K, mask=in_rows_K)
    if DIVIDE:
        p_BK = p_BK * inverse_K[None, :]
    tl.store(p + b_B.to(tl.int64)[:, None] * K + k_K[None, :], p_BK.to(p.dtype.element_ty), mask=valid_BK)


@triton.jit
def unit_rows_kernel(
    weight,
    index,
    inverse,
    unit,
    first,
    K,
    D,
    GATHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows first..first + K divided by their lengths, [K, D], in unit's dtype."""
    k_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows_K = k_K < K
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_KD = in_rows_K[:, None] & (d < D)[None, :]
    stored_K = (first + k_K).to(tl.int64)
    inverse_K = tl.full((BLOCK_K,), 1.0, dtype=tl.float32)
    if NORMALISE:
        inverse_K = tl.load(inverse + stored_K, mask=in_rows_K, other=0.0)
    if GATHER:
        stored_K = tl.load(index + stored_K, mask=in_rows_K, other=0)
    weight_KD = tl.load(weight + stored_K[:, None] * D + d[None, :], mask=mask_KD, other=0.0).to(tl.float32)
    tl.store(
        unit + k_K.to(tl.int64)[:, None] * D + d[None, :],
        (weight_KD * inverse_K[:, None]).to(unit.dtype.element_ty),
        mask=mask_KD,
    )


@triton.jit
def _mix(x):
    """tables._mix: a 31-bit hash of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF


@triton.jit
def _noise(number_K, d, mixed_key):
    """tables.Noise.bits for those rows and columns, [K, D] int32."""
    row_K = _mix(_mix(number_K) + mixed_key).to(tl.int32)
    column_D = _mix(d.to(tl.int64) + 0x2545F491).to(tl.int32)
    bits_KD = row_K[:, None] + column_D[None, :]
    bits_KD = (bits_KD ^ (bits_KD >> 15)) * 0x2C1B3C6D
    bits_KD = (bits_KD ^ (bits_KD >> 12)) * 0x297A2D39
    return bits_KD ^ (bits_KD >> 15)


@triton.jit
def _rounded(rows_KD, bits_KD, DROPPED: tl.constexpr):
    """tables.round_stochastically, still in float32. DROPPED: mantissa bits to lose; 0 keeps all."""
    if DROPPED:
        below = (1 << DROPPED) - 1
        raised_KD = rows_KD.to(tl.int32, bitcast=True) + (bits_KD & below)
        rows_KD = (raised_KD & (-1 - below)).to(tl.float32, bitcast=True)
    return rows_KD


@triton.jit
def update_kernel(
    grad,
    weight,
    weight_index,
    weight_first,
    velocity,
    velocity_index,
    velocity_first,
    velocity_scale,
    scale,
    along,
    inv_scale,
    keep,
    lr,
    momentum,
    weight_decay,
    first_number,
    weight_key,
    velocity_key,
    K,
    D,
    BLOCKS,
    WEIGHT_GATHER: tl.constexpr,
    VELOCITY: tl.constexpr,
    VELOCITY_GATHER: tl.constexpr,
    SCALE: tl.constexpr,
    ALONG: tl.constexpr,
    INV_SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT_DROPPED: tl.constexpr,
    VELOCITY_DROPPED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SGD on K rows, in one pass over gradient, weight and momentum: what `centers.Rows.update` does in many.

    VELOCITY: 0 none, 1 floating, 2 int8 with a scale per BLOCK_D columns, of which a row has BLOCKS."""
    k_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows_K = k_K < K
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_KD = in_rows_K[:, None] & (d < D)[None, :]
    row_K = weight_first + k_K.to(tl.int64)
    if WEIGHT_GATHER:
        row_K = tl.load(weight_index + k_K, mask=in_rows_K, other=0)
    weight_KP = weight + row_K[:, None] * D + d[None, :]
    weight_KD = tl.load(weight_KP, mask=mask_KD, other=0.0).to(tl.float32)
    grad_KD = tl.load(grad + k_K.to(tl.int64)[:, None] * D + d[None, :], mask=mask_KD, other=0.0)
    if SCALE:
        grad_KD = grad_KD * tl.load(scale + k_K, mask=in_rows_K, other=0.0)[:, None]
    if ALONG:
        grad_KD = grad_KD - tl.load(along + k_K, mask=in_rows_K, other=0.0)[:, None] * weight_KD
    if INV_SCALE:
        grad_KD = grad_KD * tl.load(inv_scale)
    write_K = in_rows_K
    if KEEP:  # the same number for all rows
        write_K = in_rows_K & (tl.load(keep + k_K * 0) != 0)
    write_KD = write_K[:, None] & (d < D)[None, :]
    grad_KD = grad_KD + weight_decay * weight_KD
    number_K = row_K + first_number
    if VELOCITY:
        place_K = velocity_first + k_K.to(tl.int64)
        if VELOCITY_GATHER:
            place_K = tl.load(velocity_index + k_K, mask=in_rows_K, other=0)
        velocity_KP = velocity + place_K[:, None] * D + d[None, :]
        velocity_KD = tl.load(velocity_KP, mask=mask_KD, other=0.0).to(tl.float32)
        if VELOCITY == 2:
            block_K = velocity_scale + place_K * BLOCKS + tl.program_id(1)
            velocity_KD = velocity_KD * tl.load(block_K, mask=in_rows_K, other=0.0)[:, None]
        velocity_KD = momentum * velocity_KD + grad_KD
        grad_KD = velocity_KD
        if VELOCITY == 2:
            peak_K = tl.max(tl.where(mask_KD, tl.abs(velocity_KD), 0.0), axis=1) / 127
            inverse_K = tl.where(peak_K > 0, 1.0 / tl.where(peak_K > 0, peak_K, 1.0), 0.0)
            fraction_KD = (_noise(number_K, d, velocity_key) & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
            code_KD = tl.floor(velocity_KD * inverse_K[:, None] + fraction_KD)
            code_KD = tl.minimum(tl.maximum(code_KD, -127.0), 127.0)
            tl.store(velocity_KP, code_KD.to(tl.int8), mask=write_KD)
            tl.store(block_K, peak_K, mask=write_K)
        else:
            if VELOCITY_DROPPED:
                velocity_KD = _rounded(velocity_KD, _noise(number_K, d, velocity_key), VELOCITY_DROPPED)
            tl.store(velocity_KP, velocity_KD.to(velocity.dtype.element_ty), mask=write_KD)
    weight_KD = weight_KD - lr * grad_KD
    if WEIGHT_DROPPED:
        weight_KD = _rounded(weight_KD, _noise(number_K, d, weight_key), WEIGHT_DROPPED)
    tl.store(weight_KP, weight_KD.to(weight.dtype.element_ty), mask=write_KD)
