"""Needle in a haystack as RULER defines it: facts hidden in a long text, asked for at its end.

S-NIAH-PK, -N and -W of the Titans paper are RULER's ``niah_single_1``, ``_2`` and ``_3``. Sentences, template
and scoring are RULER's (arXiv:2404.06654), in its form for base models, where the prompt ends in the start of
the answer. What differs:

* keys come from our own word list (``needle_words``), of the same form;
* "essay" haystacks are any texts that the caller gives, and each sample starts at another sentence of them
  (RULER starts every sample at the first, which would make all training samples the same text);
* depths are drawn evenly over the whole context rather than from 40 steps, and can be chosen;
* the length is that of the whole prompt, with no room kept for the answer, filled sentence by sentence;
* values within a sample are distinct, and no line of a haystack of needles has a key of the true needles.
"""

import itertools
import random
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from titans.evaluation.haystack import LengthCounter, SentenceRing, TokenCounter, fill, split_sentences
from titans.evaluation.needle_words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """What is hidden, where, and how much of it is asked for.

    Args:
        name: as in RULER.
        haystack: "noise" (one line of five sentences, repeated), "essay" (texts of the caller's) or "needle"
            (lines of the needle's own form, with other keys).
        keys: number of keys hidden, each with ``values`` needles of its own; those not asked for distract.
        queries: number of keys asked for, at most ``keys``.
        key_type, value_type: "words" are adjective-noun pairs, "numbers" have 7 digits, "uuids" are random.
    """

    name: str
    haystack: Literal["noise", "essay", "needle"]
    key_type: Literal["words", "uuids"] = "words"
    value_type: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __post_init__(self) -> None:
        if min(self.keys, self.values, self.queries) < 1 or self.queries > self.keys:
            raise ValueError(
                f"{self.name}: expected at least 1 key, value and query and no more queries than keys, got "
                f"keys={self.keys}, values={self.values}, queries={self.queries}"
            )


TASKS = {
    task.name: task
    for task in (
        NeedleTask(name="niah_single_1", haystack="noise"),
        NeedleTask(name="niah_single_2", haystack="essay"),
        NeedleTask(name="niah_single_3", haystack="essay", value_type="uuids"),
        NeedleTask(name="niah_multikey_1", haystack="essay", keys=4),
        NeedleTask(name="niah_multikey_2", haystack="needle"),
        NeedleTask(name="niah_multikey_3", haystack="needle", key_type="uuids", value_type="uuids"),
        NeedleTask(name="niah_multivalue", haystack="essay", values=4),
        NeedleTask(name="niah_multiquery", haystack="essay", keys=4, queries=4),
    )
}
PAPER_NAMES = {"S-NIAH-PK": "niah_single_1", "S-NIAH-N": "niah_single_2", "S-NIAH-W": "niah_single_3"}


@dataclass(frozen=True, kw_only=True)
class NeedleSample:
    """One prompt and what must be in the answer to it.

    ``text`` is the instruction and the context, ``question`` what follows it, up to the answer's first words.
    ``depth`` is the share of the haystack's tokens that lie before the needle of the first answer, 0 to 1.
    ``tokens`` is the length of ``prompt`` (see ``samples``).
    """

    index: int
    text: str
    question: str
    answers: tuple[str, ...]
    depth: float
    tokens: int

    @property
    def prompt(self) -> str:
        """What the model reads before it answers."""
        return self.text + self.question


def score(sample: NeedleSample, answer_text: str) -> float:
    """Share of the answers that occur in ``answer_text``, upper and lower case being the same; 0 to 1."""
    given = answer_text.lower()
    return sum(answer.lower() in given for answer in sample.answers) / len(sample.answers)


def samples(
    task: NeedleTask,
    length: int,
    count_tokens: TokenCounter | PreTrainedTokenizerBase,
    haystack: Iterable[str] = (),
    *,
    seed: int,
    depth: float | None = None,
    start: int = 0,
) -> Iterator[NeedleSample]:
    """Samples without end; the one at an index depends on nothing but the arguments, not on those before.

    Args:
        length: tokens of the whole prompt at most; the context is filled up to the last sentence that fits.
        count_tokens: number of tokens in a text, without special tokens; or a tokenizer, which is asked so.
            Sentences are counted one by one, each once. The sum is the prompt's length where no token spans
            two sentences (bytes, words); a tokenizer that joins across them can differ by a few tokens.
        haystack: texts or sentences for an "essay" task, read in order, from the start again at the end.
        depth: share of the haystack before the needle of the first answer, 0 to 1, kept to within a
            sentence; None draws one per sample. The other needles always lie at random.
        start: index of the first sample, to continue where an earlier run ended.

    Raises:
        ValueError: (at once) depth outside 0 to 1, an "essay" task without text; (at the sample) a length too
            short for the needles and the question.
    """
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected a share of the context, 0 to 1, got {depth}")
    sentences = split_sentences(haystack) if task.haystack == "essay" else []
    if task.haystack == "essay" and not sentences:
        raise ValueError(f"haystack: {task.name} hides its needles in the caller's texts, got none")
    maker = _Maker(task, length, LengthCounter(count_tokens), sentences)
    return (
        maker.sample(index, random.Random(f"{task.name}/{seed}/{index}"), depth)
        for index in itertools.count(start)
    )


