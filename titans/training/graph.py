"""`GraphedStep`: forward and backward of a training step, recorded once for each shape of its inputs.

A small model launches some thousand kernels a step (MAC, segment by segment, a hundred thousand), most of
which take less time than their launch. A replay is one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans.nn.cuda_graph import record

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class _Recorded:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    outputs: list[Outputs]  # the last are the recording's


class GraphedStep:
    """Gradients of the first output of `step` in every parameter, and its outputs, by a CUDA graph.

    What comes back, gradients included, is overwritten by the next call, whatever its shapes: all graphs
    share one memory. `step` may depend on nothing but its inputs, the parameters, and other tensors that are
    changed where they lie.

    Raises what PyTorch raises where `step` waits for the device.
    """

    def __init__(self, step: Callable[[Inputs], Outputs], parameters: Iterable[nn.Parameter]) -> None:
        self._step = step
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        self._recorded: dict[tuple[object, ...], _Recorded] = {}

    def __call__(self, inputs: Inputs) -> Outputs:
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(inputs)
        for name, buffer in recorded.inputs.items():
            buffer.copy_(inputs[name])
        recorded.graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return recorded.outputs[-1]

    def _record(self, inputs: Inputs) -> _Recorded:
        buffers = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs: list[Outputs] = []
        another = next((each.graph.pool() for each in self._recorded.values()), None)
        graph = record(lambda: outputs.append(self._run(buffers)), another)
        return _Recorded(graph, buffers, outputs)

    def _run(self, inputs: Inputs) -> Outputs:
        outputs = self._step(dict(inputs))
        gradients = torch.autograd.grad(
            outputs[0], self._parameters, allow_unused=True, materialize_grads=True
        )
        for place, gradient in zip(self._gradients, gradients, strict=True):
            place.copy_(gradient)
        return tuple(output.detach() for output in outputs)
