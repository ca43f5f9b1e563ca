"""``titans bench``: time the memory op or whole models beside their peers, in one run, into one file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from titans.cli.arguments import parse_arguments
from titans.errors import UserError, unknown_name

if TYPE_CHECKING:
    from titans.benchmark.harness import Session


@dataclass(frozen=True)
class Arguments:
    """What both kinds take."""

    rows: tuple[str, ...] = ()
    """Which rows; none named: all. A wrong name is answered with a list of them."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where. Figures of a CPU go into files of their own."""
    output: Path = Path("results")
    """Folder of the JSON file, which is written after every row."""
    commit: str | None = None
    """Of the code, for the file; asked of git where it is there."""
    compile_jobs: int = 12
    """Processes that compile side by side before anything is timed; 1: none."""
    budget: float | None = None
    """Seconds after which nothing more is measured: the rows that are left are stored as such."""
    resume: bool = False
    """Keep the rows that the file holds already, where they come from this machine and commit."""


@dataclass(frozen=True)
class OpsArguments(Arguments):
    """Time the memory op beside its peers, forward alone and forward with backward, in bf16.

    32,768 tokens are cut into 16, 4 and 1 sequences. Results go into ops_gpu.json.
    Example: titans bench ops --rows linear-c64 gated-deltanet --output results
    """

    tokens: int = 32768
    """Of all sequences together."""
    batches: tuple[int, ...] = (16, 4, 1)
    """Numbers of sequences."""
    heads: tuple[str, ...] = ("16x64", "8x128")
    """Heads x width of a head."""
    impl: Literal["auto", "triton", "chunked"] = "triton"
    """Of the op in our rows."""


@dataclass(frozen=True)
class ModelsArguments(Arguments):
    """Time training steps of whole models, bf16 and compiled: tokens/s at several lengths.

    A step is forward, backward and AdamW on random tokens. Results go into models_gpu.json.
    Example: titans bench models --rows attention lmm-f64 --lengths 4096 16384
    """

    size: str = "340m"
    """A named size of titans.models."""
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    """Tokens of a sequence."""
    step_tokens: int = 65536
    """Tokens of a step."""
    micro_tokens: int = 32768
    """Tokens of one backward, at most; fewer where memory does not suffice, never less than a sequence."""
    compiled: bool = True
    """torch.compile every block."""
    graph: bool = True
    """On a GPU: replay a step's forward and backward as one CUDA graph, as training.cuda_graph does."""
    gpus: int = 1
    """Cards of this machine, of one kind, that measure side by side, each its share of models and lengths."""


@dataclass(frozen=True)
class StreamArguments(Arguments):
    """Time reading and decoding at positions up to millions of tokens, with what they hold in memory.

    Results go into stream_gpu.json, those of --device cpu (two threads) into stream_cpu.json. Nothing is
    compiled beforehand: --compile-jobs has no effect.
    Example: titans bench stream --rows lmm attention --sizes 170m

    Side by side, a GPU each: CUDA_VISIBLE_DEVICES=0 titans bench stream --rows lmm --output parts/lmm, and so
    on; then titans bench stream --merge parts/lmm parts/mag.
    """

    sizes: tuple[str, ...] = ()
    """Named sizes of titans.models; none: 170m and 340m, on a CPU two layers of width 256."""
    lengths: tuple[int, ...] = ()
    """Tokens read before; none: from 1K to 2M (and 10M once), on a CPU 10K, 100K and 1M."""
    batches: tuple[int, ...] = (1, 64)
    """Streams that decode together."""
    merge: tuple[Path, ...] = ()
    """Measure nothing, but put the files of these folders, of one commit and kind of machine, into one."""


Kinds = (
    Annotated[OpsArguments, tyro.conf.subcommand("ops")]
    | Annotated[ModelsArguments, tyro.conf.subcommand("models")]
    | Annotated[StreamArguments, tyro.conf.subcommand("stream")]
)


