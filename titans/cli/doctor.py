"""``titans doctor``: what is here, which implementation will run, and whether it computes the right thing."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from math import inf, isnan
from typing import Literal, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from titans import __version__
from titans.ops import MemorySpec, resolve_implementation
from titans.testing import MemoryInputs, evaluate, random_inputs, relative_error

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "datasets")

# Largest relative RMS error of any output, final state or gradient against the fp64 reference. In float64
# there is nothing but rounding (1e-14); in float32 the long sums of a chunk leave about 3e-6.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# In bfloat16 the products round at 2e-3; states and gradients pass through more of them than the output.
_HALF_TOLERANCE_OF_OUTPUT, _HALF_TOLERANCE = 5e-3, 2e-2


@dataclass(frozen=True)
class Arguments:
    """Show hardware and versions, and check the memory op against its reference (exit code 1 if it fails)."""


class Check(NamedTuple):
    """One comparison with the reference: the worst tensor's name and error, or what was raised instead."""

    case: str
    impl: Literal["auto", "triton"]
    dtype: torch.dtype
    worst: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def run(arguments: Arguments) -> int:
    """Print two tables: what is here, and the checks."""
    console = Console()
    console.print(_system_table())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(title=f"the memory op on {device} against the fp64 reference")
    for column in ("case", "impl", "dtype", "worst tensor or gradient", "relative error", "allowed", ""):
        table.add_column(column)
    failed = 0
    checks = self_check(device)
    for check in chain(checks, kernel_check(device)) if device.type == "cuda" else checks:
        failed += not check.passed
        table.add_row(
            check.case,
            resolve_implementation(check.impl),
            str(check.dtype).removeprefix("torch."),
            check.worst,
            f"{check.error:.1e}",
            f"{check.allowed:.0e}",
            "[green]ok[/]" if check.passed else "[red]FAILED[/]",
        )
    console.print(table)
    if failed:
        console.print(
            f"{failed} checks failed: results of this installation cannot be trusted. Please report."
        )
    return 1 if failed else 0


def self_check(device: torch.device) -> Iterator[Check]:
    """Outputs, final state and every gradient of ``impl="auto"``, against ``"reference"`` in fp64."""
    cases = {
        "linear memory": (MemorySpec(dim=16, depth=1), {"tokens": 37}),
        "two layers": (MemorySpec(dim=16, depth=2, expansion=2), {"tokens": 37}),
        "two layers, gates per layer": (
            MemorySpec(dim=16, depth=2, expansion=2),
            {"tokens": 21, "theta": "layer", "decay": "layer", "momentum": "layer"},
        ),
        "four layers, no momentum": (
            MemorySpec(dim=8, depth=4, expansion=2),
            {"tokens": 21, "momentum": None},
        ),
        "packed documents": (MemorySpec(dim=16, depth=2, expansion=2), {"documents": (5, 1, 16, 19)}),
    }
    for name, (spec, options) in cases.items():
        inputs = random_inputs(spec, **options)  # type: ignore[arg-type]  # a literal dict of its arguments
        expected = evaluate(inputs, "reference")
        for dtype in (torch.float64, torch.float32):
            yield _compare(name, inputs.cast(dtype), "auto", dtype, device, expected)


def kernel_check(device: torch.device) -> Iterator[Check]:
    """The same of the Triton kernels in bfloat16, where ``impl="auto"`` would run them.

    70 tokens: chunks that are full, cut and entered in the middle, at both chunk sizes. Small steps, and not
    more tokens: noise that is written and read on and on turns chaotic, in any precision.
    """
    dtype = torch.bfloat16
    specs = {
        "linear memory": MemorySpec(dim=64, depth=1),
        "two layers": MemorySpec(dim=64, depth=2, expansion=1),
        "two layers, expansion 4": MemorySpec(dim=64, depth=2, expansion=4),
    }
    for (name, spec), chunk_size in product(specs.items(), (16, 64)):
        if resolve_implementation("auto", device, dtype, spec, chunk_size) != "triton":
            continue
        inputs = random_inputs(spec, tokens=70, chunk_size=chunk_size, step=0.1, forget=0.02).cast(dtype)
        expected = evaluate(inputs.cast(torch.float64), "reference")  # of the same, rounded operands
        yield _compare(f"{name}, chunk {chunk_size}", inputs, "triton", dtype, device, expected)


def _compare(
    case: str,
    inputs: MemoryInputs,
    impl: Literal["auto", "triton"],
    dtype: torch.dtype,
    device: torch.device,
    expected: dict[str, Tensor],
) -> Check:
    """The tensor that is worst by what it is allowed."""
    try:
        actual = evaluate(inputs.to(device), impl)
    except Exception as error:  # whatever a broken installation raises is the finding
        return Check(case, impl, dtype, f"{type(error).__name__}: {error}"[:60], inf, 0.0)
    found = []
    for name, value in expected.items():
        if value.is_floating_point() and value.numel():
            half = _HALF_TOLERANCE_OF_OUTPUT if name == "output" else _HALF_TOLERANCE
            off = relative_error(actual[name].cpu(), value)
            found.append(Check(case, impl, dtype, name, off, _TOLERANCE.get(dtype, half)))
    return max(found, key=lambda check: inf if isnan(check.error) else check.error / check.allowed)


def _system_table() -> Table:
    table = Table(title="what is here", show_header=False)
    table.add_row("titans", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        table.add_row(package, version)
    table.add_row("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            table.add_row(
                f"GPU {index}",
                f"{properties.name}, {memory}, capability {properties.major}.{properties.minor}",
            )
    else:
        table.add_row("GPU", "none that this torch can use")
    table.add_row("memory op", f"impl='auto' runs '{resolve_implementation('auto')}'")
    return table
