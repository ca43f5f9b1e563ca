"""The linear memory's chain of chunks as a scan over segments (`linear_scan.py`), against the oracle."""

from dataclasses import replace

import pytest
import torch

from tests.ops.test_kernels import worst_error
from titans.ops import MemorySpec
from titans.ops.kernels import linear_passes, passes
from titans.ops.kernels.linear_passes import LinearGroup
from titans.testing import random_inputs, relative_error


@pytest.fixture
def launched(monkeypatch):
    """Scans whatever has two segments; segments are of one chunk. The kernels launched since."""
    names = []

    def run_kernel(kernel, *arguments):
        names.append(kernel.__name__)
        run(kernel, *arguments)

    run = linear_passes.run_kernel
    monkeypatch.setattr(linear_passes, "run_kernel", run_kernel)
    monkeypatch.setattr(linear_passes, "SCAN_SEGMENTS", 2)
    monkeypatch.setattr(linear_passes, "SCAN_STEPS", 1)
    monkeypatch.setattr(LinearGroup, "PROGRAMS", 1000)
    return names


@pytest.mark.parametrize(
    ("options", "cells", "programs"),
    [
        ({"tokens": 75}, 8, 1000),
        ({"tokens": 92}, 12, 12),
        ({"tokens": 75, "momentum": None}, 8, 1000),
        ({"documents": (5, 0, 40, 1)}, 4, 1000),
        ({"documents": (70, 57)}, 6, 12),
    ],
    ids=["dense", "segments of two chunks", "no momentum", "packed", "packed, two chunks"],
)
def test_agreement_in_fp32(options, cells, programs, launched, monkeypatch):
    """With rows that start and end inside chunks; the state passes through two groups or more."""
    spec = MemorySpec(dim=16, depth=1, residual=programs == 12)
    inputs = random_inputs(spec, **options)
    monkeypatch.setattr(passes, "SCRATCH_BYTES", cells * LinearGroup.numbers_per_cell(spec, 16) * 4 * 2)
    monkeypatch.setattr(passes, "STEPS", 1)
    monkeypatch.setattr(LinearGroup, "PROGRAMS", programs)
    assert worst_error(inputs, torch.float32, twice=True)[0] < 1e-5
    for name in ("linear_carry", "linear_scan", "linear_carry_backward", "linear_scan_backward"):
        assert launched.count(name) >= 2


def test_without_a_backward(launched):
    """Nothing is kept: the states at the segments' starts lie in scratch memory."""
    inputs = random_inputs(MemorySpec(dim=16, depth=1), tokens=75).cast(torch.float32)
    with torch.no_grad():
        found = inputs.run("triton")
    assert "linear_scan" in launched
    expected = inputs.run("reference")
    assert relative_error(found.output, expected.output) < 1e-5
    assert relative_error(found.state.weights[0], expected.state.weights[0]) < 1e-5


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_growth_past_fp32(launched):
    """One key again and again with a huge step multiplies what a memory holds by 3e13 a chunk. An empty one
    holds nothing, and stays so: its transitions are infinite, and are not multiplied by its zeros."""
    inputs = random_inputs(MemorySpec(dim=16, depth=1), tokens=144, position=[0, 0]).cast(torch.float32)
    zero = inputs.map(lambda name, tensor: torch.zeros_like(tensor) if "state" in name else tensor)
    zero = replace(
        zero,
        k=inputs.k[:, :1, :].expand_as(inputs.k),
        v=torch.zeros_like(inputs.v),
        theta=torch.full_like(inputs.theta, 1e12),
    )
    with torch.no_grad():
        found = zero.run("triton")
    assert "linear_scan" in launched
    assert not found.output.any()
    assert not found.state.weights[0].any()
    one_value = zero.v.clone()
    one_value[:, 0] = 1.0
    with torch.no_grad():
        found = replace(zero, v=one_value).run("triton")
    assert not found.output[:, -1].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_error_budget_on_the_card(dim, chunk_size, dtype, launched):
    spec = MemorySpec(dim=dim, depth=1)
    inputs = random_inputs(spec, tokens=8 * chunk_size + 5, chunk_size=chunk_size, forget=0.02, step=0.1)
    worst, output = worst_error(inputs, dtype, "cuda")
    assert "linear_scan_backward" in launched
    assert output < (1e-4 if dtype == torch.float32 else 5e-3)
    assert worst < (1e-4 if dtype == torch.float32 else 2e-2)
