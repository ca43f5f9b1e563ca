"""The memory layer on the CPU beside lucidrains' titans-pytorch 0.5.5, in one run: speed, memory, linearity.

Forward and backward of one layer, batch 1, float32. The peer is measured twice: with the setting that
computes the same rule (gates for every token, gradients at the start of every 64 tokens: `chunk_size=1,
batch_size=64`; it wants 15 to 21 GB at 2048 tokens) and with its coarse default (`chunk_size=64`: one gate
and one gradient a chunk, all taken at the initial memory), which is something simpler.

    python benchmarks/bench_ops_cpu.py --peer-python PYTHON     an interpreter that has titans-pytorch
    python benchmarks/bench_ops_cpu.py --tokens 256 --lengths 256 512 --repeats 1     a smoke test
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from titans.benchmark.harness import Measurement, RowFailed, Session, Step, print_table

SHAPE = {"hidden_size": 384, "heads": 4, "head_dim": 64, "depth": 2, "expansion": 4, "chunk_size": 64}
LINEARITY = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MATMUL_SIZE = 2048


@dataclass
class Options:
    """Measure the layer, the op and the peer.

    tokens: length of the side-by-side rows.
    lengths: lengths of the linearity rows of our layer.
    peer_python: interpreter of an environment that has titans-pytorch; this one if it has it.
    peer_exact: also the peer's setting of the same rule (15 to 21 GB of memory at 2048 tokens).
    repeats: timed repeats of a row; the median is reported. The peer's exact setting takes at most 3.
    threads: of PyTorch.
    """

    tokens: int = 2048
    lengths: tuple[int, ...] = LINEARITY
    peer_python: str | None = None
    peer_exact: bool = True
    repeats: int = 7
    threads: int = 2


# Workloads: each runs in a process of its own and returns the step to be timed.


def forward_and_backward(layer: Any, tokens: int, hidden_size: int) -> Step:
    """Mean of squares of the first result; the input needs a gradient, too."""
    import torch

    x = torch.randn(1, tokens, hidden_size, requires_grad=True)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x)[0].square().mean().backward()

    return step


def our_layer(settings: dict[str, Any]) -> Step:
    """`titans.nn.NeuralMemory`, its projections made as narrow as the peer's: 384 -> 4 heads x 64 -> 384."""
    from torch import nn

    from titans.nn.gates import MemoryGates
    from titans.nn.memory import NeuralMemory, NeuralMemorySpec
    from titans.ops import MemorySpec

    size, heads, dim = settings["hidden_size"], settings["heads"], settings["head_dim"]
    memory = MemorySpec(dim=dim, depth=settings["depth"], expansion=settings["expansion"])
    spec = NeuralMemorySpec(hidden_size=heads * dim, memory=memory, chunk_size=settings["chunk_size"])
    layer = NeuralMemory(spec)
    if heads * dim != size:
        for name in ("q_proj", "k_proj", "v_proj", "gate_proj"):
            setattr(layer, name, nn.Linear(size, heads * dim, bias=False))
        layer.o_proj = nn.Linear(heads * dim, size, bias=False)
        layer.gates = MemoryGates(size, heads, memory.depth, spec.gates)
    return forward_and_backward(layer, settings["tokens"], size)


def our_op(settings: dict[str, Any]) -> Step:
    """`titans.ops.neural_memory` alone, gradients of every argument."""
    import torch

    from titans.ops import MemorySpec
    from titans.testing import random_inputs

    spec = MemorySpec(dim=settings["head_dim"], depth=settings["depth"], expansion=settings["expansion"])
    inputs = random_inputs(
        spec,
        batch=1,
        tokens=settings["tokens"],
        heads=settings["heads"],
        chunk_size=settings["chunk_size"],
        theta="layer",
        decay="layer",
        momentum="layer",
        position=[0],
        forget=0.002,
        dtype=torch.float32,
    )
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.tensors().items()}

    def step() -> None:
        output = inputs.map(lambda name, _: leaves[name]).run("chunked").output
        torch.autograd.grad(output.square().mean(), list(leaves.values()), allow_unused=True)

    return step


def peer_layer(settings: dict[str, Any]) -> Step:
    """`titans_pytorch.NeuralMemory` with momentum and decay, as it comes but for its chunk and batch size."""
    from titans_pytorch import NeuralMemory

    layer = NeuralMemory(
        dim=settings["hidden_size"],
        heads=settings["heads"],
        dim_head=settings["head_dim"],
        chunk_size=settings["peer_chunk_size"],
        batch_size=settings["peer_batch_size"],
        default_model_kwargs={"depth": settings["depth"], "expansion_factor": float(settings["expansion"])},
    )
    return forward_and_backward(layer, settings["tokens"], settings["hidden_size"])


def matmul(settings: dict[str, Any]) -> Step:
    import torch

    a, b = torch.randn(2, settings["size"], settings["size"]).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


# Counts.


def op_flops(shape: dict[str, int]) -> float:
    """Matrix products of one token, forward and backward, two for each multiply-add.

    Dense tiles (the masked half counts), the forward's key side computed again in the backward. D is the
    head's width, F the hidden one, C the chunk: 22 DF + 4 C (D + F) + 2 C^2 forward and
    70 DF + 14 C (D + F) + 8 C^2 backward for two layers; the linear memory has its own counts.
    """
    D, C = shape["head_dim"], shape["chunk_size"]
    F = D * shape["expansion"]
    if shape["depth"] == 1:
        per_head = 36 * D * D + 16 * C * D + 12 * C * C
    elif shape["depth"] == 2:
        per_head = 92 * D * F + 18 * C * (D + F) + 10 * C * C
    else:
        raise ValueError(f"no count for depth {shape['depth']}")
    return shape["heads"] * per_head


