"""Where the real tokens of a batch are, so that blocks work on a stream without padding."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from titans.nn import Rows


class Layout:
    """Dense (`rows` None), padded (left, right or anywhere) or packed documents.

    In the last two cases embeddings, norms, MLPs and projections run on the packed stream `[1, total, C]`;
    convolutions, chunks, windows and segments count the tokens of each row. Building one reads the mask
    or cu_seqlens on the host once per forward.
    """

    def __init__(
        self, batch: int, tokens: int, rows: Rows | None = None, places: Tensor | None = None
    ) -> None:
        self.batch = batch
        self.tokens = tokens
        self.rows = rows
        self.places = places  # flat index in [B * T] of every token of the stream; None: it is the input
        self.states = batch if rows is None else len(rows)

    @classmethod
    def of(cls, inputs: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
        """The layout of inputs `[B, T, ...]` with either a 2-D mask or cu_seqlens, or neither."""
        batch, tokens = inputs.shape[:2]
        if tokens == 0:
            raise ValueError("input_ids must hold at least one token, got T = 0")
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError("give either attention_mask or cu_seqlens, got both")
            return cls._packed(batch, tokens, cu_seqlens, inputs.device)
        if attention_mask is None:
            return cls(batch, tokens)
        return cls._masked(batch, tokens, attention_mask, inputs.device)

    @classmethod
    def _packed(cls, batch: int, tokens: int, cu_seqlens: Tensor, device: torch.device) -> Layout:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs packed input_ids [1, total], got {batch} rows")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                "cu_seqlens must be int32 of shape [N + 1] with N >= 1, "
                f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
            )
        bounds = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of tokens, {tokens}; got {bounds[0]} to "
                f"{bounds[-1]}, smallest step {min(lengths)}"
            )
        return cls(batch, tokens, Rows(lengths, device))

    @classmethod
    def _masked(cls, batch: int, tokens: int, attention_mask: Tensor, device: torch.device) -> Layout:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
            raise ValueError(
                f"attention_mask must have shape [B, T] = [{batch}, {tokens}] (or more columns: the whole "
                f"history), got {list(attention_mask.shape)}"
            )
        real = attention_mask[:, -tokens:].cpu() != 0
        if bool(real.all()):
            return cls(batch, tokens)
        lengths = real.sum(1).tolist()
        if sum(lengths) == 0:
            raise ValueError("attention_mask must have at least one 1 among these tokens, got zeros alone")
        places = real.flatten().nonzero().squeeze(1)
        return cls(batch, tokens, Rows(lengths, device), places.to(device))

    def pack(self, padded: Tensor) -> Tensor:
        """`[B, T, ...]` -> the stream `[1, total, ...]`; the input itself in the dense case."""
        return padded if self.places is None else padded.flatten(0, 1).index_select(0, self.places)[None]

    def unpack(self, stream: Tensor) -> Tensor:
        """The stream -> `[B, T, ...]`, zeros where the padding is."""
        if self.places is None:
            return stream
        flat = stream.new_zeros(self.batch * self.tokens, *stream.shape[2:])
        return flat.index_copy(0, self.places, stream[0]).unflatten(0, (self.batch, self.tokens))
