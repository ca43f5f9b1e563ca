"""``titans generate``: continue a text with a trained model, streaming it to the terminal."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.data.streams import file_stream
from titans.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: a mistake in the options must not wait for it
    from titans.inference.generate import Sampling


@dataclass(frozen=True)
class Arguments:
    """Continue a text with a trained model.

    Example: titans generate runs/demo --prompt "The memory " --max-new-tokens 200
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or the output folder of titans train (its last checkpoint)."""
    prompt: str | None = None
    """The text to continue."""
    prompt_file: Path | None = None
    """A file with the text to continue."""
    max_new_tokens: int = 256
    """Tokens to add, at most."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution, above 1 flattens it."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that hold this share of the probability."""
    greedy: bool = False
    """Always the likeliest token."""
    seed: int = 0
    """The same seed gives the same text."""


def run(arguments: Arguments) -> int:
    """Print the prompt and, as it is made, its continuation."""
    prompt = _prompt(arguments)

    from transformers.utils import logging as transformers_logging

    from titans.inference.checkpoint import load_checkpoint
    from titans.inference.generate import generate_text

    sampling = _sampling(arguments)
    transformers_logging.disable_progress_bar()
    model, tokenizer, _ = load_checkpoint(arguments.checkpoint)
    sys.stdout.write(prompt)
    for piece in generate_text(model, tokenizer, prompt, sampling):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _prompt(arguments: Arguments) -> str:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
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


def _sampling(arguments: Arguments) -> "Sampling":
    from titans.inference.generate import Sampling

    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        greedy=arguments.greedy,
        seed=arguments.seed,
    )
