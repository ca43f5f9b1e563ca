"""The dual form: chunks of tokens in matrix products, no per-token copy of the weights (paper sec. 3.2)."""

from functools import partial

from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.chunked.passes import backward_pass, forward_pass, kept_cells
from titans.ops.operator import Operator, run_operator

__all__ = ["chunked"]


def _kept_like(x: ChunkedInputs) -> list[Tensor]:
    cells = kept_cells(x.q.shape[0] * x.q.shape[1], x.position.shape[0], x.chunk_size)
    return [state.new_empty((cells, *state.shape[1:])) for state in [*x.weights, *x.momentum]]


OPERATOR = Operator("chunked", forward_pass, backward_pass, _kept_like)
chunked = partial(run_operator, "chunked")