def parse(argv: list[str]) -> Arguments:
    """The kind of benchmark and its options; one of the other kind is answered with whose it is."""
    own = {"ops": OpsArguments, "models": ModelsArguments, "stream": StreamArguments}
    for word in argv[1:] if argv and argv[0] in own else []:
        option = word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")
        for kind, other in own.items():
            has, lacks = (option in {field.name for field in fields(k)} for k in (other, own[argv[0]]))
            if word.startswith("--") and has and not lacks:
                raise UserError(f"{word}: an option of titans bench {kind}, not of titans bench {argv[0]}")
    arguments: Arguments = parse_arguments(Kinds, argv, command="bench")  # type: ignore[arg-type]
    return arguments


def run(arguments: Arguments) -> int:
    """Measure, save after every row, and print the table."""
    if arguments.compile_jobs < 1:
        raise UserError(f"--compile-jobs {arguments.compile_jobs}: expected 1 or more")
    if arguments.budget is not None and arguments.budget <= 0:
        raise UserError(f"--budget {arguments.budget:g}: expected more than 0 seconds")
    if isinstance(arguments, ModelsArguments):
        return _models(arguments)
    if isinstance(arguments, StreamArguments):
        return _stream(arguments)
    assert isinstance(arguments, OpsArguments)
    return _ops(arguments)


def _ops(arguments: OpsArguments) -> int:
    from titans.benchmark import ops_rows

    rows = _rows(arguments, ops_rows.ROWS)
    for batch in arguments.batches:
        if batch < 1 or arguments.tokens < batch or arguments.tokens % batch:
            raise UserError(f"--batches {batch}: expected a divisor of --tokens {arguments.tokens}")
    heads = tuple(_heads(word) for word in arguments.heads)
    session = _session("ops", arguments, rows, ops_rows.WORKLOADS)
    plan = ops_rows.Plan(arguments.device, arguments.tokens, arguments.batches, heads, arguments.impl)
    ops_rows.measure(session, plan, rows, arguments.compile_jobs)
    title = f"{arguments.tokens:,} tokens, bf16, medians; GDN: Gated DeltaNet"
    return _finish(session, title, ops_rows.COLUMNS, list(map(ops_rows.cells, session.summary["table"])))


def _models(arguments: ModelsArguments) -> int:
    from titans.benchmark import models_rows

    rows = _rows(arguments, models_rows.ROWS)
    if arguments.step_tokens < 1:
        raise UserError(f"--step-tokens {arguments.step_tokens}: expected 1 or more")
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: expected 1 or more")
    if arguments.micro_tokens < 1:
        raise UserError(f"--micro-tokens {arguments.micro_tokens}: expected 1 or more")
    for length in arguments.lengths:
        if length < 1 or arguments.step_tokens % length:
            raise UserError(f"--lengths {length}: expected divisors of --step-tokens {arguments.step_tokens}")

    from titans.models import SIZES

    if arguments.size not in SIZES:
        raise unknown_name("model size", arguments.size, SIZES)
    session = _session("models", arguments, rows, models_rows.WORKLOADS)
    plan = models_rows.Plan(
        arguments.device,
        arguments.size,
        arguments.lengths,
        arguments.step_tokens,
        arguments.micro_tokens,
        arguments.compiled,
        arguments.graph and arguments.device == "cuda",
    )
    models_rows.measure(session, plan, rows, arguments.compile_jobs)
    title = f"{arguments.size}, training, thousands of tokens/s (over full attention's) by length"
    return _finish(session, title, *models_rows.table(session.summary["table"]))


def _stream(arguments: StreamArguments) -> int:
    from titans.benchmark import stream_rows

    if arguments.merge:
        return _merge_streams(arguments)
    rows = _rows(arguments, stream_rows.ROWS)
    for option in ("lengths", "batches"):
        if any(number < 1 for number in getattr(arguments, option)):
            raise UserError(f"--{option} {getattr(arguments, option)}: expected numbers of 1 or more")

    from titans.models import SIZES

    for size in arguments.sizes:
        if size not in SIZES:
            raise unknown_name("model size", size, SIZES)
    on_gpu = arguments.device == "cuda"
    small = () if on_gpu or arguments.sizes else tuple(stream_rows.CPU_MODEL.items())
    plan = stream_rows.Plan(
        arguments.device,
        arguments.sizes or (("170m", "340m") if on_gpu else ("tiny",)),
        arguments.lengths or (stream_rows.LENGTHS if on_gpu else stream_rows.CPU_LENGTHS),
        arguments.batches,
        small,
    )
    session = _session("stream", arguments, rows, stream_rows.WORKLOADS, cpu_file="cpu", cpu_threads=2)
    stream_rows.measure(session, plan, rows)
    return _finish(session, _stream_title(on_gpu), *stream_rows.table(session.summary["table"]))


