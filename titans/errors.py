"""The error that means "the user can fix this": shown as one line on the command line, with exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a file, a name, a value.

    The message names the argument, what was expected and what came. The command line prints it on one line
    without a traceback; from Python it is an ordinary ``ValueError``.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a ``name`` that is not among the ``known`` ones of its ``kind`` ("recipe", "field", ...).

    It proposes the nearest known name, so that a misspelling is mended at a glance::

        >>> unknown_name("recipe", "tinny", ["demo", "tiny"])
        UserError("unknown recipe 'tinny': did you mean 'tiny'? known: demo, tiny")
    """
    choices = sorted(known)
    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return UserError(f"unknown {kind} {name!r}: {hint}known: {', '.join(choices) or 'none'}")