def layer_flops(shape: dict[str, int]) -> float:
    """The op and five projections (q, k, v, gate, output), forward and backward."""
    return op_flops(shape) + 5 * 6 * shape["hidden_size"] * shape["heads"] * shape["head_dim"]


# The run.


def find_peer(options: Options) -> str | None:
    if options.peer_python is not None:
        return options.peer_python
    return sys.executable if importlib.util.find_spec("titans_pytorch") else None


def matmul_rate(session: Session) -> float:
    """FLOP/s of one large float32 product."""
    best = min(session.measure("matmul", {"size": MATMUL_SIZE}, repeats=15, warmup=3).seconds)
    return 2 * MATMUL_SIZE**3 / best


def side_by_side(session: Session, options: Options) -> dict[str, Measurement]:
    shape = {**SHAPE, "tokens": options.tokens}
    jobs: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("our layer", "our_layer", shape, options.repeats, sys.executable),
        ("our op alone", "our_op", shape, options.repeats, sys.executable),
    ]
    peer = find_peer(options)
    if peer is None:
        print("No peer: titans-pytorch is not importable here; name its interpreter with --peer-python.")
    else:
        coarse = {**shape, "peer_chunk_size": SHAPE["chunk_size"], "peer_batch_size": None}
        jobs.append(("peer, coarse default", "peer_layer", coarse, options.repeats, peer))
    if peer is not None and options.peer_exact:
        exact = {**shape, "peer_chunk_size": 1, "peer_batch_size": SHAPE["chunk_size"]}
        jobs.append(("peer, same rule", "peer_layer", exact, min(options.repeats, 3), peer))
    found = {}
    for name, workload, settings, repeats, python in jobs:
        print(f"measuring: {name}, {options.tokens} tokens", flush=True)
        try:
            found[name] = session.measure(workload, settings, repeats=repeats, warmup=2, python=python)
        except RowFailed as failure:
            print(f"  failed: {failure}")
    return found


def report_side_by_side(
    session: Session, options: Options, found: dict[str, Measurement], peak_flops: float
) -> None:
    ours = found["our layer"]
    flops = {"our layer": layer_flops(SHAPE), "our op alone": op_flops(SHAPE)}
    rows = []
    for name, row in found.items():
        share = flops[name] * options.tokens / row.median / peak_flops if name in flops else None
        entry: dict[str, Any] = {
            "tokens_per_second": options.tokens / row.median,
            "seconds": row.median,
            "peak_gb": row.peak_bytes / 1e9,
            "share_of_matmul_peak": share,
            "time_over_ours": row.median / ours.median,
            "memory_over_ours": row.peak_bytes / max(ours.peak_bytes, 1),
        }
        session.summary[name] = entry
        rows.append(
            [
                name,
                f"{entry['seconds']:.3f}",
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['peak_gb']:.3f}",
                "" if share is None else f"{share:.0%}",
                f"{entry['time_over_ours']:.2f}x",
                f"{entry['memory_over_ours']:.2f}x",
            ]
        )
    columns = ["forward + backward", "s", "tokens/s", "GB", "of peak", "time/ours", "GB/ours"]
    print_table(f"batch 1, dim 384, 4 x 64, depth 2 x 4, chunk 64, T = {options.tokens}", columns, rows)


def linearity(session: Session, options: Options) -> None:
    """Time and memory per token of our layer over a range of lengths."""
    rows, points = [], []
    for tokens in options.lengths:
        print(f"measuring: our layer, {tokens} tokens", flush=True)
        repeats = max(3, min(options.repeats, 32768 // tokens))
        try:
            row = session.measure("our_layer", {**SHAPE, "tokens": tokens}, repeats=repeats, warmup=1)
        except RowFailed as failure:
            print(f"  failed: {failure}")
            continue
        points.append(
            {
                "tokens": tokens,
                "seconds": row.median,
                "microseconds_per_token": row.median / tokens * 1e6,
                "peak_gb": row.peak_bytes / 1e9,
                "kilobytes_per_token": row.peak_bytes / tokens / 1e3,
            }
        )
        rows.append([f"{tokens}", *(f"{value:,.3f}" for value in list(points[-1].values())[1:])])
    session.summary["linearity"] = points
    if len(points) > 1:
        first, last = points[0], points[-1]
        grown = math.log(last["tokens"] / first["tokens"])
        session.summary["exponents"] = {
            name: math.log(max(last[name], 1e-9) / max(first[name], 1e-9)) / grown
            for name in ("seconds", "peak_gb")
        }
    print_table("our layer, length by length", ["tokens", "s", "us/token", "peak GB", "kB/token"], rows)


def main(options: Options) -> None:
    # Which interpreter held the peer is this machine's business; its version is in the rows.
    stored = {**asdict(options), "peer_python": options.peer_python is not None}
    session = Session("ops_cpu", Path(__file__).resolve(), stored, options.threads)
    before = matmul_rate(session)
    found = side_by_side(session, options)
    linearity(session, options)
    after = matmul_rate(session)
    peak = max(before, after)
    session.summary["matmul_gflops"] = {"before": before / 1e9, "after": after / 1e9}
    session.summary["mflop_per_token"] = {"layer": layer_flops(SHAPE) / 1e6, "op": op_flops(SHAPE) / 1e6}
    if "our layer" in found:
        report_side_by_side(session, options, found, peak)
    print(f"matmul: {before / 1e9:.0f} GFLOP/s before, {after / 1e9:.0f} after", end="")
    print(": something else used this machine, measure again" if min(before, after) < 0.9 * peak else "")
    print(f"written: results/{session.save().name}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
