"""Device functions that several kernels share.

Names: C tokens of a chunk, D width of a head, F hidden width. Matrices of gates are `[t, s]`, t >= s: what
the write of token s still weighs at token t.
"""

import triton
import triton.language as tl

from titans.ops.kernels.support import interpreted

# Rows of `gate_vectors`' output, `[cells, H, ROWS, C]` fp32.
BETA = tl.constexpr(0)  # weight of the chunk's first W in W_t
FEED = tl.constexpr(1)  # weight of the chunk's first S in W_t
LAST_W = tl.constexpr(2)  # weight of token i's gradient in the chunk's last W, without theta
LAST_S = tl.constexpr(3)  # the same for S
THETA = tl.constexpr(4)
LOG_DECAY = tl.constexpr(5)
LOG_MOMENTUM = tl.constexpr(6)
END = tl.constexpr(
    7
)  # its first three entries: BETA, FEED and the weight of S in S at the chunk's last token
ROWS = tl.constexpr(8)

NORM_EPS = tl.constexpr(1e-6)
PREFETCH = tl.constexpr(not interpreted())  # which knows no such instruction
LOG2_E = tl.constexpr(1.4426950408889634)

# Arguments that change with lengths and batches: Triton would compile anew for 1 and for multiples of 16.
SIZES = ["num_rows", "group_start", "group_end", "stride", "segment", "number"]


@triton.jit
def row_of(table, row, num_rows):
    """First token, end, first slot of chunk 0, first cell and number of chunks of a row of the batch."""
    begin = tl.load(table + row)
    end = tl.load(table + num_rows + row)
    first = tl.load(table + 2 * num_rows + row)
    base = tl.load(table + 3 * num_rows + row)
    count = tl.load(table + 4 * num_rows + row)
    return begin, end, first, base, count


@triton.jit
def program_of(blocks, H: tl.constexpr, num_rows):
    """Of a serial kernel's only axis (the others end at 65,535): block, head, row and segment."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    return block, rest % H, rest // H % num_rows, rest // H // num_rows


@triton.jit
def chunks_of_group(base, count, stride, group_start, group_end):
    """The row's chunks whose cells (base + n stride) lie in the group."""
    low = (tl.maximum(group_start - base, 0) + stride - 1) // stride
    high = (tl.maximum(group_end - base, 0) + stride - 1) // stride
    return tl.minimum(low, count), tl.minimum(high, count)


