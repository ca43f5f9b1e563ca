"""``titans ask``: a question to a memory file, answered without the text."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from titans.cli.sampling import SamplingArguments
from titans.errors import UserError


@dataclass(frozen=True)
class Arguments(SamplingArguments):
    """Ask a memory file: what the model says after all that it has read and the question.

    The memory file is not changed. Example: titans ask notes.memory "Who wrote the letter? Answer:"
    """

    memory: tyro.conf.Positional[Path]
    """A file written by titans memorize."""
    question: tyro.conf.Positional[str]
    """The text to answer."""
    model: Path | None = None
    """The model that the memory belongs to (a shipped one by its name); by default where the file says."""


def run(arguments: Arguments) -> int:
    """Print the answer as it is made."""
    if not arguments.question:
        raise UserError("the question is empty: expected at least one character")

    from transformers.utils import logging as transformers_logging

    from titans.inference.memory import Memory

    sampling = arguments.sampling()
    transformers_logging.disable_progress_bar()
    memory = Memory.load(arguments.memory, arguments.model)
    for piece in memory.answer(arguments.question, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
