"""``titans generate``: continue a text with a trained model, streaming it to the terminal."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from titans.cli.sampling import SamplingArguments
from titans.data.streams import file_stream
from titans.errors import UserError


@dataclass(frozen=True)
class Arguments(SamplingArguments):
    """Continue a text with a trained model, or with one that has read something before.

    Example: titans generate runs/mac --prompt "The memory " --max-new-tokens 200
    """

    checkpoint: tyro.conf.Positional[Path | None] = None
    """A checkpoint, the output folder of titans train (its last checkpoint), or a shipped checkpoint's name.
    With --memory it may be left out."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    memory: Path | None = None
    """Go on from this memory file (titans memorize); without a prompt, from the end of what was read."""


def run(arguments: Arguments) -> int:
    """Print the prompt and, as it is made, its continuation."""
    if arguments.checkpoint is None and arguments.memory is None:
        raise UserError("expected a checkpoint (or --memory)")
    prompt = _prompt(arguments)

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    pieces = _continuation(arguments, prompt)
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _continuation(arguments: Arguments, prompt: str) -> Iterator[str]:
    sampling = arguments.sampling()
    if arguments.memory is not None:
        from titans.inference.memory import Memory

        return Memory.load(arguments.memory, arguments.checkpoint).answer(prompt, sampling)
    assert arguments.checkpoint is not None

    from titans.inference.checkpoint import load_checkpoint
    from titans.inference.generate import generate_text

    model, tokenizer, _ = load_checkpoint(arguments.checkpoint)
    return generate_text(model, tokenizer, prompt, sampling)


def _prompt(arguments: Arguments) -> str:
    given = (arguments.prompt is not None) + (arguments.prompt_file is not None)
    if given == 0 and arguments.memory is not None:
        return ""
    if given != 1:
        raise UserError("expected one of --prompt and --prompt-file")
    if arguments.prompt_file is not None:
        if arguments.prompt_file.is_dir():
            raise UserError(f"--prompt-file {arguments.prompt_file}: expected a file, got a folder")
        prompt, option = "".join(file_stream(arguments.prompt_file).text()), "--prompt-file"
    else:
        prompt, option = arguments.prompt or "", "--prompt"
    if not prompt:
        raise UserError(f"{option}: the prompt is empty: expected at least one character")
    return prompt
