"""Reads rows of any length in pieces and says which of the tokens asked for were the likeliest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from titans.data.dataset import IGNORED
from titans.evaluation.recall import TokenBatch
from titans.models.state import compact

GPU_TOKENS = 262144  # of all rows in one forward pass
CPU_TOKENS = 4096


class Asked(NamedTuple):
    """Rows to be read, and what is asked for in them.

    ids: [B, T] of any integer type, on the CPU. rows, places, targets: int64 [N], ``targets[i]`` being the
    token that row ``rows[i]`` asks for at place ``places[i]`` (to be predicted from the places before it).
    What stands at that place in ``ids`` is read only when later tokens are predicted. Rows shorter than T end
    in any tokens: no place sees those after it.
    """

    ids: npt.NDArray[np.integer[Any]]
    rows: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]

    @classmethod
    def of_batch(cls, batch: TokenBatch) -> Asked:
        """Every label of a batch."""
        rows, places = (batch.labels != IGNORED).nonzero(as_tuple=True)
        return cls(batch.input_ids.numpy(), rows.numpy(), places.numpy(), batch.labels[rows, places].numpy())


@torch.inference_mode()
def right(
    model: PreTrainedModel,
    asked: Asked,
    *,
    tokens: int | None = None,
    progress: Callable[[int], None] = lambda read: None,
) -> npt.NDArray[np.bool_]:
    """For each of ``asked.targets`` whether it was the model's likeliest token there, [N].

    A run of targets that are all right is what greedy decoding would have written. The device holds a piece
    of the rows and the model's state; on a GPU, matrix products are in bfloat16 (autocast), as in training.

    Args:
        model: in evaluation mode, on the device where it is to run.
        tokens: of all rows in one forward pass; None: 4,096, on a GPU 262,144.
        progress: called with the tokens of each row read so far.
    """
    device = model.device
    rows, length = asked.ids.shape
    if tokens is None:
        tokens = GPU_TOKENS if device.type == "cuda" else CPU_TOKENS
    piece = max(1, tokens // rows)
    # A target is predicted from the place before it.
    order = np.argsort(asked.places, kind="stable")
    before = asked.places[order] - 1
    if len(order) and before[0] < 0:
        raise ValueError("asked.places: expected places after the first of a row, got 0")
    found = []
    cache = None
    last = int(before[-1]) + 1 if len(order) else 0
    for start in range(0, last, piece):
        stop = min(start + piece, length)
        ids = torch.from_numpy(asked.ids[:, start:stop].astype(np.int64)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model.model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            cache.states = compact(cache.states)
            here = order[np.searchsorted(before, start) : np.searchsorted(before, stop)]
            if len(here):
                at = torch.from_numpy(asked.places[here] - 1 - start).to(device)
                of = torch.from_numpy(asked.rows[here]).to(device)
                logits = model.lm_head(out.last_hidden_state[of, at])
                found.append(logits.argmax(-1))
        progress(stop)
    right = np.zeros(len(order), dtype=bool)
    if found:
        right[order] = torch.cat(found).cpu().numpy() == asked.targets[order]
    return right
