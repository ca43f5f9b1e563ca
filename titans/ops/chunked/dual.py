"""One memory layer over chunks: reading it with every token's own weights, and carrying it to the next chunk.

Every update is the rank-one product X_i^T U_i with U_i = theta_i G_i, so the weights of token t never exist:

    read    Y = beta (Q W) + c (Q S) - (A o Q X^T) U          W, S: weights and momentum at the chunk's start
    carry   W' = beta_C W + c_C S - X^T (w U)                 beta, c: columns 0 of B and A; w: last row of A
            S' = h_C S - X^T (w_S U)                          h_C, w_S: last row of H

Shapes: Q, X `[N, C, I]`, U, Y `[N, C, O]`, W, S `[N, I, O]`; N = cells x heads. Scalings by a gate go to the
narrower of the two sides (a layer D -> 4 D is scaled at its input), except for a decay per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.gates import GateGradients, GateMatrices


def scale_inputs(gates: GateMatrices, weights: Tensor) -> bool:
    return not gates.channelwise and weights.shape[-2] <= weights.shape[-1]


def mix(gates: GateMatrices, scores: Tensor, updates: Tensor) -> Tensor:
    """(A o P) U, P = `scores` `[N, C, C]`."""
    weights = gates.mix[..., 1:]
    if not gates.channelwise:
        return torch.bmm(weights * scores, updates)
    return ((weights * scores.unsqueeze(1)) @ updates.mT.unsqueeze(-1)).squeeze(-1).mT


def mix_backward(
    gates: GateMatrices, into: GateGradients, scores: Tensor, updates: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of P and U; that of A is added to `into`."""
    weights = gates.mix[..., 1:]
    if not gates.channelwise:
        grad_mixed = torch.bmm(grad, updates.mT)
        into.mix[..., 1:].addcmul_(grad_mixed, scores)
        return grad_mixed.mul_(weights), torch.bmm((weights * scores).mT, grad)
    grad_mixed = grad.mT.unsqueeze(-1) * updates.mT.unsqueeze(-2)  # [N, O, C, C]
    into.mix[..., 1:].addcmul_(grad_mixed, scores.unsqueeze(1))
    grad_updates = (weights * scores.unsqueeze(1)).mT @ grad.mT.unsqueeze(-1)
    return (grad_mixed * weights).sum(1), grad_updates.squeeze(-1).mT


@dataclass
class LayerRead:
    """Inputs and result of one layer's read; scores = Q X^T."""

    queries: Tensor
    scores: Tensor
    output: Tensor


def read_layer(
    queries: Tensor, inputs: Tensor, updates: Tensor, weights: Tensor, momentum: Tensor | None, gates: GateMatrices
) -> LayerRead:
    scores = torch.bmm(queries, inputs.mT)
    if scale_inputs(gates, weights):
        output = torch.bmm(gates.start_weights * queries, weights)
        if momentum is not None:
            output.baddbmm_(gates.start_momentum * queries, momentum)
    else:
        output = torch.bmm(queries, weights).mul_(gates.start_weights)
        if momentum is not None:
            output.addcmul_(torch.bmm(queries, momentum), gates.start_momentum)
    return LayerRead(queries, scores, output.sub_(mix(gates, scores, updates)))


@dataclass
class ReadGradients:
    """Gradients that leave one layer's read. Those of W and S are left as factors, `outer = left^T right`,
    because the carry needs them chunk by chunk."""

    queries: Tensor
    inputs: Tensor
    updates: Tensor
    weights_factors: tuple[Tensor, Tensor]
    momentum_factors: tuple[Tensor, Tensor] | None


