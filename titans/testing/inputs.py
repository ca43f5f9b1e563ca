"""Random arguments of `neural_memory` whose dynamics are stable: an exploding recurrence proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.ops import MemoryOutput, MemorySpec, MemoryState, neural_memory

GateShape = Literal["head", "layer", "channel"]


@dataclass(frozen=True)
class MemoryInputs:
    """The arguments of one `neural_memory` call, as its signature names them."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    log_decay: Tensor | tuple[Tensor, ...]
    log_momentum: Tensor | None
    state: MemoryState
    spec: MemorySpec
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    chunk_size: int
    cu_seqlens: Tensor | None = None

    def run(self, impl: Literal["auto", "reference", "chunked", "triton"]) -> MemoryOutput:
        arguments = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return neural_memory(**arguments, impl=impl)

    def tensors(self) -> dict[str, Tensor]:
        """Every differentiable argument by name: "q", "log_decay[1]", "state.anchor[0]", ..."""
        named: dict[str, Tensor] = {}
        for name in ("q", "k", "v", "theta", "log_decay", "log_momentum", "norm_weight", "norm_bias"):
            value = getattr(self, name)
            if isinstance(value, tuple):
                named |= {f"{name}[{layer}]": tensor for layer, tensor in enumerate(value)}
            elif value is not None:
                named[name] = value
        for name in ("weights", "momentum", "anchor"):
            tensors = getattr(self.state, name)
            named |= {f"state.{name}[{layer}]": tensor for layer, tensor in enumerate(tensors)}
        return named

    def map(self, change: Callable[[str, Tensor], Tensor]) -> MemoryInputs:
        """The same call with `change(name, tensor)` in the place of every tensor of `tensors()`."""
        new = {name: change(name, tensor) for name, tensor in self.tensors().items()}

        def layers(name: str, count: int) -> tuple[Tensor, ...]:
            return tuple(new[f"{name}[{layer}]"] for layer in range(count))

        depth = self.spec.depth
        state = MemoryState(
            layers("state.weights", depth),
            layers("state.momentum", depth),
            layers("state.anchor", depth),
            self.state.position,
        )
        decay = layers("log_decay", depth) if isinstance(self.log_decay, tuple) else new["log_decay"]
        return replace(
            self,
            q=new["q"],
            k=new["k"],
            v=new["v"],
            theta=new["theta"],
            log_decay=decay,
            log_momentum=new.get("log_momentum"),
            norm_weight=new.get("norm_weight"),
            norm_bias=new.get("norm_bias"),
            state=state,
        )

    def cast(self, dtype: torch.dtype) -> MemoryInputs:
        """q, k, v and gates in `dtype`; state and norm never below float32, as layers keep them."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.map(
            lambda name, tensor: tensor.to(wide if name.startswith(("state.", "norm_")) else dtype)
        )

    def to(self, device: str | torch.device) -> MemoryInputs:
        """The same call on another device."""
        moved = self.map(lambda _, tensor: tensor.to(device))
        packed = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        state = replace(moved.state, position=self.state.position.to(device))
        return replace(moved, state=state, cu_seqlens=packed)

    def tokens(self, start: int, stop: int, state: MemoryState | None = None) -> MemoryInputs:
        """The piece `[start, stop)` of the sequence, with another state if one is given."""
        per_token = ("q", "k", "v", "theta", "log_decay", "log_momentum")
        piece = self.map(
            lambda name, tensor: tensor[:, start:stop] if name.split("[")[0] in per_token else tensor
        )
        return piece if state is None else replace(piece, state=state)

    def rows(self, rows: Sequence[int]) -> MemoryInputs:
        """The call restricted to some batch rows, in that order."""
        index = torch.tensor(rows)
        piece = self.map(
            lambda name, tensor: tensor if name.startswith("norm_") else tensor.index_select(0, index)
        )
        position = self.state.position.index_select(0, index)
        return replace(piece, state=replace(piece.state, position=position))


def random_inputs(
    spec: MemorySpec,
    *,
    batch: int = 2,
    tokens: int = 37,
    heads: int = 2,
    chunk_size: int = 16,
    theta: GateShape = "head",
    decay: GateShape = "head",
    momentum: GateShape | None = "head",
    position: Sequence[int] | Literal["random"] = "random",
    norm_affine: bool = True,
    step: float = 0.3,
    forget: float = 0.2,
    documents: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> MemoryInputs:
    """A stable call in the middle of a stream: momentum is not zero and the anchor not the weights.

    Args:
        theta, decay, momentum: "head" `[B, T, H]`, "layer" `[B, T, H, L]`, "channel" (decay alone) a tuple
            of `[B, T, H, D_out]`; momentum None leaves it out.
        position: tokens already read in the current chunk, one per row.
        norm_affine: gain and bias for a spec with norm.
        step: largest theta times the chunk: a frozen gradient over C tokens multiplies the step by up to
            C / (1 - eta).
        forget: largest share forgotten at a token. A deep memory fed with noise that forgets as fast as the
            default turns chaotic after 200 tokens (rounding grows tenfold every 30): 0.002 for a thousand.
        documents: lengths of packed documents; sets batch to 1, tokens to their sum and a state row each.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    rows = batch
    cu_seqlens = None
    if documents is not None:
        batch, tokens, rows = 1, sum(documents), len(documents)
        cu_seqlens = torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    leading = (batch, tokens, heads)
    gate_shapes = {"head": leading, "layer": (*leading, spec.depth)}

    max_theta = step / min(chunk_size, tokens)
    log_decay: Tensor | tuple[Tensor, ...]
    if decay == "channel":
        log_decay = tuple(torch.log1p(-forget * uniform(*leading, d_out)) for _, d_out in spec.layer_shapes)
    else:
        log_decay = torch.log1p(-forget * uniform(*gate_shapes[decay]))
    weights = tuple(
        normal(rows, heads, d_in, d_out) / d_in**0.5 for d_in, d_out in spec.layer_shapes
    )  # O(1) activations
    if isinstance(position, str):
        positions = torch.randint(chunk_size, (rows,), generator=rng)
    else:
        positions = torch.tensor(position)
    with_affine = bool(spec.norm and norm_affine)
    inputs = MemoryInputs(
        q=F.normalize(normal(*leading, spec.dim), dim=-1),
        k=F.normalize(normal(*leading, spec.dim), dim=-1),
        v=0.5 * normal(*leading, spec.dim),
        theta=max_theta * uniform(*gate_shapes[theta]),
        log_decay=log_decay,
        log_momentum=None if momentum is None else F.logsigmoid(normal(*gate_shapes[momentum])),
        state=MemoryState(
            weights=weights,
            momentum=tuple(0.05 * normal(*weight.shape) for weight in weights),
            anchor=tuple(weight + 0.1 * normal(*weight.shape) for weight in weights),
            position=positions.to(torch.int32),
        ),
        spec=spec,
        norm_weight=1 + 0.2 * normal(heads, spec.dim) if with_affine else None,
        norm_bias=0.2 * normal(heads, spec.dim) if with_affine else None,
        chunk_size=chunk_size,
        cu_seqlens=cu_seqlens,
    )
    return inputs.cast(dtype)