@triton.jit
def slot_of_segment(base, n, stride, group_start, segment, row):
    """Where the state at the start of the segment of chunk n is kept, among the slots of its group
    (`plan.Groups`)."""
    return (base // stride + n - group_start // stride) // segment * stride + row


@triton.jit
def chunks_of_segment(base, low, high, stride, group_start, segment, number):
    """Those of a row's chunks low to high that lie in a group's segment of that number."""
    start = group_start // stride + number * segment - base // stride
    return tl.maximum(low, start), tl.minimum(high, start + segment)


@triton.jit
def segment_of(base, n, stride, segment):
    """First chunk of the segment in which chunk n lies, and of the next one. Windows start with the groups,
    so all of them lie at multiples of `segment`."""
    start = (base // stride + n) // segment * segment - base // stride
    return start, start + segment


@triton.jit
def fetch_lines(tile, rows, stride, WIDTH: tl.constexpr):
    """Asks for rows of WIDTH numbers, `stride` numbers apart, to be brought into the L2 cache."""
    if PREFETCH:
        LINE: tl.constexpr = 1024 // tile.dtype.element_ty.primitive_bitwidth
        lines = tl.arange(0, max(WIDTH // LINE, 1)) * LINE
        addresses = (tile + (rows[:, None] * stride + lines[None, :])).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _then(factor, value, next_factor, next_value):
    return factor * next_factor, next_factor * value + next_value


@triton.jit
def carry_forward(factor, value):
    """y_t = factor_t y_{t-1} + value_t, over a chunk's slots."""
    _, result = tl.associative_scan((factor, value), 0, _then)
    return result


@triton.jit
def carry_back(factor, value):
    """y_t = factor_t y_{t+1} + value_t."""
    _, result = tl.associative_scan((factor, value), 0, _then, reverse=True)
    return result


@triton.jit
def products(log_gate, C: tl.constexpr, EXACT: tl.constexpr):
    """exp(sum of log_gate over s < j <= t), `[t, s]`, 0 above the diagonal.

    By exp2: `tl.exp` spends three more instructions on results below 1e-38. EXACT sums for every s on its
    own. Differences of one running sum cost a fourth of that and are good to 6e-8 of the sum; -inf is taken
    as -100 (exp: 0 or 4e-44), or it would make NaN.
    """
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    if EXACT:
        total = LOG2_E * tl.cumsum(tl.where(t > s, log_gate[:, None], 0.0), 0)
    else:
        running = LOG2_E * tl.cumsum(tl.maximum(log_gate, -100.0), 0)
        total = running[:, None] - running[None, :]
    return tl.exp2(tl.where(t >= s, total, float("-inf")))


@triton.jit
def products_transposed(log_gate, C: tl.constexpr, EXACT: tl.constexpr):
    """The same as `[s, t]`."""
    s = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    if EXACT:
        total = LOG2_E * tl.cumsum(tl.where(t > s, log_gate[None, :], 0.0), 1)
    else:
        running = LOG2_E * tl.cumsum(tl.maximum(log_gate, -100.0), 0)
        total = running[None, :] - running[:, None]
    return tl.exp2(tl.where(t >= s, total, float("-inf")))


@triton.jit
def compose(decay_CC, momentum_CC, EXACT: tl.constexpr):
    """decay @ momentum. Entries lie in [0, 1] and the diagonal is 1: fp16 keeps as many digits as tf32."""
    if EXACT:
        return tl.dot(decay_CC, momentum_CC, input_precision="ieee")
    return tl.dot(decay_CC.to(tl.float16), momentum_CC.to(tl.float16))


@triton.jit
def mixing(vectors, slots, C: tl.constexpr, MOMENTUM: tl.constexpr, EXACT: tl.constexpr):
    """Weight of the gradient of token i in W_t, without theta: `[t, i]`."""
    decay_CC = products(tl.load(vectors + LOG_DECAY * C + slots), C, EXACT)
    if MOMENTUM:
        momentum_CC = products(tl.load(vectors + LOG_MOMENTUM * C + slots), C, EXACT)
        return compose(decay_CC, momentum_CC, EXACT)
    return decay_CC


@triton.jit
def inverse(x):
    """1 / x of x > 0 within 2e-7: two instructions, where a division takes seven."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    return inverse(1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def normal_cdf(z, KIND: tl.constexpr):
    """The standard normal distribution at z, and exp(-z^2 / 2).

    Abramowitz and Stegun 7.1.26: within 8e-8, with half the instructions of libdevice's erf, and the
    exponential serves the derivatives, too. "gelu_fp32" keeps erf: the LN of a narrow head amplifies 8e-8
    to 8e-5.
    """
    density = tl.exp2((-0.7213475204444817 * z) * z)
    if KIND == "gelu_fp32":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)), density
    else:
        t = inverse(1.0 + 0.23164189 * tl.abs(z))
        tail = t * (
            0.127414796 + t * (-0.142248368 + t * (0.710706870 + t * (-0.726576014 + t * 0.530702714)))
        )
        tail *= density
        return tl.where(z < 0.0, tail, 1.0 - tail), density


@triton.jit
def act(z, KIND: tl.constexpr):
    if KIND == "silu":
        return z * sigmoid(z)
    elif KIND == "gelu" or KIND == "gelu_fp32":
        cdf, _ = normal_cdf(z, KIND)
        return z * cdf
    else:
        inner = 0.7978845608028654 * z * (1.0 + 0.044715 * z * z)
        return z * sigmoid(2.0 * inner)


@triton.jit
def act_slope(z, KIND: tl.constexpr):
    """act and act'."""
    if KIND == "silu":
        gate = sigmoid(z)
        return z * gate, gate * (1.0 + z * (1.0 - gate))
    elif KIND == "gelu" or KIND == "gelu_fp32":
        cdf, density = normal_cdf(z, KIND)
        return z * cdf, cdf + z * (0.3989422804014327 * density)
    else:
        square = z * z
        gate = sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * square))  # (1 + tanh) / 2
        bend = 1.5957691216057308 * (1.0 + 0.134145 * square)
        return z * gate, gate + z * gate * (1.0 - gate) * bend


@triton.jit
def act_curvature(z, KIND: tl.constexpr):
    """act, act' and act''."""
    if KIND == "silu":
        gate = sigmoid(z)
        slope = gate * (1.0 - gate)
        return z * gate, gate + z * slope, slope * (2.0 + z * (1.0 - 2.0 * gate))
    elif KIND == "gelu" or KIND == "gelu_fp32":
        cdf, density = normal_cdf(z, KIND)
        density *= 0.3989422804014327
        return z * cdf, cdf + z * density, density * (2.0 - z * z)
    else:
        square = z * z
        gate = sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * square))
        bend = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = gate * (1.0 - gate)
        turn = 0.4281288976356015 * z  # bend'
        return (
            z * gate,
            gate + z * slope * bend,
            slope * (2.0 * bend + z * (1.0 - 2.0 * gate) * bend * bend + z * turn),
        )


