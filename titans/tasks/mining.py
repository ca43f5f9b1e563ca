"""Sentences that a trained model writes into its memory, though nothing in them is ever asked for.

No list of words says what a gate still takes for a fact: the model does. Such sentences are decoys for
another leg of its training (`titans.tasks.decoys`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from titans.data.sentences import SentenceTokens
from titans.nn.metrics import WriteShares

CONTEXT = 64  # tokens read before those of a piece that count


@torch.inference_mode()
def largest_steps(
    model: PreTrainedModel,
    ids: npt.NDArray[np.integer[Any]],
    *,
    rows: int = 8,
    length: int = 2048,
    progress: Callable[[int], None] = lambda read: None,
) -> npt.NDArray[np.float32]:
    """Of every token the largest step that a memory of the model takes, over the largest it can, `[T]`.

    The text is read in pieces of ``length`` tokens, ``rows`` at a time, each from an empty memory: what a
    gate sees, a window and a convolution, is the text just before.

    Args:
        model: in evaluation mode, on the device where it is to run.
        progress: called with the tokens read so far.

    Raises:
        ValueError: pieces that are no longer than their context.
    """
    if length <= CONTEXT:
        raise ValueError(f"length: expected more than {CONTEXT} tokens, got {length}")
    found = np.zeros(len(ids), np.float32)
    starts = list(range(0, max(len(ids) - CONTEXT, 1), length - CONTEXT))
    for first in range(0, len(starts), rows):
        here = starts[first : first + rows]
        pieces = np.zeros((len(here), length), np.int64)
        for piece, start in zip(pieces, here, strict=True):
            piece[: len(ids) - start] = ids[start : start + length]
        for piece, start in zip(_steps(model, pieces), here, strict=True):
            known = CONTEXT if start else 0
            end = min(start + length, len(ids))
            found[start + known : end] = piece[known : end - start]
        progress(min(here[-1] + length, len(ids)))
    return found


def mine(haystack: SentenceTokens, steps: npt.NDArray[np.float32], least: float) -> SentenceTokens:
    """The sentences with a token whose step is larger than ``least``; steps: of the haystack's first tokens.

    Raises:
        ValueError: there is none.
    """
    written = np.flatnonzero(steps > least)
    if not len(written):
        raise ValueError(f"least: expected less than the largest step, {steps.max()}, got {least}")
    return haystack.pick(np.unique(np.searchsorted(haystack.starts, written, "right") - 1))


def _steps(model: PreTrainedModel, pieces: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """`[B, T]` of a batch `[B, T]`."""
    with WriteShares(model) as shares:
        model(torch.from_numpy(pieces).to(model.device), logits_to_keep=1)
    return torch.stack(shares.of_tokens(*pieces.shape)).amax((0, -1)).float().cpu().numpy()
