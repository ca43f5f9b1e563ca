"""``titans demo``: a fact hidden in a long text, and whether a small trained memory knows it at the end."""

import importlib.util
import json
import random
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from titans.data.sources import PYTHON_DOCS
from titans.errors import UserError
from titans.files import replace_file

if TYPE_CHECKING:  # torch takes seconds to import: a mistake in the options must not wait for it
    from rich.console import Console

    from titans.inference.checkpoint import LoadedCheckpoint
    from titans.inspection.search_report import Found, Side
    from titans.tasks.long_text import Hidden, LongText
    from titans.tasks.search import Reader

MEMORY = "needle-mag"
TWIN = "needle-sliding"  # the same data, size and window of attention, without a memory
LENGTHS = (4_096, 16_384, 65_536)  # of the picture, beside that of the text
DEPTHS = (0.1, 0.9)  # of the picture, beside that of the fact
PICTURE_SECONDS = 60.0  # beyond which nothing more is begun for the picture
_CONTEXT = 3  # sentences shown before and after the fact
_PROBE = 2048  # tokens, to see how many threads read fastest


@dataclass(frozen=True)
class Arguments:
    """Hide a fact in a long real text and ask a small trained model for it at the end.

    The text streams through constant memory on the CPU; the model's twin without a memory reads the same.
    Exit code 0: the model with the memory knows the fact. Ctrl-C ends it, and nothing half-written stays.
    """

    source: str = PYTHON_DOCS
    """A text file or folder; by default the documentation text that Python ships. Less text than --tokens
    comes again, its paragraphs in another order each time."""
    tokens: int = 200_000
    """Tokens to read, at least."""
    depth: float | None = None
    """Where the fact is hidden: the share of the text before it, 0 to 1; by default drawn."""
    seed: int = 0
    """Draws the fact, its place and the order of the text."""
    model: Path = Path(MEMORY)
    """The model with a memory: a shipped checkpoint's name, a checkpoint's folder or that of a training."""
    twin: Path = Path(TWIN)
    """The model to compare, with the same tokenizer."""
    out: Path = Path("runs/demo")
    """Folder for report.html, picture.png and demo.json."""


def run(arguments: Arguments) -> int:
    """Check the options, load both models, then search."""
    if arguments.depth is not None and not 0 <= arguments.depth <= 1:
        raise UserError(f"--depth: expected a share of the text, 0 to 1, got {arguments.depth}")
    if arguments.tokens < 256:
        raise UserError(f"--tokens: expected at least 256, got {arguments.tokens}")

    if arguments.model == arguments.twin:
        raise UserError(f"--twin: expected another model than {arguments.model}")

    from titans.data.sources import Corpus

    corpus = Corpus([arguments.source])
    arguments.out.mkdir(parents=True, exist_ok=True)

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from titans.inference.checkpoint import from_pretrained
    from titans.inference.fingerprint import tokenizer_fingerprint
    from titans.tasks.long_text import LongText

    transformers_logging.disable_progress_bar()
    models = [from_pretrained(each, device="cpu") for each in (arguments.model, arguments.twin)]
    if len({tokenizer_fingerprint(each.tokenizer) for each in models}) > 1:
        raise UserError(f"--twin {arguments.twin}: expected the tokenizer of {arguments.model}, got another")
    texts = (document.text for document in corpus)
    try:
        text = LongText.of(texts, models[0].tokenizer, arguments.tokens, seed=arguments.seed)
    except UserError as error:
        raise UserError(f"{arguments.source}: {error}") from None
    return _search(arguments, models, text, Console(highlight=False, soft_wrap=True))


