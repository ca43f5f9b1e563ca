"""Needle tasks: the published sentences, in the numbers, places and lengths asked for."""

import itertools
import random
import re

import pytest

from titans.data.tokenizer import byte_tokenizer
from titans.evaluation.haystack import split_sentences
from titans.evaluation.needle import NOISE, PAPER_NAMES, TASKS, Draws, NeedleTask, samples, score
from titans.evaluation.needle_words import ADJECTIVES, NOUNS

WORDS = r"[a-z]+-[a-z]+"
NUMBER = r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
BOOK = [
    "It was  a dark night.\nNobody was out! Who would be? He said so twice, in a low and careful voice.",
    "The second chapter is short. It ends here, as it must, with a long and rambling sentence of no use.",
]


def bytes_of(text: str) -> int:
    return len(text.encode())


def words_of(text: str) -> int:
    return len(text.split())


def draw(name: str, length: int = 4000, count=bytes_of, number: int = 1, **options):
    options = {"seed": 1} | options
    return list(itertools.islice(samples(TASKS[name], length, count, BOOK, **options), number))


def needles_in(text: str) -> list[tuple[str, str]]:
    """(key, value) of every needle, in order."""
    return re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", text)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [("S-NIAH-PK", "number", NUMBER), ("S-NIAH-N", "number", NUMBER), ("S-NIAH-W", "uuid", UUID)],
)
def test_a_single_needle_has_the_published_form(name, kind, value):
    (sample,) = draw(PAPER_NAMES[name])
    form = (
        rf"A special magic {kind} is hidden within the following text\. Make sure to memorize it\. "
        rf"I will quiz you about the {kind} afterwards\.\n"
        rf"(?P<before>.*)One of the special magic {kind}s for (?P<key>{WORDS}) is: (?P<value>{value})\."
        rf"(?P<after>.*)\nWhat is the special magic {kind} for (?P=key) mentioned in the provided text\? "
        rf"The special magic {kind} for (?P=key) mentioned in the provided text is"
    )
    match = re.fullmatch(form, sample.prompt, re.DOTALL)
    assert match, sample.prompt
    assert sample.answers == (match["value"],)
    assert needles_in(sample.prompt) == [(match["key"], match["value"])]
    assert sample.prompt.count(match["value"]) == 1
    adjective, noun = match["key"].split("-")
    assert adjective in ADJECTIVES
    assert noun in NOUNS
    if name == "S-NIAH-PK":
        lines = (match["before"] + match["after"]).split("\n")
        assert set(filter(None, lines)) == {NOISE}
    else:
        around = split_sentences([match["before"] + match["after"]])
        assert set(around) == set(split_sentences(BOOK))
        assert "\n" not in match["before"] + match["after"]


@pytest.mark.parametrize(
    ("name", "key", "value", "needles", "answers"),
    [
        ("niah_multikey_1", WORDS, NUMBER, 4, 1),
        ("niah_multikey_2", WORDS, NUMBER, None, 1),
        ("niah_multikey_3", UUID, UUID, None, 1),
        ("niah_multivalue", WORDS, NUMBER, 4, 4),
        ("niah_multiquery", WORDS, NUMBER, 4, 4),
    ],
)
def test_several_needles_have_the_right_numbers(name, key, value, needles, answers):
    for sample in draw(name, number=5):
        found = needles_in(sample.text)
        keys, values = zip(*found, strict=True)
        if needles is None:  # the whole haystack is made of them, one a line
            assert len(found) == len(sample.text.split("\n")) - 1 > 20
        else:
            assert len(found) == needles
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in found)
        assert len(set(values)) == len(values)
        assert len(sample.answers) == answers
        asked = re.search(r"for (\S.*) mentioned in the provided text\?", sample.question)
        queries = re.split(r", and |, ", asked[1])
        assert len(queries) == (4 if name == "niah_multiquery" else 1)
        # The answers are all values of the keys asked for, and no other's.
        assert set(sample.answers) == {v for k, v in found if k in queries}
        singular = answers == 1
        assert sample.text.startswith("A special magic " if singular else "Some special magic ")
        assert sample.question.endswith(" is" if singular else " are")
        assert ("What is the special" if singular else "What are all the special") in sample.question
        assert len(set(keys)) == {"niah_multivalue": 1}.get(name, len(set(keys)))


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize("count", [bytes_of, words_of])
@pytest.mark.parametrize("length", [900, 901, 2500])
def test_the_length_is_within_one_sentence_of_the_target(name, count, length):
    units = [NOISE, *split_sentences(BOOK)]
    if TASKS[name].haystack == "needle":
        units = [f"One of the special magic numbers for {'x' * 36} is: {'x' * 36}."]
    longest = max(count("." + " " + unit) for unit in units)
    for sample in draw(name, length, count, number=3):
        assert sample.tokens == count(sample.prompt)
        assert length - longest < sample.tokens <= length


