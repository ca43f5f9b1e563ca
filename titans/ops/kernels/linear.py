"""Kernels of the linear memory M(x) = x W: five, of which two are serial over the chunks of a row (or of one
of its segments, see `linear_scan.py`).

    write            serial    state at every chunk's start, grad G = 2 (K W_anchor - V)
    read             parallel  Y = beta Q W + c Q S - (A theta o Q K^T) G
    read_backward    parallel  what the reads alone give: dQ, parts of dK, dG, dW, dS and of the gates
    write_backward   serial    dG, gradient of the state at every chunk's end
    finish           parallel  dK and the gates

The serial ones hold a slice of value columns, which are independent, in registers; the parallel ones have one
program for each (cell, head). Tiles in memory, all of a group of cells: states `[cells + rows, H, D, D]` (the
last `rows` are the anchors of first chunks), G `[cells, H, C, D]`. `kernels.md`-style formulas:
docs/decisions.md.
A value that came out of a product is never transposed in registers: Triton 3.4 to 3.7 miscompiles that on
Hopper.
"""

import triton
import triton.language as tl

from titans.ops.kernels.functions import (
    BETA,
    END,
    FEED,
    LAST_S,
    LAST_W,
    ROWS,
    SIZES,
    THETA,
    chunks_of_group,
    chunks_of_segment,
    matmul,
    mixing,
    program_of,
    row_of,
    slot_of_segment,
)
from titans.ops.kernels.gates import (
    GRAD_COLUMN,
    GRAD_FEED,
    GRAD_ROW,
    GRAD_ROWS,
    GRAD_THETA,
    finish_gate_gradients,
    read_gate_gradients,
)


@triton.jit
def write_chunk(
    W_DV, S_DV, G_CV, K_DC, gates, slots, C: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr
):
    """W and S after a chunk with the gradients G."""
    theta = tl.load(gates + THETA * C + slots)
    to_W = -theta * tl.load(gates + LAST_W * C + slots)
    W_new = tl.load(gates + END * C) * W_DV
    if MOMENTUM:
        to_S = -theta * tl.load(gates + LAST_S * C + slots)
        W_new += tl.load(gates + END * C + 1) * S_DV
        S_DV = tl.load(gates + END * C + 2) * S_DV
        S_DV += matmul(K_DC, (to_S[:, None] * G_CV).to(K_DC.dtype), PRECISION)
    W_DV = W_new + matmul(K_DC, (to_W[:, None] * G_CV).to(K_DC.dtype), PRECISION)
    return W_DV, S_DV


@triton.jit
def write_chunk_backward(
    dG_CV, dW_DV, dS_DV, K_CD, gates, slots, C: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr
):
    """dG, of which the reads' share is given, from the gradients of the state at the chunk's end."""
    dtype = K_CD.dtype
    theta = tl.load(gates + THETA * C + slots)
    of_W = theta * tl.load(gates + LAST_W * C + slots)
    dG_CV -= of_W[:, None] * matmul(K_CD, dW_DV.to(dtype), PRECISION)
    if MOMENTUM:
        of_S = theta * tl.load(gates + LAST_S * C + slots)
        dG_CV -= of_S[:, None] * matmul(K_CD, dS_DV.to(dtype), PRECISION)
    return dG_CV


