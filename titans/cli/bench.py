"""``titans bench``: time the memory op beside its peers, in one run, into one JSON file."""

import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from titans.errors import UserError, unknown_name


@dataclass(frozen=True)
class Arguments:
    """Time the memory op beside its peers (see --rows), forward alone and forward with backward, in bf16.

    Example: titans bench ops --rows linear-c64 gated-deltanet --output results
    """

    what: tyro.conf.Positional[Literal["ops"]]
    """ops: the operation, 32,768 tokens cut into 16, 4 and 1 sequences. Results go into ops_gpu.json."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where."""
    tokens: int = 32768
    """Of all sequences together."""
    batches: tuple[int, ...] = (16, 4, 1)
    """Numbers of sequences."""
    heads: tuple[str, ...] = ("16x64", "8x128")
    """Heads x width of a head."""
    impl: Literal["auto", "triton", "chunked"] = "triton"
    """Of the op in our rows."""
    rows: tuple[str, ...] = ()
    """Which rows; none named: all that measure the op. A wrong name is answered with a list of them."""
    output: Path = Path("results")
    """Folder of the JSON file."""
    commit: str | None = None
    """Of the code, for the file; asked of git where it is there."""
    compile_jobs: int = 12
    """Processes that compile Triton kernels side by side before anything is timed; 1: none."""


def run(arguments: Arguments) -> int:
    """Measure, save after every row, and print the table."""
    from titans.benchmark.ops_rows import DEFAULT_ROWS, ROWS

    names = arguments.rows or DEFAULT_ROWS
    for name in names:
        if name not in ROWS:
            raise unknown_name("row", name, ROWS)
    for batch in arguments.batches:
        if batch < 1 or arguments.tokens < batch or arguments.tokens % batch:
            raise UserError(f"--batches {batch}: expected a divisor of --tokens {arguments.tokens}")
    heads = tuple(_heads(word) for word in arguments.heads)

    import torch

    from titans.benchmark.harness import Session, print_table
    from titans.benchmark.ops_rows import COLUMNS, WORKLOADS, Plan, cells, measure

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (--device cpu measures at small sizes)")
    options = asdict(arguments) | {"rows": names}
    session = Session(
        {"cuda": "ops_gpu", "cpu": "ops_check"}[arguments.device],  # times on a CPU are ops_cpu.json's
        WORKLOADS,
        {name: value for name, value in options.items() if name not in ("output", "commit")},
        threads=1,
        command=_command(arguments),
        commit=arguments.commit,
        output=arguments.output,
    )
    plan = Plan(arguments.device, arguments.tokens, arguments.batches, heads, arguments.impl)
    measure(session, plan, names, arguments.compile_jobs)
    rows = [cells(entry) for entry in session.summary["table"]]
    print_table(f"{arguments.tokens:,} tokens, bf16, medians; GDN: Gated DeltaNet", COLUMNS, rows)
    print(f"written: {session.save()}")
    return 0


def _heads(word: str) -> tuple[int, int]:
    """ "16x64" -> (16, 64)."""
    heads, cross, dim = word.partition("x")
    if not (cross and heads.isdecimal() and dim.isdecimal() and int(heads) and int(dim)):
        raise UserError(f"--heads {word!r}: expected heads x width of a head, like 16x64")
    return int(heads), int(dim)


def _command(arguments: Arguments) -> str:
    """What to type for this run again, from anywhere."""
    words = ["titans", "bench", arguments.what]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if option.name not in ("what", "output", "commit") and value != option.default:
            words.append("--" + option.name.replace("_", "-"))
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)