class Draws:
    """Keys and values of one sample, no true key and no value twice."""

    def __init__(self, rng: random.Random, task: NeedleTask):
        self._rng, self._task = rng, task
        self._used: set[str] = set()

    def unused(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._used:
            pass
        return text

    def key(self) -> str:
        """A new key, kept for a true needle."""
        key = self.unused(self._key)
        self._used.add(key)
        return key

    def distracting_key(self) -> str:
        """No key of a true needle. It may come twice: a long haystack has more lines than there are words."""
        return self.unused(self._key)

    def value(self) -> str:
        value = self.unused(self._value)
        self._used.add(value)
        return value

    def _key(self) -> str:
        if self._task.key_type == "uuids":
            return self._uuid()
        return f"{self._rng.choice(ADJECTIVES)}-{self._rng.choice(NOUNS)}"

    def _value(self) -> str:
        return self._uuid() if self._task.value_type == "uuids" else str(self._rng.randint(10**6, 10**7 - 1))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))


class _Maker:
    """What all samples of one call share: the sentences and their lengths, counted when first used."""

    def __init__(self, task: NeedleTask, length: int, counter: LengthCounter, sentences: Sequence[str]):
        self.task, self.length, self.counter = task, length, counter
        self.ring = SentenceRing(sentences, counter)
        self.separator = " " if task.haystack == "essay" else "\n"
        # The context's first sentence follows a line break, which may cost a token more than a space.
        of_break, of_separator = counter.after_stop("\nThe"), counter.after_stop(self.separator + "The")
        self.first_line_tokens = max(0, of_break - of_separator)

    def sample(self, index: int, rng: random.Random, depth: float | None) -> NeedleSample:
        task = self.task
        draws = Draws(rng, task)
        values = {draws.key(): [draws.value() for _ in range(task.values)] for _ in range(task.keys)}
        asked = rng.sample(list(values), task.queries)
        answers = tuple(value for key in asked for value in values[key])
        # The needle of the first answer comes first: the chosen depth is its.
        order = [*asked, *(key for key in values if key not in asked)]
        needles = [needle_sentence(task, key, value) for key in order for value in values[key]]
        instruction, question = frame(task, asked)

        fixed = self.counter.count(instruction) + self.first_line_tokens + self.counter.after_stop(question)
        fixed += sum(self.counter.after_stop(self.separator + needle) for needle in needles)
        if fixed > self.length:
            raise ValueError(
                f"length: the needles and the question of {task.name} alone take {fixed} tokens, "
                f"got {self.length}"
            )
        pieces, ends = fill(self._units(rng, draws), self.length - fixed)
        shares = [rng.random() for _ in needles]
        if depth is not None:
            shares[0] = depth
        places = [bisect_right(ends, share * ends[-1]) - 1 for share in shares]
        # From the last place to the first, so that the places before stay what they are.
        for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
            pieces.insert(place, needle)
        return NeedleSample(
            index=index,
            text=instruction + "\n" + self.separator.join(pieces),
            question=question,
            answers=answers,
            depth=ends[places[0]] / max(ends[-1], 1),
            tokens=fixed + ends[-1],
        )

    def _units(self, rng: random.Random, draws: Draws) -> Iterator[tuple[str, int]]:
        """The haystack without end, each unit with its tokens."""
        if self.task.haystack == "noise":
            yield from itertools.repeat((NOISE, self._tokens(NOISE)))
        elif self.task.haystack == "needle":
            while True:
                line = needle_sentence(self.task, draws.distracting_key(), draws.value())
                yield line, self._tokens(line)
        else:
            yield from self.ring.read(rng)

    def _tokens(self, unit: str) -> int:
        return self.counter.after_stop(self.separator + unit)


def needle_sentence(task: NeedleTask, key: str, value: str) -> str:
    return f"One of the special magic {task.value_type} for {key} is: {value}."


def frame(task: NeedleTask, asked: Sequence[str]) -> tuple[str, str]:
    """The instruction before the context and the question after it; singular where one value is asked for."""
    if task.queries * task.values == 1:
        kind, some, are, are_all = task.value_type.removesuffix("s"), "A", "is", "is"
    else:
        kind, some, are, are_all = task.value_type, "Some", "are", "are all"
    keys = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    instruction = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards."
    )
    question = (
        f"\nWhat {are_all} the special magic {kind} for {keys} mentioned in the provided text? "
        f"The special magic {kind} for {keys} mentioned in the provided text {are}"
    )
    return instruction, question
