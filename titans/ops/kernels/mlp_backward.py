"""Kernels of the two-layer memory, backward, that run over all chunks at once. Names and tiles as in
mlp_forward.py.

read_backward_2   the reads again, then back through LN and the second layer's scores
read_backward_1a  the rest of the reads: block by block through the second layer
read_backward_1   and through the first
finish            dK and the gates; before it comes mlp_write_backward.py
"""

import triton
import triton.language as tl

from titans.ops.kernels.functions import (
    BETA,
    FEED,
    LAST_S,
    LAST_W,
    ROWS,
    SIZES,
    THETA,
    act_slope,
    matmul,
    matmul_add,
    mixing,
    normalize,
    normalize_backward,
    row_of,
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
from titans.ops.kernels.mlp_forward import first_block, unseen_zero


@triton.jit(do_not_specialize=SIZES)
def mlp_read_backward_2(
    q, k, grad_y, gain, vectors1, vectors2, table, cell_row, W1_start, S1_start, W2_start, S2_start,
    written_in, G1_in, G2_in, read_out, slope_out, grad_Z2, mixed1_out, mixed2_out, grad_scores2, gate_parts2,
    grad_gain, grad_bias,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr, MOMENTUM: tl.constexpr, SHARED: tl.constexpr, EXACT: tl.constexpr, PRECISION:
    tl.constexpr, ):  # fmt: skip
    """Grid (cells x H). Stores the hidden rows that are read and act' there `[cells, H, C, F]`, and what the
    next kernels must load transposed: the gradient of the reads' Z2 `[cells, H, C, D]`, both layers' -(A
    theta o scores) and the gradient of the second's scores `[cells, H, C, C]`."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
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
    square = at * C * C + slots[:, None] * C + slots[None, :]
    mix1_CC = mixing(gates1, slots, C, MOMENTUM, EXACT)
    weights1_CC = mix1_CC * tl.load(gates1 + THETA * C + slots)[None, :]
    mixed1_CC = (-weights1_CC * matmul(Q_CD, tl.trans(K_CD), PRECISION)).to(dtype)
    tl.store(mixed1_out + square, mixed1_CC)
    beta1 = tl.load(gates1 + BETA * C + slots)
    beta2 = tl.load(gates2 + BETA * C + slots)
    if MOMENTUM:
        feed1 = tl.load(gates1 + FEED * C + slots)
        feed2 = tl.load(gates2 + FEED * C + slots)
    scores2_CC = tl.zeros([C, C], tl.float32)
    Z2_CD = tl.zeros([C, D], tl.float32)
    for index in range(first_block(step, F // BF), F // BF):
        block = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        in_C, in_D, in_B = slots + zero, of_D + zero, of_B + zero
        tile = at * D * F + in_D[:, None] * F + block * BF + in_B[None, :]
        tile_CB = at * C * F + in_C[:, None] * F + block * BF + in_B[None, :]
        Z1 = beta1[:, None] * matmul(Q_CD, tl.load(W1_start + tile), PRECISION)
        if MOMENTUM:
            Z1 += feed1[:, None] * matmul(Q_CD, tl.load(S1_start + tile), PRECISION)
        Z1 = matmul_add(mixed1_CC, tl.load(G1_in + tile_CB), Z1, PRECISION)
        read_C, slope = act_slope(Z1, ACT)
        tl.store(read_out + tile_CB, read_C.to(dtype))
        tl.store(slope_out + tile_CB, slope.to(dtype))
        written_C = tl.load(written_in + tile_CB)
        scores2_CC = matmul_add(read_C.to(dtype), tl.trans(written_C), scores2_CC, PRECISION)
        Z2_CD = matmul_add(
            (beta2[:, None] * read_C).to(dtype), tl.trans(tl.load(W2_start + tile)), Z2_CD, PRECISION
        )
        if MOMENTUM:
            S2_BD = tl.trans(tl.load(S2_start + tile))
            Z2_CD = matmul_add((feed2[:, None] * read_C).to(dtype), S2_BD, Z2_CD, PRECISION)
    if SHARED:
        mix2_CC = mix1_CC
    else:
        mix2_CC = mixing(gates2, slots, C, MOMENTUM, EXACT)
    weights2_CC = mix2_CC * tl.load(gates2 + THETA * C + slots)[None, :]
    at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
    G2_CD = tl.load(G2_in + at_CD)
    mixed2_CC = (-weights2_CC * scores2_CC).to(dtype)
    tl.store(mixed2_out + square, mixed2_CC)
    Z2_CD = matmul_add(mixed2_CC, G2_CD, Z2_CD, PRECISION)
    dZ2_CD = tl.load(grad_y + at_QD, mask=real[:, None], other=0.0).to(tl.float32)
    if NORM:
        normed, rstd = normalize(Z2_CD, D)
        tl.store(grad_gain + at * D + of_D, tl.sum(dZ2_CD * normed, 0))
        tl.store(grad_bias + at * D + of_D, tl.sum(dZ2_CD, 0))
        dZ2_CD = normalize_backward(tl.load(gain + head * D + of_D)[None, :] * dZ2_CD, normed, rstd, D)
    low = dZ2_CD.to(dtype)
    tl.store(grad_Z2 + at_CD, low)
    products_CC = matmul(low, tl.trans(G2_CD), PRECISION)
    tl.store(grad_scores2 + square, (-products_CC * weights2_CC).to(dtype))
    grad_mix_CC = tl.where(slots[:, None] >= slots[None, :], -products_CC * scores2_CC, 0.0)
    parts = gate_parts2 + at * GRAD_ROWS * C
    grad_row = tl.sum(dZ2_CD * Z2_CD, 1)
    tl.store(parts + GRAD_ROW * C + slots, grad_row)
    read_gate_gradients(grad_mix_CC, mix2_CC, gates2, parts, C, MOMENTUM, EXACT)


@triton.jit(do_not_specialize=SIZES)
def mlp_read_backward_1a(
    vectors2, table, cell_row, W2_start, S2_start, written_in, read_in, slope_in, grad_Z2, mixed2_in,
    grad_scores2, grad_Z1, grad_H, grad_G2, grad_W2, grad_S2, gate_parts2,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H). Back through the second layer's reads: gradients of G2, of the written hidden rows,
    of the second layer's states and of the reads' Z1."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    _, _, _, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D, of_B = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BF)
    at = cell.to(tl.int64) * H + head
    gates2 = vectors2 + at * ROWS * C
    square = at * C * C + slots[:, None] * C + slots[None, :]
    square_T = at * C * C + slots[None, :] * C + slots[:, None]
    dZ2_CD = tl.load(grad_Z2 + at * C * D + slots[:, None] * D + of_D[None, :])
    dZ2_DC = tl.load(grad_Z2 + at * C * D + slots[None, :] * D + of_D[:, None])
    dtype = dZ2_CD.dtype
    dG2_DC = matmul(dZ2_DC, tl.load(mixed2_in + square), PRECISION)
    tl.store(grad_G2 + at * C * D + slots[None, :] * D + of_D[:, None], dG2_DC.to(dtype))
    dscores2_CC = tl.load(grad_scores2 + square)
    dscores2_T = tl.load(grad_scores2 + square_T)
    beta2 = tl.load(gates2 + BETA * C + slots)
    grad_feed2 = tl.zeros([C], tl.float32)
    if MOMENTUM:
        feed2 = tl.load(gates2 + FEED * C + slots)
    for index in range(first_block(step, F // BF), F // BF):
        block = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        in_C, in_D, in_B = slots + zero, of_D + zero, of_B + zero
        tile = at * D * F + in_D[:, None] * F + block * BF + in_B[None, :]
        tile_CB = at * C * F + in_C[:, None] * F + block * BF + in_B[None, :]
        read_C = tl.load(read_in + tile_CB)
        slope = tl.load(slope_in + tile_CB)
        written_C = tl.load(written_in + tile_CB)
        # Rows of results are scaled, not those of dZ2: these would stay in registers as operands.
        dH = beta2[:, None] * matmul(dZ2_CD, tl.load(W2_start + tile), PRECISION)
        if MOMENTUM:
            by_S2 = matmul(dZ2_CD, tl.load(S2_start + tile), PRECISION)
            grad_feed2 += tl.sum(read_C.to(tl.float32) * by_S2, 1)
            dH += feed2[:, None] * by_S2
        dH = matmul_add(dscores2_CC, written_C, dH, PRECISION)
        tl.store(grad_Z1 + tile_CB, (dH * slope).to(dtype))
        tl.store(grad_H + tile_CB, matmul(dscores2_T, read_C, PRECISION).to(dtype))
        dW2 = matmul(dZ2_DC, (beta2[:, None] * read_C).to(dtype), PRECISION)
        tl.store(grad_W2 + tile, dW2.to(dtype))
        if MOMENTUM:
            dS2 = matmul(dZ2_DC, (feed2[:, None] * read_C).to(dtype), PRECISION)
            tl.store(grad_S2 + tile, dS2.to(dtype))
    if MOMENTUM:
        tl.store(gate_parts2 + at * GRAD_ROWS * C + GRAD_FEED * C + slots, grad_feed2)


@triton.jit(do_not_specialize=SIZES)
def mlp_read_backward_1(
    q, k, grad_y, grad_q, vectors1, table, cell_row, W1_start, S1_start, G1_in, grad_Z1, mixed1_in,
    grad_K_reads, grad_G1, grad_W1, grad_S1, gate_parts1,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, MOMENTUM: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H). Back through the first layer's reads: grad_q and the gradients of the keys
    (`grad_K_reads [cells, H, D, C]`), of G1, of the first layer's states and of the gates."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D, of_B = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BF)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    rows_C = (token * H + head) * D
    at_QD = rows_C[:, None] + of_D[None, :]
    at = cell.to(tl.int64) * H + head
    gates1 = vectors1 + at * ROWS * C
    Q_DC = tl.load(q + rows_C[None, :] + of_D[:, None], mask=real[None, :], other=0.0)
    dtype = Q_DC.dtype
    mixed1_T = tl.load(mixed1_in + at * C * C + slots[None, :] * C + slots[:, None])
    beta1 = tl.load(gates1 + BETA * C + slots)
    dQ_CD = tl.zeros([C, D], tl.float32)
    products_CC = tl.zeros([C, C], tl.float32)  # dZ1 G1^T
    by_S1_CD = tl.zeros([C, D], tl.float32)
    if MOMENTUM:
        feed1 = tl.load(gates1 + FEED * C + slots)
    for index in range(first_block(step, F // BF), F // BF):
        block = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        in_C, in_D, in_B = slots + zero, of_D + zero, of_B + zero
        tile = at * D * F + in_D[:, None] * F + block * BF + in_B[None, :]
        tile_CB = at * C * F + in_C[:, None] * F + block * BF + in_B[None, :]
        W1 = tl.load(W1_start + tile)
        dZ1 = tl.load(grad_Z1 + tile_CB)
        tl.store(grad_G1 + tile_CB, matmul(mixed1_T, dZ1, PRECISION).to(dtype))
        products_CC = matmul_add(dZ1, tl.trans(tl.load(G1_in + tile_CB)), products_CC, PRECISION)
        dQ_CD = matmul_add(dZ1, tl.trans(W1), dQ_CD, PRECISION)
        dW1 = matmul(Q_DC, (beta1[:, None] * dZ1).to(dtype), PRECISION)
        tl.store(grad_W1 + tile, dW1.to(dtype))
        if MOMENTUM:
            by_S1_CD = matmul_add(dZ1, tl.trans(tl.load(S1_start + tile)), by_S1_CD, PRECISION)
            dS1 = matmul(Q_DC, (feed1[:, None] * dZ1).to(dtype), PRECISION)
            tl.store(grad_S1 + tile, dS1.to(dtype))
    dQ_CD *= beta1[:, None]
    Q_CD = tl.load(q + at_QD, mask=real[:, None], other=0.0)
    K_CD = tl.load(k + at_QD, mask=real[:, None], other=0.0)
    mix_CC = mixing(gates1, slots, C, MOMENTUM, EXACT)
    weights1_CC = mix_CC * tl.load(gates1 + THETA * C + slots)[None, :]
    scores1_CC = matmul(Q_CD, tl.trans(K_CD), PRECISION)
    dscores1_CC = (-products_CC * weights1_CC).to(dtype)
    if MOMENTUM:
        grad_feed = tl.sum(Q_CD.to(tl.float32) * by_S1_CD, 1)
        dQ_CD += feed1[:, None] * by_S1_CD
    grad_mix_CC = tl.where(slots[:, None] >= slots[None, :], -products_CC * scores1_CC, 0.0)
    grad_row = tl.sum(Q_CD.to(tl.float32) * dQ_CD, 1) + tl.sum(grad_mix_CC * weights1_CC, 1)
    dQ_CD = matmul_add(dscores1_CC, K_CD, dQ_CD, PRECISION)
    if RESIDUAL:
        dQ_CD += tl.load(grad_y + at_QD, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(grad_q + at_QD, dQ_CD.to(grad_q.dtype.element_ty), mask=real[:, None])
    dK_DC = matmul(Q_DC, dscores1_CC, PRECISION)
    tl.store(grad_K_reads + at * D * C + of_D[:, None] * C + slots[None, :], dK_DC.to(dtype))
    parts = gate_parts1 + at * GRAD_ROWS * C
    tl.store(parts + GRAD_ROW * C + slots, grad_row)
    read_gate_gradients(grad_mix_CC, mix_CC, gates1, parts, C, MOMENTUM, EXACT)
    if MOMENTUM:
        tl.store(parts + GRAD_FEED * C + slots, grad_feed)


@triton.jit(do_not_specialize=SIZES)
def mlp_finish(
    k, v, gain, bias, grad_k, grad_v, vectors1, vectors2, table, cell_row,
    W1_start, S1_start, W2_start, S2_start, written_in, G1_in, G2_in, normed_in, rows_in,
    grad_K_reads, grad_Z1, grad_G2, grad_gain, grad_bias, dW1_end, dS1_end, dW2_end, dS2_end,
    gate_parts1, gate_parts2, grad_theta, grad_log_decay, grad_log_momentum,
    num_rows, group_start, group_end, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H): grad_v, grad_k and the gradients of the gates `[B, T, H, 1 or 2]` fp32. grad_gain and
    grad_bias `[cells, H, D]` fp32, those of the reads, are added to."""
    cell, head = tl.program_id(0) // H, tl.program_id(0) % H
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots, of_D, of_B = tl.arange(0, C), tl.arange(0, D), tl.arange(0, BF)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    at_KD = ((token * H + head) * D)[:, None] + of_D[None, :]
    at = cell.to(tl.int64) * H + head
    anchor_cell = tl.where(step == 0, group_end - group_start + row, cell)
    anchor = (anchor_cell.to(tl.int64) * H + head) * D * F
    G2_CD = tl.load(G2_in + at * C * D + slots[:, None] * D + of_D[None, :])
    gates1 = vectors1 + at * ROWS * C
    gates2 = vectors2 + at * ROWS * C
    dK_CD = tl.zeros([C, D], tl.float32)
    by_W1_CD = tl.zeros([C, D], tl.float32)
    by_S1_CD = tl.zeros([C, D], tl.float32)
    last_S1 = tl.zeros([C], tl.float32)
    last_W2 = tl.zeros([C], tl.float32)
    last_S2 = tl.zeros([C], tl.float32)
    dW_W1 = 0.0
    dW_S1 = 0.0
    dS_S1 = 0.0
    dW_W2 = 0.0
    dW_S2 = 0.0
    dS_S2 = 0.0
    for index in range(first_block(step, F // BF), F // BF):
        block = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        in_C, in_D, in_B = slots + zero, of_D + zero, of_B + zero
        column = in_D[:, None] * F + block * BF + in_B[None, :]
        tile = at * D * F + column
        tile_CB = at * C * F + in_C[:, None] * F + block * BF + in_B[None, :]
        G1 = tl.load(G1_in + tile_CB)
        dW1 = tl.load(dW1_end + tile)
        dW2 = tl.load(dW2_end + tile)
        W1_T = tl.trans(tl.load(W1_start + anchor + column))
        dK_CD = matmul_add(tl.load(grad_Z1 + tile_CB), W1_T, dK_CD, PRECISION)
        by_W1_CD = matmul_add(G1, tl.trans(dW1), by_W1_CD, PRECISION)
        written_C = tl.load(written_in + tile_CB).to(tl.float32)
        last_W2 -= tl.sum(matmul(G2_CD, dW2, PRECISION) * written_C, 1)
        if MOMENTUM:
            dS1 = tl.load(dS1_end + tile)
            dS2 = tl.load(dS2_end + tile)
            by_S1_CD = matmul_add(G1, tl.trans(dS1), by_S1_CD, PRECISION)
            last_S2 -= tl.sum(matmul(G2_CD, dS2, PRECISION) * written_C, 1)
            S1 = tl.load(S1_start + tile).to(tl.float32)
            dW_S1 += tl.sum(dW1.to(tl.float32) * S1)
            dS_S1 += tl.sum(dS1.to(tl.float32) * S1)
            S2 = tl.load(S2_start + tile).to(tl.float32)
            dW_S2 += tl.sum(dW2.to(tl.float32) * S2)
            dS_S2 += tl.sum(dS2.to(tl.float32) * S2)
        dW_W1 += tl.sum(dW1.to(tl.float32) * tl.load(W1_start + tile).to(tl.float32))
        dW_W2 += tl.sum(dW2.to(tl.float32) * tl.load(W2_start + tile).to(tl.float32))
    K_CD = tl.load(k + at_KD, mask=real[:, None], other=0.0).to(tl.float32)
    theta1 = tl.load(gates1 + THETA * C + slots)
    last_W1 = -tl.sum(K_CD * by_W1_CD, 1)
    dK_CD -= (theta1 * tl.load(gates1 + LAST_W * C + slots))[:, None] * by_W1_CD
    if MOMENTUM:
        last_S1 = -tl.sum(K_CD * by_S1_CD, 1)
        dK_CD -= (theta1 * tl.load(gates1 + LAST_S * C + slots))[:, None] * by_S1_CD
    dK_CD += tl.load(grad_K_reads + at * D * C + of_D[None, :] * C + slots[:, None]).to(tl.float32)
    at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
    d_error = tl.load(grad_G2 + at_CD).to(tl.float32)
    if NORM:
        normed = tl.load(normed_in + at_CD).to(tl.float32)
        gain_D = tl.load(gain + head * D + of_D)[None, :]
        error = tl.load(bias + head * D + of_D)[None, :] + gain_D * normed
        error -= tl.load(v + at_KD, mask=real[:, None], other=0.0).to(tl.float32)
        if RESIDUAL:
            error += tl.load(k + at_KD, mask=real[:, None], other=0.0).to(tl.float32)
        d_GN = normalize_backward(d_error, normed, tl.load(rows_in + at * 3 * C + slots), D)
        d_error = gain_D * d_GN
        at_D = at * D + of_D
        d_gain = 2.0 * tl.sum(tl.where(real[:, None], d_GN * error + d_error * normed, 0.0), 0)
        tl.store(grad_gain + at_D, tl.load(grad_gain + at_D) + d_gain)
        d_bias = 2.0 * tl.sum(tl.where(real[:, None], d_error, 0.0), 0)
        tl.store(grad_bias + at_D, tl.load(grad_bias + at_D) + d_bias)
    d_error *= 2.0
    tl.store(grad_v + at_KD, (-d_error).to(grad_v.dtype.element_ty), mask=real[:, None])
    if RESIDUAL:
        dK_CD += d_error
    tl.store(grad_k + at_KD, dK_CD.to(grad_k.dtype.element_ty), mask=real[:, None])
    parts1 = gate_parts1 + at * GRAD_ROWS * C + slots
    parts2 = gate_parts2 + at * GRAD_ROWS * C + slots
    theta_part1 = tl.load(parts1 + GRAD_THETA * C)
    row_part1 = tl.load(parts1 + GRAD_ROW * C)
    column_part1 = tl.load(parts1 + GRAD_COLUMN * C)
    theta_part2 = tl.load(parts2 + GRAD_THETA * C)
    row_part2 = tl.load(parts2 + GRAD_ROW * C)
    column_part2 = tl.load(parts2 + GRAD_COLUMN * C)
    feed_part1 = tl.zeros([C], tl.float32)
    feed_part2 = tl.zeros([C], tl.float32)
    if MOMENTUM:
        feed_part1 = tl.load(parts1 + GRAD_FEED * C)
        feed_part2 = tl.load(parts2 + GRAD_FEED * C)
    last = tl.minimum(end - first - step * C, C) - 1
    out = token * H + head
    if SHARED:
        finish_gate_gradients(
            theta_part1 + theta_part2, row_part1 + row_part2, column_part1 + column_part2,
            feed_part1 + feed_part2, last_W1 + last_W2, last_S1 + last_S2, dW_W1 + dW_W2, dW_S1 + dW_S2,
            dS_S1 + dS_S2,
            gates1, grad_theta, grad_log_decay, grad_log_momentum, out, real, last, C, MOMENTUM,
        )  # fmt: skip
    else:
        finish_gate_gradients(
            theta_part1, row_part1, column_part1, feed_part1, last_W1, last_S1, dW_W1, dW_S1, dS_S1,
            gates1, grad_theta, grad_log_decay, grad_log_momentum, out * 2, real, last, C, MOMENTUM,
        )  # fmt: skip
        finish_gate_gradients(
            theta_part2, row_part2, column_part2, feed_part2, last_W2, last_S2, dW_W2, dW_S2, dS_S2,
            gates2, grad_theta, grad_log_decay, grad_log_momentum, out * 2 + 1, real, last, C, MOMENTUM,
        )  # fmt: skip
