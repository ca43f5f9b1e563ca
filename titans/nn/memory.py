"""The memory as a layer: projections, convolution, gates, the op, and the way back (paper sec. 4.4).

Shape suffixes: B rows, T tokens, H memory heads, D width of a head, C = H x D channels (hidden size).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.conv import ShortConv
from titans.nn.fusion import conv_silu, norm_gate, runs_fused
from titans.nn.gates import Gates, GateSpec, MemoryGates
from titans.nn.norms import RMSNorm, l2_normalize
from titans.nn.precision import FullPrecision, at_least_fp32
from titans.nn.rows import Rows, first_tokens, moved_back, moved_on
from titans.ops import MemorySpec, MemoryState, neural_memory, read_memory
from titans.ops.api import Implementation


@dataclass(frozen=True)
class NeuralMemorySpec:
    """Sizes of the layer; memory heads = hidden_size / memory.dim.

    read_before_write: a token reads the memory as the one before it left it, `y_t = M_{t-1}(q_t)`, instead
        of with its own write in it: it recalls the past alone.
    """

    hidden_size: int
    memory: MemorySpec
    gates: GateSpec = field(default_factory=GateSpec)
    chunk_size: int = 16
    conv_size: int = 4
    norm_eps: float = 1e-6
    read_before_write: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.memory.dim:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of the memory's head width "
                f"({self.memory.dim})"
            )

    @property
    def heads(self) -> int:
        return self.hidden_size // self.memory.dim


@dataclass(frozen=True)
class NeuralMemoryState:
    """The memory and the last `conv_size - 1` projected inputs of q, k and v, each `[B, W - 1, C]`."""

    memory: MemoryState
    query_tail: Tensor
    key_tail: Tensor
    value_tail: Tensor

    @property
    def device(self) -> torch.device:
        return self.memory.position.device

    @property
    def batch(self) -> int:
        return self.memory.batch

    def select(self, rows: Tensor) -> NeuralMemoryState:
        return NeuralMemoryState(
            self.memory.select(rows),
            self.query_tail.index_select(0, rows),
            self.key_tail.index_select(0, rows),
            self.value_tail.index_select(0, rows),
        )

    def expand(self, batch: int) -> NeuralMemoryState:
        """A one-row state in `batch` rows; gradients of all rows add up in it."""
        return NeuralMemoryState(
            self.memory.expand(batch),
            self.query_tail.expand(batch, -1, -1),
            self.key_tail.expand(batch, -1, -1),
            self.value_tail.expand(batch, -1, -1),
        )

    def detach(self) -> NeuralMemoryState:
        return NeuralMemoryState(
            self.memory.detach(), self.query_tail.detach(), self.key_tail.detach(), self.value_tail.detach()
        )


class MemoryWrite(NamedTuple):
    """One call of the op, for those who watch: what was written, and the memory after it."""

    k: Tensor
    v: Tensor
    gates: Gates
    state: MemoryState
    rows: Rows | None


# E[act(z)^2] for standard normal z.
ACTIVATION_POWER = {"gelu": 0.4252, "gelu_tanh": 0.4252, "silu": 0.3558}


def input_power(spec: MemorySpec) -> tuple[float, ...]:
    """The expected `|x|^2` of what each layer of an untrained memory reads: keys have unit length, hidden
    layers F activations of unit-variance inputs."""
    hidden = spec.dim * spec.expansion * ACTIVATION_POWER[spec.activation]
    return (1.0, *[hidden] * (spec.depth - 1))


class InitialMemory(FullPrecision):
    """What every sequence starts with: `M_0`, one per head, and the gain and bias of the memory's LN.

    Slow parameters, kept in at least fp32 because the memory computes in it.
    """

    def __init__(self, heads: int, spec: MemorySpec) -> None:
        super().__init__()
        dtype = at_least_fp32(torch.get_default_dtype())
        self.spec = spec
        # Parameters of this very module, not of a ParameterList: transformers initialises what a checkpoint
        # lacks module by module.
        for layer, shape in enumerate(spec.layer_shapes):
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.empty(heads, *shape, dtype=dtype)))
        affine = [
            nn.Parameter(torch.empty(heads, spec.dim, dtype=dtype)) if spec.norm else None for _ in "ab"
        ]
        self.norm_weight, self.norm_bias = affine
        self.reset_parameters()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """`M_0`: L tensors `[H, D_in, D_out]`."""
        return tuple(self.get_parameter(f"weight_{layer}") for layer in range(self.spec.depth))

    def reset_parameters(self) -> None:
        # Every layer's output has unit variance: activations work where they bend, and neither they nor the
        # inner gradient grow with depth. (With fan-in scaling the first layer of a unit key has outputs of
        # 1 / sqrt(D); LN then divides by almost nothing, the first token overwrites the memory, and the outer
        # gradient of a tiny lmm reached 1.7e7 within 230 steps; here 10.) A linear memory starts smaller:
        # what it recalls before it has read anything is noise.
        scales = [power**-0.5 for power in input_power(self.spec)]
        if self.spec.depth == 1:
            scales = [self.spec.dim**-0.5]
        for weight, scale in zip(self.weights, scales, strict=True):
            nn.init.normal_(weight, std=scale)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def state(self, batch: int) -> MemoryState:
        return MemoryState.initial(self.weights, batch=batch)


class MemoryCore(nn.Module):
    """q, k, v -> conv -> SiLU -> l2 norm of q, k -> gates -> memory: all of the layer but its way out.

    MAC reads one stream and writes another with the same projections, so the steps are methods of their
    own: `project_query`, `project_write`, `read`, `write`.

    impl: as in `neural_memory`. "triton" also runs the fused kernels around the memory, or raises ValueError
    at the first call; "auto" takes those on a CUDA device where it can. It is how to compute, no part of the
    model; change it at any time:

        for module in model.modules():
            if isinstance(module, MemoryCore):
                module.impl = "triton"
    """

    def __init__(self, spec: NeuralMemorySpec, impl: Implementation = "auto") -> None:
        super().__init__()
        size = spec.hidden_size
        self.spec = spec
        self.impl = impl
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.q_conv = ShortConv(size, spec.conv_size)
        self.k_conv = ShortConv(size, spec.conv_size)
        self.v_conv = ShortConv(size, spec.conv_size)
        widths = tuple(width for _, width in spec.memory.layer_shapes)
        power = input_power(spec.memory)
        self.gates = MemoryGates(size, spec.heads, spec.memory.depth, spec.gates, power, widths)
        self.initial = InitialMemory(spec.heads, spec.memory)
        self.observer: Callable[[MemoryWrite], None] | None = None  # set by `MemoryMetrics`

    def initial_state(self, batch: int) -> NeuralMemoryState:
        """Before the first token: `M_0` in every row, no momentum, empty convolutions."""
        return NeuralMemoryState(
            self.initial.state(batch),
            self.q_conv.initial_tail(batch),
            self.k_conv.initial_tail(batch),
            self.v_conv.initial_tail(batch),
        )

    def retrieve(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        rows: Rows | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """Write x `[B, T, C]` and read at every token: `[B, T, H, D]`, and the new state.

        With `rows`, x is packed `[1, total, C]` and the state has one row for each of them. context: what the
        gates see in place of x.
        """
        if state is None:
            state = self.initial_state(x.shape[0] if rows is None else len(rows))
        (q, k, v), state = self.project_write(x, state, rows)
        return self.write(q, k, v, self.gates(x if context is None else context), state, rows)

    def project_query(self, x: Tensor, tail: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, H, D]` of unit length and the convolution's new tail."""
        return self._to_heads(self.q_conv, self.q_proj(x), tail, rows, unit=True)

    def project_write(
        self, x: Tensor, state: NeuralMemoryState, rows: Rows | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], NeuralMemoryState]:
        """(q, k, v), each `[B, T, H, D]`, and the state with its tails moved on."""
        q, query_tail = self.project_query(x, state.query_tail, rows)
        k, key_tail = self._to_heads(self.k_conv, self.k_proj(x), state.key_tail, rows, unit=True)
        v, value_tail = self._to_heads(self.v_conv, self.v_proj(x), state.value_tail, rows, unit=False)
        return (q, k, v), replace(state, query_tail=query_tail, key_tail=key_tail, value_tail=value_tail)

    def write(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Gates,
        state: NeuralMemoryState,
        rows: Rows | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """The op: `[B, T, H, D]` read just after (or before) each write, and the memory after the last."""
        # The op reads after the write. To read before it, every token asks what the next one of its row
        # would; the first finds the memory as it came in.
        early = self.spec.read_before_write
        output, memory = neural_memory(
            moved_back(q, rows) if early else q,
            k,
            v,
            theta=gates.theta,
            log_decay=gates.log_decay,
            log_momentum=gates.log_momentum,
            state=state.memory,
            spec=self.spec.memory,
            norm_weight=self.initial.norm_weight,
            norm_bias=self.initial.norm_bias,
            chunk_size=self.spec.chunk_size,
            cu_seqlens=None if rows is None else rows.cu_seqlens,
            impl=self.impl,
        )
        if early:
            output = moved_on(output, self.read(first_tokens(q, rows), state.memory.weights), rows)
        if self.observer is not None:
            self.observer(MemoryWrite(k, v, gates, memory, rows))
        return output, replace(state, memory=memory)

    def read(self, q: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """Retrieval with fixed weights (L tensors `[B, H, D_in, D_out]`): `[B, T, H, D]`."""
        return read_memory(q, weights, self.spec.memory, self.initial.norm_weight, self.initial.norm_bias)

    def _to_heads(
        self, conv: ShortConv, projected: Tensor, tail: Tensor, rows: Rows | None, unit: bool
    ) -> tuple[Tensor, Tensor]:
        """Convolution, SiLU and, with `unit`, unit length: `[B, T, H, D]` and the new tail."""
        heads = self.spec.heads
        if runs_fused(self.impl, projected, self.spec.conv_size):
            return conv(projected, tail, rows, partial(conv_silu, heads=heads, unit=unit))
        y, tail = conv(projected, tail, rows)
        y = F.silu(y).unflatten(-1, (heads, self.spec.memory.dim))
        return (l2_normalize(y) if unit else y), tail


class NeuralMemory(MemoryCore):
    """The memory as a layer of its own: `MemoryCore` -> RMSNorm per head -> gate -> output projection."""

    def __init__(self, spec: NeuralMemorySpec, impl: Implementation = "auto") -> None:
        super().__init__(spec, impl)
        self.norm = RMSNorm(spec.memory.dim, spec.norm_eps, heads=spec.heads)
        self.gate_proj = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)
        self.o_proj = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)

    def forward(
        self, x: Tensor, state: NeuralMemoryState | None = None, rows: Rows | None = None
    ) -> tuple[Tensor, NeuralMemoryState]:
        """x `[B, T, C]`, or packed `[1, total, C]` with `rows`; the output has the shape of x."""
        output, state = self.retrieve(x, state, rows)
        gate = self.gate_proj(x)
        if runs_fused(self.impl, gate):
            return self.o_proj(norm_gate(output, self.norm.weight, gate, self.norm.eps)), state
        return self.o_proj(self.norm(output).flatten(2) * F.silu(gate)), state
