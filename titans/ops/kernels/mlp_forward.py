"""Kernels of the two-layer memory M(x) = x + LN(act(x W1) W2), forward.

    write   serial    the inner gradient of a chunk at its anchor, then the state at the next chunk's start
    read    parallel  queries through the memory as it is after each token

W2 is held transposed, so both layers are `[D, F]` and no value that came out of a product is ever the
transposed
first operand of another (Triton 3.4 to 3.7 miscompiles that on Hopper). The hidden width is walked in blocks
of BF
columns. Where it is a single block the state stays in registers (RESIDENT); otherwise it is read and written
block by block: 8 D F x 4 bytes a chunk, from L2 as long as the rows in flight fit there (132 x 256 KB at D
64, F 256).

Tiles of a group: states `[cells + rows, H, D, F]` (the last `rows`: anchors of first chunks), Z1 and G1
`[cells, H, C, F]`, G2 and the normalised output `[cells, H, C, D]`, rstd `[cells, H, C]` fp32.
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
    THETA,
    act,
    act_slope,
    chunks_of_group,
    matmul,
    matmul_add,
    mixing,
    normalize,
    normalize_backward,
    row_of,
)


@triton.jit
def mlp_write(
    k, v, gain, bias, vectors1, vectors2, table, W1_state, S1_state, W2_state, S2_state,
    first1, first2, end1, end2, W1_start, S1_start, W2_start, S2_start, Z1_out, G1_out, G2_out, normed_out,
    rstd_out, num_rows, group_start, group_end, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows x H). The states `[rows, H, D, F]` fp32 are read and written."""
    RESIDENT: tl.constexpr = BF == F
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    begin, end, first, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    if low >= high:
        return
    slots, of_D, of_B = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BF)
    state = (row.to(tl.int64) * H + head) * D * F
    anchor_slot = ((group_end - group_start + row).to(tl.int64) * H + head) * D * F
    start_slot = ((base + low * stride - group_start) * H + head) * D * F
    dtype = k.dtype.element_ty
    gain_D = tl.load(gain + head * D + of_D)
    bias_D = tl.load(bias + head * D + of_D)
    for part in tl.static_range(F // BF):
        where = of_D[:, None] * F + part * BF + of_B[None, :]
        W1 = tl.load(W1_state + state + where)
        W2 = tl.load(W2_state + state + where)
        a1 = W1.to(dtype)
        a2 = W2.to(dtype)
        tl.store(W1_start + start_slot + where, a1)
        tl.store(W2_start + start_slot + where, a2)
        if MOMENTUM:
            S1 = tl.load(S1_state + state + where)
            S2 = tl.load(S2_state + state + where)
            tl.store(S1_start + start_slot + where, S1.to(dtype))
            tl.store(S2_start + start_slot + where, S2.to(dtype))
        if low == 0:
            a1 = tl.load(first1 + state + where).to(dtype)
            a2 = tl.load(first2 + state + where).to(dtype)
            tl.store(W1_start + anchor_slot + where, a1)
            tl.store(W2_start + anchor_slot + where, a2)
    for n in range(low, high):
        at = (base + n * stride - group_start) * H + head
        anchor = tl.where(n == 0, anchor_slot, at * D * F)
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        Z2_CD = tl.zeros([C, D], tl.float32)
        if not RESIDENT:
            tl.debug_barrier()  # the anchor of this chunk was stored by other threads
        for block in range(F // BF):
            tile = of_D[:, None] * F + block * BF + of_B[None, :]
            if not RESIDENT:
                a1 = tl.load(W1_start + anchor + tile)
                a2 = tl.load(W2_start + anchor + tile)
            Z1 = matmul(K_CD, a1, PRECISION).to(dtype)
            tl.store(Z1_out + at * C * F + slots[:, None] * F + block * BF + of_B[None, :], Z1)
            hidden = act(Z1.to(tl.float32), ACT).to(dtype)
            Z2_CD = matmul_add(hidden, tl.trans(a2), Z2_CD, PRECISION)
        target = tl.load(v + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        if RESIDUAL:
            target -= K_CD.to(tl.float32)
        at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
        if NORM:
            normed, rstd = normalize(Z2_CD, D)
            error = 2.0 * (gain_D[None, :] * normed + bias_D[None, :] - target)
            G2_CD = normalize_backward(gain_D[None, :] * error, normed, rstd, D)
            tl.store(normed_out + at_CD, normed.to(dtype))
            tl.store(rstd_out + at * C + slots, rstd)
        else:
            G2_CD = 2.0 * (Z2_CD - target)
        G2_CD = tl.where(real[:, None], G2_CD, 0.0).to(dtype)
        tl.store(G2_out + at_CD, G2_CD)
        tl.debug_barrier()
        G2_DC = tl.load(G2_out + at * C * D + slots[None, :] * D + of_D[:, None])
        gates1 = vectors1 + at * ROWS * C
        gates2 = vectors2 + at * ROWS * C
        theta1 = tl.load(gates1 + THETA * C + slots)
        theta2 = tl.load(gates2 + THETA * C + slots)
        to_W1 = -theta1 * tl.load(gates1 + LAST_W * C + slots)
        to_W2 = -theta2 * tl.load(gates2 + LAST_W * C + slots)
        if MOMENTUM:
            to_S1 = -theta1 * tl.load(gates1 + LAST_S * C + slots)
            to_S2 = -theta2 * tl.load(gates2 + LAST_S * C + slots)
        for block in range(F // BF):
            tile = of_D[:, None] * F + block * BF + of_B[None, :]
            tile_CB = at * C * F + slots[:, None] * F + block * BF + of_B[None, :]
            if not RESIDENT:
                a2 = tl.load(W2_start + anchor + tile)
                W1 = tl.load(W1_state + state + tile)
                W2 = tl.load(W2_state + state + tile)
                if MOMENTUM:
                    S1 = tl.load(S1_state + state + tile)
                    S2 = tl.load(S2_state + state + tile)
            if (n == count - 1) & (n > 0):
                tl.store(end1 + state + tile, W1)
                tl.store(end2 + state + tile, W2)
            hidden_C, slope = act_slope(tl.load(Z1_out + tile_CB).to(tl.float32), ACT)
            G1 = (matmul(G2_CD, a2, PRECISION) * slope).to(dtype)
            tl.store(G1_out + tile_CB, G1)
            W1 = tl.load(gates1 + END * C) * W1
            W2 = tl.load(gates2 + END * C) * W2
            if MOMENTUM:
                W1 += tl.load(gates1 + END * C + 1) * S1
                W2 += tl.load(gates2 + END * C + 1) * S2
                S1 = tl.load(gates1 + END * C + 2) * S1
                S2 = tl.load(gates2 + END * C + 2) * S2
                S1 = matmul_add(K_DC, (to_S1[:, None] * G1).to(dtype), S1, PRECISION)
                S2 = matmul_add(G2_DC, (to_S2[:, None] * hidden_C).to(dtype), S2, PRECISION)
            W1 = matmul_add(K_DC, (to_W1[:, None] * G1).to(dtype), W1, PRECISION)
            W2 = matmul_add(G2_DC, (to_W2[:, None] * hidden_C).to(dtype), W2, PRECISION)
            a1 = W1.to(dtype)
            a2 = W2.to(dtype)
            if n + 1 < high:
                next_at = (at + stride * H) * D * F
                tl.store(W1_start + next_at + tile, a1)
                tl.store(W2_start + next_at + tile, a2)
                if MOMENTUM:
                    tl.store(S1_start + next_at + tile, S1.to(dtype))
                    tl.store(S2_start + next_at + tile, S2.to(dtype))
            if not RESIDENT:
                tl.store(W1_state + state + tile, W1)
                tl.store(W2_state + state + tile, W2)
                if MOMENTUM:
                    tl.store(S1_state + state + tile, S1)
                    tl.store(S2_state + state + tile, S2)
    if RESIDENT:
        tile = of_D[:, None] * F + of_B[None, :]
        tl.store(W1_state + state + tile, W1)
        tl.store(W2_state + state + tile, W2)
        if MOMENTUM:
            tl.store(S1_state + state + tile, S1)
            tl.store(S2_state + state + tile, S2)


@triton.jit
def mlp_read(
    q, k, y, gain, bias, vectors1, vectors2, table, cell_row, W1_start, S1_start, W2_start, S2_start,
    Z1_in, G1_in, G2_in,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, SHARED: tl.constexpr, EXACT:
    tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells, H). SHARED: both layers have the same gates."""
    cell, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D, of_B = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BF)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    at_QD = ((token * H + head) * D)[:, None] + of_D[None, :]
    at = cell.to(tl.int64) * H + head
    gates1 = vectors1 + at * ROWS * C
    gates2 = vectors2 + at * ROWS * C
    Q_CD = tl.load(q + at_QD, mask=real[:, None], other=0.0)
    K_CD = tl.load(k + at_QD, mask=real[:, None], other=0.0)
    dtype = Q_CD.dtype
    weights1_CC = mixing(gates1, slots, C, MOMENTUM, EXACT) * tl.load(gates1 + THETA * C + slots)[None, :]
    if SHARED:
        weights2_CC = weights1_CC
    else:
        weights2_CC = mixing(gates2, slots, C, MOMENTUM, EXACT) * tl.load(gates2 + THETA * C + slots)[None, :]
    mixed1_CC = (-weights1_CC * matmul(Q_CD, tl.trans(K_CD), PRECISION)).to(dtype)
    beta1 = tl.load(gates1 + BETA * C + slots)
    beta2 = tl.load(gates2 + BETA * C + slots)
    Q_beta = (beta1[:, None] * Q_CD).to(dtype)
    if MOMENTUM:
        feed1 = tl.load(gates1 + FEED * C + slots)
        feed2 = tl.load(gates2 + FEED * C + slots)
        Q_feed = (feed1[:, None] * Q_CD).to(dtype)
    scores2_CC = tl.zeros([C, C], tl.float32)
    Z2_CD = tl.zeros([C, D], tl.float32)
    for block in range(F // BF):
        tile = at * D * F + of_D[:, None] * F + block * BF + of_B[None, :]
        tile_CB = at * C * F + slots[:, None] * F + block * BF + of_B[None, :]
        Z1 = matmul(Q_beta, tl.load(W1_start + tile), PRECISION)
        if MOMENTUM:
            Z1 = matmul_add(Q_feed, tl.load(S1_start + tile), Z1, PRECISION)
        Z1 = matmul_add(mixed1_CC, tl.load(G1_in + tile_CB), Z1, PRECISION)
        read_C = act(Z1, ACT)
        written_C = act(tl.load(Z1_in + tile_CB).to(tl.float32), ACT).to(dtype)
        scores2_CC = matmul_add(read_C.to(dtype), tl.trans(written_C), scores2_CC, PRECISION)
        Z2_CD = matmul_add(
            (beta2[:, None] * read_C).to(dtype), tl.trans(tl.load(W2_start + tile)), Z2_CD, PRECISION
        )
        if MOMENTUM:
            S2_BD = tl.trans(tl.load(S2_start + tile))
            Z2_CD = matmul_add((feed2[:, None] * read_C).to(dtype), S2_BD, Z2_CD, PRECISION)
    G2_CD = tl.load(G2_in + at * C * D + slots[:, None] * D + of_D[None, :])
    Z2_CD = matmul_add((-weights2_CC * scores2_CC).to(dtype), G2_CD, Z2_CD, PRECISION)
    if NORM:
        normed, _ = normalize(Z2_CD, D)
        Z2_CD = tl.load(gain + head * D + of_D)[None, :] * normed + tl.load(bias + head * D + of_D)[None, :]
    if RESIDUAL:
        Z2_CD += Q_CD.to(tl.float32)
    tl.store(y + at_QD, Z2_CD.to(y.dtype.element_ty), mask=real[:, None])
