"""The inner gradient of a chunk and its own gradient, both by hand.

Forward, at the anchor weights W_l (layers l = 1..L, X_0 = k, X_l = act(Z_l)):
    Z_l = X_{l-1} W_l          E = 2 (M(k) - v)          G_L = J (g E)        (J: Jacobian of LN, symmetric)
    G_l = (G_{l+1} W_{l+1}^T) act'(Z_l)                  grad_{W_l} l = X_{l-1}^T G_l

Suffixes are left out: every tensor is `[N, C, width]`, N = cells x heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.activations import slope_and_curvature, slope_times, value
from titans.ops.network import NORM_EPS
from titans.ops.spec import MemorySpec

Weights = list[Tensor]


def normalize(z: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with mean 0 and variance 1, and the reciprocal deviation."""
    centered = z - z.mean(-1, keepdim=True)
    rstd = centered.square().mean(-1, keepdim=True).add_(NORM_EPS).rsqrt_()
    return centered.mul_(rstd), rstd


def normalize_backward(grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """J grad, with J = rstd (I - 1/D - normed normed^T / D)."""
    along = (grad * normed).mean(-1, keepdim=True)
    return (grad - grad.mean(-1, keepdim=True)).sub_(normed * along).mul_(rstd)


def stack_layers(pieces: list[list[Tensor]]) -> list[Tensor]:
    """Per-layer lists of consecutive chunks -> one list of their concatenations."""
    return pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]


@dataclass
class InnerTrace:
    """What the forward leaves for the backward, for some cells.

    inputs: X_0 .. X_{L-1}; hidden: Z_1 .. Z_{L-1}; grads: G_1 .. G_L; error: E; normed, rstd: of Z_L.
    """

    inputs: list[Tensor]
    hidden: list[Tensor]
    grads: list[Tensor]
    error: Tensor
    normed: Tensor | None
    rstd: Tensor | None

    @classmethod
    def stack(cls, traces: list[InnerTrace]) -> InnerTrace:
        """The traces of consecutive chunks as one."""
        if len(traces) == 1:
            return traces[0]

        def cat(name: str) -> list[Tensor]:
            return stack_layers([getattr(trace, name) for trace in traces])

        def maybe(parts: list[Tensor | None]) -> Tensor | None:
            return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

        return cls(
            cat("inputs"),
            cat("hidden"),
            cat("grads"),
            torch.cat([trace.error for trace in traces]),
            maybe([trace.normed for trace in traces]),
            maybe([trace.rstd for trace in traces]),
        )

    def __getitem__(self, cells: slice) -> InnerTrace:
        return InnerTrace(
            [x[cells] for x in self.inputs],
            [z[cells] for z in self.hidden],
            [g[cells] for g in self.grads],
            self.error[cells],
            None if self.normed is None else self.normed[cells],
            None if self.rstd is None else self.rstd[cells],
        )


def inner_forward(
    k: Tensor, v: Tensor, anchor: Weights, spec: MemorySpec, gain: Tensor | None, bias: Tensor | None
) -> InnerTrace:
    """gain, bias: `[N, 1, D]` or None."""
    inputs, hidden = [k], []
    for layer, weight in enumerate(anchor):
        z = torch.bmm(inputs[-1], weight)
        if layer < spec.depth - 1:
            hidden.append(z)
            inputs.append(value(z, spec.activation))
    normed = rstd = None
    prediction = z
    if spec.norm:
        normed, rstd = normalize(z)
        prediction = normed if gain is None else normed * gain
        if bias is not None:
            prediction = prediction + bias
    error = prediction - v
    if spec.residual:
        error += k
    error *= 2
    grad = error
    if normed is not None and rstd is not None:
        grad = normalize_backward(error if gain is None else error * gain, normed, rstd)
    grads = [grad]
    for layer in range(spec.depth - 1, 0, -1):
        grad = slope_times(torch.bmm(grad, anchor[layer].mT), hidden[layer - 1], spec.activation)
        grads.insert(0, grad)
    return InnerTrace(inputs, hidden, grads, error, normed, rstd)


