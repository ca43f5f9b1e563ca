"""The chain of chunks of a linear memory, cut into segments: for calls with too few heads to fill a GPU.

Gradients are taken at the state at a chunk's start, where they are affine in it. So is the state at a
segment's end in that at its start, [W; S]' = P [W; S] + [what the segment writes from zero], and P `[2 D,
2 D]` holds for every value column. Three launches take the place of one chain:

    linear_carry        parallel over segments    P, by carrying 2 D unit columns, and the writes from zero
    linear_scan         over segments             the states at their starts
    linear_write        parallel over segments    everything else, from these

The backward is the same in reverse, with P transposed, which it has from the forward:
`linear_carry_backward`, `linear_scan_backward`, `linear_write_backward`. The first segment of a row starts
from a known state, so nobody asks for its P; nobody asks for the last one's either.

States are in the kernels' layout, fp32: kept_W and kept_S `[slots, H, D, D]` (`plan.Groups`), transitions
`[slots, H, 2, D, 2 D]` (`[slots, H, 1, D, D]` without momentum): of W and of S at the end, from W and from S.
"""

import triton
import triton.language as tl

from titans.ops.kernels.functions import (
    END,
    ROWS,
    SIZES,
    chunks_of_group,
    chunks_of_segment,
    matmul,
    program_of,
    row_of,
    segment_of,
    slot_of_segment,
)
from titans.ops.kernels.linear import write_chunk, write_chunk_backward


@triton.jit
def carried(P, state, PRECISION: tl.constexpr):
    """P state. What has grown past fp32 in P leaves rows of the state that are zero at zero, as the chain
    does, and makes NaN of others."""
    finite = tl.abs(P) < float("inf")
    lost = tl.where(finite, 0.0, 1.0).to(tl.float16)
    lost_rows = tl.dot(lost, tl.where(state == 0.0, 0.0, 1.0).to(tl.float16))
    result = tl.dot(tl.where(finite, P, 0.0), state, input_precision=PRECISION)
    return tl.where(lost_rows > 0.0, float("nan"), result)