def test_a_tokenizer_counts_without_its_special_tokens():
    (counted,) = draw("niah_single_2", 1500)
    (tokenized,) = draw("niah_single_2", 1500, byte_tokenizer())
    assert tokenized == counted


def test_a_space_put_before_every_text_is_not_counted_again():
    """As SentencePiece does. Counted sentence by sentence, the noise would come out too short."""

    def with_prefix(text: str) -> int:
        return bytes_of(" " + text)

    (sample,) = draw("niah_single_1", 2000, with_prefix)
    assert sample.tokens == with_prefix(sample.prompt)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_3", "niah_multikey_1", "niah_multikey_3"])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_the_chosen_depth_is_kept_to_within_a_sentence(name, depth):
    for sample in draw(name, 8000, number=3, depth=depth):
        context = sample.text.split("\n", 1)[1]
        before = context.index(f" is: {sample.answers[0]}.")
        # Other needles, too, lie before or after it: 3 of 70 bytes in multikey_1.
        assert before / len(context) == pytest.approx(depth, abs=(120 + 3 * 70) / len(context))
        assert sample.depth == pytest.approx(depth, abs=120 / len(context))
    if depth in (0.0, 1.0) and name == "niah_single_1":
        lines = context.split("\n")
        assert needles_in(lines[0 if depth == 0 else -1])


def test_depths_without_a_choice_cover_the_context():
    depths = [sample.depth for sample in draw("niah_single_1", 8000, number=200)]
    for low in (0.0, 0.25, 0.5, 0.75):
        assert 25 < sum(low <= depth <= low + 0.25 for depth in depths) < 80


@pytest.mark.parametrize("name", list(TASKS))
def test_a_sample_depends_on_its_index_alone(name):
    several = draw(name, number=5)
    assert draw(name, start=3, number=2) == several[3:]
    assert [sample.index for sample in several] == list(range(5))
    assert len({sample.prompt for sample in several}) == 5
    assert draw(name, seed=2)[0].answers != several[0].answers


def test_an_essay_haystack_starts_at_different_sentences_and_repeats():
    starts = {sample.text.split("\n")[1][:12] for sample in draw("niah_single_2", depth=1.0, number=40)}
    assert len(starts) == len(split_sentences(BOOK)) == 6


def test_each_sentence_is_counted_once():
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return bytes_of(text)

    stream = samples(TASKS["niah_single_2"], 200_000, count, BOOK, seed=0)
    next(stream)
    first = len(counted)
    assert first < 20  # six sentences, the needle and the frame, though the text has some 4,000
    next(stream)
    assert len(counted) - first < 5


def test_the_score_is_the_share_of_answers_in_the_output():
    (sample,) = draw("niah_multiquery")
    one, two, three, four = sample.answers
    assert score(sample, f"{two}, {one}, {four} and {three}.") == 1
    assert score(sample, f"It is {one}, surely") == 0.25
    assert score(sample, "") == 0
    (word,) = draw("niah_single_3")
    assert score(word, word.answers[0].upper()) == 1
    assert score(word, word.answers[0][:-1]) == 0


def test_bad_arguments_are_named_before_work_begins():
    task = TASKS["niah_single_2"]
    with pytest.raises(ValueError, match="depth: expected a share of the context, 0 to 1, got 50"):
        samples(task, 4000, bytes_of, BOOK, seed=0, depth=50)
    with pytest.raises(ValueError, match=r"haystack: niah_single_2 hides .* got none"):
        samples(task, 4000, bytes_of, [" "], seed=0)
    with pytest.raises(ValueError, match=r"length: the needles .* alone take \d+ tokens, got 100"):
        next(samples(task, 100, bytes_of, BOOK, seed=0))
    with pytest.raises(ValueError, match="count_tokens: expected at least 1 token"):
        samples(task, 4000, lambda text: 1, BOOK, seed=0)
    with pytest.raises(ValueError, match="no more queries than keys, got keys=1, values=1, queries=2"):
        NeedleTask(name="x", haystack="noise", queries=2)


def test_a_value_drawn_twice_is_drawn_again():
    """One in a million by chance, and the question would have two keys of one answer."""

    class Repeating(random.Random):
        numbers = iter([1000000, 1000000, 1000001])

        def randint(self, a: int, b: int) -> int:
            return next(self.numbers)

    draws = Draws(Repeating(0), TASKS["niah_multivalue"])
    assert [draws.value(), draws.value()] == ["1000000", "1000001"]
