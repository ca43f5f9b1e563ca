"""Error and time of every kernel of one memory on this GPU, with the launch settings asked for.

    python -m tools.time_kernels --depth 2 --expansion 4 --chunk 64
    python -m tools.time_kernels --depth 2 --expansion 4 --chunk 64 --serial 8 64 --parallel 8 64

Error first: Triton miscompiles some settings on Hopper (docs/decisions.md, "Kernels"), so a time says nothing
without it. One setting a process: an illegal access costs a process its GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from titans.benchmark.ops import our_op
from titans.ops import MemorySpec
from titans.ops.kernels import linear_passes, mlp_passes
from titans.ops.kernels.launch import Launch
from titans.testing import evaluate, random_inputs, relative_error

SERIAL = ("WRITE", "WRITE_BACKWARD")
PARALLEL = ("READ", "READ_BACKWARD", "READ_BACKWARD_1", "READ_BACKWARD_2", "FINISH")
TOKENS = 32768


def errors(spec: MemorySpec, chunk_size: int) -> dict[str, float]:
    """Relative RMS errors against float64, over two chunks and a bit: more random tokens turn chaotic."""
    inputs = random_inputs(spec, tokens=2 * chunk_size + 6, chunk_size=chunk_size, step=0.1, forget=0.02)
    inputs = inputs.cast(torch.bfloat16)
    expected = evaluate(inputs.cast(torch.float64), "chunked")
    actual = evaluate(inputs.to("cuda"), "triton")
    return {
        name: relative_error(actual[name].cpu(), value)
        for name, value in expected.items()
        if value.is_floating_point() and value.numel()
    }


def times(step: Callable[[], object], repeats: int = 5) -> str:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock = time.perf_counter()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    host = (time.perf_counter() - clock) / repeats * 1e3
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        name = event.key.partition("(")[0][:24]
        kernels[name if event.key.partition("_")[0] in ("linear", "mlp", "gate") else "others"] += (
            event.self_device_time_total / 1e3
        )
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(kernels.items(), key=lambda item: -item[1]))
    total = sum(kernels.values())
    return f"{start.elapsed_time(end) / repeats:.2f} ms (host {host:.2f}, kernels {total:.2f}: {parts})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--expansion", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--serial", type=int, nargs=2, metavar=("WARPS", "BLOCK"))
    parser.add_argument("--parallel", type=int, nargs=2, metavar=("WARPS", "BLOCK"))
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 4, 1])
    arguments = parser.parse_args()
    passes = linear_passes if arguments.depth == 1 else mlp_passes
    for names, setting in ((SERIAL, arguments.serial), (PARALLEL, arguments.parallel)):
        for name in names:
            if setting and hasattr(passes, name):
                warps, block = setting
                setattr(passes, name, Launch(warps=warps, stages=arguments.stages, block=block))
    spec = MemorySpec(dim=arguments.dim, depth=arguments.depth, expansion=arguments.expansion)
    found = errors(spec, arguments.chunk)
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    print(f"output {found['output']:.1e}, worst {worst} {found[worst]:.1e}", flush=True)
    settings = {
        "device": "cuda",
        "dtype": "bfloat16",
        "heads": arguments.heads,
        "dim": arguments.dim,
        "depth": arguments.depth,
        "expansion": arguments.expansion,
        "chunk_size": arguments.chunk,
        "impl": "triton",
        "passes": "both",
    }
    for batch in arguments.batches:
        step = our_op(settings | {"batch": batch, "tokens": TOKENS // batch})
        print(f"B{batch}: {times(step)}", flush=True)


if __name__ == "__main__":
    main()
