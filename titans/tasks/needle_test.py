"""Needle and BABILong tests: samples of the published form as tokens, and the share that a model answers.

An answer counts when greedy decoding would begin with it, space and all. RULER's own rule, that the answer
occurs somewhere in the output, is milder; so is BABILong's, that it is the only label before a full stop.
"""

from __future__ import annotations

import io
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel

from titans.data.bpe import WordEncoder
from titans.data.sentences import SentenceTokens
from titans.errors import UserError, unknown_name
from titans.evaluation import babilong
from titans.evaluation.babilong import BabiSample
from titans.evaluation.needle import TASKS, NeedleSample, NeedleTask, samples
from titans.files import replace_file
from titans.tasks.answers import Asked, right
from titans.tasks.babi import BABILONG


@dataclass(frozen=True, eq=False)
class NeedleTest:
    """Samples of one task and length, tokenized.

    task, length: as in `titans.evaluation.needle.samples`, the length in the tokens that the haystack counts.
    depths: of the samples, or empty where each has facts at several (BABILong). tokens: of their prompts, as
    the haystack counts them.
    """

    task: str
    length: int
    asked: Asked
    depths: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            task=self.task,
            length=self.length,
            depths=self.depths,
            tokens=self.tokens,
            **self.asked._asdict(),
        )
        replace_file(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> NeedleTest:
        with np.load(path) as stored:
            asked = Asked(*(stored[name] for name in Asked._fields))
            task, length = str(stored["task"]), int(stored["length"])
            return cls(task, length, asked, stored["depths"], stored["tokens"])


@dataclass(frozen=True, kw_only=True)
class DepthScore:
    """Samples whose needle lies at ``depth_from`` <= depth < ``depth_to`` (or 1), and those answered."""

    task: str
    length: int
    depth_from: float
    depth_to: float
    samples: int
    correct: int
    tokens_asked: int
    tokens_correct: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def length_counter(haystack: SentenceTokens, count: Callable[[str], int]) -> Callable[[str], int]:
    """``count``, but for the haystack's sentences, whose tokens stand in its file.

    Raises:
        UserError: they do not.
    """
    if len(haystack.counts) != len(haystack):
        raise UserError("haystack: expected one made with a tokenizer for lengths, got one without")
    known = {". " + text: int(tokens) for text, tokens in zip(haystack.texts(), haystack.counts, strict=True)}

    def counted(text: str) -> int:
        tokens = known.get(text)
        return count(text) if tokens is None else tokens

    return counted


def make_test(
    task: str,
    length: int,
    number: int,
    haystack: SentenceTokens,
    count: Callable[[str], int],
    *,
    seed: int,
    babi: Path | None = None,
) -> NeedleTest:
    """``number`` samples of the task of this name, at depths drawn evenly.

    Args:
        count: tokens by which ``length`` is told (see `length_counter`).
        babi: bAbI's archive or folder, whose test files a BABILong task's stories come from.

    Raises:
        UserError: no such task, or no ``babi`` for one of BABILong.
    """
    encode = WordEncoder(haystack.tokenizer)
    rows, depths, tokens = [], [], []
    places: list[npt.NDArray[np.int64]] = []
    for sample, answer_text in itertools.islice(
        _samples(task, length, haystack.texts(), count, seed, babi), number
    ):
        prompt, answer = encode(sample.prompt), encode(answer_text)
        rows.append(np.array(prompt + answer, dtype=np.uint16))
        places.append(np.arange(len(prompt), len(prompt) + len(answer)))
        tokens.append(sample.tokens)
        if isinstance(sample, NeedleSample):
            depths.append(sample.depth)
    ids = np.zeros((number, max(map(len, rows))), dtype=np.uint16)
    for row, filled in zip(ids, rows, strict=True):
        row[: len(filled)] = filled
    of = np.repeat(np.arange(number), [len(each) for each in places])
    at = np.concatenate(places)
    asked = Asked(ids, of, at, ids[of, at].astype(np.int64))
    return NeedleTest(task, length, asked, np.array(depths), np.array(tokens))


def _samples(
    task: str, length: int, texts: list[str], count: Callable[[str], int], seed: int, babi: Path | None
) -> Iterator[tuple[NeedleSample | BabiSample, str]]:
    """Samples without end, each with what follows its prompt."""
    if task in TASKS:
        needles = samples(TASKS[task], length, count, texts, seed=seed)
        return ((sample, answer_text(TASKS[task], sample)) for sample in needles)
    if task not in BABILONG:
        raise unknown_name("task", task, {**TASKS, **BABILONG})
    if babi is None:
        raise UserError(f"babi: {task} needs bAbI's archive or its folder")
    stories = babilong.read_stories(babi, BABILONG[task], "test")
    asked = babilong.samples(BABILONG[task], stories, length, count, texts, seed=seed)
    return ((sample, f" {sample.answers[0]}") for sample in asked)


def answer_text(task: NeedleTask, sample: NeedleSample) -> str:
    """What follows the prompt: a key's values in the order of the text, as in training."""
    values = iter(sample.answers)
    of_keys = iter(lambda: list(itertools.islice(values, task.values)), [])
    ordered = [value for key in of_keys for value in sorted(key, key=sample.text.index)]
    return " " + ", ".join(ordered)


def run_test(
    model: PreTrainedModel,
    test: NeedleTest,
    *,
    bins: int = 5,
    rows: int | None = None,
    tokens: int | None = None,
) -> list[DepthScore]:
    """The model's scores on ``test`` by depth of the needle, in ``bins`` of equal width that are not empty;
    in one where samples have no depth.

    Args:
        rows: samples at once; None: all.
        tokens: see `titans.tasks.answers.right`.
    """
    asked = test.asked
    number = len(asked.ids)
    hits = np.zeros(len(asked.rows), dtype=bool)
    step = rows or number
    for first in range(0, number, step):
        here = (asked.rows >= first) & (asked.rows < first + step)
        part = Asked(
            asked.ids[first : first + step], asked.rows[here] - first, asked.places[here], asked.targets[here]
        )
        hits[here] = right(model, part, tokens=tokens)
    wrong = np.bincount(asked.rows[~hits], minlength=number)
    length = np.bincount(asked.rows, minlength=number)
    by_bin: dict[int, list[int]] = defaultdict(list)
    depths = test.depths
    if not len(depths):
        depths, bins = np.zeros(number), 1
    for sample, depth in enumerate(depths):
        by_bin[min(int(depth * bins), bins - 1)].append(sample)
    return [
        DepthScore(
            task=test.task,
            length=test.length,
            depth_from=place / bins,
            depth_to=(place + 1) / bins,
            samples=len(members),
            correct=int((wrong[members] == 0).sum()),
            tokens_asked=int(length[members].sum()),
            tokens_correct=int((length - wrong)[members].sum()),
        )
        for place, members in sorted(by_bin.items())
    ]
