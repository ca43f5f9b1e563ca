"""An implementation's forward and backward as two registered operators and one autograd function.

The operators are opaque to `torch.compile` (their fakes know the shapes), so a compiled model keeps one
graph; the autograd function around them is traced. Lists are flat because both sides want plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from titans.ops.chunked.group import ChunkedInputs
from titans.ops.chunked.passes import ChunkedGradients, ChunkedResult
from titans.ops.spec import MemorySpec, MemoryState

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor theta, Tensor[] log_decay, Tensor? log_momentum, "
    "Tensor[] weights, Tensor[] momentum, Tensor[] anchor, Tensor position, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? cu_seqlens, "
    "int depth, int expansion, str activation, bool residual, bool norm, int chunk_size, bool channelwise"
)


Arguments = Sequence[Any]

_spec = lru_cache(maxsize=32)(MemorySpec)  # forward and backward ask for the same few


def _inputs(arguments: Arguments) -> ChunkedInputs:
    tensors: list[Any]
    *tensors, depth, expansion, activation, residual, norm, chunk_size, channelwise = arguments
    spec = _spec(int(tensors[0].shape[-1]), depth, expansion, activation, residual, norm)
    return ChunkedInputs(*[*tensors, spec, chunk_size, channelwise])


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


class Operator:
    """`titans::<name>_forward` and `titans::<name>_backward`, opaque to torch.compile.

    `forward(inputs, keep) -> ChunkedResult`; `backward(inputs, kept, grad_output, grad_weights,
    grad_momentum, grad_anchor) -> ChunkedGradients`; `kept_like(inputs)`: empty tensors of the shapes of what
    the forward keeps for the backward, from shapes alone.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[[ChunkedInputs, bool], ChunkedResult],
        backward: Callable[..., ChunkedGradients],
        kept_like: Callable[[ChunkedInputs], list[Tensor]],
    ) -> None:
        self.forward_pass, self.backward_pass, self.kept_like = forward, backward, kept_like
        self.forward = torch.library.custom_op(
            f"titans::{name}_forward",
            self._run_forward,
            mutates_args=(),
            schema=f"({_ARGUMENTS}, bool keep) -> Tensor[]",
        )
        self.forward.register_fake(self._fake_forward)
        self.backward = torch.library.custom_op(
            f"titans::{name}_backward",
            self._run_backward,
            mutates_args=(),
            schema=f"({_ARGUMENTS}, Tensor[] kept, Tensor grad_output, Tensor[] grad_states) -> Tensor[]",
        )
        self.backward.register_fake(_fake_backward)

    def _run_forward(self, *arguments: Any) -> list[Tensor]:
        """output, L weights, L or no momentum, L anchor, then the kept states of weights and of momentum."""
        x = _inputs(arguments[:-1])
        with torch.cuda.device_of(x.q):  # kernels start on the current device
            result = self.forward_pass(x, arguments[-1])
        states = [*result.weights, *result.momentum, *result.anchor]
        return [result.output, *states, *result.kept]

    def _fake_forward(self, *arguments: Any) -> list[Tensor]:
        x, keep = _inputs(arguments[:-1]), arguments[-1]
        kept = self.kept_like(x) if keep else []
        return [x.v.new_empty(x.v.shape), *_like([*x.weights, *x.momentum, *x.anchor]), *kept]

    def _run_backward(self, *arguments: Any) -> list[Tensor]:
        """Gradients of q, k, v, theta, log_decay.., log_momentum, weights.., momentum.., anchor..,
        norm_weight, norm_bias, in this order; the optional ones only where they were given."""
        kept, grad_output, grad_states = arguments[-3:]
        x = _inputs(arguments[:-3])
        weights, momentum, anchor = _split(grad_states, (len(x.weights), len(x.momentum), len(x.anchor)))
        with torch.cuda.device_of(x.q):
            grads = self.backward_pass(x, kept, grad_output, weights, momentum, anchor)
        found = [
            *(grads.q, grads.k, grads.v, grads.theta, *grads.log_decay, grads.log_momentum),
            *(*grads.weights, *grads.momentum, *grads.anchor, grads.norm_weight, grads.norm_bias),
        ]
        return [grad for grad in found if grad is not None]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    x = _inputs(arguments[:-3])
    given = [
        *(x.q, x.k, x.v, x.theta, *x.log_decay, x.log_momentum),
        *(*x.weights, *x.momentum, *x.anchor, x.norm_weight, x.norm_bias),
    ]
    return _like([tensor for tensor in given if tensor is not None])


