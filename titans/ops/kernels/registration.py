"""Registers the kernels as `titans::triton_forward` and `titans::triton_backward`."""

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.kernels.functions import ROWS
from titans.ops.kernels.passes import (
    backward_pass,
    empty_kept,
    forward_pass,
    groups_of,
    sizes_of,
)
from titans.ops.operator import Operator


def _kept_like(x: ChunkedInputs) -> list[Tensor]:
    """The plan's table, the gates as vectors, the states at the starts of segments."""
    table = x.position.new_empty((5, x.position.shape[0]), dtype=torch.int64)
    gates = [x.theta, *x.log_decay] + ([] if x.log_momentum is None else [x.log_momentum])
    shape = (max(gate.shape[-1] for gate in gates), sizes_of(x).cells, x.q.shape[2], ROWS.value, x.chunk_size)
    vectors = x.q.new_empty(shape, dtype=torch.float32)
    return [table, vectors, *empty_kept(x, groups_of(x))]


OPERATOR = Operator("triton", forward_pass, backward_pass, _kept_like)
