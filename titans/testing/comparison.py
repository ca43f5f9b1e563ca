"""Run an implementation forward and backward, and compare two results tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from titans.ops import MemoryOutput
from titans.testing.inputs import MemoryInputs


def named_results(result: MemoryOutput) -> dict[str, Tensor]:
    """Output and final state by name; `position` is among them."""
    named = {"output": result.output}
    for name in ("weights", "momentum", "anchor"):
        tensors = getattr(result.state, name)
        named |= {f"final {name}[{layer}]": tensor for layer, tensor in enumerate(tensors)}
    return named | {"final position": result.state.position}


def random_cotangents(results: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """One random cotangent per floating result; equal shapes and seed give equal draws in any dtype."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=rng, dtype=torch.float64).to(tensor)
        for name, tensor in results.items()
        if tensor.is_floating_point()
    }


def evaluate(
    inputs: MemoryInputs,
    impl: Literal["auto", "reference", "chunked", "triton"],
    *,
    seed: int = 0,
    wanted: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Output, final state and the gradient of every argument under random cotangents on all results.

    Gradients are named "grad q", "grad state.weights[0]", ...; one that does not exist counts as zero.
    Strides of the arguments are kept. `wanted` limits which arguments need a gradient.
    """
    named = inputs.tensors()
    leaves = {
        name: tensor.detach().requires_grad_(wanted is None or name in wanted)
        for name, tensor in named.items()
    }
    results = named_results(inputs.map(lambda name, _: leaves[name]).run(impl))
    cotangents = random_cotangents(results, seed)
    sought = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    reached = {name: cotangent for name, cotangent in cotangents.items() if results[name].requires_grad}
    gradients = torch.autograd.grad(
        [results[name] for name in reached], list(sought.values()), list(reached.values()), allow_unused=True
    )
    return {name: tensor.detach() for name, tensor in results.items()} | {
        f"grad {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(sought.items(), gradients, strict=True)
    }


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of `expected`, in float64; absolute below an RMS of 1e-6."""
    actual, expected = actual.double(), expected.double()
    scale = expected.square().mean().sqrt().clamp_min(1e-6)
    return ((actual - expected).square().mean().sqrt() / scale).item()


def assert_agreement(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-9
) -> None:
    """Every tensor of `expected` is in `actual`, elementwise within rtol of the tensor's largest value.

    Raises `AssertionError` with one line for each tensor that is off, or not finite, or of other shape.
    """
    problems = [f"missing: {name}" for name in expected if name not in actual]
    for name, want in expected.items():
        got = actual.get(name)
        if got is None:
            continue
        if got.shape != want.shape:
            problems.append(f"{name}: shape {list(got.shape)} instead of {list(want.shape)}")
            continue
        if not got.isfinite().all():
            problems.append(f"{name}: not finite")
            continue
        if want.numel() == 0:
            continue
        if not want.is_floating_point():
            if not torch.equal(got, want):
                problems.append(f"{name}: {got.tolist()} instead of {want.tolist()}")
            continue
        scale = max(want.abs().max().item(), 1e-3)  # values are O(1): below 1e-3 the error is absolute
        error = (got.double() - want.double()).abs().max().item() / scale
        if not error <= rtol:
            problems.append(f"{name}: relative error {error:.2e} > {rtol:.0e}")
    if problems:
        raise AssertionError("\n".join(["results differ:", *problems]))
