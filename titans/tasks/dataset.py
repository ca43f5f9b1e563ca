"""Batches of tasks as a map-style dataset: item i is a whole batch, made from the seed and i alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data.sentences import SentenceTokens
from titans.errors import UserError, unknown_name
from titans.evaluation.needle import TASKS
from titans.evaluation.recall import MQAR
from titans.evaluation.selective_copy import SelectiveCopy
from titans.tasks.babi import BABILONG, BabiRows, training_chains
from titans.tasks.decoys import Decoys, digits
from titans.tasks.needles import NeedleRows
from titans.tasks.settings import TOKEN_TASKS, TaskSettings
from titans.training.data import TrainingData, refuse_noise_penalty
from titans.training.recipe import TrainingSettings

_HELD_OUT = 0.05  # of the haystack's sentences and of the stories, the last of them, for validation

# (index of the batch, rows, length, seed) -> batch
Maker = Callable[[int, int, int, int], dict[str, Tensor]]


class TaskBatches(Dataset[dict[str, Tensor]]):
    """``count`` batches: ``input_ids`` and ``labels`` int64 [B, L], L drawn from the settings' lengths.

    Args:
        maker: makes a batch; it depends on nothing but its arguments.
        validation: lengths by turns instead of drawn, and other batches than those of training.
    """

    def __init__(
        self, settings: TaskSettings, maker: Maker, count: int, seed: int, *, validation: bool = False
    ):
        self.settings, self.maker, self.count = settings, maker, count
        self.seed = 2 * seed + validation
        self.validation = validation

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"batch {index} of {self.count}")
        length = self.length(index)
        rows = max(1, self.settings.tokens_per_batch // length)
        return self.maker(index, rows, length, self.seed)

    def length(self, index: int) -> int:
        """Tokens of the rows of batch ``index``."""
        lengths, steps = self.settings.lengths, self.settings.curriculum_steps
        if self.validation:
            return lengths[index % len(lengths)]
        if index < steps:
            lengths = lengths[: 1 + index * len(lengths) // steps]
        return random.Random(f"length/{self.seed}/{index}").choice(lengths)


class RowMaker:
    """Batches of rows of text, each of a task drawn for it; with ``worth`` also that, int8 [B, L]."""

    def __init__(self, rows: NeedleRows, *, worth: bool = False):
        self.rows, self.worth = rows, worth

    def __call__(self, index: int, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        made = [self.rows.row(random.Random(f"{seed}/{index}/{row}"), length) for row in range(rows)]
        ids, labels, worth = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        return {"input_ids": ids, "labels": labels} | ({"worth": worth} if self.worth else {})


class TokenMaker:
    """Batches of MQAR or selective copying."""

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    def __call__(self, index: int, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        pairs = random.Random(f"pairs/{seed}/{index}").choice(self.pairs(length))
        return self.task(length, pairs, seed).batch(index, rows)._asdict()

    def pairs(self, length: int) -> list[int]:
        """The settings' numbers that fit into so many tokens, or the largest that does."""
        most = length // 4
        return [pairs for pairs in self.settings.pairs if pairs <= most] or [most]

    def task(self, length: int, pairs: int, seed: int) -> MQAR | SelectiveCopy:
        vocab_size = self.settings.vocab_size
        if self.settings.tasks == ("mqar",):
            noise = self.settings.noise
            return MQAR(vocab_size=vocab_size, length=length, pairs=pairs, noise=noise, seed=seed)
        return SelectiveCopy(vocab_size=vocab_size, length=length, tokens=pairs, seed=seed)