@dataclass
class Curvature:
    """act' and act'' at Z_1 .. Z_{L-1}, computed for a whole group of chunks at once."""

    slope: list[Tensor]
    curvature: list[Tensor]

    @classmethod
    def of(cls, trace: InnerTrace, kind: str) -> Curvature:
        pairs = [slope_and_curvature(z, kind) for z in trace.hidden]
        return cls([slope for slope, _ in pairs], [curvature for _, curvature in pairs])

    def __getitem__(self, cells: slice) -> Curvature:
        return Curvature([s[cells] for s in self.slope], [c[cells] for c in self.curvature])


@dataclass
class InnerGradients:
    """Gradients of k and v, and of the LN's gain and bias summed over tokens (`[N, 1, D]`, None without)."""

    k: Tensor
    v: Tensor
    gain: Tensor | None
    bias: Tensor | None


def inner_backward(
    grad_grads: list[Tensor],
    grad_inputs: list[Tensor],
    trace: InnerTrace,
    bend: Curvature,
    anchor: Weights,
    grad_anchor: Weights,
    spec: MemorySpec,
    gain: Tensor | None,
) -> InnerGradients:
    """Back through `inner_forward`, given gradients of G_1..G_L and of X_0..X_{L-1} (both overwritten).

    Gradients of the anchor weights are added to `grad_anchor` in place.
    """
    grads, last = trace.grads, spec.depth - 1
    grad_hidden = []
    for layer in range(last):  # G_l = (G_{l+1} W_{l+1}^T) act'(Z_l)
        grad_back = grad_grads[layer] * bend.slope[layer]
        backprop = torch.bmm(grads[layer + 1], anchor[layer + 1].mT)
        grad_hidden.append(backprop.mul_(grad_grads[layer]).mul_(bend.curvature[layer]))
        grad_grads[layer + 1].baddbmm_(grad_back, anchor[layer + 1])
        grad_anchor[layer + 1].baddbmm_(grad_back.mT, grads[layer + 1])
    grad_error = grad_top = grad_grads[last]
    grad_gain = grad_bias = None
    if trace.normed is not None and trace.rstd is not None:
        normed, rstd, error = trace.normed, trace.rstd, trace.error
        scaled = error if gain is None else error * gain
        grad_scaled = normalize_backward(grad_top, normed, rstd)
        grad_error = grad_scaled if gain is None else grad_scaled * gain
        grad_gain = (grad_scaled * error + 2 * grad_error * normed).sum(1, keepdim=True)
        grad_bias = 2 * grad_error.sum(1, keepdim=True)
        grad_normed = grad_error * 2 if gain is None else grad_error * (2 * gain)
        width = normed.shape[-1]
        grad_normed -= rstd / width * (
            grad_top * (scaled * normed).sum(-1, keepdim=True)
            + scaled * (grad_top * normed).sum(-1, keepdim=True)
        )
        stretch = (grad_top * grads[last]).sum(-1, keepdim=True) * (rstd / width)
        grad_z = normalize_backward(grad_normed, normed, rstd).sub_(normed * stretch)
    else:
        grad_z = 2 * grad_error
    for layer in range(last, -1, -1):  # Z_l = X_{l-1} W_l
        grad_anchor[layer].baddbmm_(trace.inputs[layer].mT, grad_z)
        grad_inputs[layer].baddbmm_(grad_z, anchor[layer].mT)
        if layer > 0:
            grad_z = grad_hidden[layer - 1].addcmul_(grad_inputs[layer], bend.slope[layer - 1])
    grad_k = grad_inputs[0]
    if spec.residual:
        grad_k = grad_k.add_(grad_error, alpha=2)
    return InnerGradients(grad_k, -2 * grad_error, grad_gain, grad_bias)
