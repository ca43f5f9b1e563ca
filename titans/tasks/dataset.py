"""Batches of tasks as a map-style dataset: item i is a whole batch, made from the seed and i alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data.sentences import SentenceTokens
from titans.errors import UserError, unknown_name
from titans.evaluation.needle import TASKS
from titans.evaluation.recall import MQAR, TokenBatch
from titans.evaluation.selective_copy import SelectiveCopy
from titans.tasks.needles import NeedleRows
from titans.tasks.settings import TOKEN_TASKS, TaskSettings
from titans.training.data import TrainingData
from titans.training.recipe import TrainingSettings

_HELD_OUT = 0.05  # of the haystack's sentences, its last, for validation

# (index of the batch, rows, length, seed) -> batch
Maker = Callable[[int, int, int, int], TokenBatch]


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
        return self.maker(index, rows, length, self.seed)._asdict()

    def length(self, index: int) -> int:
        """Tokens of the rows of batch ``index``."""
        lengths, steps = self.settings.lengths, self.settings.curriculum_steps
        if self.validation:
            return lengths[index % len(lengths)]
        if index < steps:
            lengths = lengths[: 1 + index * len(lengths) // steps]
        return random.Random(f"length/{self.seed}/{index}").choice(lengths)


class NeedleMaker:
    """Batches whose rows are of needle tasks, each of one drawn for it."""

    def __init__(self, rows: NeedleRows):
        self.rows = rows

    def __call__(self, index: int, rows: int, length: int, seed: int) -> TokenBatch:
        made = [self.rows.row(random.Random(f"{seed}/{index}/{row}"), length) for row in range(rows)]
        ids, labels = (
            torch.stack([torch.from_numpy(each) for each in part]) for part in zip(*made, strict=True)
        )
        return TokenBatch(ids, labels)


class TokenMaker:
    """Batches of MQAR or selective copying."""

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    def __call__(self, index: int, rows: int, length: int, seed: int) -> TokenBatch:
        return self.task(length, seed).batch(index, rows)

    def task(self, length: int, seed: int) -> MQAR | SelectiveCopy:
        settings = self.settings
        if settings.tasks == ("mqar",):
            pairs = min(settings.pairs, length // 8)
            return MQAR(vocab_size=settings.vocab_size, length=length, pairs=pairs, seed=seed)
        tokens = min(settings.pairs, length // 4)
        return SelectiveCopy(vocab_size=settings.vocab_size, length=length, tokens=tokens, seed=seed)


def open_tasks(settings: TaskSettings, training: TrainingSettings) -> TrainingData:
    """Training and validation batches of the settings' tasks.

    Raises:
        UserError: an unknown task or mixture, no haystack, lengths too short, a batch size other than 1.
    """
    if training.batch_size != 1:
        raise UserError(
            f"training.batch_size: expected 1 (data.tokens_per_batch counts), got {training.batch_size}"
        )
    known = {**TASKS, **dict.fromkeys(TOKEN_TASKS)}
    for name in settings.tasks:
        if name not in known:
            raise unknown_name("task", name, known)
    makers: tuple[Maker, Maker]
    if settings.of_tokens:
        if len(settings.tasks) > 1:
            raise UserError(
                f"data.tasks: {' and '.join(TOKEN_TASKS)} mix with no other, got {settings.tasks}"
            )
        makers = TokenMaker(settings), TokenMaker(settings)
        tokenizer, vocab_size = None, settings.vocab_size
    else:
        if settings.haystack is None:
            raise UserError("data.haystack: needle tasks need one (titans haystack makes it)")
        sentences = SentenceTokens.load(settings.haystack)
        kept = min(len(sentences) - 1, round(len(sentences) * (1 - _HELD_OUT)))
        if kept < 1:
            raise UserError(f"data.haystack: expected at least 2 sentences, got {len(sentences)}")
        makers = (
            NeedleMaker(_rows(settings, sentences.part(0, kept))),
            NeedleMaker(_rows(settings, sentences.part(kept, len(sentences)))),
        )
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


def _rows(settings: TaskSettings, sentences: SentenceTokens) -> NeedleRows:
    rows = NeedleRows(
        sentences.at_least(2 * settings.lengths[-1] + 2),
        [TASKS[name] for name in settings.tasks],
        keys=settings.keys,
        questions=settings.questions,
        dense=settings.dense,
        middle=settings.middle,
    )
    if rows.shortest() > settings.lengths[0]:
        raise UserError(
            f"data.lengths: expected at least {rows.shortest()} tokens for a row of these tasks, "
            f"got {settings.lengths[0]}"
        )
    return rows
