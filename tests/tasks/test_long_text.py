"""A fact in a long text: there once, where it was asked for, as the tokens that the whole text makes."""

import random

import pytest

from tests.tasks.tiny import book, tiny_haystack
from titans.data.sources import PYTHON_DOCS, Corpus
from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.tasks.long_text import LongText

TOKENIZER = tiny_haystack().tokenizer
PARAGRAPHS = "\n\n".join(book(seed, sentences=6) for seed in range(20))


def long_text(tokens: int, seed: int = 0, text: str = PARAGRAPHS) -> LongText:
    return LongText.of([text], TOKENIZER, tokens, seed=seed)


@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.93, 1])
def test_the_fact_stands_once_at_its_depth(depth):
    text = long_text(30_000)
    hidden = text.hide(random.Random(1), 30_000, depth)
    ids = text.prompt_ids(hidden)
    prompt = text.text(hidden) + hidden.question
    assert TextEncoder(TOKENIZER)([prompt])[0].tolist() == ids.tolist()
    assert prompt.count(hidden.sentence) == prompt.count(hidden.value) == 1
    assert hidden.key in hidden.sentence
    assert hidden.value in hidden.sentence
    before = len(TextEncoder(TOKENIZER)([prompt[: prompt.index(" " + hidden.sentence)]])[0])
    longest = max(after - start for start, after in zip(text.bounds, text.bounds[1:], strict=False))
    assert before == len(text.start) + hidden.position
    # The first sentence always comes first.
    assert abs(hidden.position - depth * hidden.end) <= max(longest / 2, (depth == 0) * longest)
    assert hidden.depth == hidden.position / hidden.end
    assert prompt.rindex(hidden.sentence) < prompt.index(hidden.question)


@pytest.mark.parametrize("length", [300, 5_000, 29_999, 30_000])
def test_a_prompt_has_as_many_tokens_as_asked_for_and_few_more(length):
    text = long_text(30_000)
    hidden = text.hide(random.Random(2), length, 0.5)
    assert hidden.tokens == len(text.prompt_ids(hidden))
    assert length <= hidden.tokens < length + 100
    assert text.words(hidden) == len(" ".join(text.sentences[: hidden.last]).split())


def test_no_stretch_of_the_text_comes_back_at_a_distance():
    """A short text that is read again and again must not be periodic."""
    text = long_text(40_000)
    once = len({*text.sentences})
    assert len(text.sentences) > 3 * once
    first = text.sentences[:once]
    for distance in range(1, len(text.sentences) - once):
        assert text.sentences[distance : distance + once] != first
    assert {*text.sentences[:once]} == {*text.sentences}  # the first time all of it, in its order


def test_seeds_and_order():
    texts = [long_text(1_500, seed).sentences for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    joined = " ".join(PARAGRAPHS.split())
    assert " ".join(texts[0]) in joined + " " + joined


def test_no_more_is_read_than_it_takes():
    def texts():
        for seed in range(50):
            yield book(seed)
        raise AssertionError("read on")

    assert LongText.of(texts(), TOKENIZER, 20_000, seed=0).bounds[-1] >= 20_000


def test_a_source_that_knows_the_fact_gets_another():
    plain = long_text(1_000).hide(random.Random(3), 1_000, 0.5)
    spoiled = f"{PARAGRAPHS} I like {plain.key}. And {plain.value}."
    hidden = long_text(20_000, text=spoiled).hide(random.Random(3), 1_000, 0.5)
    assert hidden.key != plain.key
    assert hidden.value != plain.value


@pytest.mark.parametrize("text", ["", " \n\n ", "x" * 2_000])
def test_no_sentence_is_an_error(text):
    with pytest.raises(UserError, match="at least one sentence"):
        long_text(100, text=text)


def test_one_sentence_is_enough():
    text = long_text(2_000, text="Only this")
    assert text.hide(random.Random(0), 2_000, 0.5).tokens >= 2_000


def test_pythons_own_documentation():
    text = LongText.of((each.text for each in Corpus([PYTHON_DOCS])), TOKENIZER, 5_000, seed=0)
    hidden = text.hide(random.Random(0), 5_000, 0.3)
    assert (
        TextEncoder(TOKENIZER)([text.text(hidden) + hidden.question])[0].tolist()
        == text.prompt_ids(hidden).tolist()
    )
