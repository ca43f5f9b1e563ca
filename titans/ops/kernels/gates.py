"""Gates of a chunk as vectors (forward) and the gradients of the gates from those of the vectors (backward).

With a_t = exp(log_decay_t), e_t = exp(log_momentum_t), B[t,s] = a_{s+1} .. a_t, H[s,i] = e_{i+1} .. e_s, A =
B H:

    W_t = beta_t W_0 + c_t S_0 - sum_i A[t,i] theta_i grad_i        beta_t = B[t,0]   c_t = sum_s B[t,s] m_s
    S_t = m_t S_0              - sum_i H[t,i] theta_i grad_i        m_s = H[s,0]

Gradients never divide by a gate: with X = dB o B, the gradient of log a_t is a sum of X's rows minus one of
its columns, and the same for H (derivation: docs/decisions.md, "Gate gradients of the kernels").
"""

import triton
import triton.language as tl

from titans.ops.kernels.functions import (
    BETA,
    END,
    FEED,
    LAST_S,
    LAST_W,
    LOG_DECAY,
    LOG_MOMENTUM,
    ROWS,
    SIZES,
    THETA,
    carry_back,
    carry_forward,
    products,
    products_transposed,
    row_of,
)

# Rows of what one layer's reads leave for the gates, `[layers, cells, H, GRAD_ROWS, C]` fp32.
GRAD_THETA = tl.constexpr(0)  # of theta, through A
GRAD_ROW = tl.constexpr(1)  # <gradient of the read at t, what it read>: the row sums of X and of beta, c
GRAD_COLUMN = tl.constexpr(2)  # column sums of X, without what passes through c
GRAD_FEED = tl.constexpr(3)  # of c
GRAD_ROWS = tl.constexpr(4)


