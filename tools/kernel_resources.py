"""Registers, spills and shared memory of the Triton kernels on Hopper, without a GPU.

    python -m tools.kernel_resources                                          every configuration
    python -m tools.kernel_resources --only mlp_write --warps 8 --set BF=32   other settings
    python -m tools.kernel_resources --write                                  results/kernel_resources.json

Triton compiles for sm_90 anywhere; the binary says what it needs. The settings are those of the launches. The
figures belong to one version of Triton, which the file names: they show that a change made a kernel spill,
not how fast it is.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans.benchmark.harness import commit
from titans.ops.kernels import layer_conv, layer_conv_wide, layer_norm, linear_passes, mlp_passes
from titans.ops.kernels.gates import gate_vectors
from titans.ops.kernels.launch import GATES, Launch
from titans.ops.kernels.linear import (
    linear_finish,
    linear_read,
    linear_read_backward,
    linear_write,
    linear_write_backward,
)
from titans.ops.kernels.linear_scan import (
    linear_carry,
    linear_carry_backward,
    linear_scan,
    linear_scan_backward,
)
from titans.ops.kernels.mlp_backward import (
    mlp_finish,
    mlp_read_backward_1,
    mlp_read_backward_1a,
    mlp_read_backward_2,
)
from titans.ops.kernels.mlp_forward import mlp_read, mlp_write
from titans.ops.kernels.mlp_write_backward import mlp_write_backward

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "kernel_resources.json"

INTEGERS = {"num_rows", "group_start", "group_end", "stride", "segment", "number", "T", "tokens"}
INDICES = {"table": "*i64", "cell_row": "*i32", "arrived": "*i32"}
# Gates, the state between groups, the LN and the gradients of these are fp32 for every dtype of q, k and v.
FP32 = re.compile(
    r"vectors\d?|(grad_)?(gain|bias|weight|theta|log_decay|log_momentum|first\d|end\d)|rows_(in|out)|gate_parts\d?|exchange"
    r"|kept_(W\d?|S)|transitions|slopes|\w+_(state|anchor)"
)


@dataclass(frozen=True)
class Configuration:
    """A kernel as one of its launches asks for it. dtype: of q, k, v and the tiles, as Triton spells it."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int
    dtype: str = "bf16"
    registers: int | None = None  # at most

    def signature(self) -> dict[str, str]:
        def type_of(argument: str) -> str:
            if argument in self.constants:
                return "constexpr"
            if argument in INTEGERS:
                return "i32"
            return INDICES.get(argument) or ("*fp32" if FP32.fullmatch(argument) else f"*{self.dtype}")

        return {argument: type_of(argument) for argument in self.kernel.arg_names}


def compiled_kernels() -> Iterator[Configuration]:
    """The table: chunk 64 and 16, linear and two layers, and float32, which tensor cores do not multiply."""
    serial = {
        linear_write: linear_passes.WRITE,
        linear_write_backward: linear_passes.WRITE_BACKWARD,
        linear_carry: linear_passes.CARRY,
        linear_carry_backward: linear_passes.CARRY,
    }
    for dtype, D, C in (("bf16", 64, 64), ("bf16", 128, 64), ("bf16", 64, 16), ("fp32", 64, 16)):
        for kernel, launch in serial.items():
            launch = linear_passes.serial_launch(launch, D, C, dtype == "fp32", crowded=False)
            yield _configuration(kernel, launch, dtype, {"D": D, "BV": min(launch.block, D), "C": C})
        parallel = {
            linear_read: linear_passes.READ,
            linear_read_backward: linear_passes.read_backward_launch(D, C),
            linear_finish: linear_passes.finish_launch(D, C, dtype == "fp32"),
        }
        for kernel, launch in parallel.items():
            yield _configuration(kernel, launch, dtype, {"D": D, "BV": min(launch.block, D), "C": C})
        for kernel in (linear_scan, linear_scan_backward) if (C, dtype) != (16, "bf16") else ():
            launch = linear_passes.scan_launch(D, dtype == "fp32")
            yield _configuration(kernel, launch, dtype, {"D": D, "BV": launch.block})
    serial = {mlp_write: mlp_passes.write_launch, mlp_write_backward: mlp_passes.write_backward_launch}
    for D, F, C in ((64, 64, 64), (64, 256, 64), (64, 64, 16)):
        for kernel, launch_for in serial.items():
            for alone in (False, True):
                launch = launch_for(C, alone)
                sizes = {"D": D, "F": F, "BF": min(launch.block, F), "C": C, "AHEAD": alone}
                yield _configuration(kernel, launch, "bf16", sizes, " alone" if alone else "")
        parallel = {
            mlp_read: mlp_passes.READ,
            mlp_read_backward_2: mlp_passes.READ_BACKWARD_2,
            mlp_read_backward_1: mlp_passes.READ_BACKWARD_1,
            mlp_read_backward_1a: mlp_passes.READ_BACKWARD_1,
            mlp_finish: mlp_passes.finish_launch(D, C, exact=False),
        }
        for kernel, launch in parallel.items():
            yield _configuration(kernel, launch, "bf16", {"D": D, "F": F, "BF": min(launch.block, F), "C": C})
    for C in (16, 64):
        yield _configuration(gate_vectors, GATES, "bf16", {"C": C})
    layer = {
        layer_conv.conv_forward: layer_conv.FORWARD,
        layer_conv.conv_backward: layer_conv.BACKWARD,
        layer_conv_wide.conv_slopes: layer_conv_wide.BACKWARD,
        layer_conv_wide.conv_backward_wide: layer_conv_wide.BACKWARD,
        layer_norm.norm_gate_forward: layer_norm.FORWARD,
        layer_norm.norm_gate_backward: layer_norm.BACKWARD,
    }
    for kernel, launch in layer.items():
        yield _layer_configuration(kernel, launch, heads=16, dim=64)