@triton.jit(do_not_specialize=SIZES)
def linear_carry(
    k, v, vectors, table, W_state, S_state, first_anchor, kept_W, kept_S, transitions,
    num_rows, group_start, group_end, stride, segment,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x parts x H x rows x segments); parts: the segment's own writes, P's columns from W, and
    those from S with momentum. Its own writes leave the state at the next segment's start in kept_W and
    kept_S: complete after the first segment, from zero after others."""
    PARTS: tl.constexpr = 3 if MOMENTUM else 2
    block, head, row, piece = program_of(PARTS * (D // BV), H, num_rows)
    part, block = block // (D // BV), block % (D // BV)
    begin, end, first, base, count = row_of(table, row, num_rows)
    start, last = chunks_of_group(base, count, stride, group_start, group_end)
    low, high = chunks_of_segment(base, start, last, stride, group_start, segment, piece)
    opens = low == start
    unasked = (high == last) | (opens & (part > 0))
    if (low >= high) | (unasked & ((not opens) | (part > 0))):
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = block * BV + tl.arange(0, BV)
    tile_DV = of_D[:, None] * D + columns[None, :]
    state = (row.to(tl.int64) * H + head) * D * D
    dtype = k.dtype.element_ty
    unit_DV = tl.where(of_D[:, None] == columns[None, :], 1.0, 0.0)
    W_DV = tl.where(opens, tl.load(W_state + state + tile_DV), tl.where(part == 1, unit_DV, 0.0))
    S_DV = W_DV
    if MOMENTUM:
        S_DV = tl.where(opens, tl.load(S_state + state + tile_DV), tl.where(part == 2, unit_DV, 0.0))
    if opens:
        kept = (slot_of_segment(base, low, stride, group_start, segment, row) * H + head) * D * D
        tl.store(kept_W + kept + tile_DV, W_DV)
        if MOMENTUM:
            tl.store(kept_S + kept + tile_DV, S_DV)
    anchor_DV = W_DV.to(dtype)
    if low == 0:
        anchor_DV = tl.load(first_anchor + state + tile_DV).to(dtype)
    for n in range(low, tl.where(unasked, low, high)):
        at = (base + n * stride - group_start) * H + head
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        written = (real & (token < tl.where(part == 0, end, begin)))[:, None]
        target = tl.load(v + rows_C[:, None] + columns[None, :], mask=written, other=0.0).to(tl.float32)
        if RESIDUAL:
            target -= tl.load(k + rows_C[:, None] + columns[None, :], mask=written, other=0.0).to(tl.float32)
        G_CV = (2.0 * (matmul(K_CD, anchor_DV, PRECISION) - target)).to(dtype)
        gates = vectors + at * ROWS * C
        if MOMENTUM:
            W_DV, S_DV = write_chunk(W_DV, S_DV, G_CV, K_DC, gates, slots, C, MOMENTUM, PRECISION)
        else:
            W_DV, _ = write_chunk(W_DV, W_DV, G_CV, K_DC, gates, slots, C, MOMENTUM, PRECISION)
        anchor_DV = W_DV.to(dtype)
    if part == 0:
        if not unasked:
            kept = (slot_of_segment(base, high, stride, group_start, segment, row) * H + head) * D * D
            tl.store(kept_W + kept + tile_DV, W_DV)
            if MOMENTUM:
                tl.store(kept_S + kept + tile_DV, S_DV)
    else:
        SOURCES: tl.constexpr = 2 if MOMENTUM else 1
        slot = slot_of_segment(base, low, stride, group_start, segment, row) * H + head
        tile = of_D[:, None] * (SOURCES * D) + (part - 1) * D + columns[None, :]
        P = transitions + slot * (SOURCES * SOURCES * D * D) + tile
        tl.store(P, W_DV)
        if MOMENTUM:
            tl.store(P + SOURCES * D * D, S_DV)


@triton.jit(do_not_specialize=SIZES)
def linear_scan(
    kept_W, kept_S, transitions, table, num_rows, group_start, group_end, stride, segment,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x H x rows): completes the states at the starts of the third segment and later ones."""
    block, head, row, _ = program_of(D // BV, H, num_rows)
    _, _, _, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    of_D = tl.arange(0, D)
    tile_DV = of_D[:, None] * D + (block * BV + tl.arange(0, BV))[None, :]
    SOURCES: tl.constexpr = 2 if MOMENTUM else 1
    tile_DD = of_D[:, None] * (SOURCES * D) + of_D[None, :]
    _, n = segment_of(base, low, stride, segment)  # the second segment
    if (low >= high) | (n >= high):
        return
    slot = slot_of_segment(base, n, stride, group_start, segment, row) * H + head
    W_DV = tl.load(kept_W + slot * D * D + tile_DV)
    if MOMENTUM:
        S_DV = tl.load(kept_S + slot * D * D + tile_DV)
    n += segment
    while n < high:
        P = transitions + slot * (SOURCES * SOURCES * D * D) + tile_DD
        slot = slot_of_segment(base, n, stride, group_start, segment, row) * H + head
        W_new = tl.load(kept_W + slot * D * D + tile_DV) + carried(tl.load(P), W_DV, PRECISION)
        if MOMENTUM:
            W_new += carried(tl.load(P + D), S_DV, PRECISION)
            P += 2 * D * D
            S_new = tl.load(kept_S + slot * D * D + tile_DV) + carried(tl.load(P), W_DV, PRECISION)
            S_DV = S_new + carried(tl.load(P + D), S_DV, PRECISION)
            tl.store(kept_S + slot * D * D + tile_DV, S_DV)
        W_DV = W_new
        tl.store(kept_W + slot * D * D + tile_DV, W_DV)
        n += segment


@triton.jit(do_not_specialize=SIZES)
def linear_carry_backward(
    k, vectors, table, grad_W_state, grad_S_state, grad_end_anchor, kept_W, kept_S, grad_G, grad_W, grad_S,
    num_rows, group_start, group_end, stride, segment,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x H x rows x segments). kept_W and kept_S get the gradients of the state at the previous
    segment's end: complete those of the last segment, from zero those of others."""
    block, head, row, piece = program_of(D // BV, H, num_rows)
    begin, end, first, base, count = row_of(table, row, num_rows)
    start, last = chunks_of_group(base, count, stride, group_start, group_end)
    low, high = chunks_of_segment(base, start, last, stride, group_start, segment, piece)
    closes = high == last
    unasked = low == start
    if (low >= high) | (unasked & (not closes)):
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = block * BV + tl.arange(0, BV)
    tile_DV = of_D[:, None] * D + columns[None, :]
    state = (row.to(tl.int64) * H + head) * D * D
    dtype = k.dtype.element_ty
    dW_DV = tl.where(closes, tl.load(grad_W_state + state + tile_DV), 0.0)
    dS_DV = dW_DV
    if MOMENTUM:
        dS_DV = tl.where(closes, tl.load(grad_S_state + state + tile_DV), 0.0)
    if closes:
        kept = (slot_of_segment(base, low, stride, group_start, segment, row) * H + head) * D * D
        tl.store(kept_W + kept + tile_DV, dW_DV)
        if MOMENTUM:
            tl.store(kept_S + kept + tile_DV, dS_DV)
    for back in range(tl.where(unasked, 0, high - low)):
        n = high - 1 - back
        at = (base + n * stride - group_start) * H + head
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        gates = vectors + at * ROWS * C
        dG_CV = tl.load(grad_G + at * C * D + slots[:, None] * D + columns[None, :]).to(tl.float32)
        W_reads_DV = tl.load(grad_W + at * D * D + tile_DV).to(tl.float32)
        if MOMENTUM:
            dG_CV = write_chunk_backward(dG_CV, dW_DV, dS_DV, K_CD, gates, slots, C, MOMENTUM, PRECISION)
            S_reads_DV = tl.load(grad_S + at * D * D + tile_DV).to(tl.float32)
            dS_DV = tl.load(gates + END * C + 2) * dS_DV + tl.load(gates + END * C + 1) * dW_DV + S_reads_DV
        else:
            dG_CV = write_chunk_backward(dG_CV, dW_DV, dW_DV, K_CD, gates, slots, C, MOMENTUM, PRECISION)
        dW_DV = tl.load(gates + END * C) * dW_DV + W_reads_DV
        dW_DV += 2.0 * matmul(K_DC, dG_CV.to(dtype), PRECISION)
        if n == count - 1:
            dW_DV += tl.load(grad_end_anchor + state + tile_DV)
    if not unasked:
        kept = (slot_of_segment(base, low - 1, stride, group_start, segment, row) * H + head) * D * D
        tl.store(kept_W + kept + tile_DV, dW_DV)
        if MOMENTUM:
            tl.store(kept_S + kept + tile_DV, dS_DV)


@triton.jit(do_not_specialize=SIZES)
def linear_scan_backward(
    kept_W, kept_S, transitions, table, num_rows, group_start, group_end, stride, segment,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x H x rows): completes the gradients at the ends of all segments but the last two."""
    block, head, row, _ = program_of(D // BV, H, num_rows)
    _, _, _, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    if low >= high:
        return
    of_D = tl.arange(0, D)
    tile_DV = of_D[:, None] * D + (block * BV + tl.arange(0, BV))[None, :]
    SOURCES: tl.constexpr = 2 if MOMENTUM else 1
    transposed_DD = of_D[None, :] * (SOURCES * D) + of_D[:, None]
    _, second = segment_of(base, low, stride, segment)
    n, _ = segment_of(base, high - 1, stride, segment)
    n -= 1  # the last chunk of the last segment but one
    if n < second:
        return
    slot = slot_of_segment(base, n, stride, group_start, segment, row) * H + head
    dW_DV = tl.load(kept_W + slot * D * D + tile_DV)
    if MOMENTUM:
        dS_DV = tl.load(kept_S + slot * D * D + tile_DV)
    while n >= second:
        P = transitions + slot * (SOURCES * SOURCES * D * D) + transposed_DD
        n -= segment
        slot = slot_of_segment(base, n, stride, group_start, segment, row) * H + head
        dW_new = tl.load(kept_W + slot * D * D + tile_DV) + carried(tl.load(P), dW_DV, PRECISION)
        if MOMENTUM:
            dS_new = tl.load(kept_S + slot * D * D + tile_DV) + carried(tl.load(P + D), dW_DV, PRECISION)
            P += 2 * D * D
            dW_new += carried(tl.load(P), dS_DV, PRECISION)
            dS_DV = dS_new + carried(tl.load(P + D), dS_DV, PRECISION)
            tl.store(kept_S + slot * D * D + tile_DV, dS_DV)
        dW_DV = dW_new
        tl.store(kept_W + slot * D * D + tile_DV, dW_DV)
