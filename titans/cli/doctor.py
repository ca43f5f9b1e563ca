"""``titans doctor``: what is here, which implementation will run, and whether it computes the right thing."""

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from titans import __version__
from titans.ops import MemorySpec, resolve_implementation
from titans.testing import MemoryInputs, evaluate, random_inputs, relative_error

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy", "datasets")

# Largest relative RMS error of any output, final state or gradient against the fp64 reference. In float64
# there is nothing but rounding (1e-14); in float32 the long sums of a chunk leave about 3e-6.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Arguments:
    """Show hardware and versions, and check the memory op against its reference (exit code 1 if it fails)."""


class Check(NamedTuple):
    """One comparison with the reference: the worst tensor's name and error, or what was raised instead."""

    case: str
    dtype: torch.dtype
    worst: str
    error: float
    passed: bool


def run(arguments: Arguments) -> int:
    """Print two tables: what is here, and the checks."""
    console = Console()
    console.print(_system_table())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(title=f"impl='{resolve_implementation('auto')}' on {device} against the fp64 reference")
    for column in ("case", "dtype", "worst of output, state, gradients", "relative error", "allowed", ""):
        table.add_column(column)
    failed = 0
    for check in self_check(device):
        failed += not check.passed
        table.add_row(
            check.case,
            str(check.dtype).removeprefix("torch."),
            check.worst,
            f"{check.error:.1e}",
            f"{_TOLERANCE[check.dtype]:.0e}",
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
            try:
                actual = evaluate(_moved(inputs.cast(dtype), device), "auto")
            except Exception as error:  # whatever a broken installation raises is the finding
                yield Check(name, dtype, f"{type(error).__name__}: {error}"[:60], float("inf"), False)
                continue
            errors = {
                key: relative_error(actual[key].cpu(), value)
                for key, value in expected.items()
                if value.is_floating_point() and value.numel()
            }
            worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
            yield Check(name, dtype, worst, errors[worst], errors[worst] <= _TOLERANCE[dtype])


def _moved(inputs: MemoryInputs, device: torch.device) -> MemoryInputs:
    moved = inputs.map(lambda _, tensor: tensor.to(device))
    state = replace(moved.state, position=moved.state.position.to(device))
    cu_seqlens = None if moved.cu_seqlens is None else moved.cu_seqlens.to(device)
    return replace(moved, state=state, cu_seqlens=cu_seqlens)


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
