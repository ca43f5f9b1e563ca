"""``titans``: finds the command, runs it, and turns users' mistakes into one line.

A command ``some-name`` is the module ``titans.cli.some_name`` with

* ``Arguments``, a dataclass whose fields are the options and whose field docstrings are the help,
* ``run(arguments) -> int``, which returns the exit code, and
* only where the options depend on one another (a recipe's fields), ``parse(argv) -> Arguments``.

Exit codes: 0 fine, 2 a user's mistake, 130 interrupted, 141 the reader of our output went away.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType, TracebackType

from titans.errors import UserError, unknown_name

COMMANDS = {
    "prepare": "turn text into token shards",
    "haystack": "turn books into a haystack for needle tasks",
    "train": "train a recipe on token shards",
    "generate": "continue a text with a trained model",
    "memorize": "read text of any length into a memory file",
    "ask": "ask a memory file, without the text",
    "eval-loss": "loss by position over long streams",
    "inspect": "show a memory at work on a text, as a page and as pictures",
    "doctor": "what hardware and versions are here, and a self-check",
    "bench": "time the memory op beside its peers",
    "demo": "a fact hidden in 200,000 tokens, found by a small trained memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``titans`` with ``argv`` (default: the process's arguments) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    developer = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        code = _dispatch(words)
        # Here and not at the interpreter's exit, where a closed pipe could no longer be caught.
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("titans: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `titans ... | head`: the interpreter flushes once more at exit, into something that accepts it.
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if developer or not _is_users_mistake(error):
            raise
        print(f"titans: error: {_message(error)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] == "--version":
        from titans import __version__

        print(f"titans {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        if name.startswith("-"):
            raise UserError(f"unknown option {name!r}: expected a command first (see titans --help)")
        raise unknown_name("command", name, COMMANDS)
    module = _load(name)
    try:
        if hasattr(module, "parse"):
            arguments = module.parse(rest)
        else:
            from titans.cli.arguments import parse_arguments

            arguments = parse_arguments(module.Arguments, rest, command=name)
    except SystemExit:  # --help: tyro has printed it
        return 0
    return int(module.run(arguments))


def _load(name: str) -> ModuleType:
    path = f"titans.cli.{name.replace('-', '_')}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:  # something that the command itself imports: not this message's business
            raise
        raise UserError(f"the command {name!r} is not part of this installation: no module {path}") from None


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: titans [--version] [--traceback] <command> [options]\n\n"
        f"{commands}\n\n"
        "titans <command> --help tells a command's options; --traceback shows where an error was raised."
    )


def _is_users_mistake(error: ValueError | OSError) -> bool:
    """A file that cannot be used, or a ``ValueError`` that one of our own checks raised.

    Any other ``ValueError`` is our bug, or a library's, and keeps its traceback.
    """
    if isinstance(error, UserError | OSError):
        return True
    frame: TracebackType | None = error.__traceback__
    raised_in = ""
    while frame is not None:
        raised_in = frame.tb_frame.f_globals.get("__name__", "")
        frame = frame.tb_next
    return raised_in.partition(".")[0] == "titans"


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
