"""The workloads of `titans bench ops`: each builds inputs for one row and returns the step to be timed.

Settings of a row: device, dtype, batch, tokens, heads, dim, `passes` ("forward"; "both": with the gradient
of every input; "graph": the same as one CUDA graph) and what the workload names itself. Dynamics are stable,
as in a trained model: log(1 - alpha) about -0.002, eta about 0.9, theta between 0.001 and 0.01, outputs of
the memory's layers of unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[], object]

LOG_DECAY = -0.002
LOG_MOMENTUM = math.log(0.9)
THETA = (0.001, 0.01)


def our_op(settings: dict[str, Any]) -> Step:
    """`titans.ops.neural_memory` from the initial weights on: depth, expansion, chunk_size, impl."""
    from titans.nn.memory import input_power
    from titans.ops import MemorySpec, MemoryState, neural_memory

    spec = MemorySpec(dim=settings["dim"], depth=settings["depth"], expansion=settings["expansion"])
    q, k, v = _queries_keys_values(settings)
    gates = {"theta": _gate(settings, *THETA), "log_decay": _gate(settings, 1.1 * LOG_DECAY, 0.9 * LOG_DECAY)}
    gates["log_momentum"] = _gate(settings, 1.1 * LOG_MOMENTUM, 0.9 * LOG_MOMENTUM)
    weights = tuple(
        torch.randn(settings["heads"], *shape, device=settings["device"]) / math.sqrt(power)
        for shape, power in zip(spec.layer_shapes, input_power(spec), strict=True)
    )

    def op() -> Tensor:
        return neural_memory(
            q,
            k,
            v,
            **gates,
            state=MemoryState.initial(weights, settings["batch"]),
            spec=spec,
            chunk_size=settings["chunk_size"],
            impl=settings["impl"],
        ).output

    return _step(op, [q, k, v, *gates.values(), *weights], settings)


def decode_step(settings: dict[str, Any]) -> Step:
    """One token through `layers` memories, every state written in place; on a GPU one CUDA graph replayed.

    Layers run one after another, as they do in a model, and each owns its state.
    """
    from titans.nn.cuda_graph import record
    from titans.nn.memory import input_power
    from titans.ops import MemorySpec, MemoryState
    from titans.ops.kernels.step import memory_step, own_memory

    spec = MemorySpec(dim=settings["dim"], depth=settings["depth"], expansion=settings["expansion"])
    q, k, v = _queries_keys_values(settings)
    gates = {"theta": _gate(settings, *THETA), "log_decay": _gate(settings, 1.1 * LOG_DECAY, 0.9 * LOG_DECAY)}
    gates["log_momentum"] = _gate(settings, 1.1 * LOG_MOMENTUM, 0.9 * LOG_MOMENTUM)
    states = []
    for _ in range(settings["layers"]):
        weights = tuple(
            torch.randn(settings["heads"], *shape, device=settings["device"]) / math.sqrt(power)
            for shape, power in zip(spec.layer_shapes, input_power(spec), strict=True)
        )
        states.append(own_memory(MemoryState.initial(weights, settings["batch"])))

    @torch.no_grad()
    def token() -> None:
        for state in states:
            memory_step(
                q, k, v, **gates, state=state, spec=spec, chunk_size=settings["chunk_size"], in_place=True
            )

    if settings["device"] != "cuda":
        return token
    return record(token).replay


def gated_deltanet(settings: dict[str, Any]) -> Step:
    """Gated DeltaNet of flash-linear-attention. Where its backward refuses to run, the refusal is taken out.

    On Hopper with Triton 3.4 to 3.7.0 its gradients are wrong (its issue 640): the time stands, they do not.
    share `[number, of]`, if there is one: only these of the configurations that its autotuners choose from.
    """
    if "share" in settings:
        take_share(import_module("triton.runtime.autotuner").Autotuner, *settings["share"])
    op_of_fla = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    # Read by the guard alone once the module is imported.
    vars(import_module("fla.ops.common.chunk_o"))["IS_NVIDIA_HOPPER"] = False
    q, k, v = _queries_keys_values(settings)
    decay = _gate(settings, 1.1 * LOG_DECAY, 0.9 * LOG_DECAY)
    beta = _gate(settings, 0.1, 0.9).to(v.dtype)

    def op() -> Tensor:
        output: Tensor = op_of_fla(q, k, v, g=decay, beta=beta)[0]
        return output

    return _step(op, [q, k, v, decay, beta], settings)


def take_share(autotuner: Any, number: int, of: int) -> None:
    """From now on autotuners choose from every `of`-th of their configurations alone, at least from one."""
    prune = autotuner.prune_configs

    def share(self: Any, arguments: dict[str, Any]) -> list[Any]:
        configurations: list[Any] = prune(self, arguments)
        return configurations[number::of] or configurations[:1]

    autotuner.prune_configs = share


def attention(settings: dict[str, Any]) -> Step:
    """Causal softmax attention, PyTorch's `scaled_dot_product_attention`."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in _queries_keys_values(settings))
    return _step(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], settings)


