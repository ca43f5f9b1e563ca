"""What the memory is told for every token: how much to learn, to keep of the momentum, and to forget.

Shape suffixes: B rows, T tokens, H heads, L memory layers.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class GateSpec:
    """How gates are made of a token.

    momentum: False leaves `log_momentum` out (`S = -theta G`).
    momentum_init: eta of an untrained layer, between 0 and 1.
    per_layer: a gate for every layer of the memory instead of one for all (camera-ready: deep memories
        need it).
    forget: "rectified" (alpha = 0.2 relu(sigmoid(x) - 0.5), can be exactly 0), "sigmoid", "none".
    step: "sigmoid" or "hard" (clipped, can be exactly 0: a token that writes nothing).
    max_step: bound of `theta / (1 - eta)`, the total step that one token's surprise makes over time.
    """

    momentum: bool = True
    momentum_init: float = 0.5
    per_layer: bool = True
    forget: ForgetGate = "rectified"
    step: StepGate = "sigmoid"
    max_step: float = 0.5

    def __post_init__(self) -> None:
        for name, value, known in (("forget", self.forget, ForgetGate), ("step", self.step, StepGate)):
            if value not in get_args(known):
                raise ValueError(f"GateSpec.{name} must be one of {get_args(known)}, got {value!r}")
        if not 0 < self.momentum_init < 1:
            raise ValueError(f"GateSpec.momentum_init must lie between 0 and 1, got {self.momentum_init}")
        if not self.max_step > 0:
            raise ValueError(f"GateSpec.max_step must be positive, got {self.max_step}")


class Gates(NamedTuple):
    """Numbers the op takes: `[B, T, H]`, or `[B, T, H, L]` with gates per memory layer."""

    theta: Tensor
    log_decay: Tensor
    log_momentum: Tensor | None


class MemoryGates(FullPrecision):
    """theta, log(1 - alpha) and log(eta) of paper Eq. 10 and 13 from one linear map of the token.

    Everything happens in fp32 (fp64 for fp64), autocast or not. The map starts at zero around a constant
    logit: every token begins with the same gates, and decaying the weights leads back to them.
    """

    def __init__(self, hidden_size: int, heads: int, memory_layers: int, spec: GateSpec) -> None:
        super().__init__()
        self.spec = spec
        self.shape = (heads, memory_layers) if spec.per_layer and memory_layers > 1 else (heads,)
        kinds = 1 + int(spec.momentum) + int(spec.forget != "none")
        outputs = kinds * heads * (self.shape[1] if len(self.shape) > 1 else 1)
        dtype = at_least_fp32(torch.get_default_dtype())
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Gates:
        """x `[B, T, hidden]` -> gates in at least fp32."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
            kinds = list(logits.unflatten(-1, (-1, *self.shape)).unbind(2))
            theta = self._step(kinds.pop(0)) * self.spec.max_step
            log_momentum = None
            if self.spec.momentum:
                # logit = logit(eta_0) + map; 1 - eta = sigmoid(-logit) keeps its digits when eta is near 1.
                logit = kinds.pop(0) + _logit(self.spec.momentum_init)
                log_momentum = F.logsigmoid(logit)
                theta = theta * torch.sigmoid(-logit)
            log_decay = self._log_decay(kinds.pop(0)) if kinds else torch.zeros_like(theta)
        return Gates(theta, log_decay, log_momentum)

    def _step(self, logit: Tensor) -> Tensor:
        share = torch.sigmoid(logit)
        return share if self.spec.step == "sigmoid" else (1.2 * share - 0.1).clamp(0, 1)

    def _log_decay(self, logit: Tensor) -> Tensor:
        if self.spec.forget == "sigmoid":
            return F.logsigmoid(-(logit + SIGMOID_FORGET_LOGIT))
        alpha = 2 * MAX_RECTIFIED_FORGET * F.relu(torch.sigmoid(logit + RECTIFIED_FORGET_LOGIT) - 0.5)
        return torch.log1p(-alpha)


def _logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))