def _configuration(
    kernel: Any, launch: Launch, dtype: str, sizes: dict[str, int], suffix: str = ""
) -> Configuration:
    """With the defaults of a memory of its depth (a linear one has no residual)."""
    exact = dtype == "fp32"
    options = {
        "H": 4,
        "SETS": 1,
        "RESIDUAL": "F" in sizes,
        "NORM": True,
        "MOMENTUM": True,
        "SHARED": True,
        "EXACT": exact,
        "KEEP": True,
        "AGAIN": False,
        "LEAVE": True,
        "SEGMENTS": False,
        "PRECISION": "ieee" if exact else "tf32",
        "ACT": "gelu",
    }
    constants = {key: value for key, value in {**sizes, **options}.items() if key in kernel.arg_names}
    label = " ".join(f"{key}{sizes[key]}" for key in ("D", "F", "C") if key in sizes)
    name = f"{kernel.__name__} {label} {dtype}{suffix}"
    return Configuration(name, kernel, constants, launch.warps, launch.stages, dtype, launch.registers)


def _layer_configuration(kernel: Any, launch: Launch, heads: int, dim: int) -> Configuration:
    """Half-precision streams, fp32 parameters."""
    tokens = layer_conv.TOKENS if kernel is layer_conv.conv_backward else launch.block // dim
    wide = kernel in (layer_conv_wide.conv_slopes, layer_conv_wide.conv_backward_wide)
    sizes = {"H": heads, "D": dim, "BD": dim, "BH": launch.block // dim, "BT": tokens}
    sizes |= {"W": 6, "BW": 8} if wide else {"W": 4}
    options = {"TILES": layer_norm.TILES, "STAGES": launch.stages, "UNIT": True, "EPS": layer_conv_wide.EPS}
    constants = {key: value for key, value in {**sizes, **options}.items() if key in kernel.arg_names}
    return Configuration(
        f"layer {kernel.__name__} D{dim} bf16", kernel, constants, launch.warps, launch.stages
    )


def resources(configuration: Configuration) -> dict[str, int]:
    """Registers and bytes of spilled registers of a thread, shared memory of a block; warps, stages."""
    signature = configuration.signature()
    # As in a launch: PyTorch aligns to 16 bytes and more, which decides how wide loads are.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(configuration.kernel, signature, configuration.constants, aligned)
    options = {"num_warps": configuration.warps, "num_stages": configuration.stages, "enable_fp_fusion": True}
    if configuration.registers is not None:
        options["maxnreg"] = configuration.registers
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "warps": configuration.warps,
        "stages": configuration.stages,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"],
        "shared_bytes": compiled.metadata.shared,
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """What the assembler decided. STACK: kernels have no arrays of their own, so only spills lie there."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(program), "--dump-resource-usage", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    assert {"REG", "STACK"} <= usage.keys(), report
    return usage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="configurations whose name contains one of these"
    )
    parser.add_argument("--warps", type=int)
    parser.add_argument("--stages", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=INT", help="other constants")
    parser.add_argument("--write", action="store_true", help=f"all of them into {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.write and (arguments.only != [""] or arguments.warps or arguments.stages or arguments.set):
        parser.error("--write records every configuration as it is launched")
    changes = {key: int(value) for key, _, value in (change.partition("=") for change in arguments.set)}
    found = {}
    for configuration in compiled_kernels():
        if not any(part in configuration.name for part in arguments.only):
            continue
        configuration = replace(
            configuration,
            warps=arguments.warps or configuration.warps,
            stages=arguments.stages or configuration.stages,
            constants={**configuration.constants, **changes},
        )
        try:
            needs: dict[str, Any] = resources(configuration)
        except triton.CompilationError as error:  # the interpreter accepts more than the compiler
            needs = {"error": str(error)}
        found[configuration.name] = needs
        print(json.dumps({"name": configuration.name, **needs}), flush=True)
    if arguments.write:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "triton": triton.__version__,
            "target": "sm_90a",
            "kernels": found,
        }
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