def open_tasks(settings: TaskSettings, training: TrainingSettings) -> TrainingData:
    """Training and validation batches of the settings' tasks; validation has other sentences and stories.

    Raises:
        UserError: an unknown task or mixture, no haystack or stories, lengths too short, a batch size other
            than 1.
    """
    if training.batch_size != 1:
        raise UserError(
            f"training.batch_size: expected 1 (data.tokens_per_batch counts), got {training.batch_size}"
        )
    known = {**TASKS, **BABILONG, **dict.fromkeys(TOKEN_TASKS)}
    for name in settings.tasks:
        if name not in known:
            raise unknown_name("task", name, known)
    makers: tuple[Maker, Maker]
    if settings.of_tokens:
        if len(settings.tasks) > 1:
            raise UserError(
                f"data.tasks: {' and '.join(TOKEN_TASKS)} mix with no other, got {settings.tasks}"
            )
        refuse_noise_penalty(training, settings.tasks[0])
        makers = TokenMaker(settings), TokenMaker(settings)
        tokenizer, vocab_size = None, settings.vocab_size
    else:
        if settings.haystack is None:
            raise UserError(f"data.haystack: {settings.tasks[0]} needs one (titans haystack makes it)")
        sentences = SentenceTokens.load(settings.haystack)
        if len(sentences) < 2:
            raise UserError(f"data.haystack: expected at least 2 sentences, got {len(sentences)}")
        border = _border(len(sentences))
        parts = sentences.part(0, border), sentences.part(border, len(sentences))
        rows = _babi_rows(settings, *parts) if settings.of_babi else _needle_rows(settings, *parts)
        for each in rows:
            if each.shortest() > settings.lengths[0]:
                raise UserError(
                    f"data.lengths: expected at least {each.shortest()} tokens for a row of these tasks, "
                    f"got {settings.lengths[0]}"
                )
        makers = RowMaker(rows[0], worth=training.noise_penalty > 0), RowMaker(rows[1])
        tokenizer = sentences.tokenizer
        vocab_size = len(tokenizer)
    count = training.steps * training.gradient_accumulation_steps
    return TrainingData(
        train=TaskBatches(settings, makers[0], count, training.seed),
        validation=TaskBatches(
            settings, makers[1], settings.validation_batches, training.seed, validation=True
        ),
        collate=only,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        in_order=True,
        answers=True,
    )


def only(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of a list of one."""
    (batch,) = batches
    return batch


def _needle_rows(settings: TaskSettings, *parts: SentenceTokens) -> list[NeedleRows]:
    mined = _mined(settings, parts[0])
    return [
        NeedleRows(
            _enough(settings, sentences),
            [TASKS[name] for name in settings.tasks],
            keys=settings.keys,
            questions=settings.questions,
            dense=settings.dense,
            middle=settings.middle,
            decoys=_decoys(settings, sentences, mined),
        )
        for sentences in parts
    ]


def _decoys(settings: TaskSettings, sentences: SentenceTokens, mined: SentenceTokens | None) -> Decoys | None:
    return Decoys(sentences, digits(sentences), settings.decoys, mined) if settings.decoys else None


def _mined(settings: TaskSettings, sentences: SentenceTokens) -> SentenceTokens | None:
    if settings.mined is None:
        return None
    mined = SentenceTokens.load(settings.mined)
    if mined.tokenizer_json != sentences.tokenizer_json:
        raise UserError(f"data.mined: {settings.mined} has another tokenizer than data.haystack")
    return mined


def _babi_rows(settings: TaskSettings, train: SentenceTokens, held_out: SentenceTokens) -> list[BabiRows]:
    if foreign := set(settings.tasks) - set(BABILONG):
        raise UserError(f"data.tasks: BABILong's mix with no other, got {', '.join(sorted(foreign))}, too")
    if settings.babi is None:
        raise UserError("data.babi: BABILong tasks need bAbI's archive or its folder")
    chains = training_chains(settings.babi, settings.tasks)
    first = {name: of_task[: _border(len(of_task))] for name, of_task in chains.items()}
    last = {name: of_task[_border(len(of_task)) :] for name, of_task in chains.items()}
    mined = _mined(settings, train)
    return [
        BabiRows(
            _enough(settings, sentences),
            stories,
            keys=settings.keys,
            questions=settings.questions,
            decoys=settings.decoys,
            mined=mined,
        )
        for sentences, stories in ((train, first), (held_out, last))
    ]


def _border(number: int) -> int:
    """Where the held-out ones of so many begin; one at least."""
    return min(number - 1, round(number * (1 - _HELD_OUT)))


def _enough(settings: TaskSettings, sentences: SentenceTokens) -> SentenceTokens:
    return sentences.at_least(2 * settings.lengths[-1] + 2)
