"""The inner gradient of a chunk and its own gradient, both by hand.

Forward, at the anchor weights W_l (layers l = 1..L, X_0 = k, X_l = act(Z_l)):
    Z_l = X_{l-1} W_l          E = 2 (M(k) - v)          G_L = J (gain E)     (J: Jacobian of LN, symmetric)
    G_l = (G_{l+1} W_{l+1}^T) act'(Z_l)                  grad_{W_l} l = X_{l-1}^T G_l

Every tensor is `[N, C, width]`, N = cells x heads. Both directions run chunk by chunk on the critical path,
so they write into buffers of a whole group, and whatever can wait is done for the group at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans.ops.chunked.activations import slope_and_curvature, slope_times, value
from titans.ops.network import NORM_EPS
from titans.ops.spec import MemorySpec

Tensors = list[Tensor]


def normalize(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with mean 0 and variance 1; their mean and reciprocal deviation before."""
    return torch.native_layer_norm(z, z.shape[-1:], None, None, NORM_EPS)


def normalize_backward(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """J grad, J = rstd (I - 1/D - normed normed^T / D)."""
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


@dataclass
class InnerTrace:
    """What the inner gradient leaves. inputs: X_0 .. X_{L-1}; hidden: Z_1 .. Z_L; grads: G_1 .. G_L."""

    inputs: Tensors
    hidden: Tensors
    grads: Tensors

    @classmethod
    def allocate(cls, k: Tensor, spec: MemorySpec) -> InnerTrace:
        outputs = [k.new_empty((*k.shape[:2], d_out)) for _, d_out in spec.layer_shapes]
        inputs = [k, *(torch.empty_like(hidden) for hidden in outputs[:-1])]
        return cls(inputs, outputs, [torch.empty_like(hidden) for hidden in outputs])

    def split(self, sizes: list[int]) -> list[InnerTrace]:
        """Views of consecutive chunks."""

        def cut(tensors: Tensors) -> list[Tensors]:
            return [list(parts) for parts in zip(*(tensor.split(sizes) for tensor in tensors), strict=True)]

        parts = zip(cut(self.inputs), cut(self.hidden), cut(self.grads), strict=True)
        return [InnerTrace(*fields) for fields in parts]


def shifted_target(k: Tensor, v: Tensor, spec: MemorySpec, bias: Tensor | None) -> Tensor:
    """2 (bias + k - v): what is left of E = 2 (M(k) - v) without the network's own output."""
    shifted = k - v if spec.residual else v.neg()
    if bias is not None:
        shifted += bias
    return shifted.mul_(2)


def inner_error(normed: Tensor, target: Tensor, gain: Tensor | None) -> Tensor:
    """E, given the normalised output of the network."""
    return (
        torch.add(target, normed, alpha=2) if gain is None else torch.addcmul(target, normed, gain, value=2)
    )


def inner_forward(
    target: Tensor, anchor: Tensors, spec: MemorySpec, gain: Tensor | None, trace: InnerTrace
) -> None:
    """Fill `trace` (its X_0 = k is there). gain: `[N, 1, D]` or None."""
    for layer, weight in enumerate(anchor):
        torch.bmm(trace.inputs[layer], weight, out=trace.hidden[layer])
        if layer < spec.depth - 1:
            value(trace.hidden[layer], spec.activation, out=trace.inputs[layer + 1])
    top = trace.hidden[-1]
    if spec.norm:
        normed, mean, rstd = normalize(top)
        error = inner_error(normed, target, gain)
        scaled = error if gain is None else error.mul_(gain)
        trace.grads[-1].copy_(normalize_backward(scaled, top, mean, rstd))
    else:
        torch.add(target, top, alpha=2, out=trace.grads[-1])
    for layer in range(spec.depth - 1, 0, -1):
        back = torch.bmm(trace.grads[layer], anchor[layer].mT)
        slope_times(back, trace.hidden[layer - 1], spec.activation, out=trace.grads[layer - 1])


@dataclass
class NormTrace:
    """What the double backward through the LN reuses, `[N, C, D]` or `[N, C, 1]`.

    scaled: gain E rstd; along: rstd mean(gain E normed); slant: normed rstd / D; gain: 2 gain^2 `[N, 1, D]`.
    """

    mean: Tensor
    rstd: Tensor
    normed: Tensor
    scaled: Tensor
    along: Tensor
    slant: Tensor


@dataclass
class InnerTape:
    """A group's trace with all that its backward needs, computed for the group at once."""

    trace: InnerTrace
    slope: Tensors
    curvature: Tensors
    norm: NormTrace | None

    @classmethod
    def of(cls, trace: InnerTrace, target: Tensor, spec: MemorySpec, gain: Tensor | None) -> InnerTape:
        pairs = [slope_and_curvature(z, spec.activation) for z in trace.hidden[:-1]]
        norm = None
        if spec.norm:
            top = trace.hidden[-1]
            normed, mean, rstd = normalize(top)
            scaled = inner_error(normed, target, gain)
            if gain is not None:
                scaled *= gain
            scaled *= rstd
            along = (scaled * normed).mean(-1, keepdim=True)
            norm = NormTrace(mean, rstd, normed, scaled, along, normed * (rstd / top.shape[-1]))
        return cls(trace, [slope for slope, _ in pairs], [bend for _, bend in pairs], norm)

    def split(self, sizes: list[int]) -> list[InnerTape]:
        traces = self.trace.split(sizes)
        slopes = [tensor.split(sizes) for tensor in self.slope]
        bends = [tensor.split(sizes) for tensor in self.curvature]
        fields = None if self.norm is None else [tensor.split(sizes) for tensor in vars(self.norm).values()]
        return [
            InnerTape(
                traces[step],
                [slope[step] for slope in slopes],
                [bend[step] for bend in bends],
                None if fields is None else NormTrace(*(field[step] for field in fields)),
            )
            for step in range(len(sizes))
        ]


def inner_backward(
    grad_grads: Tensors,
    grad_inputs: Tensors,
    tape: InnerTape,
    anchor: Tensors,
    grad_anchor: Tensors,
    spec: MemorySpec,
    square_gain: Tensor | None,
) -> None:
    """Back through `inner_forward`, given gradients of G_1..G_L and of X_0..X_{L-1}; all updated in place.

    Afterwards `grad_grads[-1]` is the whole gradient of G_L, from which `finish_inner_backward` takes the
    gradients of v, gain and bias, and `grad_inputs[0]` that of k but for the residual. Gradients of the
    anchor weights are added to `grad_anchor`. square_gain: gain^2.
    """
    trace, last = tape.trace, spec.depth - 1
    grad_hidden = []
    for layer in range(last):  # G_l = (G_{l+1} W_{l+1}^T) act'(Z_l)
        back = torch.bmm(trace.grads[layer + 1], anchor[layer + 1].mT)
        grad_hidden.append(back.mul_(grad_grads[layer]).mul_(tape.curvature[layer]))
        grad_back = grad_grads[layer].mul_(tape.slope[layer])
        grad_grads[layer + 1].baddbmm_(grad_back, anchor[layer + 1])
        grad_anchor[layer + 1].baddbmm_(grad_back.mT, trace.grads[layer + 1])
    grad_top = grad_grads[last]
    if tape.norm is None:
        grad_z = grad_top * 2
    else:
        norm, top = tape.norm, trace.hidden[last]
        grad_scaled = normalize_backward(grad_top, top, norm.mean, norm.rstd)
        grad_normed = grad_scaled.mul_(2) if square_gain is None else grad_scaled.mul_(square_gain).mul_(2)
        grad_normed.addcmul_(grad_top, norm.along, value=-1)
        grad_normed.addcmul_(norm.scaled, (grad_top * norm.normed).mean(-1, keepdim=True), value=-1)
        stretch = (grad_top * trace.grads[last]).sum(-1, keepdim=True)
        grad_z = normalize_backward(grad_normed, top, norm.mean, norm.rstd)
        grad_z.addcmul_(norm.slant, stretch, value=-1)
    for layer in range(last, -1, -1):  # Z_l = X_{l-1} W_l
        grad_anchor[layer].baddbmm_(trace.inputs[layer].mT, grad_z)
        grad_inputs[layer].baddbmm_(grad_z, anchor[layer].mT)
        if layer > 0:
            grad_z = grad_hidden[layer - 1].addcmul_(grad_inputs[layer], tape.slope[layer - 1])


@dataclass
class InnerGradients:
    """v: `[N, C, D]`; gain, bias: gradients of the LN's gain and bias, `[N, C, D]` (None without a LN)."""

    v: Tensor
    gain: Tensor | None
    bias: Tensor | None


def finish_inner_backward(
    grad_top: Tensor, grad_k: Tensor, tape: InnerTape, target: Tensor, spec: MemorySpec, gain: Tensor | None
) -> InnerGradients:
    """The rest of `inner_backward`, for a whole group: grad_top is the gradient of G_L; k's is updated."""
    grad_error, grad_gain, grad_bias = grad_top, None, None
    if tape.norm is not None:
        norm = tape.norm
        grad_scaled = normalize_backward(grad_top, tape.trace.hidden[-1], norm.mean, norm.rstd)
        grad_error = grad_scaled if gain is None else grad_scaled * gain
        error = inner_error(norm.normed, target, gain)
        grad_gain = torch.addcmul(grad_scaled * error, grad_error, norm.normed, value=2)
        grad_bias = 2 * grad_error
    if spec.residual:
        grad_k.add_(grad_error, alpha=2)
    return InnerGradients(grad_error * -2, grad_gain, grad_bias)
