"""Packed batches: windows of a token stream that keep their documents apart.

A *fragment* is a run of tokens of one document inside one window: what a sequence is to the model. A document
that is longer than a window is several fragments, and each starts from the initial memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from titans.data.shards import TokenShards
from titans.errors import UserError

IGNORED = -100  # the label that transformers' losses leave out


class Window(NamedTuple):
    """A window of the stream: ``input_ids`` int64 [T], ``boundaries`` int64 [n].

    ``boundaries`` are the positions p, 0 < p < T, at which another document starts, ascending.
    """

    input_ids: Tensor
    boundaries: Tensor


class PackedDataset(Dataset[Window]):
    """The windows of exactly ``sequence_length`` tokens that tile a split; a shorter rest is left out.

    ``dataset[i]`` depends on nothing but the arguments and ``i``: order and resumption are the sampler's.

    Args:
        shards: the split.
        sequence_length: T, at least 2 (a window of one token predicts nothing).
        seed: shifts where the first window starts by 0 to T - 1 tokens (fewer if the split is short), so that
            another seed cuts documents at other places; None starts at token 0.

    Raises:
        UserError: ``sequence_length`` is below 2 or above the split's size.
    """

    def __init__(self, shards: TokenShards, sequence_length: int, seed: int | None = None):
        if sequence_length < 2:
            raise UserError(f"sequence_length: expected at least 2, got {sequence_length}")
        if sequence_length > len(shards):
            raise UserError(
                f"sequence_length: {sequence_length} is more than the {len(shards)} tokens of the split "
                f"{shards.split!r} of {shards.folder}: give more text or a shorter sequence"
            )
        self.shards = shards
        self.sequence_length = sequence_length
        self.first = 0
        if seed is not None:
            shifts = min(sequence_length, len(shards) - sequence_length + 1)
            self.first = int(torch.randint(shifts, (), generator=torch.Generator().manual_seed(seed)))

    def __len__(self) -> int:
        return (len(self.shards) - self.first) // self.sequence_length

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = self.first + index * self.sequence_length
        stop = start + self.sequence_length
        boundaries = self.shards.starts_between(start + 1, stop) - start
        return Window(torch.from_numpy(self.shards.read(start, stop)), torch.from_numpy(boundaries))


class PackedCollator:
    """Windows -> the model's arguments; no fragment ever sees another.

    * Windows of equal length without boundaries: ``input_ids`` and ``labels`` [B, T].
    * Otherwise all fragments of all windows in one row: ``input_ids`` and ``labels`` [1, total] and
      ``cu_seqlens`` int32 [N + 1], where fragment i is tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.

    ``labels`` are the ids (the model shifts them), but -100 at every fragment's first token, which has no
    predecessor to be predicted from.
    """

    def __call__(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        lengths = {len(window.input_ids) for window in windows}
        if len(lengths) == 1 and not any(len(window.boundaries) for window in windows):
            input_ids = torch.stack([window.input_ids for window in windows])
            labels = input_ids.clone()
            labels[:, 0] = IGNORED
            return {"input_ids": input_ids, "labels": labels}
        starts, total = [], 0
        for window in windows:
            starts += [torch.tensor([total]), window.boundaries + total]
            total += len(window.input_ids)
        firsts = torch.cat(starts)
        input_ids = torch.cat([window.input_ids for window in windows])[None]
        labels = input_ids.clone()
        labels[0, firsts] = IGNORED
        cu_seqlens = torch.cat([firsts, torch.tensor([total])]).to(torch.int32)
        return {"input_ids": input_ids, "labels": labels, "cu_seqlens": cu_seqlens}
