"""Kernels of the two-layer memory M(x) = x + LN(act(x W1) W2), forward.

    write   serial    the inner gradient of a chunk at its anchor, then the state at the next chunk's start
    read    parallel  queries through the memory as it is after each token

W2 is held transposed, so both layers are `[D, F]` and no value that came out of a product is ever the
transposed first operand of another (Triton 3.4 to 3.7 miscompiles that on Hopper). The serial kernels keep
their state in registers: a head's hidden width is split over F / BF programs, which hold BF columns each and
add up one [C, D] tile a chunk (`sum_of_parts`). The parallel ones walk the hidden width in blocks of BF.

Tiles of a group: states `[cells + rows, H, D, F]` (the last `rows`: anchors of first chunks), Z1 and its
inner gradient G1 `[cells, H, C, F]`, G2, the normalised output and its inner gradient GN `[cells, H, C, D]`,
rstd `[cells, H, C]` fp32.
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
    act,
    act_slope,
    chunks_of_group,
    matmul,
    matmul_add,
    mixing,
    normalize,
    normalize_backward,
    place_of,
    row_of,
    sum_of_parts,
)


@triton.jit(do_not_specialize=SIZES)
def mlp_write(
    k, v, gain, bias, vectors1, vectors2, table, W1_state, S1_state, W2_state, S2_state,
    first1, first2, end1, end2, W1_start, S1_start, W2_start, S2_start, Z1_out, G1_out, G2_out, normed_out,
    GN_out, rstd_out, exchange, arrived, num_rows, group_start, group_end, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows x H x F / BF). The states `[rows, H, D, F]` fp32 are read and written. exchange `[rows x H,
    2, F / BF, C, D]` fp32 and arrived `[rows x H + 1]` int32, zero, as in `sum_of_parts` and `place_of`."""
    PARTS: tl.constexpr = F // BF
    place = place_of(arrived + num_rows * H, PARTS)
    part, row, head = place % PARTS, place // PARTS // H, place // PARTS % H
    begin, end, first, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    if low >= high:
        return
    slots, of_D = tl.arange(0, C), tl.arange(0, D)
    columns = part * BF + tl.arange(0, BF)
    tile = of_D[:, None] * F + columns[None, :]
    state = (row.to(tl.int64) * H + head) * D * F
    exchange += (row.to(tl.int64) * H + head) * 2 * PARTS * C * D
    dtype = k.dtype.element_ty
    gain_D = tl.load(gain + head * D + of_D)
    bias_D = tl.load(bias + head * D + of_D)
    W1 = tl.load(W1_state + state + tile)
    W2 = tl.load(W2_state + state + tile)
    if MOMENTUM:
        S1 = tl.load(S1_state + state + tile)
        S2 = tl.load(S2_state + state + tile)
    if low == 0:
        anchor1 = tl.load(first1 + state + tile).to(dtype)
        anchor2 = tl.load(first2 + state + tile).to(dtype)
        slot = ((group_end - group_start + row).to(tl.int64) * H + head) * D * F
        tl.store(W1_start + slot + tile, anchor1)
        tl.store(W2_start + slot + tile, anchor2)
    else:
        anchor1 = W1.to(dtype)
        anchor2 = W2.to(dtype)
    for n in range(low, high):
        at = (base + n * stride - group_start) * H + head
        token = first + n * C + slots
        real = (token >= begin) & (token < end)
        rows_C = (token * H + head) * D
        K_CD = tl.load(k + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0)
        K_DC = tl.load(k + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
        target = tl.load(v + rows_C[:, None] + of_D[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        gates1 = vectors1 + at * ROWS * C
        gates2 = vectors2 + at * ROWS * C
        theta1 = tl.load(gates1 + THETA * C + slots)
        theta2 = tl.load(gates2 + THETA * C + slots)
        to_W1 = -theta1 * tl.load(gates1 + LAST_W * C + slots)
        to_W2 = -theta2 * tl.load(gates2 + LAST_W * C + slots)
        tl.store(W1_start + at * D * F + tile, W1.to(dtype))
        tl.store(W2_start + at * D * F + tile, W2.to(dtype))
        if MOMENTUM:
            to_S1 = -theta1 * tl.load(gates1 + LAST_S * C + slots)
            to_S2 = -theta2 * tl.load(gates2 + LAST_S * C + slots)
            tl.store(S1_start + at * D * F + tile, S1.to(dtype))
            tl.store(S2_start + at * D * F + tile, S2.to(dtype))
        if (n == count - 1) & (n > 0):
            tl.store(end1 + state + tile, W1)
            tl.store(end2 + state + tile, W2)
        tile_CB = at * C * F + slots[:, None] * F + columns[None, :]
        Z1 = matmul(K_CD, anchor1, PRECISION).to(dtype)
        tl.store(Z1_out + tile_CB, Z1)
        hidden_C, slope_C = act_slope(Z1.to(tl.float32), ACT)
        hidden_C = hidden_C.to(dtype)  # half the registers, as the slope
        slope_C = slope_C.to(dtype)
        Z2_CD = matmul(hidden_C, tl.trans(anchor2), PRECISION)
        Z2_CD = sum_of_parts(Z2_CD, exchange, arrived + place // PARTS, part, n - low, PARTS, C, D)
        if RESIDUAL:
            target -= K_CD.to(tl.float32)
        at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
        if NORM:
            normed, rstd = normalize(Z2_CD, D)
            GN_CD = gain_D[None, :] * (2.0 * (gain_D[None, :] * normed + bias_D[None, :] - target))
            G2_CD = normalize_backward(GN_CD, normed, rstd, D)
            if part == 0:
                tl.store(normed_out + at_CD, normed.to(dtype))
                tl.store(GN_out + at_CD, GN_CD.to(dtype))
                tl.store(rstd_out + at * C + slots, rstd)
        else:
            G2_CD = 2.0 * (Z2_CD - target)
        G2_CD = tl.where(real[:, None], G2_CD, 0.0).to(dtype)
        tl.store(G2_out + at_CD, G2_CD)  # every part stores the same bits, and reads what it stored itself
        tl.debug_barrier()
        G2_DC = tl.load(G2_out + at * C * D + slots[None, :] * D + of_D[:, None])
        G1 = (matmul(G2_CD, anchor2, PRECISION) * slope_C).to(dtype)
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
        anchor1 = W1.to(dtype)
        anchor2 = W2.to(dtype)
    tl.store(W1_state + state + tile, W1)
    tl.store(W2_state + state + tile, W2)
    if MOMENTUM:
        tl.store(S1_state + state + tile, S1)
        tl.store(S2_state + state + tile, S2)


@triton.jit(do_not_specialize=SIZES)
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
