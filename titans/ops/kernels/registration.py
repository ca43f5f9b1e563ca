"""Registers the kernels as `titans::triton_forward` and `titans::triton_backward`."""

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.kernels.passes import backward_pass, forward_pass, groups_of
from titans.ops.operator import Operator


def _kept_like(x: ChunkedInputs) -> list[Tensor]:
    """The plan's table, and states at every group's start after the first in the kernels' layout."""
    table = x.position.new_empty((5, x.position.shape[0]), dtype=torch.int64)
    states = [tensor if layer == 0 else tensor.mT for layer, tensor in enumerate(x.weights)]
    states += [tensor if layer == 0 else tensor.mT for layer, tensor in enumerate(x.momentum)]
    return [table, *(state.new_empty((len(groups_of(x)) - 1, *state.shape)) for state in states)]


OPERATOR = Operator("triton", forward_pass, backward_pass, _kept_like)
