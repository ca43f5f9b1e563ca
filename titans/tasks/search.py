"""Asks a model for facts hidden at many places of one long text, reading as little as that takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from titans.inference.generate import Sampling, continue_text
from titans.inference.stream import Stream
from titans.tasks.long_text import Hidden, LongText

# Called with the tokens just read.
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said. text: all that was decoded; given: the answer in it; state_bytes: of its state
    then."""

    text: str
    given: str
    value: str
    state_bytes: int

    @property
    def right(self) -> bool:
        return self.given == self.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "right": self.right}


class Reader:
    """One model in one text without facts, which keeps its states at the places where facts will be hidden.

    Every answer is to a prompt with one fact: the state before it is shared, what follows is read anew.

    Args:
        marks: positions where states are kept when the text is read there for the first time.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: LongText, marks: list[int]
    ):
        self._tokenizer, self._text = tokenizer, text
        self._marks = sorted(marks)
        self._new = Stream(model)
        self._kept: dict[int, Stream] = {}

    def cost(self, hidden: Hidden) -> int:
        """Tokens that `answer` will read."""
        start = self._nearest(hidden.position)
        beginning = len(self._text.start) if start < 0 else 0
        return beginning + hidden.tokens - len(self._text.start) - max(start, 0)

    def answer(self, hidden: Hidden, progress: Progress = lambda read: None) -> Answer:
        """Read up to the question and let the model answer by its likeliest tokens.

        As many as the true value has, as the tests do.
        """
        stream = self._before(hidden.position, progress)
        for ids in (hidden.needle_ids, self._text.ids[hidden.position : hidden.end], hidden.question_ids):
            _read(stream, ids, progress)
        tokens = len(self._text.encode([" " + hidden.value])[0])
        sampling = Sampling(greedy=True, max_new_tokens=tokens)
        text = "".join(continue_text(stream, self._tokenizer, sampling))
        return Answer(text=text, given=answer_in(text), value=hidden.value, state_bytes=stream.state_bytes)

    def _nearest(self, position: int) -> int:
        return max((kept for kept in self._kept if kept <= position), default=-1)

    def _before(self, position: int, progress: Progress) -> Stream:
        """A stream that has read the text up to ``position``."""
        at = self._nearest(position)
        if at < 0:
            stream, at = self._new.fork(), 0
            _read(stream, self._text.start, progress)
            self._kept[0] = stream.fork()
        else:
            stream = self._kept[at].fork()
        for mark in [*(mark for mark in self._marks if at < mark < position), position]:
            if mark > at:
                _read(stream, self._text.ids[at:mark], progress)
                self._kept[mark] = stream.fork()
                at = mark
        return stream


def answer_in(text: str) -> str:
    """The first word or number of what a model said, without what punctuates it."""
    found = re.match(r"\s*([\w-]+)", text)
    return found.group(1) if found else ""


def key_value_bytes(model: PreTrainedModel, tokens: int) -> int:
    """What full attention of the model's size would keep of ``tokens`` tokens, in the model's precision."""
    config = model.config
    return 2 * config.num_hidden_layers * config.hidden_size * tokens * model.dtype.itemsize


def _read(stream: Stream, ids: Any, progress: Progress) -> None:
    if not len(ids):
        return
    before = 0

    def show(read: int) -> None:
        nonlocal before
        progress(read - before)
        before = read

    stream.read(ids, show)
