"""What the memory is told for every token: how much to learn, to keep of the momentum, and to forget.

Shape suffixes: B rows, T tokens, H heads, L memory layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans.nn.precision import FullPrecision, at_least_fp32

ForgetGate = Literal["rectified", "sigmoid", "none"]
StepGate = Literal["sigmoid", "hard"]

# Logits of the gates of an untrained layer. The rectified forget gate starts a hair above its exact zero
# (alpha = 0.00005 a token): remembering, and still with a gradient. The sigmoid one at alpha = 0.0003.
RECTIFIED_FORGET_LOGIT = 0.001
SIGMOID_FORGET_LOGIT = -8.0
MAX_RECTIFIED_FORGET = 0.1


# Bound of a token's total step, by depth of the memory: the largest of 0.5, 0.1 and 0.02 whose outer gradient
# stayed tame in training at tiny size (results/initial_values.json). A linear memory has no LN to absorb a
# large step; with 0.5 the outer gradient of three layers reached 4e6, of four 8e7.
DEFAULT_MAX_STEP = {1: 0.1, 2: 0.5, 3: 0.1, 4: 0.02}


@dataclass(frozen=True)
class GateSpec:
    """How gates are made of a token.

    momentum: False leaves `log_momentum` out (`S = -theta G`).
    momentum_init: eta of an untrained layer, between 0 and 1.
    per_layer: a gate for every layer of the memory instead of one for all (camera-ready: deep memories
        need it).
    forget: "rectified" (alpha = 0.2 relu(sigmoid(x) - 0.5), can be exactly 0), "sigmoid", "none".
    forget_per_channel: a forget gate for every output channel of every memory layer, so that a token can
        clear some of what a layer holds and keep the rest. No kernel covers it: "auto" takes "chunked".
    step: "sigmoid" or "hard" (clipped, can be exactly 0: a token that writes nothing).
    step_init: share of the largest step that an untrained layer takes at every token, between 0 and 1. The
        outer gradient runs through all writes: with few of them, it is tame from the first step on.
    max_step: bound of `theta / (1 - eta)`, the total step that one token's surprise makes over time, for an
        input of power 1 (see `MemoryGates`). None: `DEFAULT_MAX_STEP` for the memory's depth.
    """

    momentum: bool = True
    momentum_init: float = 0.5
    per_layer: bool = True
    forget: ForgetGate = "rectified"
    forget_per_channel: bool = False
    step: StepGate = "sigmoid"
    step_init: float = 0.5
    max_step: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("forget", self.forget, ForgetGate), ("step", self.step, StepGate)):
            if value not in get_args(known):
                raise ValueError(f"GateSpec.{name} must be one of {get_args(known)}, got {value!r}")
        if self.forget_per_channel and self.forget == "none":
            raise ValueError("GateSpec.forget_per_channel must be False with forget='none', got True")
        for name in ("momentum_init", "step_init"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"GateSpec.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.max_step is not None and not self.max_step > 0:
            raise ValueError(f"GateSpec.max_step must be positive, got {self.max_step}")


class Gates(NamedTuple):
    """Numbers the op takes: `[B, T, H]`, or `[B, T, H, L]` with gates per memory layer.

    log_decay: the same, or with forget gates per channel L tensors `[B, T, H, D_out]`.
    """

    theta: Tensor
    log_decay: Tensor | tuple[Tensor, ...]
    log_momentum: Tensor | None

    @property
    def alpha(self) -> Tensor:
        """What is forgotten, `1 - decay`; of gates per channel every layer's mean, `[B, T, H, L]`."""
        if isinstance(self.log_decay, tuple):
            return torch.stack([-torch.expm1(decay).mean(-1) for decay in self.log_decay], dim=-1)
        return -torch.expm1(self.log_decay)