@triton.jit(do_not_specialize=SIZES)
def gate_vectors(
    theta, log_decay, log_momentum, vectors, table, cell_row,
    num_rows, group_start, stride,
    H: tl.constexpr, SETS: tl.constexpr, C: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Grid (cells x H, SETS). Gates `[B, T, H, SETS]` fp32 -> vectors `[SETS, cells, H, ROWS, C]`."""
    cell, head, gate_set = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1)
    row = tl.load(cell_row + group_start + cell)
    begin, end, first, base, count = row_of(table, row, num_rows)
    step = (group_start + cell - base) // stride
    if step >= count:
        return
    slots = tl.arange(0, C)
    token = first + step * C + slots
    real = (token >= begin) & (token < end)
    at = (token * H + head) * SETS + gate_set
    step_size = tl.load(theta + at, mask=real, other=0.0)
    log_a = tl.load(log_decay + at, mask=real, other=0.0)
    last = tl.minimum(end - first - step * C, C) - 1
    is_last = tl.where(slots == last, 1.0, 0.0)
    has_next, of_next = (token + 1 >= begin) & (slots < last), at + H * SETS
    next_decay = tl.exp(tl.load(log_decay + of_next, mask=has_next, other=0.0))
    last_decay = carry_back(next_decay, is_last)
    beta = tl.exp(tl.cumsum(log_a, 0))
    out = vectors + (gate_set * tl.num_programs(0).to(tl.int64) + tl.program_id(0)) * ROWS * C
    ends = tl.where(slots == 0, tl.sum(is_last * beta, 0), 0.0)
    last_weight = last_decay
    if MOMENTUM:
        log_e = tl.load(log_momentum + at, mask=real, other=0.0)
        next_momentum = tl.exp(tl.load(log_momentum + of_next, mask=has_next, other=0.0))
        hold = tl.where(real, tl.exp(tl.cumsum(log_e, 0)), 0.0)
        feed = carry_forward(tl.exp(log_a), hold)
        last_weight = carry_back(next_momentum, tl.where(real, last_decay, 0.0))
        ends += tl.where(slots == 1, tl.sum(is_last * feed, 0), 0.0)
        ends += tl.where(slots == 2, tl.sum(is_last * hold, 0), 0.0)
        tl.store(out + FEED * C + slots, feed)
        tl.store(out + LAST_S * C + slots, tl.where(real, carry_back(next_momentum, is_last), 0.0))
        tl.store(out + LOG_MOMENTUM * C + slots, log_e)
    tl.store(out + BETA * C + slots, beta)
    tl.store(out + LAST_W * C + slots, tl.where(real, last_weight, 0.0))
    tl.store(out + THETA * C + slots, step_size)
    tl.store(out + LOG_DECAY * C + slots, log_a)
    tl.store(out + END * C + slots, ends)


@triton.jit
def read_gate_gradients(
    grad_mix_CC, mix_CC, vectors, out, C: tl.constexpr, MOMENTUM: tl.constexpr, EXACT: tl.constexpr
):
    """What the reads of one layer leave through A (mix_CC `[t, i]`); grad_mix is the gradient of A theta.
    GRAD_ROW and GRAD_FEED are the caller's."""
    slots = tl.arange(0, C)
    tl.store(out + GRAD_THETA * C + slots, tl.sum(grad_mix_CC * mix_CC, 0))
    grad_CC = grad_mix_CC * tl.load(vectors + THETA * C + slots)[None, :]
    if MOMENTUM:
        log_e = tl.load(vectors + LOG_MOMENTUM * C + slots)
        # fp32 or tf32: log eta's gradient is a difference of two large sums.
        if EXACT:
            grad_CC = tl.dot(grad_CC, products_transposed(log_e, C, EXACT), input_precision="ieee")
        else:
            grad_CC = tl.dot(grad_CC, products_transposed(log_e, C, EXACT), input_precision="tf32")
    decay_CC = products(tl.load(vectors + LOG_DECAY * C + slots), C, EXACT)
    tl.store(out + GRAD_COLUMN * C + slots, tl.sum(decay_CC * grad_CC, 0))


@triton.jit
def finish_gate_gradients(
    grad_theta, grad_row, grad_column, grad_feeds, grad_last_W, grad_last_S, grad_beta, grad_feed, grad_hold,
    vectors, theta_out, decay_out, momentum_out, at, real, last, C: tl.constexpr, MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Adds the carry's share (its gates are those of the chunk's last token) and stores the gradients of
    theta, log_decay and log_momentum at `at`. grad_last_W and grad_last_S are gradients of
    theta A[last, :] and theta H[last, :], grad_feeds those of c at the reads; the three scalars are those of
    END."""
    slots = tl.arange(0, C)
    theta = tl.load(vectors + THETA * C + slots)
    log_a = tl.load(vectors + LOG_DECAY * C + slots)
    last_W = tl.load(vectors + LAST_W * C + slots)
    beta_end = tl.load(vectors + END * C)
    is_last = slots == last
    has_next = slots < C - 1
    next_decay = tl.exp(tl.load(vectors + LOG_DECAY * C + slots + 1, mask=has_next, other=0.0))
    last_decay = carry_back(next_decay, tl.where(is_last, 1.0, 0.0))
    grad_theta += grad_last_W * last_W
    grad_A = grad_last_W * theta
    at_end = tl.sum(grad_A * last_W, 0) + beta_end * grad_beta
    if MOMENTUM:
        log_e = tl.load(vectors + LOG_MOMENTUM * C + slots)
        last_S = tl.load(vectors + LAST_S * C + slots)
        feed_end = tl.load(vectors + END * C + 1)
        hold_end = tl.load(vectors + END * C + 2)
        hold = tl.where(real, tl.exp(tl.cumsum(log_e, 0)), 0.0)
        grad_theta += grad_last_S * last_S
        at_end += feed_end * grad_feed
        grad_column += hold * carry_back(next_decay, grad_feeds)
        grad_column += last_decay * (carry_forward(tl.exp(log_e), grad_A) + grad_feed * hold)
        at_momentum_end = tl.sum(grad_last_S * theta * last_S, 0) + hold_end * grad_hold
        of_log_e = grad_column - theta * grad_theta + tl.where(is_last, at_momentum_end, 0.0)
        of_log_e = tl.cumsum(tl.where(real, of_log_e, 0.0), 0, reverse=True)
        tl.store(momentum_out + at, tl.where(log_e == float("-inf"), 0.0, of_log_e), mask=real)
    else:
        grad_column += last_decay * grad_A
    of_log_a = grad_row - grad_column + tl.where(is_last, at_end, 0.0)
    of_log_a = tl.cumsum(tl.where(real, of_log_a, 0.0), 0, reverse=True)
    tl.store(decay_out + at, tl.where(log_a == float("-inf"), 0.0, of_log_a), mask=real)
    tl.store(theta_out + at, grad_theta, mask=real)
