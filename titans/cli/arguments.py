"""Typed arguments: a dataclass is a command's argument list (tyro), and a mistake in it is one line."""

import contextlib
import io
from typing import TypeVar

import tyro

from titans.errors import UserError

Arguments = TypeVar("Arguments")


def parse_arguments(
    kind: type[Arguments], argv: list[str], *, command: str, default: Arguments | None = None
) -> Arguments:
    """An instance of the dataclass ``kind`` filled from ``argv``.

    Field docstrings are the help text. ``default`` (an instance) gives the values of the fields not named in
    ``argv``: a recipe, for example. ``--help`` prints and raises ``SystemExit(0)``.

    Raises:
        UserError: an option is unknown, missing or has a value of the wrong type.
    """
    prog = f"titans {command}"
    missing = tyro.MISSING_NONPROP if default is None else default
    complaint = io.StringIO()
    try:
        # tyro prints mistakes as boxes of several lines and exits: here they become one line like all others.
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=argv, prog=prog, default=missing)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise UserError(f"{_one_line(complaint.getvalue())} (see {prog} --help)") from None


def _one_line(box: str) -> str:
    """The first part of tyro's error box, and the option that it proposes instead, without the frame.

    Rules divide the parts. The frame carries the title; without UTF-8 there is none and the title is a part.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        words = line.strip("│").split()
        if words and set("".join(words)) <= {"─", "-"}:
            parts.append([])
        elif not line.startswith(("╭", "╰")):
            parts[-1] += words
    if not box.lstrip().startswith("╭"):
        parts = parts[1:]
    if not parts or not parts[0]:
        return "the arguments could not be read"
    message = " ".join(parts[0])
    for words in parts[1:]:
        if words[:3] == ["Perhaps", "you", "meant:"] and len(words) > 3:
            return f"{message}: did you mean {words[3]}?"
    return message