def call(name: str, direction: str, *arguments: Any) -> list[Tensor]:
    """The registered operator `titans::<name>_<direction>`."""
    return getattr(torch.ops.titans, f"{name}_{direction}")(*arguments)


class _Function(torch.autograd.Function):
    """`lists` is log_decay.., weights.., momentum.., anchor..; `lengths` says how many of each."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        settings: tuple[Any, ...],
        lengths: tuple[int, ...],
        keep: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        theta: Tensor,
        log_momentum: Tensor | None,
        position: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        cu_seqlens: Tensor | None,
        *lists: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors = (q, k, v, theta, log_momentum, position, norm_weight, norm_bias, cu_seqlens)
        results = call(name, "forward", *_in_order(tensors, lists, lengths), *settings, keep)
        states = 1 + sum(lengths[1:])
        ctx.save_for_backward(*tensors, *lists, *results[states:])
        ctx.name, ctx.settings, ctx.lengths = name, settings, lengths
        return tuple(results[:states])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *grad_states: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes at the first look
        tensors, rest = saved[:9], saved[9:]
        lists, kept = rest[: sum(ctx.lengths)], rest[sum(ctx.lengths) :]
        arguments = _in_order(tensors, lists, ctx.lengths)
        grads = call(
            *(ctx.name, "backward", *arguments, *ctx.settings),
            *(list(kept), grad_output, list(grad_states)),
        )
        *_, log_momentum, _, norm_weight, norm_bias, _ = tensors
        # By slices: to the compiler of torch 2.11 an operator's list is a tuple, which has no pop.
        optional = [log_momentum, norm_weight, norm_bias]
        given = [int(tensor is not None) for tensor in optional]
        lengths = (4, ctx.lengths[0], given[0], sum(ctx.lengths[1:]), given[1], given[2])
        of_tokens, of_decay, of_momentum, of_states, of_weight, of_bias = _split(grads, lengths)
        return (
            *(None, None, None, None, *of_tokens, _only(of_momentum)),
            *(None, _only(of_weight), _only(of_bias), None, *of_decay, *of_states),
        )


def _only(tensors: list[Tensor]) -> Tensor | None:
    return tensors[0] if tensors else None


def _in_order(
    tensors: Sequence[Tensor | None], lists: Sequence[Tensor], lengths: tuple[int, ...]
) -> tuple[Any, ...]:
    """The operators' tensor arguments, from what the autograd function takes."""
    q, k, v, theta, log_momentum, *others = tensors
    log_decay, weights, momentum, anchor = _split(lists, lengths)
    return (q, k, v, theta, log_decay, log_momentum, weights, momentum, anchor, *others)


def _split(lists: Any, lengths: tuple[int, ...]) -> list[list[Tensor]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(list(lists[start : start + length]))
        start += length
    return parts


def run_operator(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    log_decay: Tensor | tuple[Tensor, ...],
    log_momentum: Tensor | None,
    state: MemoryState,
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """`neural_memory` through the operator of that name, with gradients."""

    def with_layers(gate: Tensor) -> Tensor:
        return gate.unsqueeze(-1) if gate.dim() == 3 else gate

    decays = list(log_decay) if isinstance(log_decay, tuple) else [with_layers(log_decay)]
    momentum = list(state.momentum) if log_momentum is not None else []
    theta = with_layers(theta)
    log_momentum = None if log_momentum is None else with_layers(log_momentum)
    # At a chunk's start the anchor may be the weights themselves; torch.compile wants different tensors.
    anchor = [
        old.view_as(old) if old is weight else old
        for old, weight in zip(state.anchor, state.weights, strict=True)
    ]
    lists = [*decays, *state.weights, *momentum, *anchor]
    tensors = [q, k, v, theta, *lists, log_momentum, norm_weight, norm_bias]
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    channelwise = isinstance(log_decay, tuple)
    settings = (
        spec.depth,
        spec.expansion,
        spec.activation,
        spec.residual,
        spec.norm,
        chunk_size,
        channelwise,
    )
    lengths = (len(decays), spec.depth, len(momentum), spec.depth)
    output, *states = _Function.apply(
        *(name, settings, lengths, keep, q, k, v, theta, log_momentum, state.position),
        *(norm_weight, norm_bias, cu_seqlens, *lists),
    )
    weights, new_momentum, new_anchor = _split(states, lengths[1:])
    tokens = q.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    position = ((state.position + tokens) % chunk_size).to(torch.int32)
    kept_momentum = tuple(new_momentum) if momentum else state.momentum
    return output, MemoryState(tuple(weights), kept_momentum, tuple(new_anchor), position)
