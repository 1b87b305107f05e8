"""The Triton kernels of `head.ops.triton`. Importing this needs triton; with TRITON_INTERPRET=1 they run on a CPU.

Row and column numbers are widened to int64 before they become addresses: 10^8 rows of 512 pass 2^31. WIDTH is the next
power of two of D: a tile has whole rows, so that it serves both products of its pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tiles that a machine may try, once for each shape; what it finds is kept in Triton's cache on disk. On Hopper products
# of 64 rows by two groups of warps are the quick ones: BLOCK_B in the first pass, BLOCK_K in the second.
TILES = [
    triton.Config({"BLOCK_B": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_B": 32, "BLOCK_K": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK_B": 32, "BLOCK_K": 32}, num_warps=8, num_stages=2),
]
STATE = ["top", "total", "best", "better", "out"]  # trying a tile must not count


def without_spills(tiles, capability: int, longest: str, flags: dict) -> list:
    """Those that need no more registers than there are (benchmark/results/*_kernels.json). longest: the side of the
    tile whose sums a kernel holds. flags: the kernel's constants."""
    if any(flags.get(name) for name in ("FILTER", "TOP5", "MEMBER")):
        tiles = [tile for tile in tiles if tile.kwargs[longest] < 64]
    return [tile for tile in tiles if capability < 100 or tile.kwargs["BLOCK_B"] < 64]


def _prune(longest):
    def prune(tiles, arguments, **flags):
        major, minor = torch.cuda.get_device_capability(arguments["left"].device)
        return without_spills(tiles, 10 * major + minor, longest, flags)

    return {"early_config_prune": prune}


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies bfloat16's bits as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b)


@triton.autotune(
    TILES,
    key=["B", "WIDTH", "LEARN", "FILTER", "TOP5"],
    prune_configs_by=_prune("BLOCK_B"),
    restore_value=STATE,
    cache_results=True,
)
@triton.jit
def scan_kernel(
    left,
    left_scale,
    right,
    column,
    plain,
    top,
    total,
    best,
    better,
    out,
    first,
    B,
    K,
    D,
    PER,
    filter_above,
    skip_below,
    boost,
    LEARN: tl.constexpr,
    FILTER: tl.constexpr,
    TOP5: tl.constexpr,
    WIDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the batch over PER rows of a chunk [K, D], with the running maximum and the weighted sum of the rows:
    top, total, best, better are [programs, B], out [programs, B, D]; they go on from the chunk before."""
    b_B = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch_B = b_B < B
    d = tl.arange(0, WIDTH)
    in_width = d < D
    mask_BD = in_batch_B[:, None] & in_width[None, :]
    left_BD = tl.load(left + b_B[:, None] * D + d[None, :], mask=mask_BD, other=0.0)
    scale_B = tl.load(left_scale + b_B, mask=in_batch_B, other=0.0)
    column_B = tl.load(column + b_B, mask=in_batch_B, other=-1)
    plain_B = tl.load(plain + b_B, mask=in_batch_B, other=0.0)
    place_B = tl.program_id(1) * B + b_B
    top_B = tl.load(top + place_B, mask=in_batch_B, other=0.0)
    total_B = tl.load(total + place_B, mask=in_batch_B, other=0.0)
    best_B = tl.load(best + place_B, mask=in_batch_B, other=0.0)
    better_B = tl.load(better + place_B, mask=in_batch_B, other=0.0)
    out_P = out + place_B.to(tl.int64)[:, None] * D + d[None, :]
    if LEARN:
        out_BD = tl.load(out_P, mask=mask_BD, other=0.0)
    begin = tl.program_id(1) * PER
    end = tl.minimum(begin + PER, K)
    for start in range(begin, end, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        in_rows_K = k_K < end
        right_P = right + k_K.to(tl.int64)[:, None] * D + d[None, :]
        right_KD = tl.load(right_P, mask=in_rows_K[:, None] & in_width[None, :], other=0.0)
        z_BK = _dot(left_BD, tl.trans(right_KD), WIDEN) * scale_B[:, None]
        other_BK = in_rows_K[None, :] & ((first + k_K)[None, :] != column_B[:, None])
        z_BK = tl.where(other_BK, z_BK, -1.7e38)  # finite, so that a tile without a column gives no inf - inf
        tile_top_B = tl.max(z_BK, axis=1)
        best_B = tl.maximum(best_B, tile_top_B)
        if TOP5:
            better_B += tl.sum((z_BK >= plain_B[:, None]).to(tl.float32), axis=1)
        plain_BK = z_BK
        if FILTER:
            z_BK = tl.where(z_BK > filter_above, 0.0, z_BK)
            tile_top_B = tl.max(z_BK, axis=1)
        new_top_B = tl.maximum(top_B, tile_top_B)
        fade_B = tl.exp(top_B - new_top_B)
        p_BK = tl.exp(z_BK - new_top_B[:, None])
        total_B = total_B * fade_B + tl.sum(p_BK, axis=1)
        top_B = new_top_B
        if LEARN:
            if FILTER:
                p_BK = tl.where(plain_BK > filter_above, 0.0, p_BK)
            out_BD = out_BD * fade_B[:, None]
            if tl.max(p_BK) >= skip_below:
                out_BD += _dot((p_BK * boost).to(right_KD.dtype), right_KD, WIDEN)
    tl.store(top + place_B, top_B, mask=in_batch_B)
    tl.store(total + place_B, total_B, mask=in_batch_B)
    tl.store(best + place_B, best_B, mask=in_batch_B)
    tl.store(better + place_B, better_B, mask=in_batch_B)
    if LEARN:
        tl.store(out_P, out_BD, mask=mask_BD)


@triton.autotune(TILES, key=["B", "WIDTH", "FILTER", "MEMBER"], prune_configs_by=_prune("BLOCK_K"), cache_results=True)
@triton.jit
def gradient_kernel(
    left,
    left_scale,
    right,
    column,
    shift,
    minus,
    weight,
    member,
    part,
    grad,
    first,
    B,
    K,
    D,
    R,
    filter_above,
    skip_below,
    FILTER: tl.constexpr,
    MEMBER: tl.constexpr,
    WIDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_i weight_i p_ij left_i of a tile of a chunk's rows, [K, D]: p = exp(logit - shift), minus on the target.
    weight: at most 1. MEMBER: p counts where member [parts, R] says so of the image's part."""
    k_K = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows_K = k_K < K
    d = tl.arange(0, WIDTH)
    in_width = d < D
    place_KD = k_K.to(tl.int64)[:, None] * D + d[None, :]
    mask_KD = in_rows_K[:, None] & in_width[None, :]
    right_KD = tl.load(right + place_KD, mask=mask_KD, other=0.0)
    sum_KD = tl.zeros((BLOCK_K, WIDTH), dtype=tl.float32)
    for start in range(0, B, BLOCK_B):
        b_B = start + tl.arange(0, BLOCK_B)
        in_batch_B = b_B < B
        mask_BD = in_batch_B[:, None] & in_width[None, :]
        left_BD = tl.load(left + b_B[:, None] * D + d[None, :], mask=mask_BD, other=0.0)
        scale_B = tl.load(left_scale + b_B, mask=in_batch_B, other=0.0)
        column_B = tl.load(column + b_B, mask=in_batch_B, other=-1)
        shift_B = tl.load(shift + b_B, mask=in_batch_B, other=0.0)
        minus_B = tl.load(minus + b_B, mask=in_batch_B, other=0.0)
        weight_B = tl.load(weight + b_B, mask=in_batch_B, other=0.0)
        z_KB = _dot(right_KD, tl.trans(left_BD), WIDEN) * scale_B[None, :]
        p_KB = tl.exp(z_KB - shift_B[None, :])
        if FILTER:
            p_KB = tl.where(z_KB > filter_above, 0.0, p_KB)
        if MEMBER:
            part_B = tl.load(part + b_B, mask=in_batch_B, other=0)
            in_part_KB = tl.load(
                member + part_B[None, :] * R + first + k_K[:, None],
                mask=in_rows_K[:, None] & in_batch_B[None, :],
                other=0,
            )
            p_KB = tl.where(in_part_KB != 0, p_KB, 0.0)
        p_KB = tl.where((first + k_K)[:, None] == column_B[None, :], minus_B[None, :], p_KB)
        p_KB = tl.where(in_batch_B[None, :] & in_rows_K[:, None], p_KB * weight_B[None, :], 0.0)
        if tl.max(tl.abs(p_KB)) >= skip_below:
            sum_KD += _dot(p_KB.to(left_BD.dtype), left_BD, WIDEN)
    tl.store(grad + place_KD, sum_KD, mask=mask_KD)


@triton.jit
def unit_rows_kernel(
    weight, index, inverse, unit, first, K, D, GATHER: tl.constexpr, NORMALISE: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows first..first + K divided by their lengths, [K, D], in unit's dtype."""
    d = tl.arange(0, WIDTH)
    k = tl.program_id(0).to(tl.int64)
    row = first + k
    if GATHER:
        row = tl.load(index + row)
    row_D = tl.load(weight + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    if NORMALISE:
        row_D = row_D * tl.load(inverse + row)
    tl.store(unit + k * D + d, row_D.to(unit.dtype.element_ty), mask=d < D)


@triton.jit
def _mix(x):
    """A 31-bit hash of int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF


@triton.jit
def _noise(row, d, key):
    """Random bits of a row's elements, [D] int32: a function of key, row and column, whatever the order."""
    bits_D = _mix(_mix(row) + key).to(tl.int32) + _mix(d.to(tl.int64) + 0x2545F491).to(tl.int32)
    bits_D = (bits_D ^ (bits_D >> 15)) * 0x2C1B3C6D
    bits_D = (bits_D ^ (bits_D >> 12)) * 0x297A2D39
    return bits_D ^ (bits_D >> 15)


@triton.jit
def _rounded(row_D, bits_D, DROPPED: tl.constexpr):
    """`storage.round_stochastically`, still in float32. DROPPED: mantissa bits to lose; 0 keeps all."""
    if DROPPED:
        below = (1 << DROPPED) - 1
        raised_D = (row_D.to(tl.int32, bitcast=True) + (bits_D & below)) & (-1 - below)
        # a nan of all ones would run over into -0
        row_D = tl.where(row_D == row_D, raised_D.to(tl.float32, bitcast=True), row_D)
    return row_D


@triton.jit(do_not_specialize=["weight_key", "momentum_key", "first_number"])
def update_kernel(
    grad,
    weight,
    weight_index,
    weight_first,
    inverse,
    momentum,
    momentum_scale,
    scale,
    keep,
    lr,
    factor,
    decay,
    first_number,
    weight_key,
    momentum_key,
    D,
    GATHER: tl.constexpr,
    NORMALISE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    SCALE: tl.constexpr,
    KEEP: tl.constexpr,
    WEIGHT_DROPPED: tl.constexpr,
    MOMENTUM_DROPPED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """SGD on a row, in one pass over gradient, weight, momentum and inverse length: what `centers.Update` does in many.
    With NORMALISE the gradient's part along the row is taken off here.

    MOMENTUM: 0 none, 1 floating, 2 int8 with a scale per 128 columns."""
    k = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    in_width = d < D
    write = in_width
    if KEEP:  # the same number for all rows
        write = in_width & (tl.load(keep + d * 0) != 0)
    row = weight_first + k
    if GATHER:
        row = tl.load(weight_index + k)
    weight_P = weight + row * D + d
    weight_D = tl.load(weight_P, mask=in_width, other=0.0).to(tl.float32)
    grad_D = tl.load(grad + k * D + d, mask=in_width, other=0.0)
    if SCALE:
        grad_D = grad_D * tl.load(scale + k)
    if NORMALISE:
        length = tl.load(inverse + row)
        grad_D = grad_D - weight_D * (tl.sum(grad_D * weight_D) * length * length)
    grad_D = grad_D + decay * weight_D
    number = row + first_number
    if MOMENTUM:
        momentum_P = momentum + row * D + d
        momentum_D = tl.load(momentum_P, mask=in_width, other=0.0).to(tl.float32)
        if MOMENTUM == 2:
            BLOCKS: tl.constexpr = (WIDTH + 127) // 128
            stored = (D + 127) // 128
            n = tl.arange(0, BLOCKS)
            scale_P = momentum_scale + row * stored + n
            scale_N1 = tl.load(scale_P, mask=n < stored, other=0.0)[:, None]
            momentum_D = tl.reshape(tl.reshape(momentum_D, (BLOCKS, WIDTH // BLOCKS)) * scale_N1, (WIDTH,))
        grad_D = factor * momentum_D + grad_D
        if MOMENTUM == 2:
            blocks_NK = tl.reshape(tl.where(in_width, grad_D, 0.0), (BLOCKS, WIDTH // BLOCKS))
            peak_N = tl.max(tl.abs(blocks_NK), axis=1) / 127
            inverse_N = tl.where(peak_N > 0, 1.0 / tl.where(peak_N > 0, peak_N, 1.0), 0.0)
            exact_D = tl.reshape(blocks_NK * inverse_N[:, None], (WIDTH,))
            fraction_D = (_noise(number, d, momentum_key) & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
            code_D = tl.minimum(tl.maximum(tl.floor(exact_D + fraction_D), -127.0), 127.0)
            tl.store(momentum_P, code_D.to(tl.int8), mask=write)
            keeps = n < stored
            if KEEP:
                keeps = keeps & (tl.load(keep + n * 0) != 0)
            tl.store(scale_P, peak_N, mask=keeps)
        else:
            stored_D = grad_D
            if MOMENTUM_DROPPED:
                stored_D = _rounded(grad_D, _noise(number, d, momentum_key), MOMENTUM_DROPPED)
            tl.store(momentum_P, stored_D.to(momentum.dtype.element_ty), mask=write)
    weight_D = weight_D - lr * grad_D
    if WEIGHT_DROPPED:
        weight_D = _rounded(weight_D, _noise(number, d, weight_key), WEIGHT_DROPPED)
    tl.store(weight_P, weight_D.to(weight.dtype.element_ty), mask=write)
    if NORMALISE:
        square = tl.sum(tl.where(in_width, weight_D * weight_D, 0.0))
        long = square > 1e-37
        new = tl.where(long, 1.0 / tl.sqrt(tl.where(long, square, 1.0)), 0.0)
        if KEEP:
            new = tl.where(tl.load(keep) != 0, new, length)
        tl.store(inverse + row, new)