class MemoryGates(FullPrecision):
    """theta, log(1 - alpha) and log(eta) of paper Eq. 10 and 13 from one linear map of the token.

    Everything happens in fp32 (fp64 for fp64), autocast or not. The map starts at zero around a constant
    logit: every token begins with the same gates, and decaying the weights leads back to them.

    input_power: the expected `|x|^2` of what each memory layer reads, 1 by default. A step moves a layer's
    output by theta |x|^2, so theta is divided by it: the normalised step of least-mean-squares filters.
    widths: the output width of each memory layer, for `forget_per_channel`.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        memory_layers: int,
        spec: GateSpec,
        input_power: tuple[float, ...] | None = None,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.spec = spec
        max_step = DEFAULT_MAX_STEP[memory_layers] if spec.max_step is None else spec.max_step
        self.max_steps = tuple(max_step / power for power in input_power or (1.0,) * memory_layers)
        self.shape = (heads, memory_layers) if spec.per_layer and memory_layers > 1 else (heads,)
        if spec.forget_per_channel and len(widths) != memory_layers:
            raise ValueError(
                f"widths must hold one width for each of {memory_layers} memory layers with "
                f"forget_per_channel, got {widths}"
            )
        # What the map puts out: the step, momentum, and forgetting, per channel one after another layer's.
        gates = math.prod(self.shape)
        self.sizes = [gates] * (1 + int(spec.momentum))
        if spec.forget != "none":
            self.sizes += [heads * width for width in widths] if spec.forget_per_channel else [gates]
        dtype = at_least_fp32(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(sum(self.sizes), dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Gates:
        """x `[B, T, hidden]` -> gates in at least fp32."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
            kinds = list(logits.split(self.sizes, dim=-1))
            share = self._step(kinds.pop(0).unflatten(-1, self.shape))
            log_momentum = None
            if self.spec.momentum:
                # logit = logit(eta_0) + map; 1 - eta = sigmoid(-logit) keeps its digits when eta is near 1.
                logit = kinds.pop(0).unflatten(-1, self.shape) + _logit(self.spec.momentum_init)
                log_momentum = F.logsigmoid(logit)
                share = share * torch.sigmoid(-logit)
            theta = self._scaled(share)
            log_decay: Tensor | tuple[Tensor, ...]
            if not kinds:
                log_decay = torch.zeros_like(share)
            elif self.spec.forget_per_channel:
                log_decay = tuple(self._log_decay(kind.unflatten(-1, (self.shape[0], -1))) for kind in kinds)
            else:
                log_decay = self._log_decay(kinds[0].unflatten(-1, self.shape))
        return Gates(theta, log_decay, log_momentum)

    def steps_and_bounds(self, theta: Tensor) -> list[tuple[Tensor, float]]:
        """theta of each memory layer, `[B, T, H]`, and the largest that it can be.

        One pair where a gate serves all layers: it has the same bound everywhere.
        """
        layers = theta.unbind(-1) if theta.dim() == 4 else (theta,)
        return list(zip(layers, self.max_steps, strict=False))

    def _scaled(self, share: Tensor) -> Tensor:
        """Shares of the largest step -> theta."""
        if len(set(self.max_steps)) == 1:
            return share * self.max_steps[0]
        # One gate for all memory layers, each with a bound of its own; no tensor is sent to the device.
        shares = share.unbind(-1) if len(self.shape) > 1 else [share] * len(self.max_steps)
        return torch.stack([one * step for one, step in zip(shares, self.max_steps, strict=True)], dim=-1)

    def _step(self, logit: Tensor) -> Tensor:
        if self.spec.step == "sigmoid":
            return torch.sigmoid(logit + _logit(self.spec.step_init))
        share = torch.sigmoid(logit + _logit((self.spec.step_init + 0.1) / 1.2))
        return (1.2 * share - 0.1).clamp(0, 1)

    def _log_decay(self, logit: Tensor) -> Tensor:
        if self.spec.forget == "sigmoid":
            return F.logsigmoid(-(logit + SIGMOID_FORGET_LOGIT))
        alpha = 2 * MAX_RECTIFIED_FORGET * F.relu(torch.sigmoid(logit + RECTIFIED_FORGET_LOGIT) - 0.5)
        return torch.log1p(-alpha)


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