def _search(
    arguments: Arguments, models: "list[LoadedCheckpoint]", text: "LongText", console: "Console"
) -> int:
    from titans import __version__
    from titans.cli.reading_bar import ReadingBar
    from titans.inspection.search_report import Found
    from titans.tasks.search import Reader
    from titans.tasks.survey import Place, plan, survey

    depth = arguments.depth
    if depth is None:
        depth = round(random.Random(f"depth/{arguments.seed}").uniform(0.25, 0.75), 2)
    hidden = text.hide(random.Random(f"fact/{arguments.seed}"), arguments.tokens, depth)
    words = text.words(hidden)
    console.rule("1. the text")
    console.print(
        f"{arguments.source}: {hidden.tokens:,} tokens, about {words:,} words\n"
        f"hidden at {hidden.depth:.0%}, after {hidden.position:,} tokens:\n  {hidden.sentence}\n"
        f"asked at the end:\n  {hidden.question.strip()}",
        markup=False,
    )
    _set_threads(models[0], text)
    names = str(arguments.model), str(arguments.twin)
    lengths = [*(length for length in LENGTHS if length < arguments.tokens), arguments.tokens]
    others = plan(text, lengths, (*DEPTHS, depth), arguments.seed)
    marks = [other.position for other in others.values()]
    readers, sides = {}, []
    for title, name, loaded in zip(("2. the memory", "3. its twin without one"), names, models, strict=True):
        console.rule(f"{title}: {name}")
        readers[name] = Reader(loaded.model, loaded.tokenizer, text, marks)
        sides.append(_ask(name, readers[name], loaded, hidden))
        _print_side(console, sides[-1], hidden)

    console.rule("4. other facts, at other depths and lengths")
    cells = survey(
        others,
        readers,
        {side.name: hidden.tokens / side.seconds for side in sides},
        {Place(arguments.tokens, depth): {side.name: side.answer for side in sides}},
        seconds=PICTURE_SECONDS,
        bar=ReadingBar,
    )
    found = Found(
        source=arguments.source,
        tokens=hidden.tokens,
        words=words,
        position=hidden.position,
        depth=hidden.depth,
        before=" ".join(text.sentences[max(hidden.place - _CONTEXT, 0) : hidden.place]),
        sentence=hidden.sentence,
        after=" ".join(text.sentences[hidden.place : min(hidden.place + _CONTEXT, hidden.last)]),
        question=hidden.question.strip(),
        value=hidden.value,
        sides=tuple(sides),
        cells=tuple(cells),
        command=_command(arguments),
        version=__version__,
    )
    _print_cells(console, found)
    _write(arguments.out, found, console)
    memory = sides[0]
    if memory.answer.right:
        console.print(
            f"{memory.name} found the number after {hidden.tokens - hidden.position:,} more tokens."
        )
        return 0
    console.print(
        f"{memory.name} did not find the number: it answered {memory.answer.given or 'nothing'!r}, "
        f"the true value is {hidden.value}.",
        markup=False,
    )
    return 1


def _set_threads(loaded: "LoadedCheckpoint", text: "LongText") -> None:
    """The products are small: on busy cores, sharing them among threads can take ten times as long."""
    import torch

    from titans.inference.stream import Stream

    seconds = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        stream = Stream(loaded.model)
        stream.read(text.ids[:64])
        started = time.perf_counter()
        stream.read(text.ids[:_PROBE])
        seconds[threads] = time.perf_counter() - started
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))


def _ask(name: str, reader: "Reader", loaded: "LoadedCheckpoint", hidden: "Hidden") -> "Side":
    from titans.cli.reading_bar import ReadingBar
    from titans.inspection.search_report import Side
    from titans.tasks.search import key_value_bytes

    config = loaded.model.config
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    window = f", attention to the last {config.window_size} tokens" if config.window_size else ""
    with ReadingBar("reading", reader.cost(hidden)) as bar:
        answer = reader.answer(hidden, bar.add)
        seconds = bar.seconds
    return Side(
        name=name,
        what=f"{config.variant}, {parameters / 1e6:.1f} M parameters{window}",
        answer=answer,
        seconds=seconds,
        key_value_bytes=key_value_bytes(loaded.model, hidden.tokens),
    )


def _print_side(console: "Console", side: "Side", hidden: "Hidden") -> None:
    from titans.inspection.search_report import in_units

    answer = side.answer
    console.print(
        f"answer  {answer.given or '(nothing)'}   true value  {answer.value}   "
        f"{'right' if answer.right else 'wrong'}   (in full: {answer.text!r})\n"
        f"{side.what}; {side.seconds:.1f} s, {hidden.tokens / side.seconds:,.0f} tokens/s; "
        f"state {in_units(answer.state_bytes)}, "
        f"a key-value cache of all tokens would take {in_units(side.key_value_bytes)}",
        markup=False,
    )


def _print_cells(console: "Console", found: "Found") -> None:
    from rich.table import Table

    lengths = sorted({cell.length for cell in found.cells})
    for side in found.sides:
        table = Table(title=side.name, title_justify="left")
        for column in ("depth", *(f"{length:,}" for length in lengths)):
            table.add_column(column, justify="right", no_wrap=True)
        for depth in sorted({cell.depth for cell in found.cells}):
            answers = [cell.answers[side.name] for cell in found.cells if cell.depth == depth]
            words = ("-" if answer is None else "right" if answer.right else "wrong" for answer in answers)
            table.add_row(f"{depth:.0%}", *words)
        console.print(table)


def _write(out: Path, found: "Found", console: "Console") -> None:
    """Three files, each whole or as it was."""
    from titans.inspection.search_report import render, to_plain

    pictures: list[bytes] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from titans.inspection.search_picture import draw

        pictures = [draw(found), draw(found, dark=True)]
        replace_file(out / "picture.png", pictures[0])
    replace_file(out / "report.html", render(found, pictures).encode())
    replace_file(out / "demo.json", (json.dumps(to_plain(found), indent=1) + "\n").encode())
    console.print(f"report: {out / 'report.html'}", markup=False)


def _command(arguments: Arguments) -> str:
    words = ["titans", "demo"]
    for name, value in vars(arguments).items():
        if value != getattr(Arguments, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)
