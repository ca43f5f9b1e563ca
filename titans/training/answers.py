"""Rows in which a few tokens are asked for: where they stand, and how many are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def select_answers(labels: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Where the next token is asked for, among all `B * T` tokens, and that token.

    labels `[B, T]`, not shifted, -100 where nothing is asked. Both results are `[K]`, K a multiple of
    `multiple`, to which place 0 and -100 fill them up: then there are few different K.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    places = (targets != -100).nonzero().squeeze(1)
    fill = -len(places) % multiple
    return F.pad(places, (0, fill)), F.pad(targets[places], (0, fill), value=-100)


def right_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens asked for that are the likeliest, answers all of whose tokens are, and the number of answers.

    logits `[B, T, V]`, not shifted; labels `[B, T]`, an answer being a run of labels other than -100.
    """
    asked = labels[:, 1:] != -100
    right = asked & (logits[:, :-1].argmax(-1) == labels[:, 1:])
    first = asked.clone()
    first[:, 1:] &= ~asked[:, :-1]
    # Each answer counts its wrong tokens in a place of its own; the last place is no answer's.
    answer = torch.where(asked.flatten(), first.flatten().cumsum(0) - 1, asked.numel())
    wrong = torch.zeros(asked.numel() + 1, device=labels.device).index_add(
        0, answer, (asked & ~right).flatten().float()
    )
    spoiled = (wrong[:-1] > 0).sum()
    return right.sum(), first.sum() - spoiled, first.sum()
