"""One memory layer over chunks: reading it with every token's own weights, and carrying it to the next chunk.

Every update is a rank-one product X_i^T G_i, so the weights of token t never exist (gates.py names the rest):

    read    Y = beta (Q W) + c (Q S) - (A o Q X^T) G          W, S: weights and momentum at the chunk's start
    carry   W' = beta_C W + c_C S - X^T (w G)                 beta, c: start_weights, start_momentum
            S' = h_C S - X^T (w_S G)                          A: mix; w, w_S: write_weights, write_momentum

Shapes: Q, X `[N, C, I]`, G, Y `[N, C, O]`, W, S `[N, I, O]`; N = cells x heads. Scalings by a gate go to the
narrower of the two sides (a layer D -> 4 D is scaled at its input), except for a decay per output channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.gates import GateGradients, GateMatrices


def scales_inputs(gates: GateMatrices, weights: Tensor) -> bool:
    return not gates.channelwise and weights.shape[-2] <= weights.shape[-1]


@dataclass
class LayerRead:
    """queries: Q; scores: Q X^T; mixed: -(A o scores), `[N, C, C]` or `[N, O, C, C]`; output: Y."""

    queries: Tensor
    scores: Tensor
    mixed: Tensor
    output: Tensor


def read_layer(
    queries: Tensor,
    inputs: Tensor,
    grads: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    gates: GateMatrices,
) -> LayerRead:
    scores = torch.bmm(queries, inputs.mT)
    if scales_inputs(gates, weights):
        output = torch.bmm(gates.start_weights * queries, weights)
        if momentum is not None and gates.start_momentum is not None:
            output.baddbmm_(gates.start_momentum * queries, momentum)
    else:
        output = torch.bmm(queries, weights).mul_(gates.start_weights)
        if momentum is not None and gates.start_momentum is not None:
            output.addcmul_(torch.bmm(queries, momentum), gates.start_momentum)
    if gates.channelwise:
        mixed = (gates.mix * scores.unsqueeze(1)).neg_()
        output += (mixed @ grads.mT.unsqueeze(-1)).squeeze(-1).mT
    else:
        mixed = (gates.mix * scores).neg_()
        output.baddbmm_(mixed, grads)
    return LayerRead(queries, scores, mixed, output)


@dataclass
class ReadGradients:
    """Gradients that leave one layer's read. Those of W and S are left as factors, `left^T right`, because
    the carry adds them chunk by chunk."""

    queries: Tensor
    inputs: Tensor
    grads: Tensor
    weights_factors: tuple[Tensor, Tensor]
    momentum_factors: tuple[Tensor, Tensor] | None


def _mix_backward(
    grad: Tensor, read: LayerRead, grads: Tensor, gates: GateMatrices, into: GateGradients
) -> tuple[Tensor, Tensor]:
    """Gradients of Q X^T and of G from -(A o Q X^T) G; that of A is added to `into`."""
    if not gates.channelwise:
        grad_mixed = torch.bmm(grad, grads.mT)
        into.mix.addcmul_(grad_mixed, read.scores, value=-1)
        return grad_mixed.mul_(gates.mix).neg_(), torch.bmm(read.mixed.mT, grad)
    grad_mixed = grad.mT.unsqueeze(-1) * grads.mT.unsqueeze(-2)  # [N, O, C, C]
    into.mix.addcmul_(grad_mixed, read.scores.unsqueeze(1), value=-1)
    grad_grads = (read.mixed.mT @ grad.mT.unsqueeze(-1)).squeeze(-1).mT.contiguous()
    return (grad_mixed * gates.mix).sum(1).neg_(), grad_grads


def read_layer_backward(
    grad: Tensor,
    read: LayerRead,
    inputs: Tensor,
    grads: Tensor,
    weights: Tensor,
    momentum: Tensor | None,
    gates: GateMatrices,
    into: GateGradients,
) -> ReadGradients:
    """Back through `read_layer`, given the gradient of Y; gate gradients are added to `into`."""
    queries = read.queries
    grad_scores, grad_grads = _mix_backward(grad, read, grads, gates, into)
    grad_queries = torch.bmm(grad_scores, inputs)
    grad_inputs = torch.bmm(grad_scores.mT, queries)

    def through(state: Tensor, gate: Tensor, grad_gate: Tensor) -> tuple[Tensor, Tensor]:
        """gate (Q state): adds to the gradients of Q and of the gate, returns the factors of the state's."""
        if scales_inputs(gates, weights):
            back = torch.bmm(grad, state.mT)
            grad_queries.addcmul_(back, gate)
            grad_gate += (queries * back).sum(-1, keepdim=True)
            return gate * queries, grad
        scaled = gate * grad
        grad_queries.baddbmm_(scaled, state.mT)
        grad_gate += (grad * torch.bmm(queries, state)).sum_to_size(grad_gate.shape)
        return queries, scaled

    weights_factors = through(weights, gates.start_weights, into.start_weights)
    momentum_factors = None
    if momentum is not None and gates.start_momentum is not None:
        momentum_factors = through(momentum, gates.start_momentum, into.start_momentum)
    return ReadGradients(grad_queries, grad_inputs, grad_grads, weights_factors, momentum_factors)


