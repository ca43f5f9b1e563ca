"""Kernels of the two-layer memory M(x) = x + LN(act(x W1) W2), forward.

    write   serial    the inner gradient of a chunk at its anchor, then the state at the next chunk's start
    read    parallel  queries through the memory as it is after each token

W2 is held transposed, so both layers are `[D, F]` and no value that came out of a product is ever the
transposed first operand of another (Triton 3.4 to 3.7 miscompiles that on Hopper). The serial kernels keep
their state in registers: a head's hidden width is split over F / BF programs, which hold BF columns each and
add up one [C, D] tile a chunk (`sum_of_parts`). The parallel ones walk the hidden width in blocks of BF.

Tiles of a group: states `[cells + rows, H, D, F]` (the last `rows`: anchors of first chunks), the written
hidden rows act(K W1) and the inner gradient G1 of K W1 `[cells, H, C, F]`, G2, the normalised output and its
inner gradient GN `[cells, H, C, D]`, rstd `[cells, H, C]` fp32.
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
    act_curvature,
    act_slope,
    chunks_of_group,
    chunks_of_segment,
    fetch_lines,
    matmul,
    matmul_add,
    mixing,
    normalize,
    place_of,
    row_of,
    share_part,
    slot_of_segment,
    sum_of_parts,
)


@triton.jit
def unseen_zero(n, SALT: tl.constexpr):
    """0 for n >= 0, which the compiler cannot know.

    Offsets of a tile plus this are computed where they are used. Without it LLVM keeps a 64-bit pointer per
    row and tensor in registers through the whole loop of a serial kernel: 150 of the 255 registers.
    """
    return (tl.minimum(n + SALT, SALT) - SALT).to(tl.int32) * 64


@triton.jit
def first_block(step, BLOCKS: tl.constexpr):
    """0, where there are several blocks such that the compiler cannot know it (`unseen_zero`)."""
    if BLOCKS == 1:
        return 0
    else:
        return unseen_zero(step, 0)


@triton.jit
def carry_gates(gates, slots):
    """Weights of a chunk's gradients in its last W and S; of W in W, of S in W and of S in S."""
    C: tl.constexpr = slots.shape[0]
    theta = tl.load(gates + THETA * C + slots)
    to_W = -theta * tl.load(gates + LAST_W * C + slots)
    to_S = -theta * tl.load(gates + LAST_S * C + slots)
    end = gates + END * C
    return to_W, to_S, tl.load(end), tl.load(end + 1), tl.load(end + 2)


