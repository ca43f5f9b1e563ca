"""The serial kernel of the two-layer memory, backward: back through the carry and the inner gradient, from
the last chunk on. Names and tiles as in mlp_forward.py; it runs between the kernels of mlp_backward.py.
"""

import triton
import triton.language as tl

from titans.ops.kernels.functions import (
    END,
    LAST_S,
    LAST_W,
    ROWS,
    SIZES,
    THETA,
    chunks_of_group,
    fetch_lines,
    matmul,
    matmul_add,
    normalize_backward,
    place_of,
    row_of,
    share_part,
    sum_of_parts,
)
from titans.ops.kernels.mlp_forward import unseen_zero


@triton.jit
def move_back(dS_here, dW_here, from_reads, dS_before, dS_state, last, tile, end):
    """dS at the chunk's start, from the rounded gradients at its end: through memory, as S in `mlp_write`."""
    dS = tl.load(end + 2) * tl.load(dS_here + tile).to(tl.float32)
    dS += tl.load(end + 1) * tl.load(dW_here + tile).to(tl.float32)
    dS += tl.load(from_reads + tile).to(tl.float32)
    if last:
        tl.store(dS_state + tile, dS)
    else:
        tl.store(dS_before + tile, dS.to(dS_before.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def mlp_write_backward(
    k, gain, vectors1, vectors2, table, dW1_state, dS1_state, dW2_state, dS2_state,
    grad_first1, grad_first2, grad_end1, grad_end2, W2_start, written_in, slope_in, bend_in, G2_in, normed_in,
    GN_in, rows_in, grad_H, grad_G1, grad_G2, grad_W1, grad_S1, grad_W2, grad_S2,
    dW1_end, dS1_end, dW2_end, dS2_end, grad_Z2, complete_Z1, complete_G2, exchange, arrived,
    num_rows, group_start, group_end, stride,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    NORM: tl.constexpr, MOMENTUM: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (rows x H x F / BF), see `mlp_write`. complete_Z1 and complete_G2 get the gradients of the
    written Z1 and of G2, `*_end` those of the state at the chunk's end. AHEAD: each program has a core to
    itself."""
    PARTS: tl.constexpr = F // BF
    place = place_of(arrived, PARTS)
    part, row, head = place % PARTS, place // PARTS // H, place // PARTS % H
    begin, end, first, base, count = row_of(table, row, num_rows)
    low, high = chunks_of_group(base, count, stride, group_start, group_end)
    if low >= high:
        return
    share = tl.arange(0, D)[:, None] * F + tl.arange(0, BF)[None, :]
    state = (row.to(tl.int64) * H + head) * D * F + part * BF
    exchange += (row.to(tl.int64) * H + head) * 2 * PARTS * C * D
    anchor_slot = ((group_end - group_start + row).to(tl.int64) * H + head) * D * F + part * BF
    dtype = k.dtype.element_ty
    dW1 = tl.load(dW1_state + state + share)
    dW2 = tl.load(dW2_state + state + share)
    if MOMENTUM:
        here = ((base + (high - 1) * stride - group_start) * H + head) * D * F + part * BF
        tl.store(dS1_end + here + share, tl.load(dS1_state + state + share).to(dtype))
        tl.store(dS2_end + here + share, tl.load(dS2_state + state + share).to(dtype))
        tl.debug_barrier()
    for index in range(low, high):
        n = (low + high - 1 - index) ^ unseen_zero(index, 0)
        # 1, which the compiler cannot know: of a sum of two products it would make one the accumulator of the
        # other, and lay the first out for four warps (`mlp_write`).
        one = (index >= low).to(tl.float32)
        at = (base + n * stride - group_start) * H + head
        here = at * D * F + part * BF
        hidden = at * C * F + part * BF
        rows = ((first + n * C) * H + head) * D
        gates1 = vectors1 + at * ROWS * C
        gates2 = vectors2 + at * ROWS * C
        zero = unseen_zero(index, 1)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        real = (slots >= (begin - first - n * C).to(tl.int32)) & (slots < (end - first - n * C).to(tl.int32))
        tile = of_D[:, None] * F + of_B[None, :]
        tile_CB = slots[:, None] * F + of_B[None, :]
        if AHEAD:
            earlier = tl.maximum(n - 1, low)
            earlier_at = (base + earlier * stride - group_start) * H + head
            earlier_tile = earlier_at * D * F + part * BF
            earlier_hidden = earlier_at * C * F + part * BF
            earlier_CD = earlier_at * C * D
            fetch_lines(k + head * D, tl.minimum(first + earlier * C + slots, end - 1), H * D, D)
            fetch_lines(G2_in + earlier_CD, slots, D, D)
            fetch_lines(W2_start + earlier_tile, of_D, F, BF)
            fetch_lines(vectors1 + earlier_at * ROWS * C, tl.arange(0, ROWS), C, C)
            fetch_lines(vectors2 + earlier_at * ROWS * C, tl.arange(0, ROWS), C, C)
            fetch_lines(grad_G1 + earlier_hidden, slots, F, BF)
            fetch_lines(written_in + earlier_hidden, slots, F, BF)
            fetch_lines(slope_in + earlier_hidden, slots, F, BF)
            fetch_lines(bend_in + earlier_hidden, slots, F, BF)
            fetch_lines(grad_H + earlier_hidden, slots, F, BF)
            fetch_lines(grad_G2 + earlier_CD, slots, D, D)
            fetch_lines(normed_in + earlier_CD, slots, D, D)
            fetch_lines(GN_in + earlier_CD, slots, D, D)
            fetch_lines(rows_in + earlier_at * 3 * C, tl.arange(0, 4), C, C)
            fetch_lines(grad_W1 + earlier_tile, of_D, F, BF)
            fetch_lines(grad_W2 + earlier_tile, of_D, F, BF)
            if MOMENTUM:
                fetch_lines(grad_S1 + earlier_tile, of_D, F, BF)
                fetch_lines(grad_S2 + earlier_tile, of_D, F, BF)
        K_CD = tl.load(k + rows + slots[:, None] * (H * D) + of_D[None, :], mask=real[:, None], other=0.0)
        G2_DC = tl.load(G2_in + at * C * D + slots[None, :] * D + of_D[:, None])
        dG1 = tl.load(grad_G1 + hidden + tile_CB)
        hidden_C = tl.load(written_in + hidden + tile_CB)
        slope_C = tl.load(slope_in + hidden + tile_CB)
        bend_C = tl.load(bend_in + hidden + tile_CB)
        at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
        dG2 = tl.load(grad_G2 + at_CD, mask=(slots >= part * C)[:, None], other=0.0)
        anchor = tl.where(n == 0, anchor_slot, here)
        W2 = tl.load(W2_start + anchor + tile)
        theta1 = tl.load(gates1 + THETA * C + slots)
        theta2 = tl.load(gates2 + THETA * C + slots)
        of_W1 = -theta1 * tl.load(gates1 + LAST_W * C + slots)
        of_W2 = -theta2 * tl.load(gates2 + LAST_W * C + slots)
        low_dW1 = dW1.to(dtype)
        low_dW2 = dW2.to(dtype)
        tl.store(dW1_end + here + tile, low_dW1)
        tl.store(dW2_end + here + tile, low_dW2)
        # Rows of the products are scaled, not those of the operands: these come from memory as they are.
        dG1 = of_W1[:, None] * matmul(K_CD, low_dW1, PRECISION) + dG1.to(tl.float32)
        if MOMENTUM:
            of_S1 = -theta1 * tl.load(gates1 + LAST_S * C + slots)
            of_S2 = -theta2 * tl.load(gates2 + LAST_S * C + slots)
            low_dS1 = tl.load(dS1_end + here + tile)
            low_dS2 = tl.load(dS2_end + here + tile)
            dG1 += of_S1[:, None] * matmul(K_CD, low_dS1, PRECISION)
        bend_C = (bend_C * dG1).to(dtype)
        # Gradient of G2 W2^T, in the place of grad_Z1 meanwhile.
        tl.store(complete_Z1 + hidden + tile_CB, (dG1 * slope_C).to(dtype))
        tl.debug_barrier()
        gated_C = tl.load(complete_Z1 + hidden + tile_CB)
        dG2_CD = of_W2[:, None] * matmul(hidden_C, tl.trans(low_dW2), PRECISION)
        if MOMENTUM:
            dG2_CD += of_S2[:, None] * matmul(hidden_C, tl.trans(low_dS2), PRECISION)
        dG2_CD += dG2.to(tl.float32)
        dG2_CD += one * matmul(gated_C, tl.trans(W2), PRECISION)
        head_arrived = arrived + 1 + place // PARTS
        share_part(dG2_CD, exchange, head_arrived, part, index - low, PARTS, C, D)
        K_DC = tl.load(k + rows + slots[None, :] * (H * D) + of_D[:, None], mask=real[None, :], other=0.0)
        G2_CD = tl.load(G2_in + at_CD)
        dH = of_W2[:, None] * matmul(G2_CD, low_dW2, PRECISION)
        if MOMENTUM:
            dH += of_S2[:, None] * matmul(G2_CD, low_dS2, PRECISION)
        dH += tl.load(grad_H + hidden + tile_CB).to(tl.float32)
        # From here on dW1 and dW2 are those at the chunk's start. What passes through the anchor belongs to
        # the first one in chunk 0: there they start again from zero.
        dW1 = tl.load(gates1 + END * C) * dW1 + tl.load(grad_W1 + here + tile).to(tl.float32)
        dW2 = tl.load(gates2 + END * C) * dW2 + tl.load(grad_W2 + here + tile).to(tl.float32)
        if n == 0:
            tl.store(dW1_state + state + tile, dW1)
            tl.store(dW2_state + state + tile, dW2)
        dW1 = tl.where(n == 0, 0.0, dW1)
        dW2 = tl.where(n == 0, 0.0, dW2) + matmul(G2_DC, gated_C, PRECISION)
        if NORM:
            normed = tl.load(normed_in + at_CD)
            GN_CD = tl.load(GN_in + at_CD)
            rstd = tl.load(rows_in + at * 3 * C + slots)
            mean_GN = tl.load(rows_in + (at * 3 + 1) * C + slots)
            along_GN = tl.load(rows_in + (at * 3 + 2) * C + slots)
            gain_D = tl.load(gain + head * D + of_D)
        dG2_CD = sum_of_parts(dG2_CD, exchange, head_arrived, index - low, PARTS, C, D)
        zero = unseen_zero(index, 2)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        at_CD = at * C * D + slots[:, None] * D + of_D[None, :]
        if part == 0:
            tl.store(complete_G2 + at_CD, dG2_CD.to(dtype))
        if NORM:
            normed = normed.to(tl.float32)
            GN_CD = GN_CD.to(tl.float32)
            mean_dG2 = tl.sum(dG2_CD, 1) / D
            along_dG2 = tl.sum(dG2_CD * normed, 1) / D
            # G2 = rstd (GN - mean - normed along): through rstd, through normed and along, through GN.
            d_log_rstd = rstd * (tl.sum(dG2_CD * GN_CD, 1) / D - mean_dG2 * mean_GN - along_dG2 * along_GN)
            d_GN = rstd[:, None] * (dG2_CD - mean_dG2[:, None] - normed * along_dG2[:, None])
            d_normed = -rstd[:, None] * (dG2_CD * along_GN[:, None] + GN_CD * along_dG2[:, None])
            d_normed += (2.0 * gain_D * gain_D)[None, :] * d_GN
            dZ2_CD = normalize_backward(d_normed, normed, rstd, D) - (d_log_rstd * rstd)[:, None] * normed
        else:
            dZ2_CD = 2.0 * dG2_CD
        dZ2_CD = dZ2_CD.to(dtype)
        tl.store(grad_Z2 + at_CD, dZ2_CD)  # every part stores the same bits, and reads what it stored itself
        tl.debug_barrier()
        zero = unseen_zero(index, 3)
        slots, of_D, of_B = tl.arange(0, C) + zero, tl.arange(0, D) + zero, tl.arange(0, BF) + zero
        real = (slots >= (begin - first - n * C).to(tl.int32)) & (slots < (end - first - n * C).to(tl.int32))
        tile = of_D[:, None] * F + of_B[None, :]
        tile_CB = slots[:, None] * F + of_B[None, :]
        dZ2_DC = tl.load(grad_Z2 + at * C * D + slots[None, :] * D + of_D[:, None])
        dZ2_CD = tl.load(grad_Z2 + at * C * D + slots[:, None] * D + of_D[None, :])
        dH += one * matmul(dZ2_CD, W2, PRECISION)
        tl.store(complete_Z1 + hidden + tile_CB, (dH * slope_C + bend_C).to(dtype))
        tl.debug_barrier()
        dW2 += one * matmul(dZ2_DC, hidden_C, PRECISION)
        dW1 = matmul_add(K_DC, tl.load(complete_Z1 + hidden + tile_CB), dW1, PRECISION)
        if (n == count - 1) & (n > 0):
            dW1 += tl.load(grad_end1 + state + tile)
            dW2 += tl.load(grad_end2 + state + tile)
        if MOMENTUM:
            before = here - stride * H * D * F
            last = index == high - 1
            move_back(
                dS1_end + here, dW1_end + here, grad_S1 + here, dS1_end + before, dS1_state + state,
                last, tile, gates1 + END * C,
            )  # fmt: skip
            move_back(
                dS2_end + here, dW2_end + here, grad_S2 + here, dS2_end + before, dS2_state + state,
                last, tile, gates2 + END * C,
            )  # fmt: skip
            tl.debug_barrier()  # the next chunk may load dS in another layout
    if low == 0:
        tl.store(grad_first1 + state + share, dW1)
        tl.store(grad_first2 + state + share, dW2)
    else:
        tl.store(dW1_state + state + share, dW1)
        tl.store(dW2_state + state + share, dW2)
