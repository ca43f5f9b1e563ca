"""The demo's page: everything found is on it, hostile text is text, and nothing is asked of a network."""

import html.parser
import json
import sys

import pytest

from tests.inspection.test_page import HOSTILE
from titans.inspection.search_report import Found, Side, in_units, render, to_plain
from titans.tasks.search import Answer
from titans.tasks.survey import Cell


def answer(given: str, value: str = "4720981", text: str | None = None) -> Answer:
    return Answer(text=text or f" {given}. ", given=given, value=value, state_bytes=2_800_000)


def side(name: str, given: str, **changes) -> Side:
    fields = {"what": "mag, 3.7 M parameters", "answer": answer(given), "seconds": 20.0}
    return Side(**{"name": name, "key_value_bytes": 1_229_000_000, **fields, **changes})


def found(**changes) -> Found:
    cells = tuple(
        Cell(
            length=length,
            depth=depth,
            answers={
                "needle-mag": answer(str(length), str(length)),
                "twin": answer("no") if depth > 0.5 else None,
            },
        )
        for length in (2048, 8192)
        for depth in (0.1, 0.9)
    )
    fields = {
        "source": "python-docs",
        "tokens": 200_045,
        "words": 82_887,
        "position": 115_944,
        "depth": 0.58,
        "before": "A sentence before.",
        "sentence": "One of the special magic numbers for polite-fog is: 4720981.",
        "after": "One after.",
        "question": "What is the special magic number for polite-fog",
        "value": "4720981",
        "sides": (side("needle-mag", "4720981"), side("twin", "1234567")),
        "cells": cells,
        "command": "titans demo",
        "version": "1.0",
    }
    return Found(**{**fields, **changes})


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text between them but for the styles."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.style = tag == "style"

    def handle_endtag(self, tag):
        self.style = False

    def handle_data(self, data):
        if not self.style:
            self.words.append(data)


def test_the_page_tells_what_was_found():
    words = "".join(Reader(render(found())).words)
    for part in (
        "200,045", "82,887", "115,944", "58%", "polite-fog is: 4720981", "A sentence before.", "One after.",
        "1234567", "2.8 MB", "1.2 GB", "10,002", "✓ 2048", "✗ no", "not measured", "titans demo",
    ):  # fmt: skip
        assert part in words, part
    assert words.count("right") == words.count("wrong") == 1


def test_hostile_text_is_text():
    """Anything may stand in a source, in its name and in what a model says."""

    def page_of(words: str) -> str:
        names = ("source", "before", "after", "sentence", "question", "value", "command", "version")
        said = answer(words, text=words)
        sides = side("needle-mag", "", what=words, answer=said), side("twin", "", answer=said)
        return render(found(**dict.fromkeys(names, words), sides=sides))

    pages = [page_of(HOSTILE), page_of("harmless")]
    tags = [Reader(page).tags for page in pages]
    assert tags[0] == tags[1]
    assert not any(tag in ("script", "a", "iframe", "form", "link") for tag, _ in tags[0])
    assert "<img src=x onerror=alert(1)>" in "".join(Reader(pages[0]).words)
    for sign in ("\x1b", "\u202e", "\u200b"):
        assert sign not in pages[0]


def test_pictures_are_part_of_the_page():
    page = Reader(render(found(), [b"light", b"dark"]))
    addresses = [
        attributes[name]
        for _, attributes in page.tags
        for name in ("src", "srcset", "href")
        if name in attributes
    ]
    assert addresses == ["data:image/png;base64,ZGFyaw==", "data:image/png;base64,bGlnaHQ="]
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_figures_as_plain_values():
    plain = json.loads(json.dumps(to_plain(found())))
    assert plain["sides"][0]["answer"]["right"] is True
    assert plain["cells"][0]["answers"]["twin"] is None
    assert plain["cells"][1]["answers"]["twin"]["given"] == "no"


def test_the_pictures_differ_by_what_was_found():
    pytest.importorskip("matplotlib")
    from titans.inspection.search_picture import draw

    drawn = [draw(found()), draw(found()), draw(found(), dark=True), draw(found(cells=found().cells[:2]))]
    assert all(each.startswith(b"\x89PNG") for each in drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_the_page_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "<picture>" not in render(found())


@pytest.mark.parametrize(("size", "shown"), [(999, "999 bytes"), (2_800_000, "2.8 MB"), (1.229e9, "1.2 GB")])
def test_units(size, shown):
    assert in_units(size) == shown