def our_layer(settings: dict[str, Any]) -> Step:
    """`titans.nn.NeuralMemory` under bf16 autocast, implementation "auto"."""
    from titans.nn.memory import NeuralMemory, NeuralMemorySpec
    from titans.ops import MemorySpec

    memory = MemorySpec(dim=settings["dim"], depth=settings["depth"], expansion=settings["expansion"])
    hidden = settings["heads"] * settings["dim"]
    layer = NeuralMemory(NeuralMemorySpec(hidden, memory, chunk_size=settings["chunk_size"]))
    return _layer_step(layer, settings)


def lucidrains_layer(settings: dict[str, Any]) -> Step:
    """`titans_pytorch.NeuralMemory` under bf16 autocast; chunk 1, batch size 64 is our rule at chunk 64."""
    from titans_pytorch import NeuralMemory

    layer = NeuralMemory(
        dim=settings["heads"] * settings["dim"],
        heads=settings["heads"],
        dim_head=settings["dim"],
        chunk_size=settings["peer_chunk_size"],
        batch_size=settings["peer_batch_size"],
        default_model_kwargs={"depth": settings["depth"], "expansion_factor": float(settings["expansion"])},
    )
    return _layer_step(layer, settings)


def copy(settings: dict[str, Any]) -> Step:
    """What the memory bus does: `bytes` are read and as many written."""
    source = torch.ones(settings["bytes"], dtype=torch.int8, device=settings["device"])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _queries_keys_values(settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T, H, D]` each; queries and keys of unit length."""
    shape = [settings[name] for name in ("batch", "tokens", "heads", "dim")]
    q, k, v = (torch.randn(shape, device=settings["device"]) for _ in range(3))
    dtype = getattr(torch, settings["dtype"])
    return F.normalize(q, dim=-1).to(dtype), F.normalize(k, dim=-1).to(dtype), v.to(dtype)


def _gate(settings: dict[str, Any], low: float, high: float) -> Tensor:
    """`[B, T, H]`, fp32, uniform."""
    shape = [settings[name] for name in ("batch", "tokens", "heads")]
    return torch.empty(shape, device=settings["device"]).uniform_(low, high)


def _step(op: Callable[[], Tensor], inputs: Sequence[Tensor], settings: dict[str, Any]) -> Step:
    """Forward alone, or forward and backward into every input from one random cotangent, perhaps recorded."""
    if settings["passes"] == "forward":

        @torch.no_grad()
        def forward() -> Tensor:
            return op()

        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.no_grad():
        output = op()
    if not output.isfinite().all():
        raise RuntimeError("the output is not finite")
    cotangent = torch.randn_like(output)
    del output

    def both() -> object:
        return torch.autograd.grad(op(), inputs, cotangent)

    if settings["passes"] == "graph":
        from titans.nn.cuda_graph import record

        return record(both).replay
    return both


def _layer_step(layer: torch.nn.Module, settings: dict[str, Any]) -> Step:
    """Forward and backward of a layer, gradients of its parameters and its input."""
    device = torch.device(settings["device"])
    layer.to(device)
    hidden = settings["heads"] * settings["dim"]
    x = torch.randn(settings["batch"], settings["tokens"], hidden, device=device, requires_grad=True)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = layer(x)[0]
        output.float().square().mean().backward()

    return step