@triton.jit(do_not_specialize=SIZES)
def linear_write(
    k, v, vectors, table, W_state, S_state, first_anchor, end_anchor, kept_W, kept_S, W_start, S_start, G_out,
    num_rows, group_start, group_end, stride, segment, number,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, KEEP: tl.constexpr, AGAIN: tl.constexpr,
    LEAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x H x rows), one segment of the group, the one of that number. W_state and S_state `[rows,
    H, D, D]` fp32 are read and written. KEEP: kept_W and kept_S `[slots, H, D, D]` fp32 get those at the
    segment's start. AGAIN: grid (D / BV x H x rows x segments), all segments at once from their kept states.
    LEAVE: the state at the group's end is written, and the last anchor; not so in the backward."""
    block, head, row, piece = program_of(D // BV, H, num_rows)
    begin, end, first, base, count = row_of(table, row, num_rows)
    low, last = chunks_of_group(base, count, stride, group_start, group_end)
    if AGAIN:
        number = piece
    low, high = chunks_of_segment(base, low, last, stride, group_start, segment, number)
    if low >= high:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = block * BV + tl.arange(0, BV)
    tile_DV = of_D[:, None] * D + columns[None, :]
    state = (row.to(tl.int64) * H + head) * D * D
    kept = (slot_of_segment(base, low, stride, group_start, segment, row) * H + head) * D * D
    if AGAIN:
        W_DV = tl.load(kept_W + kept + tile_DV)
        if MOMENTUM:
            S_DV = tl.load(kept_S + kept + tile_DV)
    else:
        W_DV = tl.load(W_state + state + tile_DV)
        if MOMENTUM:
            S_DV = tl.load(S_state + state + tile_DV)
        if KEEP:
            tl.store(kept_W + kept + tile_DV, W_DV)
            if MOMENTUM:
                tl.store(kept_S + kept + tile_DV, S_DV)
    dtype = k.dtype.element_ty
    if low == 0:
        anchor_DV = tl.load(first_anchor + state + tile_DV).to(dtype)
        slot = (group_end - group_start + row).to(tl.int64) * H + head
        tl.store(W_start + slot * D * D + tile_DV, anchor_DV)
    else:
        anchor_DV = W_DV.to(dtype)
    for n in range(low, high):
        at = (base + n * stride - group_start) * H + head
        tl.store(W_start + at * D * D + tile_DV, W_DV.to(dtype))
        if LEAVE:  # noqa: SIM102 (a constant)
            if (n == count - 1) & (n > 0):
                tl.store(end_anchor + state + tile_DV, W_DV)
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        target = tl.load(v + rows_C[:, None] + columns[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        if RESIDUAL:
            target -= tl.load(k + rows_C[:, None] + columns[None, :], mask=real[:, None], other=0.0).to(
                tl.float32
            )
        gates = vectors + at * ROWS * C
        G_CV = (2.0 * (matmul(K_CD, anchor_DV, PRECISION) - target)).to(dtype)
        tl.store(G_out + at * C * D + slots[:, None] * D + columns[None, :], G_CV)
        if MOMENTUM:
            tl.store(S_start + at * D * D + tile_DV, S_DV.to(dtype))
            W_DV, S_DV = write_chunk(W_DV, S_DV, G_CV, K_DC, gates, slots, C, MOMENTUM, PRECISION)
        else:
            W_DV, _ = write_chunk(W_DV, W_DV, G_CV, K_DC, gates, slots, C, MOMENTUM, PRECISION)
        anchor_DV = W_DV.to(dtype)
    if LEAVE:  # noqa: SIM102
        if (not AGAIN) | (high == last):
            tl.store(W_state + state + tile_DV, W_DV)
            if MOMENTUM:
                tl.store(S_state + state + tile_DV, S_DV)


@triton.jit(do_not_specialize=SIZES)
def linear_read(
    q, k, y, vectors, table, cell_row, W_start, S_start, G_in,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H, D / BV)."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    rows_C = (token * H + head) * D
    at = cell.to(tl.int64) * H + head
    gates = vectors + at * ROWS * C
    Q_CD = tl.load(q + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
    K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
    tile_DV = of_D[:, None] * D + columns[None, :]
    W_DV = tl.load(W_start + at * D * D + tile_DV)
    theta = tl.load(gates + THETA * C + slots)
    mixed_CC = (
        mixing(gates, slots, C, MOMENTUM, EXACT) * theta[None, :] * matmul(Q_CD, tl.trans(K_CD), PRECISION)
    )
    G_CV = tl.load(G_in + at * C * D + slots[:, None] * D + columns[None, :])
    Y_CV = tl.load(gates + BETA * C + slots)[:, None] * matmul(Q_CD, W_DV, PRECISION)
    if MOMENTUM:
        S_DV = tl.load(S_start + at * D * D + tile_DV)
        Y_CV += tl.load(gates + FEED * C + slots)[:, None] * matmul(Q_CD, S_DV, PRECISION)
    Y_CV -= matmul(mixed_CC.to(Q_CD.dtype), G_CV, PRECISION)
    at_CV = rows_C[:, None] + columns[None, :]
    if RESIDUAL:
        Y_CV += tl.load(q + at_CV, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(y + at_CV, Y_CV.to(y.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=SIZES)
def linear_read_backward(
    q, k, grad_y, grad_q, grad_k, vectors, table, cell_row, W_start, S_start, G_in,
    grad_G, grad_W, grad_S, gate_parts,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H). Writes grad_q, the reads' parts of grad_k, grad_G `[cells, H, C, D]`, grad_W and
    grad_S `[cells, H, D, D]` and `gate_parts [cells, H, GRAD_ROWS, C]`."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    rows_C = (token * H + head) * D
    at = cell.to(tl.int64) * H + head
    gates = vectors + at * ROWS * C
    at_CD = rows_C[:, None] + of_D[None, :]
    at_DC = rows_C[None, :] + of_D[:, None]
    Q_CD = tl.load(q + at_CD, mask=real[:, None], other=0.0)
    K_CD = tl.load(k + at_CD, mask=real[:, None], other=0.0)
    dtype = Q_CD.dtype
    theta = tl.load(gates + THETA * C + slots)
    mix_CC = mixing(gates, slots, C, MOMENTUM, EXACT)
    scores_CC = matmul(Q_CD, tl.trans(K_CD), PRECISION)
    mixed_CC = (mix_CC * theta[None, :] * scores_CC).to(dtype)
    products_CC = tl.zeros([C, C], tl.float32)  # dY G^T
    for block in range(D // BV):
        columns = block * BV + tl.arange(0, BV)
        dY_CV = tl.load(grad_y + rows_C[:, None] + columns[None, :], mask=real[:, None], other=0.0)
        dY_VC = tl.load(grad_y + rows_C[None, :] + columns[:, None], mask=real[None, :], other=0.0)
        G_CV = tl.load(G_in + at * C * D + slots[:, None] * D + columns[None, :])
        products_CC += matmul(dY_CV, tl.trans(G_CV), PRECISION)
        dG_VC = -matmul(dY_VC, mixed_CC, PRECISION)
        tl.store(grad_G + at * C * D + slots[None, :] * D + columns[:, None], dG_VC.to(dtype))
    causal = slots[:, None] >= slots[None, :]
    grad_mix_CC = tl.where(causal, -products_CC * scores_CC, 0.0)
    grad_scores_CC = (-products_CC * mix_CC * theta[None, :]).to(dtype)
    Q_DC = tl.load(q + at_DC, mask=real[None, :], other=0.0)
    dK_DC = matmul(Q_DC, grad_scores_CC, PRECISION)
    tl.store(grad_k + at_DC, dK_DC.to(grad_k.dtype.element_ty), mask=real[None, :])
    parts = gate_parts + at * GRAD_ROWS * C
    grad_row = tl.sum(grad_mix_CC * mix_CC * theta[None, :], 1)
    read_gate_gradients(grad_mix_CC, mix_CC, gates, parts, C, MOMENTUM, EXACT)
    beta = tl.load(gates + BETA * C + slots)
    through_W = tl.zeros([C, D], tl.float32)
    if MOMENTUM:
        feed = tl.load(gates + FEED * C + slots)
        through_S = tl.zeros([C, D], tl.float32)
    for block in range(D // BV):
        columns = block * BV + tl.arange(0, BV)
        dY_CV = tl.load(grad_y + rows_C[:, None] + columns[None, :], mask=real[:, None], other=0.0)
        tile_DV = of_D[:, None] * D + columns[None, :]
        W_DV = tl.load(W_start + at * D * D + tile_DV)
        through_W += matmul(dY_CV, tl.trans(W_DV), PRECISION)
        dW_DV = matmul(Q_DC, (beta[:, None] * dY_CV).to(dtype), PRECISION)
        tl.store(grad_W + at * D * D + tile_DV, dW_DV.to(dtype))
        if MOMENTUM:
            S_DV = tl.load(S_start + at * D * D + tile_DV)
            through_S += matmul(dY_CV, tl.trans(S_DV), PRECISION)
            dS_DV = matmul(Q_DC, (feed[:, None] * dY_CV).to(dtype), PRECISION)
            tl.store(grad_S + at * D * D + tile_DV, dS_DV.to(dtype))
    dQ_CD = beta[:, None] * through_W
    if MOMENTUM:
        dQ_CD += feed[:, None] * through_S
        tl.store(parts + GRAD_FEED * C + slots, tl.sum(Q_CD.to(tl.float32) * through_S, 1))
    tl.store(parts + GRAD_ROW * C + slots, grad_row + tl.sum(Q_CD.to(tl.float32) * dQ_CD, 1))
    dQ_CD += matmul(grad_scores_CC, K_CD, PRECISION)
    if RESIDUAL:
        dQ_CD += tl.load(grad_y + at_CD, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(grad_q + at_CD, dQ_CD.to(grad_q.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=SIZES)
def linear_write_backward(
    k, vectors, table, grad_W_state, grad_S_state, grad_first_anchor, grad_end_anchor, kept_W, kept_S,
    grad_G, grad_W, grad_S, grad_W_end, grad_S_end, grad_v,
    num_rows, group_start, group_end, stride, segment,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    MOMENTUM: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (D / BV x H x rows), from the last chunk to the first. grad_W and grad_S hold the reads' parts,
    grad_G is completed, grad_W_end and grad_S_end get the gradients of the state at the chunk's end (buffers
    of their own: threads of a program may store an element before others have loaded it); the `*_state` and
    `*_anchor` are `[rows, H, D, D]` fp32. SEGMENTS: grid (D / BV x H x rows x segments), all segments at once
    from the gradients at their ends in kept_W and kept_S `[slots, H, D, D]` fp32."""
    block, head, row, piece = program_of(D // BV, H, num_rows)
    begin, end, first, base, count = row_of(table, row, num_rows)
    start, high = chunks_of_group(base, count, stride, group_start, group_end)
    low = start
    if SEGMENTS:
        low, high = chunks_of_segment(base, low, high, stride, group_start, segment, piece)
    if low >= high:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = block * BV + tl.arange(0, BV)
    tile_DV = of_D[:, None] * D + columns[None, :]
    state = (row.to(tl.int64) * H + head) * D * D
    dtype = k.dtype.element_ty
    if SEGMENTS:
        kept = (slot_of_segment(base, low, stride, group_start, segment, row) * H + head) * D * D
        dW_DV = tl.load(kept_W + kept + tile_DV)
        if MOMENTUM:
            dS_DV = tl.load(kept_S + kept + tile_DV)
    else:
        dW_DV = tl.load(grad_W_state + state + tile_DV)
        if MOMENTUM:
            dS_DV = tl.load(grad_S_state + state + tile_DV)
    for back in range(high - low):
        n = high - 1 - back
        at = (base + n * stride - group_start) * H + head
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        gates = vectors + at * ROWS * C
        at_CV = at * C * D + slots[:, None] * D + columns[None, :]
        dG_CV = tl.load(grad_G + at_CV).to(tl.float32)
        W_reads_DV = tl.load(grad_W + at * D * D + tile_DV).to(tl.float32)
        tl.store(grad_W_end + at * D * D + tile_DV, dW_DV.to(dtype))
        if MOMENTUM:
            dG_CV = write_chunk_backward(dG_CV, dW_DV, dS_DV, K_CD, gates, slots, C, MOMENTUM, PRECISION)
            S_reads_DV = tl.load(grad_S + at * D * D + tile_DV).to(tl.float32)
            tl.store(grad_S_end + at * D * D + tile_DV, dS_DV.to(dtype))
            dS_DV = tl.load(gates + END * C + 2) * dS_DV + tl.load(gates + END * C + 1) * dW_DV + S_reads_DV
        else:
            dG_CV = write_chunk_backward(dG_CV, dW_DV, dW_DV, K_CD, gates, slots, C, MOMENTUM, PRECISION)
        dG_low = dG_CV.to(dtype)
        tl.store(grad_G + at_CV, dG_low)
        tl.store(
            grad_v + rows_C[:, None] + columns[None, :],
            (-2.0 * dG_CV).to(grad_v.dtype.element_ty),
            mask=real[:, None],
        )
        dW_DV = tl.load(gates + END * C) * dW_DV + W_reads_DV
        d_anchor_DV = 2.0 * matmul(K_DC, dG_low, PRECISION)
        if n == 0:
            tl.store(grad_first_anchor + state + tile_DV, d_anchor_DV)
        else:
            dW_DV += d_anchor_DV
            if n == count - 1:
                dW_DV += tl.load(grad_end_anchor + state + tile_DV)
    if low == start:
        tl.store(grad_W_state + state + tile_DV, dW_DV)
        if MOMENTUM:
            tl.store(grad_S_state + state + tile_DV, dS_DV)


@triton.jit(do_not_specialize=SIZES)
def linear_finish(
    k, grad_k, vectors, table, cell_row, W_start, S_start, G_in, grad_G, grad_W_end, grad_S_end, gate_parts,
    grad_theta, grad_log_decay, grad_log_momentum,
    num_rows, group_start, group_end, stride,
    H: tl.constexpr, D: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H): completes grad_k and the gradients of the gates `[B, T, H]` fp32."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    rows_C = (token * H + head) * D
    at = cell.to(tl.int64) * H + head
    anchor_cell = tl.where(step == 0, group_end - group_start + row, cell)
    anchor_at = anchor_cell.to(tl.int64) * H + head
    gates = vectors + at * ROWS * C
    theta = tl.load(gates + THETA * C + slots)
    at_CD = rows_C[:, None] + of_D[None, :]
    K_CD = tl.load(k + at_CD, mask=real[:, None], other=0.0).to(tl.float32)
    through_G = tl.zeros([C, D], tl.float32)
    by_W_CD = tl.zeros([C, D], tl.float32)
    by_S_CD = tl.zeros([C, D], tl.float32)
    dW_W = 0.0
    dW_S = 0.0
    dS_S = 0.0
    for block in range(D // BV):
        columns = block * BV + tl.arange(0, BV)
        at_CV = at * C * D + slots[:, None] * D + columns[None, :]
        tile_DV = of_D[:, None] * D + columns[None, :]
        G_CV = tl.load(G_in + at_CV)
        through_G += matmul(
            tl.load(grad_G + at_CV), tl.trans(tl.load(W_start + anchor_at * D * D + tile_DV)), PRECISION
        )
        dW_DV = tl.load(grad_W_end + at * D * D + tile_DV)
        by_W_CD += matmul(G_CV, tl.trans(dW_DV), PRECISION)
        dW_W += tl.sum(dW_DV.to(tl.float32) * tl.load(W_start + at * D * D + tile_DV).to(tl.float32))
        if MOMENTUM:
            dS_DV = tl.load(grad_S_end + at * D * D + tile_DV)
            S_DV = tl.load(S_start + at * D * D + tile_DV).to(tl.float32)
            by_S_CD += matmul(G_CV, tl.trans(dS_DV), PRECISION)
            dW_S += tl.sum(dW_DV.to(tl.float32) * S_DV)
            dS_S += tl.sum(dS_DV.to(tl.float32) * S_DV)
    dK_CD = tl.load(grad_k + at_CD, mask=real[:, None], other=0.0).to(tl.float32) + 2.0 * through_G
    dK_CD -= (theta * tl.load(gates + LAST_W * C + slots))[:, None] * by_W_CD
    grad_last_W = -tl.sum(K_CD * by_W_CD, 1)
    grad_last_S = tl.zeros([C], tl.float32)
    if MOMENTUM:
        dK_CD -= (theta * tl.load(gates + LAST_S * C + slots))[:, None] * by_S_CD
        grad_last_S = -tl.sum(K_CD * by_S_CD, 1)
    if RESIDUAL:
        dK_CD += 2.0 * tl.load(grad_G + at * C * D + slots[:, None] * D + of_D[None, :]).to(tl.float32)
    tl.store(grad_k + at_CD, dK_CD.to(grad_k.dtype.element_ty), mask=real[:, None])
    parts = gate_parts + at * GRAD_ROWS * C
    grad_feeds = tl.zeros([C], tl.float32)
    if MOMENTUM:
        grad_feeds = tl.load(parts + GRAD_FEED * C + slots)
    finish_gate_gradients(
        tl.load(parts + GRAD_THETA * C + slots), tl.load(parts + GRAD_ROW * C + slots),
        tl.load(parts + GRAD_COLUMN * C + slots), grad_feeds, grad_last_W, grad_last_S, dW_W, dW_S, dS_S,
        gates, grad_theta, grad_log_decay, grad_log_momentum, token * H + head, real,
        tl.minimum(end - first - step * C, C) - 1, C, MOMENTUM,
    )  # fmt: skip
