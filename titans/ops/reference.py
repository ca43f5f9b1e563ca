"""The oracle: the paper's recurrence, token by token, with the inner gradient taken by autograd.

    l(M; k, v) = || M(k) - v ||^2                                        (Eq. 12)
    S_t = eta_t S_{t-1} - theta_t grad l(anchor; k_t, v_t)               (Eq. 10, 16)
    M_t = (1 - alpha_t) M_{t-1} + S_t                                    (Eq. 13)
    y_t = M_t(q_t)                                                       (Eq. 15, read after write)

The anchor is the memory at the start of the chunk (sec. 3.2). Nothing here is derived by hand, so this
file is what every other implementation is compared with. It is slow, and meant to be.

Shape suffixes: B rows, T tokens, H heads, D width of a head, I/O input and output width of a layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from titans.ops.network import apply_memory
from titans.ops.spec import MemorySpec, MemoryState
from titans.ops.validation import check_bounds


def inner_gradient(
    k_BHD: Tensor,
    v_BHD: Tensor,
    anchor: tuple[Tensor, ...],
    spec: MemorySpec,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """grad_M ||M(k) - v||^2 at the anchor, differentiable once more when the caller records gradients.

    The anchor is aliased first: k and v may themselves depend on the same tensors (in MAC they do), and
    the inner gradient must not follow that path.
    """
    given = [tensor for tensor in (k_BHD, v_BHD, norm_weight, norm_bias, *anchor) if tensor is not None]
    record = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)

    def usable(tensor: Tensor) -> Tensor:
        """Autograd cannot save a tensor made in inference mode, but it can save a copy."""
        return tensor.clone() if tensor.is_inference() else tensor

    with torch.inference_mode(False), torch.enable_grad():
        anchor = tuple(usable(a) for a in anchor)
        aliases = tuple(a.view_as(a) if a.requires_grad else a.detach().requires_grad_() for a in anchor)
        gain, bias = (None if affine is None else usable(affine) for affine in (norm_weight, norm_bias))
        error = apply_memory(usable(k_BHD), aliases, spec, gain, bias) - usable(v_BHD)
        return torch.autograd.grad(error.square().sum(), aliases, create_graph=record)


def layer_gate(gate: Tensor | tuple[Tensor, ...], token: int, layer: int) -> Tensor:
    """The gate of one token and memory layer, shaped to multiply `[B, H, I, O]`."""
    if isinstance(gate, tuple):  # channel-wise: L tensors [B, T, H, O]
        return gate[layer][:, token, :, None, :]
    if gate.dim() == 4:  # [B, T, H, L]
        gate = gate[..., layer]
    return gate[:, token, :, None, None]


def reference_rows(
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
) -> tuple[Tensor, MemoryState]:
    """The recurrence over rows of equal length. Everything is computed in the state's dtype."""
    weights, momentum, anchor = state.weights, state.momentum, state.anchor
    position = state.position
    outputs = []
    for t in range(q.shape[1]):
        starts_chunk = (position == 0)[:, None, None, None]
        anchor = tuple(torch.where(starts_chunk, w, a) for w, a in zip(weights, anchor, strict=True))
        gradient = inner_gradient(k[:, t], v[:, t], anchor, spec, norm_weight, norm_bias)
        new_weights, new_momentum = [], []
        for layer, gradient_BHIO in enumerate(gradient):
            surprise = -layer_gate(theta, t, layer) * gradient_BHIO
            if log_momentum is not None:
                surprise = layer_gate(log_momentum, t, layer).exp() * momentum[layer] + surprise
                new_momentum.append(surprise)
            new_weights.append(layer_gate(log_decay, t, layer).exp() * weights[layer] + surprise)
        weights = tuple(new_weights)
        momentum = tuple(new_momentum) if log_momentum is not None else momentum
        outputs.append(apply_memory(q[:, t], weights, spec, norm_weight, norm_bias))
        position = (position + 1) % chunk_size
    starts_chunk = (position == 0)[:, None, None, None]
    anchor = tuple(torch.where(starts_chunk, w, a) for w, a in zip(weights, anchor, strict=True))
    return torch.stack(outputs, dim=1), MemoryState(weights, momentum, anchor, position)


def reference(
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
    """`neural_memory` by the recurrence itself; packed documents are simply read one after another."""
    if cu_seqlens is None:
        return reference_rows(
            q, k, v, theta, log_decay, log_momentum, state, spec, norm_weight, norm_bias, chunk_size
        )
    outputs, states = [], []
    bounds = cu_seqlens.tolist()
    check_bounds(bounds, q.shape[1])
    for row, (start, stop) in enumerate(pairwise(bounds)):
        row_state = state.select(torch.tensor([row], device=state.position.device))
        if stop > start:  # an empty document passes its state through
            document = slice(start, stop)
            decay = (
                tuple(gate[:, document] for gate in log_decay)
                if isinstance(log_decay, tuple)
                else log_decay[:, document]
            )
            momentum = None if log_momentum is None else log_momentum[:, document]
            output, row_state = reference_rows(
                q[:, document],
                k[:, document],
                v[:, document],
                theta[:, document],
                decay,
                momentum,
                row_state,
                spec,
                norm_weight,
                norm_bias,
                chunk_size,
            )
            outputs.append(output)
        states.append(row_state)
    return torch.cat(outputs, dim=1), MemoryState.concatenate(states)
