"""The states of all rows on their way into the serial kernels and out: copies, layouts, which anchor counts.

One launch a layer where PyTorch would take twenty, which cost the linear memory more time than its products.
Layers after the first are held transposed, `[D, F]` like the first (`user` is the op's layout).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans.ops.kernels.dispatch import run_kernel
from titans.ops.kernels.functions import SIZES, row_of
from titans.ops.kernels.launch import Launch

Tensors = list[Tensor]

COPY = Launch(warps=4)
STRIDES = ["weights_row", "weights_head", "momentum_row", "momentum_head", "anchor_row", "anchor_head"]
BLOCK = 4096  # numbers of a tile


@triton.jit
def marks_of(table, row, num_rows, C: tl.constexpr):
    """Of a row: starts at a chunk's start, has no tokens, ends at a chunk's end, lies in one chunk."""
    begin, end, first, _, count = row_of(table, row, num_rows)
    position = begin - first
    empty = begin == end
    closes = (begin != end) & ((position + end - begin) % C == 0)
    return position == 0, empty, closes, count <= 1


@triton.jit
def offsets(
    row, head, H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, FLIP: tl.constexpr, BF: tl.constexpr
):
    """Of the program's tile `[D, BF]`: in the kernels' layout, and in the user's matrix. A tile, not a run of
    numbers: then reads and writes both go along their own matrix' rows."""
    of_D = tl.arange(0, D)[:, None]
    columns = (tl.program_id(1) * BF + tl.arange(0, BF))[None, :]
    ours = (row.to(tl.int64) * H + head) * D * F + of_D * F + columns
    return ours, columns * D + of_D if FLIP else of_D * F + columns


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def states_in(
    weights, momentum, anchor, W, S, first, end, table,
    num_rows, weights_row, weights_head, momentum_row, momentum_head, anchor_row, anchor_head,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, FLIP: tl.constexpr,
    MOMENTUM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Copies to be overwritten, the first chunk's anchor, and that of a last chunk which is the first."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    fresh, empty, _, _ = marks_of(table, row, num_rows, C)
    ours, user = offsets(row, head, H, D, F, FLIP, BF)
    of_weights = row.to(tl.int64) * weights_row + head * weights_head
    value = tl.load(weights + of_weights + user)
    old = tl.load(anchor + row.to(tl.int64) * anchor_row + head * anchor_head + user)
    start = tl.where(fresh, value, old)
    tl.store(W + ours, value)
    tl.store(first + ours, start)
    tl.store(end + ours, tl.where(empty, old, start))
    if MOMENTUM:
        of_momentum = row.to(tl.int64) * momentum_row + head * momentum_head
        tl.store(S + ours, tl.load(momentum + of_momentum + user))


@triton.jit(do_not_specialize=SIZES)
def states_out(
    W, S, end, weights, momentum, anchor, table, num_rows,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, FLIP: tl.constexpr,
    MOMENTUM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The anchor after the last token, and all of them in the user's layout where it differs (FLIP)."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    _, _, closes, _ = marks_of(table, row, num_rows, C)
    ours, user = offsets(row, head, H, D, F, FLIP, BF)
    user += (row.to(tl.int64) * H + head) * D * F
    value = tl.load(W + ours)
    tl.store(anchor + user, tl.where(closes, value, tl.load(end + ours)))
    if FLIP:
        tl.store(weights + user, value)
        if MOMENTUM:
            tl.store(momentum + user, tl.load(S + ours))


@triton.jit(do_not_specialize=SIZES)
def gradients_in(
    weights, momentum, anchor, dW, dS, d_first, d_end, table, num_rows,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, FLIP: tl.constexpr,
    MOMENTUM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """From the gradients of the returned state. The returned anchor is the weights where a chunk closes, and
    elsewhere the state at the last chunk's start (d_end)."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    _, _, closes, _ = marks_of(table, row, num_rows, C)
    ours, user = offsets(row, head, H, D, F, FLIP, BF)
    user += (row.to(tl.int64) * H + head) * D * F
    of_anchor = tl.load(anchor + user)
    at_end = tl.where(closes, of_anchor, 0.0)
    tl.store(dW + ours, tl.load(weights + user) + at_end)
    tl.store(d_end + ours, of_anchor - at_end)
    tl.store(d_first + ours, tl.zeros_like(at_end))
    if MOMENTUM:
        tl.store(dS + ours, tl.load(momentum + user))


@triton.jit(do_not_specialize=SIZES)
def gradients_out(
    dW, dS, d_first, d_end, grad_anchor, weights, momentum, anchor, table, num_rows,
    H: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, FLIP: tl.constexpr,
    MOMENTUM: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Gradients of the given state: the first chunk's anchor is a fresh row's weights, else the anchor."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    fresh, empty, _, one_chunk = marks_of(table, row, num_rows, C)
    ours, user = offsets(row, head, H, D, F, FLIP, BF)
    user += (row.to(tl.int64) * H + head) * D * F
    of_first = tl.load(d_first + ours)
    of_first += tl.where(one_chunk, tl.load(d_end + ours), 0.0)
    of_weights = tl.load(dW + ours)
    of_weights += tl.where(fresh & (not empty), of_first, 0.0)
    of_anchor = tl.where(fresh, 0.0, of_first)
    of_anchor = tl.where(empty, tl.load(grad_anchor + user), of_anchor)
    tl.store(weights + user, of_weights)
    tl.store(anchor + user, of_anchor)
    if MOMENTUM:
        tl.store(momentum + user, tl.load(dS + ours))


class States:
    """Runs these kernels for every layer; the user's tensors are `[rows, H, D_in, D_out]`."""

    def __init__(self, table: Tensor, chunk_size: int, momentum: bool) -> None:
        self.table, self.chunk_size, self.momentum = table, chunk_size, momentum

    def enter(self, weights: Tensors, momentum: Tensors, anchor: Tensors) -> list[Tensors]:
        """Weights, momentum, first anchor and last anchor as the kernels hold them, all of them new."""
        groups: list[Tensors] = [[], [], [], []]
        for layer, given in enumerate(weights):
            new = self._new(given, layer, 4 if self.momentum else 3)
            W, first, end, S = (*new, new[0])[:4]
            matrices = [_inner_contiguous(given)]
            matrices += [_inner_contiguous(momentum[layer])] if self.momentum else matrices
            matrices += [_inner_contiguous(anchor[layer])]
            strides = [stride for matrix in matrices for stride in matrix.stride()[:2]]
            self._run(
                states_in, layer, given, *matrices, W, S, first, end, self.table, given.shape[0], *strides
            )
            for group, tensor in zip(groups, (W, S, first, end), strict=True):
                group.append(tensor)
        return [groups[0], groups[1] if self.momentum else [], groups[2], groups[3]]

    def leave(self, W: Tensors, S: Tensors, end: Tensors) -> list[Tensors]:
        """Weights, momentum and anchor after the last token, as the op returns them."""
        results: list[Tensors] = [[], [], []]
        for layer, weights in enumerate(W):
            momentum = S[layer] if self.momentum else weights
            shape = _transposed(weights.shape, layer)
            new = [weights.new_empty(shape) for _ in range(1 if layer == 0 else 3)]
            *user, anchor = new if layer > 0 else (weights, momentum, *new)
            self._run(
                *(states_out, layer, anchor, weights, momentum, end[layer]),
                *(*user, anchor, self.table, anchor.shape[0]),
            )
            for result, tensor in zip(results, (*user, anchor), strict=True):
                result.append(tensor)
        return [results[0], results[1] if self.momentum else [], results[2]]

    def gradients_enter(self, weights: Tensors, momentum: Tensors, anchor: Tensors) -> list[Tensors]:
        """From those of the returned state: of W, S, first anchor (zero) and last anchor."""
        groups: list[Tensors] = [[], [], [], []]
        for layer, given in enumerate(weights):
            new = self._new(given, layer, 4 if self.momentum else 3)
            W, first, end, S = (*new, new[0])[:4]
            matrices = [given, momentum[layer] if self.momentum else given, anchor[layer]]
            matrices = [matrix.contiguous() for matrix in matrices]
            self._run(gradients_in, layer, given, *matrices, W, S, first, end, self.table, given.shape[0])
            for group, tensor in zip(groups, (W, S, first, end), strict=True):
                group.append(tensor)
        return [groups[0], groups[1] if self.momentum else [], groups[2], groups[3]]

    def gradients_leave(
        self, dW: Tensors, dS: Tensors, d_first: Tensors, d_end: Tensors, grad_anchor: Tensors
    ) -> list[Tensors]:
        """Gradients of the given weights, momentum and anchor."""
        results: list[Tensors] = [[], [], []]
        for layer, given in enumerate(grad_anchor):
            user = [given.new_empty(given.shape) for _ in range(3 if self.momentum else 2)]
            weights, anchor, momentum = (*user, user[0])[:3]
            of_S = dS[layer] if self.momentum else dW[layer]
            self._run(
                *(gradients_out, layer, given, dW[layer], of_S, d_first[layer], d_end[layer]),
                *(given.contiguous(), weights, momentum, anchor, self.table, given.shape[0]),
            )
            for result, tensor in zip(results, (weights, momentum, anchor), strict=True):
                result.append(tensor)
        return [results[0], results[1] if self.momentum else [], results[2]]

    def _new(self, given: Tensor, layer: int, count: int) -> list[Tensor]:
        shape = _transposed(given.shape, layer)
        return [given.new_empty(shape, dtype=torch.float32) for _ in range(count)]

    def _run(self, kernel: object, layer: int, like: Tensor, *arguments: object) -> None:
        rows, H, D, F = _transposed(like.shape, layer)
        columns = min(F, BLOCK // D)
        grid = (rows * H, F // columns)
        sizes = (H, D, F, self.chunk_size, layer > 0, self.momentum, columns)
        run_kernel(kernel, grid, COPY.options, *arguments, *sizes)


def _transposed(shape: torch.Size, layer: int) -> tuple[int, ...]:
    """From the kernels' layout to the user's, or back: the shapes of the first layer are the same."""
    rows, heads, rest, last = shape
    return (rows, heads, rest, last) if layer == 0 else (rows, heads, last, rest)


def _inner_contiguous(tensor: Tensor) -> Tensor:
    """Rows and heads may be far apart, or the same one (an expanded initial memory)."""
    return tensor if tensor.stride()[2:] == (tensor.shape[3], 1) else tensor.contiguous()