def _stream_title(on_gpu: bool) -> str:
    return f"streams, {'bfloat16' if on_gpu else 'float32'}, random weights, by tokens read"


def _merge_streams(arguments: StreamArguments) -> int:
    """No GPU is needed for it: nothing runs."""
    from titans.benchmark.harness import print_table
    from titans.benchmark.stream_merge import merge
    from titans.benchmark.stream_rows import LENGTHS, LONGEST, table
    from titans.files import replace_file

    for option in fields(arguments):
        if option.name not in ("merge", "device", "output") and (
            getattr(arguments, option.name) != option.default
        ):
            raise UserError(
                f"--{option.name.replace('_', '-')} says how to measure; --merge measures nothing"
            )
    on_gpu = arguments.device == "cuda"
    name = f"stream_{'gpu' if on_gpu else 'cpu'}.json"
    record, plan = merge([folder / name for folder in arguments.merge])
    usual = set(plan.lengths) - {LONGEST} == set(LENGTHS)
    alike = replace(
        arguments,
        merge=(),
        rows=tuple(record["options"]["rows"]),
        sizes=plan.sizes,
        lengths=() if usual else plan.lengths,
        batches=plan.batches or arguments.batches,
    )
    record["command"] = _command("stream", alike)
    arguments.output.mkdir(parents=True, exist_ok=True)
    replace_file(arguments.output / name, (json.dumps(record, indent=2) + "\n").encode())
    print_table(_stream_title(on_gpu), *table(record["summary"]["table"]))
    print(f"written: {arguments.output / name}")
    return 0


def _rows(arguments: Arguments, known: Collection[str]) -> tuple[str, ...]:
    for name in arguments.rows:
        if name not in known:
            raise unknown_name("row", name, known)
    return arguments.rows or tuple(known)


def _heads(word: str) -> tuple[int, int]:
    """ "16x64" -> (16, 64)."""
    heads, cross, dim = word.partition("x")
    if not (cross and heads.isdecimal() and dim.isdecimal() and int(heads) and int(dim)):
        raise UserError(f"--heads {word!r}: expected heads x width of a head, like 16x64")
    return int(heads), int(dim)


def _session(
    kind: str,
    arguments: Arguments,
    rows: tuple[str, ...],
    workloads: Path,
    cpu_file: str = "check",
    cpu_threads: int = 1,
) -> Session:
    """Times of a CPU are kept apart: ops_check.json, models_check.json, stream_cpu.json."""
    import torch

    from titans.benchmark.harness import Session

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (--device cpu measures at small sizes)")
    options = asdict(arguments) | {"rows": rows}
    return Session(
        f"{kind}_{'gpu' if arguments.device == 'cuda' else cpu_file}",
        workloads,
        {
            name: value
            for name, value in options.items()
            if name not in ("output", "commit", "resume", "merge")
        },
        threads=1 if arguments.device == "cuda" else cpu_threads,
        command=_command(kind, arguments),
        commit=arguments.commit,
        output=arguments.output,
        budget=arguments.budget,
        resume=arguments.resume,
        gpus=_gpus(arguments.gpus) if isinstance(arguments, ModelsArguments) else (),
    )


def _gpus(count: int) -> list[str]:
    """The names of so many; of none where one is enough, or there are no others to be told from."""
    from titans.benchmark.machine import visible_gpus

    if count == 1:
        return []
    if len(gpus := visible_gpus()) < count:
        raise UserError(f"--gpus {count}: PyTorch sees {len(gpus)} here")
    return gpus[:count]


def _command(kind: str, arguments: Arguments) -> str:
    """What to type for this run again, from anywhere."""
    words = ["titans", "bench", kind]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if option.name in ("output", "commit", "budget", "resume") or value == option.default:
            continue
        name = option.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _finish(session: Session, title: str, columns: list[str], rows: list[list[str]]) -> int:
    from titans.benchmark.harness import print_table

    print_table(title, columns, rows)
    print(f"written: {session.save()}")
    return 0