def read_layer_backward(
    grad: Tensor,
    read: LayerRead,
    inputs: Tensor,
    updates: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    gates: GateMatrices,
    into: GateGradients,
) -> ReadGradients:
    """Back through `read_layer`; gate gradients are added to `into`."""
    queries = read.queries
    grad_scores, grad_updates = mix_backward(gates, into, read.scores, updates, grad.neg())
    grad_queries = torch.bmm(grad_scores, inputs)
    at_input = scale_inputs(gates, weights)

    def through(state: Tensor, gate: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """gate (Q state): gradient of the gate, and the factors of the state's gradient."""
        nonlocal grad_queries
        if at_input:
            back = torch.bmm(grad, state.mT)
            grad_queries.addcmul_(back, gate)
            return (queries * back).sum(-1, keepdim=True), (gate * queries, grad)
        scaled = gate * grad
        grad_queries.baddbmm_(scaled, state.mT)
        grad_gate = grad * torch.bmm(queries, state)
        return (grad_gate if gates.channelwise else grad_gate.sum(-1, keepdim=True)), (queries, scaled)

    grad_gate, weights_factors = through(weights, gates.start_weights)
    into.decay_start += grad_gate.mT if gates.channelwise else grad_gate[..., 0]
    momentum_factors = None
    if momentum is not None:
        grad_gate, momentum_factors = through(momentum, gates.start_momentum)
        into.mix[..., 0] += grad_gate.mT if gates.channelwise else grad_gate[..., 0]
    grad_inputs = torch.bmm(grad_scores.mT, queries)
    return ReadGradients(grad_queries, grad_inputs, grad_updates, weights_factors, momentum_factors)


def carry(
    inputs: Tensor, updates: Tensor, weights: Tensor, momentum: Tensor | None, gates: GateMatrices
) -> tuple[Tensor, Tensor | None]:
    """Weights and momentum at the chunk's end."""
    new_weights = weights * gates.start_weights[:, -1:]
    new_weights.baddbmm_(inputs.mT, gates.write_weights * updates, alpha=-1)
    if momentum is None:
        return new_weights, None
    new_weights.addcmul_(momentum, gates.start_momentum[:, -1:])
    new_momentum = momentum * gates.keep_momentum
    return new_weights, new_momentum.baddbmm_(inputs.mT, gates.write_momentum * updates, alpha=-1)


def carry_backward(
    grad_weights: Tensor,
    grad_momentum: Tensor | None,
    inputs: Tensor,
    updates: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    gates: GateMatrices,
    into: GateGradients,
    cells: slice,
    grad_inputs: Tensor,
    grad_updates: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Back through `carry`: returns the gradients at the chunk's start.

    `grad_inputs` and `grad_updates` are added to in place; gate gradients go to rows `cells` of `into`.
    """
    at_input = scale_inputs(gates, weights)

    def through(grad_state: Tensor, gate: Tensor) -> Tensor:
        """- X^T (gate U): returns the gradient of the gate, `[N, C, 1]` or `[N, C, O]`."""
        if at_input:
            back = torch.bmm(updates, grad_state.mT)
            grad_inputs.addcmul_(back, gate, value=-1)
            grad_updates.baddbmm_(gate * inputs, grad_state, alpha=-1)
            return (inputs * back).sum(-1, keepdim=True).neg_()
        back = torch.bmm(inputs, grad_state)
        grad_updates.addcmul_(back, gate, value=-1)
        grad_inputs.baddbmm_(gate * updates, grad_state.mT, alpha=-1)
        grad_gate = (updates * back).neg_()
        return grad_gate if gates.channelwise else grad_gate.sum(-1, keepdim=True)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        """<a, b> per cell, or per output channel: `[N]` or `[N, O]`."""
        if gates.channelwise:
            return (a * b).sum(1)
        return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2))[:, 0, 0]

    last_mix = into.mix[cells][..., -1, :]
    grad_gate = through(grad_weights, gates.write_weights)
    last_mix[..., 1:] += grad_gate.mT if gates.channelwise else grad_gate[..., 0]
    into.decay_start[cells][..., -1] += inner(grad_weights, weights)
    start = grad_weights * gates.start_weights[:, -1:]
    if momentum is None or grad_momentum is None:
        return start, None
    last_mix[..., 0] += inner(grad_weights, momentum)
    assert into.momentum_end is not None
    grad_gate = through(grad_momentum, gates.write_momentum)
    into.momentum_end[cells, 1:] += grad_gate.sum(-1)
    whole = (grad_momentum * momentum).sum((1, 2)) if gates.channelwise else inner(grad_momentum, momentum)
    into.momentum_end[cells, 0] += whole
    start_momentum = grad_momentum * gates.keep_momentum
    return start, start_momentum.addcmul_(grad_weights, gates.start_momentum[:, -1:])