@triton.jit
def move(
    W, S, S_next, S_state, last, tile, input_T, grad, weights,
    MOMENTUM: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W at the next chunk's start. S goes through memory: registers have no room for it."""
    dtype = grad.dtype
    to_W, to_S, W_in_W, S_in_W, S_in_S = weights
    W = W_in_W * W
    if MOMENTUM:
        S = S.to(tl.float32)
        W += S_in_W * S
        S = matmul_add(input_T, (to_S[:, None] * grad).to(dtype), S_in_S * S, PRECISION)
        if last:
            if not AGAIN:
                tl.store(S_state + tile, S)
        else:
            tl.store(S_next + tile, S.to(dtype))
    return matmul_add(input_T, (to_W[:, None] * grad).to(dtype), W, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def mlp_write(
    k, v, gain, bias, vectors1, vectors2, table, W1_state, S1_state, W2_state, S2_state,
    first1, first2, end1, end2, kept_W1, kept_S1, kept_W2, kept_S2, W1_start, S1_start, W2_start, S2_start,
    written_out, G1_out, G2_out, slope_out, bend_out, normed_out, GN_out, rows_out, exchange, arrived,
    num_rows, group_start, group_end, stride, segment, number,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, KEEP: tl.constexpr,
    AGAIN: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows x H x F / BF), one segment of the group, the one of that number. The states `[rows, H, D,
    F]` fp32 are read and written. KEEP: kept_W and kept_S `[slots, H, D, F]` get those at the segment's
    start. exchange `[rows x H, 2, F / BF, C, D]` fp32 and arrived `[1 + rows x H]` int32, zero, as in
    `sum_of_parts` and `place_of`.
    AGAIN: the backward's, grid (segments x rows x H x F / BF), all segments at once from their kept states.
    Stores what only the backward reads: act', act'' times the gradient G2 W2^T, normed, GN and, of each row
    `[3, C]`, rstd, GN's mean and its mean along normed.
    AHEAD: each program has a core to itself, and registers to load early what a chunk needs late."""
    PARTS: tl.constexpr = F // BF
    place = place_of(arrived, PARTS)
    part, unit = place % PARTS, place // PARTS
    head, row = unit % H, unit // H % num_rows
    begin, end, first, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    if AGAIN:
        number = unit // H // num_rows
    low, high = chunks_of_segment(base, low, high, stride, group_start, segment, number)
    if low >= high:
        return
    share = tl.arange(0, D)[:, None] * F + tl.arange(0, BF)[None, :]
    state = (row.to(tl.int64) * H + head) * D * F + part * BF
    exchange += unit.to(tl.int64) * 2 * PARTS * C * D
    dtype = k.dtype.element_ty
    kept = (slot_of_segment(base, low, stride, group_start, segment, row) * H + head) * D * F + part * BF
    if AGAIN:
        W1 = tl.load(kept_W1 + kept + share)
        W2 = tl.load(kept_W2 + kept + share)
    else:
        W1 = tl.load(W1_state + state + share)
        W2 = tl.load(W2_state + state + share)
        if KEEP:
            tl.store(kept_W1 + kept + share, W1)
            tl.store(kept_W2 + kept + share, W2)
    anchor1 = W1.to(dtype)
    anchor2 = W2.to(dtype)
    if low == 0:
        anchor1 = tl.load(first1 + state + share).to(dtype)
        anchor2 = tl.load(first2 + state + share).to(dtype)
        slot = ((group_end - group_start + row).to(tl.int64) * H + head) * D * F + part * BF
        tl.store(W1_start + slot + share, anchor1)
        tl.store(W2_start + slot + share, anchor2)
    if MOMENTUM:
        here = ((base + low * stride - group_start) * H + head) * D * F + part * BF
        if AGAIN:
            tl.store(S1_start + here + share, tl.load(kept_S1 + kept + share))
            tl.store(S2_start + here + share, tl.load(kept_S2 + kept + share))
        else:
            S1 = tl.load(S1_state + state + share).to(dtype)
            S2 = tl.load(S2_state + state + share).to(dtype)
            tl.store(S1_start + here + share, S1)
            tl.store(S2_start + here + share, S2)
            if KEEP:
                tl.store(kept_S1 + kept + share, S1)
                tl.store(kept_S2 + kept + share, S2)
    if AHEAD:
        tl.debug_barrier()  # the first chunk may load S in another layout
    for index in range(low, high):
        n = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        at = (base + n * stride - group_start) * H + head
        here = at * D * F + part * BF
        rows = ((first + n * C) * H + head) * D
        real = (slots >= (begin - first - n * C).to(tl.int32)) & (slots < (end - first - n * C).to(tl.int32))
        at_CD = slots[:, None] * (H * D) + of_D[None, :]
        tile = of_D[:, None] * F + of_B[None, :]
        tile_CB = slots[:, None] * F + of_B[None, :]
        hidden = at * C * F + part * BF
        if AHEAD:
            following = tl.minimum(n + 1, high - 1)
            tokens = tl.minimum(first + following * C + slots, end - 1)
            fetch_lines(k + head * D, tokens, H * D, D)
            fetch_lines(v + head * D, tokens, H * D, D)
            following = ((base + following * stride - group_start) * H + head) * ROWS * C
            fetch_lines(vectors1 + following, tl.arange(0, ROWS), C, C)
            fetch_lines(vectors2 + following, tl.arange(0, ROWS), C, C)
            K_DC = tl.load(k + rows + slots[None, :] * (H * D) + of_D[:, None], mask=real[None, :], other=0.0)
            S1 = tl.load(S1_start + here + tile)
            S2 = tl.load(S2_start + here + tile)
            weights1 = carry_gates(vectors1 + at * ROWS * C, slots)
            weights2 = carry_gates(vectors2 + at * ROWS * C, slots)
        K_CD = tl.load(k + rows + at_CD, mask=real[:, None], other=0.0)
        target = tl.load(v + rows + at_CD, mask=real[:, None], other=0.0)
        if AGAIN:
            hidden_C, slope_C, bend_C = act_curvature(matmul(K_CD, anchor1, PRECISION), ACT)
            bend_C = bend_C.to(dtype)
        else:
            hidden_C, slope_C = act_slope(matmul(K_CD, anchor1, PRECISION), ACT)
        hidden_C = hidden_C.to(dtype)  # half the registers, as the slope
        slope_C = slope_C.to(dtype)
        tl.store(written_out + hidden + tile_CB, hidden_C)
        if AGAIN:
            tl.store(slope_out + hidden + tile_CB, slope_C)
        # From memory, as G2 and G1 below: a product whose result feeds another in registers is laid out for
        # four warps, and eight take every row twice.
        tl.debug_barrier()
        hidden_C = tl.load(written_out + hidden + tile_CB)
        Z2_CD = matmul(hidden_C, tl.trans(anchor2), PRECISION)
        share_part(Z2_CD, exchange, arrived + 1 + unit, part, index - low, PARTS, C, D)
        zero = unseen_zero(index, 2)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        # Not before: sharing waits until all that was stored before can be seen.
        tile = of_D[:, None] * F + of_B[None, :]
        tl.store(W1_start + here + tile, W1.to(dtype))
        tl.store(W2_start + here + tile, W2.to(dtype))
        if not AGAIN:  # noqa: SIM102 (a constant)
            if (n == count - 1) & (n > 0):
                tl.store(end1 + state + tile, W1)
                tl.store(end2 + state + tile, W2)
        Z2_CD = sum_of_parts(Z2_CD, exchange, arrived + 1 + unit, index - low, PARTS, C, D)
        real = (slots >= (begin - first - n * C).to(tl.int32)) & (slots < (end - first - n * C).to(tl.int32))
        target = target.to(tl.float32)
        if RESIDUAL:
            if PARTS > 1:  # not kept in registers meanwhile
                at_CD = slots[:, None] * (H * D) + of_D[None, :]
                K_CD = tl.load(k + rows + at_CD, mask=real[:, None], other=0.0)
            target -= K_CD.to(tl.float32)
        in_CD = slots[:, None] * D + of_D[None, :]
        if NORM:
            normed, rstd = normalize(Z2_CD, D)
            gain_D = tl.load(gain + head * D + of_D)
            bias_D = tl.load(bias + head * D + of_D)
            GN_CD = gain_D[None, :] * (2.0 * (gain_D[None, :] * normed + bias_D[None, :] - target))
            if AGAIN and part == 0:
                tl.store(normed_out + at * C * D + in_CD, normed.to(dtype))
                tl.store(GN_out + at * C * D + in_CD, GN_CD.to(dtype))
            mean = tl.sum(GN_CD, 1) / D
            along = tl.sum(GN_CD * normed, 1) / D
            if AGAIN and part == 0:
                tl.store(rows_out + at * 3 * C + slots, rstd)
                tl.store(rows_out + (at * 3 + 1) * C + slots, mean)
                tl.store(rows_out + (at * 3 + 2) * C + slots, along)
            G2_CD = rstd[:, None] * (GN_CD - mean[:, None] - normed * along[:, None])
        else:
            G2_CD = 2.0 * (Z2_CD - target)
        G2_CD = tl.where(real[:, None], G2_CD, 0.0).to(dtype)
        # Every part stores the same bits, and reads what it stored itself.
        tl.store(G2_out + at * C * D + in_CD, G2_CD)
        tl.debug_barrier()
        zero = unseen_zero(index, 3)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        real = (slots >= (begin - first - n * C).to(tl.int32)) & (slots < (end - first - n * C).to(tl.int32))
        tile = of_D[:, None] * F + of_B[None, :]
        tile_CB = slots[:, None] * F + of_B[None, :]
        G2_CD = tl.load(G2_out + at * C * D + slots[:, None] * D + of_D[None, :])
        G1 = matmul(G2_CD, anchor2, PRECISION)  # of the hidden rows, so far
        if AGAIN:
            tl.store(bend_out + hidden + tile_CB, (bend_C * G1).to(dtype))
        G1 = (G1 * slope_C).to(dtype)
        tl.store(G1_out + hidden + tile_CB, G1)
        tl.debug_barrier()
        G1 = tl.load(G1_out + hidden + tile_CB)
        then = here + stride * H * D * F
        last = index == high - 1
        if not AHEAD:
            K_DC = tl.load(k + rows + slots[None, :] * (H * D) + of_D[:, None], mask=real[None, :], other=0.0)
            S1 = tl.load(S1_start + here + tile)
            weights1 = carry_gates(vectors1 + at * ROWS * C, slots)
        W1 = move(
            W1,
            S1,
            S1_start + then,
            S1_state + state,
            last,
            tile,
            K_DC,
            G1,
            weights1,
            MOMENTUM,
            AGAIN,
            PRECISION,
        )
        G2_DC = tl.load(G2_out + at * C * D + slots[None, :] * D + of_D[:, None])
        if not AHEAD:
            S2 = tl.load(S2_start + here + tile)
            weights2 = carry_gates(vectors2 + at * ROWS * C, slots)
        W2 = move(
            W2, S2, S2_start + then, S2_state + state, last, tile, G2_DC, hidden_C, weights2, MOMENTUM, AGAIN,
            PRECISION,
        )  # fmt: skip
        if AHEAD and MOMENTUM:
            tl.debug_barrier()  # the next chunk may load S in another layout
        anchor1 = W1.to(dtype)
        anchor2 = W2.to(dtype)
    if not AGAIN:
        tl.store(W1_state + state + share, W1)
        tl.store(W2_state + state + share, W2)


@triton.jit(do_not_specialize=SIZES)
def mlp_read(
    q, k, y, gain, bias, vectors1, vectors2, table, cell_row, W1_start, S1_start, W2_start, S2_start,
    written_in, G1_in, G2_in,
    num_rows, group_start, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, MOMENTUM: tl.constexpr, SHARED: tl.constexpr, EXACT:
    tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H). SHARED: both layers have the same gates."""
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
    for index in range(first_block(step, F // BF), F // BF):
        block = index ^ unseen_zero(index, 0)
        zero = unseen_zero(index, 1)
        in_C, in_D, in_B = slots + zero, of_D + zero, of_B + zero
        tile = at * D * F + in_D[:, None] * F + block * BF + in_B[None, :]
        tile_CB = at * C * F + in_C[:, None] * F + block * BF + in_B[None, :]
        Z1 = matmul(Q_beta, tl.load(W1_start + tile), PRECISION)
        if MOMENTUM:
            Z1 = matmul_add(Q_feed, tl.load(S1_start + tile), Z1, PRECISION)
        Z1 = matmul_add(mixed1_CC, tl.load(G1_in + tile_CB), Z1, PRECISION)
        read_C = act(Z1, ACT)
        written_C = tl.load(written_in + tile_CB)
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
