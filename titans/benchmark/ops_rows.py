"""The rows of `titans bench ops`: what is measured at which shapes, and what the measurements say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from titans.benchmark.harness import Job, Measurement, Progress, RowFailed, Session

WORKLOADS = Path(__file__).resolve().parent / "ops.py"
PEER = "gated-deltanet"
PEER_SHARES = 4  # processes that compile its 75 kernels, at each width
COPY = "copy"
COPY_BYTES = 2**31
COMPILE_TIMEOUT = 150.0  # seconds of one process


@dataclass(frozen=True)
class Row:
    """A line of the table: a workload and its settings, at every shape but where it names its own.

    batches: those of the run that it takes; None: all. first_heads: only the first of the run's heads.
    shapes: `(B, T)` of its own. passes: "forward", "both", "graph" (on a GPU; see `ops.py`).
    """

    workload: str
    settings: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] | None = None
    first_heads: bool = False
    shapes: tuple[tuple[int, int], ...] | None = None
    passes: tuple[str, ...] = ("forward", "both")
    repeats: int = 10  # of 3 to 100 ms each: they scatter by a few per cent, and there are 120 rows
    warmup: int = 2
    timeout: float = 90.0


_ALL_PASSES = ("forward", "both", "graph")


def _memory(depth: int, expansion: int, chunk_size: int) -> dict[str, Any]:
    return {"depth": depth, "expansion": expansion, "chunk_size": chunk_size}


_MEMORIES = {"linear": (1, 1), "mlp1": (2, 1), "mlp2": (2, 2), "mlp4": (2, 4)}
OURS = {
    f"{name}-c{chunk}": Row("our_op", _memory(*shape, chunk), passes=_ALL_PASSES)
    for name, shape in _MEMORIES.items()
    for chunk in (64, 16)
}
# Eager PyTorch: slow, and its memory grows with every chunk, so at one shape alone. To torch.compile the op
# is one opaque operator: compiled it would be the same.
_CHUNKED = {
    f"{name}-c64-chunked": Row(
        "our_op",
        _memory(*_MEMORIES[name], 64) | {"impl": "chunked"},
        batches=(4,),
        first_heads=True,
        repeats=3,
        warmup=1,
        timeout=30.0,
    )
    for name in ("linear", "mlp4")
}
# One token through the memories of 24 layers; a row of its own shape.
DECODE = {
    "decode-mlp4": Row(
        "decode_step",
        _memory(2, 4, 16) | {"layers": 24},
        shapes=((1, 1),),
        first_heads=True,
        passes=("forward",),
        repeats=100,  # of 0.2 ms
        warmup=10,
    )
}
# Layer against layer. The peer's exact setting holds the fast weights of every token: about 2.6 MB a token
# and head, so 43 GB at (1, 1024) with 16 heads, and (4, 2048) cannot fit any card.
_LUCIDRAINS = _memory(2, 4, 64)
LAYERS = {
    "layer-mlp4-c64": Row(
        "our_layer", _LUCIDRAINS, shapes=((1, 1024), (4, 2048)), first_heads=True, passes=("both",)
    ),
    "lucidrains": Row(
        "lucidrains_layer",
        _LUCIDRAINS | {"peer_chunk_size": 1, "peer_batch_size": 64},
        shapes=((1, 1024),),
        repeats=1,
        warmup=1,
        timeout=45.0,
        first_heads=True,
        passes=("both",),
    ),
    "lucidrains-gate-per-chunk": Row(
        "lucidrains_layer",
        _LUCIDRAINS | {"peer_chunk_size": 64, "peer_batch_size": 64},
        shapes=((4, 2048),),
        repeats=1,
        warmup=1,
        timeout=45.0,
        first_heads=True,
        passes=("both",),
    ),
}
_OTHERS = {
    PEER: Row("gated_deltanet", passes=_ALL_PASSES),
    "attention": Row("attention", passes=_ALL_PASSES),
    **DECODE,
    **_CHUNKED,
    **LAYERS,
}
# In the order in which they are measured: a run that is cut off holds what the targets need.
_ORDER = (
    *(PEER, "attention", "linear-c64", "mlp1-c64", "mlp4-c64", "decode-mlp4"),
    *("linear-c16", "mlp1-c16", "mlp4-c16", "mlp2-c64", "mlp2-c16", *_CHUNKED, *LAYERS),
)
ROWS = {name: (OURS | _OTHERS)[name] for name in _ORDER}

# Upper limits on the time of forward and backward over Gated DeltaNet's, by the number of sequences.
TIME_TARGETS = {
    "linear-c64": {16: 1.0, 4: 1.0, 1: 1.0},
    "mlp1-c64": {16: 1.25, 4: 1.25, 1: 3.0},
    "mlp4-c64": {16: 4.0, 4: 4.0, 1: 8.0},
}
MEMORY_TARGETS = {"linear-c64": 1.5, "mlp4-c64": 2.5}
CHUNK_16_TARGET = 2.0  # over the same memory at chunk 64
FLOOR_TARGET = 3.0  # over the byte floor: the linear memory, 16 sequences
LUCIDRAINS_TARGET = 200.0  # times faster
DECODE_TARGET = 3.0  # over reading and writing the state once, at this rate
DECODE_RATE = 4.0  # TB/s


@dataclass(frozen=True)
class Plan:
    """A run: where, on how many tokens, cut into which batches, with which `(heads, dim)`."""

    device: str
    tokens: int
    batches: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    impl: str

    def jobs(self, name: str) -> list[Job]:
        """Everything that is measured for the row."""
        row = ROWS[name]
        batches = self.batches if row.batches is None else [b for b in self.batches if b in row.batches]
        shapes = row.shapes or tuple((batch, self.tokens // batch) for batch in batches)
        common = {"device": self.device, "dtype": "bfloat16"}
        if row.workload == "our_op":
            common["impl"] = self.impl
        settings = [
            common
            | {"batch": batch, "tokens": tokens, "heads": heads, "dim": dim, "passes": passes}
            | row.settings
            for heads, dim in (self.heads[:1] if row.first_heads else self.heads)
            for batch, tokens in shapes
            for passes in row.passes
            if passes != "graph" or self.device == "cuda"
        ]
        return [Job(row.workload, each, row.repeats, row.warmup, row.timeout, name) for each in settings]

    def compilations(self, names: Sequence[str]) -> list[list[Job]]:
        """What compiles Triton kernels, in groups for a process each, the longest first.

        Gated DeltaNet chooses among about 75 configurations by timing, so each of its groups compiles a share
        of them. It chooses again, from all, when it is measured: what is found beside others is not kept.
        """
        shares = [{"share": [number, PEER_SHARES]} for number in range(PEER_SHARES)]
        groups: dict[str, list[Job]] = {}
        for name in names:
            row = ROWS[name]
            ours = row.workload == "our_op" and self.impl == "triton" and "impl" not in row.settings
            if not (ours or name == PEER or row.workload in ("decode_step", "our_layer")):
                continue
            for job in self.jobs(name):
                # Forward alone and other numbers of sequences use the same kernels of the peer.
                first = (job.settings["batch"], job.settings["passes"]) == (self.batches[0], "both")
                if name == PEER and not first:
                    continue
                if ours and job.settings["passes"] != "both":
                    continue
                for share in shares if name == PEER else [{}]:
                    job_of_share = replace(job, settings=job.settings | share)
                    group = f"{name} {job.settings['heads']}x{job.settings['dim']} {share.get('share', '')}"
                    groups.setdefault(group, []).append(job_of_share)

        def weight(group: list[Job]) -> float:
            settings = group[0].settings
            width = settings["dim"] * settings.get("expansion", 1) * settings.get("depth", 1)
            return float("inf") if "share" in settings else width

        return sorted(groups.values(), key=weight, reverse=True)


Shape = tuple[int, int, int, int]  # batch, tokens, heads, dim
Found = dict[tuple[str, Shape, str], Measurement | RowFailed]


def measure(session: Session, plan: Plan, names: Sequence[str], compile_jobs: int) -> None:
    """One process compiles each kind of row, one measures all; saved, with the summary, after every row."""
    jobs = [job for name in names for job in plan.jobs(name)]
    if plan.device == "cuda":
        if compile_jobs > 1:
            left = [name for name in names if not all(map(session.knows, plan.jobs(name)))]
            session.compile(plan.compilations(left), compile_jobs, COMPILE_TIMEOUT, FLA_CACHE_RESULTS="0")
        settings = {"device": "cuda", "bytes": COPY_BYTES}
        jobs.insert(0, Job("copy", settings, repeats=10, warmup=2, timeout=60.0, name=COPY))
    if PEER in names:
        session.summary["note"] = (
            "Gated DeltaNet's backward was timed with its guard taken out: on Hopper with Triton 3.4 to "
            "3.7.0 it refuses to run because its gradients are wrong there (timing only; TileLang, its other "
            "way there, was not used)."
        )
    found: Found = {}
    progress = Progress([job.name for job in jobs])
    for job, result in session.measure_each(jobs):
        if job.name != COPY:
            found[job.name, _shape(job.settings), job.settings["passes"]] = result
        elif isinstance(result, Measurement):
            session.summary["copy_terabytes_per_second"] = 2 * COPY_BYTES / result.median / 1e12
        session.summary["table"] = summarise(
            found, session.summary.get("copy_terabytes_per_second"), first_seconds(session)
        )
        session.save()
        progress.add(job.name, result)


def _shape(setting: dict[str, Any]) -> Shape:
    return setting["batch"], setting["tokens"], setting["heads"], setting["dim"]


def first_seconds(session: Session) -> dict[str, float]:
    """What the first forward and backward took before anything was compiled, by `_first_key`.

    A process compiles its first row; the others of the same widths find the kernels.
    """
    found: dict[str, float] = {}
    for row in session.compiled:
        if "first_seconds" in row and "share" not in row["settings"]:
            found.setdefault(_first_key(row["workload"], row["settings"]), row["first_seconds"])
    return found


def _first_key(workload: str, setting: dict[str, Any]) -> str:
    names = ("heads", "dim", "depth", "expansion", "chunk_size")
    return " ".join([workload, *(str(setting.get(name)) for name in names)])


def summarise(
    found: Found, copy_rate: float | None, first: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """One entry a row and shape: milliseconds, peak memory, both over Gated DeltaNet's, and the targets.

    A failed measurement leaves its number None and its message in "error". Targets are those of a GPU:
    left out where `copy_rate` (TB/s, of the same run) is None.
    """

    def value(name: str, shape: Shape, passes: str, of: Callable[[Measurement], float]) -> float | None:
        result = found.get((name, shape, passes))
        return of(result) if isinstance(result, Measurement) else None

    entries = []
    for name, shape in dict.fromkeys((name, shape) for name, shape, _ in found):
        batch, tokens, heads, dim = shape
        both, peer = (value(which, shape, "both", _milliseconds) for which in (name, PEER))
        graph, peer_graph = (value(which, shape, "graph", _milliseconds) for which in (name, PEER))
        peak, peer_peak = (value(which, shape, "both", _peak) for which in (name, PEER))
        errors = [found.get((name, shape, passes)) for passes in _ALL_PASSES]
        entry: dict[str, Any] = {
            "row": name,
            "batch": batch,
            "tokens": tokens,
            "heads": heads,
            "dim": dim,
            "forward_ms": value(name, shape, "forward", _milliseconds),
            "both_ms": both,
            "ratio": _over(both, peer),
            "graph_ms": graph,
            "graph_ratio": _over(graph, peer_graph),
            "peak_gb": peak,
            "peak_ratio": _over(peak, peer_peak),
            "terabytes_per_second": None,
            "first_seconds": (first or {}).get(
                _first_key(ROWS[name].workload, ROWS[name].settings | {"heads": heads, "dim": dim})
            ),
            "error": next((str(error) for error in errors if isinstance(error, RowFailed)), None),
            "targets": [],
        }
        if (counted := least_bytes(name, shape)) is not None:
            seconds = both if name in OURS else entry["forward_ms"]
            entry["terabytes_per_second"] = _over(counted / 1e9, seconds)
        if copy_rate is not None:
            sibling = value(name.replace("-c16", "-c64"), shape, "both", _milliseconds)
            ours = value("layer-mlp4-c64", shape, "both", _milliseconds)
            entry["targets"] = [
                {"what": what, "limit": limit, "value": got, "met": got <= limit}
                for what, limit, got in _targets(entry, sibling, ours, copy_rate)
                if got is not None
            ]
        entries.append(entry)
    return entries


def _targets(
    entry: dict[str, Any], sibling: float | None, our_layer: float | None, copy_rate: float
) -> Iterator[tuple[str, float, float | None]]:
    """What was asked of this row: name, upper limit, and what came."""
    name, batch = entry["row"], entry["batch"]
    if batch in TIME_TARGETS.get(name, {}):
        yield "time", TIME_TARGETS[name][batch], entry["ratio"]
        yield "time in a graph", TIME_TARGETS[name][batch], entry["graph_ratio"]
    if name in MEMORY_TARGETS:
        yield "memory", MEMORY_TARGETS[name], entry["peak_ratio"]
    if name == "linear-c64" and batch == 16:
        yield "byte floor", FLOOR_TARGET, _over(copy_rate, entry["terabytes_per_second"])
    if name.endswith("-c16"):
        yield "chunk 64", CHUNK_16_TARGET, _over(entry["both_ms"], sibling)
    if name.startswith("lucidrains"):
        yield "our layer / it", 1 / LUCIDRAINS_TARGET, _over(our_layer, entry["both_ms"])
    if name == "decode-mlp4":
        yield "byte floor", DECODE_TARGET, _over(DECODE_RATE, entry["terabytes_per_second"])


def least_bytes(name: str, shape: Shape) -> float | None:
    """Bytes that a row moves at least; None where nobody counted them.

    Forward and backward of the linear memory, states of chunks in bf16: per token and head
    14 D + 8 D^2 / C + 68 forward and 44 D + 16 D^2 / C + 8 C + 130 backward. A decoding step: weights and
    momentum read and written, the anchor read, all in fp32.
    """
    batch, tokens, heads, dim = shape
    settings = ROWS[name].settings
    if name in ("linear-c64", "linear-c16"):
        chunk_size = settings["chunk_size"]
        per_token = 58 * dim + 24 * dim * dim / chunk_size + 8 * chunk_size + 198
        return batch * tokens * heads * per_token
    if name == "decode-mlp4":
        matrices = 2 * dim * dim * settings["expansion"]
        return batch * heads * settings["layers"] * matrices * 4 * (2 + 2 + 1)
    return None


def _milliseconds(result: Measurement) -> float:
    return result.median * 1e3


def _peak(result: Measurement) -> float:
    return result.peak_bytes / 1e9


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


COLUMNS = [
    "row",
    "shape",
    "fwd ms",
    "fwd + bwd ms",
    "/ GDN",
    "in a graph",
    "/ GDN",
    "peak GB",
    "/ GDN",
    "TB/s",
    "first s",
    "targets",
]
NUMBERS = {
    "forward_ms": ".2f",
    "both_ms": ".2f",
    "ratio": ".2f",
    "graph_ms": ".2f",
    "graph_ratio": ".2f",
    "peak_gb": ".2f",
    "peak_ratio": ".2f",
    "terabytes_per_second": ".2f",
    "first_seconds": ".0f",
}


def cells(entry: dict[str, Any]) -> list[str]:
    """An entry of the summary as a line of the table under COLUMNS."""
    targets = [
        f"{target['what']} {target['value']:.3g} {'<=' if target['met'] else 'MISSED'} {target['limit']:g}"
        for target in entry["targets"]
    ]
    if entry["error"]:
        targets.append("failed: " + entry["error"].partition("}: ")[2][:60])
    return [
        entry["row"],
        f"B{entry['batch']} T{entry['tokens']} {entry['heads']}x{entry['dim']}",
        *("" if entry[name] is None else format(entry[name], form) for name, form in NUMBERS.items()),
        "; ".join(targets),
    ]
