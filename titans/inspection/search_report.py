"""What `titans demo` found, as one HTML page that needs no network and runs no script."""

from __future__ import annotations

import base64
import html
import string
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from itertools import groupby
from typing import Any

from titans.inspection.page import content_hash, template
from titans.inspection.tokens import visible
from titans.tasks.search import Answer
from titans.tasks.survey import Cell


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's part. what: the model in words. key_value_bytes: what full attention would have kept."""

    name: str
    what: str
    answer: Answer
    seconds: float
    key_value_bytes: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """All that was found.

    source: what the text is made of. tokens, words: of the whole prompt. position: tokens before the fact.
    before, after: the text around it. sides: the memory, then its twin.
    """

    source: str
    tokens: int
    words: int
    position: int
    depth: float
    before: str
    sentence: str
    after: str
    question: str
    value: str
    sides: tuple[Side, ...]
    cells: tuple[Cell, ...]
    command: str
    version: str


def render(found: Found, pictures: Sequence[bytes] = ()) -> str:
    """The page. Text is escaped; the policy allows the page's own style and pictures in it, nothing else.

    pictures: PNG files, one for light surroundings and one for dark ones; or none.
    """
    style = template("page.css") + template("search.css")
    plain = {name: _shown(value) for name, value in vars(found).items() if isinstance(value, str)}
    return string.Template(template("search.html")).substitute(
        plain,
        policy=f"default-src 'none'; img-src data:; style-src '{content_hash(style)}'",
        style=style,
        tokens=f"{found.tokens:,}",
        words=f"{found.words:,}",
        position=f"{found.position:,}",
        percent=f"{found.depth:.0%}",
        place=f"{1000 * found.depth:.1f}",
        sides="\n".join(map(_side, found.sides)),
        figures="\n".join(_figures(side, found.tokens) for side in found.sides),
        picture=_picture(pictures),
        cells="\n".join(_tables(found)),
    )


def to_plain(value: Any) -> Any:
    """A `Found` for JSON: dataclasses as dictionaries, an answer with whether it is right."""
    if isinstance(value, Answer):
        return value.to_dict()
    if is_dataclass(value):
        return {name: to_plain(each) for name, each in vars(value).items()}
    if isinstance(value, dict):
        return {name: to_plain(each) for name, each in value.items()}
    return [to_plain(each) for each in value] if isinstance(value, tuple) else value


def in_units(size: float) -> str:
    """Bytes as a person reads them."""
    for unit, of in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def _side(side: Side) -> str:
    answer = side.answer
    verdict = "right" if answer.right else "wrong"
    return (
        f'<div class="answer {verdict}"><h2>{_shown(side.name)}</h2> <i>{_shown(side.what)}</i>'
        f"<p><b>{_shown(answer.given) or '(nothing)'}</b> <span>{verdict}</span></p>"
        f'<p class="faint">in full: <code>{_shown(answer.text)}</code></p></div>'
    )


def _figures(side: Side, tokens: int) -> str:
    values = (
        _shown(side.name),
        f"{side.seconds:,.1f} s",
        f"{tokens / side.seconds:,.0f}",
        in_units(side.answer.state_bytes),
        in_units(side.key_value_bytes),
    )
    return "<tr>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def _picture(pictures: Sequence[bytes]) -> str:
    if not pictures:
        return ""
    light, dark = (f"data:image/png;base64,{base64.b64encode(each).decode('ascii')}" for each in pictures)
    return (
        f'<figure><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="Answers by depth and length, as in the tables below"></picture></figure>'
    )


def _tables(found: Found) -> list[str]:
    """One table for each model: a row for each depth, a column for each length."""
    lengths = sorted({cell.length for cell in found.cells})
    head = "".join(f"<th>{length:,}</th>" for length in lengths)
    made = []
    for side in found.sides if found.cells else ():
        by_depth = groupby(sorted(found.cells, key=lambda cell: cell.depth), key=lambda cell: cell.depth)
        rows = []
        for depth, cells in by_depth:
            answers = {cell.length: cell.answers[side.name] for cell in cells}
            columns = "".join(_cell(answers.get(length)) for length in lengths)
            rows.append(f"<tr><th>{depth:.0%}</th>{columns}</tr>")
        made.append(
            f'<table class="cells"><caption>{_shown(side.name)}</caption>'
            f"<tr><th>depth \\ tokens</th>{head}</tr>{''.join(rows)}</table>"
        )
    return made


def _cell(answer: Answer | None) -> str:
    if answer is None:
        return '<td class="faint">not measured</td>'
    sign, verdict = ("✓", "right") if answer.right else ("✗", "wrong")
    given = _shown(answer.given) or "(nothing)"
    return f'<td class="{verdict}">{sign} {given}<br><i>{_shown(answer.value)}</i></td>'


def _shown(text: str) -> str:
    return html.escape(visible(text))
