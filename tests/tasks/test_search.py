"""Shared states: every answer is the one that a model gives after the whole prompt, for fewer tokens."""

import contextlib
import random

import pytest

from tests.tasks.shipped import tiny_model
from tests.tasks.tiny import book, tiny_haystack
from titans.inference.generate import Sampling, continue_text
from titans.inference.stream import Stream
from titans.tasks.long_text import LongText
from titans.tasks.search import Answer, Reader, answer_in, key_value_bytes
from titans.tasks.survey import Place, plan, survey

TOKENIZER = tiny_haystack().tokenizer


class Count:
    def __init__(self):
        self.read = 0

    def add(self, tokens):
        self.read += tokens


@pytest.mark.parametrize("variant", ["mag", "attention"])
def test_answers_are_those_to_the_whole_prompt(variant):
    model = tiny_model(variant).double()
    text = LongText.of([book(0)], TOKENIZER, 1_500, seed=0)
    main = text.hide(random.Random("main"), 1_500, 0.4)
    others = plan(text, (400, 1_000, 1_500), (0.1, 0.9), seed=0)
    reader = Reader(model, TOKENIZER, text, [hidden.position for hidden in others.values()])
    total, whole = Count(), 0
    for hidden in (main, *others.values(), main):
        cost, count = reader.cost(hidden), Count()
        answer = reader.answer(hidden, count.add)
        assert count.read == cost
        total.add(cost)
        whole += hidden.tokens
        stream = Stream(model)
        stream.read(text.prompt_ids(hidden))
        tokens = len(TOKENIZER.encode(" " + hidden.value, add_special_tokens=False))
        expected = continue_text(stream, TOKENIZER, Sampling(greedy=True, max_new_tokens=tokens))
        assert answer.text == "".join(expected)
        assert answer.value == hidden.value
        assert answer.state_bytes == stream.state_bytes > 0
    assert total.read < 0.75 * whole


def test_the_state_does_not_grow():
    text = LongText.of([book(0)], TOKENIZER, 2_000, seed=0)
    model = tiny_model("mag")
    reader = Reader(model, TOKENIZER, text, [])
    sizes = {reader.answer(text.hide(random.Random(0), length, 0.5)).state_bytes for length in (500, 2_000)}
    assert len(sizes) == 1
    assert key_value_bytes(model, 2_000) == 2 * 2 * 16 * 2_000 * 4


@pytest.mark.parametrize(
    ("text", "given"),
    [
        (" 4720981.", "4720981"),
        ("4720981, 12", "4720981"),
        (" 47209817", "47209817"),
        ("\n 4720981", "4720981"),
        (" a4720981", "a4720981"),
        ("", ""),
        (" .4720981", ""),
        (" 1a-2b.", "1a-2b"),
    ],
)
def test_the_answer_in_what_was_said(text, given):
    assert answer_in(text) == given
    answer = Answer(text=text, given=given, value="4720981", state_bytes=1)
    assert answer.right == (given == "4720981")


class FixedReader:
    """Costs a token a token of the prompt, and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def cost(self, hidden):
        return hidden.tokens

    def answer(self, hidden, progress):
        self.asked.append(hidden)
        return Answer(text="", given="", value=hidden.value, state_bytes=1)


def test_a_survey_leaves_out_what_is_known_and_what_takes_too_long():
    text = LongText.of([book(0)], TOKENIZER, 2_000, seed=0)
    others = plan(text, (400, 2_000), (0.1, 0.5), seed=0)
    readers = {"memory": FixedReader(), "twin": FixedReader()}
    answer = Answer(text="", given="7", value="7", state_bytes=1)
    cells = survey(
        others,
        readers,
        {"memory": 1e9, "twin": 1.0},  # tokens/s: the twin would need 2,000 s
        {Place(2_000, 0.5): {"memory": answer, "twin": answer}},
        seconds=1_000,
        bar=lambda title, cost: contextlib.nullcontext(Count()),
    )
    assert [(cell.length, cell.depth) for cell in cells] == [
        (400, 0.1),
        (400, 0.5),
        (2_000, 0.1),
        (2_000, 0.5),
    ]
    assert cells[3].answers == {"memory": answer, "twin": answer}
    assert cells[2].answers["twin"] is None
    assert [hidden.tokens >= 400 for hidden in readers["twin"].asked] == [True] * 2
    assert readers["memory"].asked == [
        others[Place(400, 0.5)], others[Place(400, 0.1)], others[Place(2_000, 0.1)]
    ]  # fmt: skip
    assert len({hidden.value for hidden in others.values()}) == 4