@triton.jit
def normalize(z, D: tl.constexpr):
    """Rows with mean 0 and variance 1, and the reciprocal deviation before."""
    centred = z - (tl.sum(z, 1) / D)[:, None]
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + NORM_EPS)
    return centred * rstd[:, None], rstd


@triton.jit
def normalize_backward(grad, normed, rstd, D: tl.constexpr):
    """J grad, J = rstd (I - 1/D - normed normed^T / D): the Jacobian of `normalize`, symmetric."""
    mean = (tl.sum(grad, 1) / D)[:, None]
    along = (tl.sum(grad * normed, 1) / D)[:, None]
    return rstd[:, None] * (grad - mean - normed * along)


@triton.jit
def share_part(tile_CD, buffer, arrived, part, turn, PARTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Hands a program's part of a sum to the PARTS programs of its head: `sum_of_parts` collects them.

    buffer `[2, PARTS, C, D]` fp32 and arrived (zero before the first turn) are the head's own. Two halves
    suffice: who writes turn n + 2 has seen all parts of n + 1, so all have read n.
    """
    if PARTS > 1:
        at_CD = tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(buffer + (turn % 2) * PARTS * C * D + part * C * D + at_CD, tile_CD)
        tl.debug_barrier()  # the release below is one thread's; it covers what the others stored before this
        tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def sum_of_parts(tile_CD, buffer, arrived, turn, PARTS: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """The sum over the programs of a head of what they shared this turn, the same bits in each: always added
    in the same order. What stands between the two hides the wait. The programs must run at the same time, see
    `place_of`."""
    if PARTS == 1:
        return tile_CD
    else:
        while tl.atomic_add(arrived, 0, sem="acquire") < PARTS * (turn + 1):
            pass
        tl.debug_barrier()
        at_CD = tl.arange(0, C)[:, None] * D + tl.arange(0, D)[None, :]
        buffer += (turn % 2) * PARTS * C * D
        total_CD = tl.load(buffer + at_CD, cache_modifier=".cg")  # not from this core's own cache
        for other in tl.static_range(1, PARTS):
            total_CD += tl.load(buffer + other * C * D + at_CD, cache_modifier=".cg")
        return total_CD


@triton.jit
def place_of(started, PARTS: tl.constexpr):
    """Which program this is: by the order in which they start where they wait for each other.

    All programs of a head have then started before any of the next one, so whoever waits waits for programs
    that run. started: zero before the launch.
    """
    if PARTS == 1:
        return tl.program_id(0)
    else:
        return tl.atomic_add(started, 1)