@dataclass
class Carry:
    """The gates of one chunk (or a group) and layer, in the form the carry uses.

    keep: beta_C, feed: c_C, hold: h_C, `[N, 1, J]` (J = 1 or D_out). write, write_momentum: `[N, C, J]`.
    With `at_input` the write gates multiply X, else G.
    """

    at_input: bool
    keep: Tensor
    write: Tensor
    feed: Tensor | None
    hold: Tensor | None
    write_momentum: Tensor | None

    @classmethod
    def of(cls, gates: GateMatrices, weights: Tensor) -> Carry:
        feed = None if gates.start_momentum is None else gates.start_momentum[:, -1:]
        return cls(
            scales_inputs(gates, weights),
            gates.start_weights[:, -1:],
            gates.write_weights,
            feed,
            gates.keep_momentum,
            gates.write_momentum,
        )

    def split(self, sizes: list[int]) -> list[Carry]:
        def cut(tensor: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * len(sizes) if tensor is None else tensor.split(sizes)

        parts = zip(
            cut(self.keep),
            cut(self.write),
            cut(self.feed),
            cut(self.hold),
            cut(self.write_momentum),
            strict=True,
        )
        return [Carry(self.at_input, *fields) for fields in parts]  # type: ignore[arg-type]

    def add_writes(self, state: Tensor, inputs: Tensor, grads: Tensor, gate: Tensor) -> None:
        """state -= X^T (gate G)."""
        if self.at_input:
            state.baddbmm_((gate * inputs).mT, grads, alpha=-1)
        else:
            state.baddbmm_(inputs.mT, gate * grads, alpha=-1)

    def forward(
        self, inputs: Tensor, grads: Tensor, weights: Tensor, momentum: Tensor | None, out: list[Tensor]
    ) -> None:
        """Weights (and momentum) at the chunk's end, written into `out`."""
        torch.mul(weights, self.keep, out=out[0])
        self.add_writes(out[0], inputs, grads, self.write)
        if momentum is not None and self.feed is not None and self.hold is not None:
            assert self.write_momentum is not None
            out[0].addcmul_(momentum, self.feed)
            torch.mul(momentum, self.hold, out=out[1])
            self.add_writes(out[1], inputs, grads, self.write_momentum)

    def _writes_backward(
        self,
        grad: Tensor,
        inputs: Tensor,
        grads: Tensor,
        gate: Tensor,
        grad_inputs: Tensor,
        grad_grads: Tensor,
    ) -> Tensor:
        """Back through `add_writes`. Returns X's or G's partner: its product with that side, summed and
        negated, is the gradient of the gate."""
        if self.at_input:
            back = torch.bmm(grads, grad.mT)
            grad_inputs.addcmul_(back, gate, value=-1)
            grad_grads.baddbmm_(gate * inputs, grad, alpha=-1)
        else:
            back = torch.bmm(inputs, grad)
            grad_grads.addcmul_(back, gate, value=-1)
            grad_inputs.baddbmm_(gate * grads, grad.mT, alpha=-1)
        return back

    def backward(
        self,
        grad_weights: Tensor,
        grad_momentum: Tensor | None,
        inputs: Tensor,
        grads: Tensor,
        weights: Tensor,
        momentum: Tensor | None,
        grad_inputs: Tensor,
        grad_grads: Tensor,
        tape: CarryTape,
    ) -> tuple[Tensor, Tensor | None]:
        """Back through `forward`: returns the gradients at the chunk's start; those of X and G are added to
        in place, those of the gates go to `tape`."""
        partner = self._writes_backward(grad_weights, inputs, grads, self.write, grad_inputs, grad_grads)
        tape.write.append(partner)
        tape.keep.append(_inner(grad_weights, weights, self.keep))
        start = grad_weights * self.keep
        if momentum is None or grad_momentum is None or self.hold is None:
            return start, None
        assert self.feed is not None
        assert self.write_momentum is not None
        partner = self._writes_backward(
            grad_momentum, inputs, grads, self.write_momentum, grad_inputs, grad_grads
        )
        tape.write_momentum.append(partner)
        tape.feed.append(_inner(grad_weights, momentum, self.feed))
        tape.hold.append(_inner(grad_momentum, momentum, self.hold))
        return start, (grad_momentum * self.hold).addcmul_(grad_weights, self.feed)


def _inner(a: Tensor, b: Tensor, gate: Tensor) -> Tensor:
    """<a, b> over what one entry of the gate multiplies: `[N, 1]`, or `[N, O]` for a gate per channel."""
    if gate.shape[-1] > 1:
        return (a * b).sum(1)
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).squeeze(-1)


class CarryTape:
    """What the carries of a group leave for the gradients of their gates, last chunk first."""

    def __init__(self) -> None:
        self.write: list[Tensor] = []
        self.keep: list[Tensor] = []
        self.write_momentum: list[Tensor] = []
        self.feed: list[Tensor] = []
        self.hold: list[Tensor] = []

    def add_to(self, into: GateGradients, carry: Carry, inputs: Tensor, grads: Tensor) -> None:
        """Add the gradients of the gates of the whole group to `into`."""
        side = inputs if carry.at_input else grads

        def write_gradient(partners: list[Tensor], gate: Tensor) -> Tensor:
            product = torch.cat(partners[::-1]).mul_(side).neg_()
            return product if gate.shape[-1] > 1 else product.sum(-1, keepdim=True)

        into.add_write_weights(write_gradient(self.write, carry.write))
        into.start_weights[:, -1] += torch.cat(self.keep[::-1])
        if self.feed:
            assert carry.write_momentum is not None
            into.write_momentum += write_gradient(self.write_momentum, carry.write_momentum)[..., 0]
            into.start_momentum[:, -1] += torch.cat(self.feed[::-1])
            into.keep_momentum += torch.cat(self.hold[::-1])[:, 0]
