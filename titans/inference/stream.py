"""`Stream`: a text of any length through one model, piece by piece, in constant memory.

Everything that reads long texts goes through here: generation, memory files, loss by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from titans.inference.graph import StepGraph, keeps_its_shape
from titans.models import TitansCache, TitansForCausalLM
from titans.models.state import compact, for_steps, leaves, unrolled
from titans.nn import at_least_fp32

# Tokens per forward pass. More fill a GPU; on a CPU they only take memory.
PIECE = 1024
GPU_PIECE = 16384
# Logits at once where each token's are needed: 128 MB in fp32, whatever the vocabulary.
_LOGITS = 1 << 25

Progress = Callable[[int], None]


class Stream:
    """One sequence that a model reads on and on; the state between two calls has a constant size.

    How the tokens are cut into calls and pieces changes nothing but rounding, and with the same cuts on the
    same machine not even that. With a model of another library it works as well, as far as its cache does.

    Args:
        model: in evaluation mode, on the device where it is to run.
        cache: what an earlier stream has read, one row; it is taken over and changes. None starts anew.
        logits: those after the last token of `cache`, `[V]`; None where nobody needs them.
        piece: tokens per forward pass: speed and memory, not the answer. None: 1,024, on a GPU 16,384.
        graph: take steps by a CUDA graph as soon as the state keeps its shape (see `StepGraph`). None: where
            there is a GPU.

    Attributes:
        logits: `[V]`, the prediction of the next token; None before the first.
        tokens_read: since the stream began, earlier streams whose state it took over included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: TitansCache | None = None,
        *,
        logits: Tensor | None = None,
        piece: int | None = None,
        graph: bool | None = None,
    ) -> None:
        if piece is None:
            piece = PIECE if model.device.type == "cpu" else GPU_PIECE
        if piece < 1:
            raise ValueError(f"piece: expected at least 1 token, got {piece}")
        if cache is not None and cache.is_initialized and cache.batch_size != 1:
            raise ValueError(f"cache: expected one row, got {cache.batch_size}")
        self.model = model
        self.piece = piece
        self.logits = logits
        self.tokens_read = 0 if cache is None else cache.seen
        self._cache = cache
        if graph is None:
            graph = model.device.type == "cuda"
        self._by_graph = graph and isinstance(model, TitansForCausalLM)
        self._graph: StepGraph | None = None
        self._in_graph = False  # the state is in the graph's buffers, ahead of the cache

    @property
    def cache(self) -> TitansCache:
        """The state, as the model takes it: the stream's own. `fork()` first to go on elsewhere.

        Between steps it costs a copy of the state, and the next step another.
        """
        if not isinstance(self._cache, TitansCache):
            raise ValueError(
                f"expected a Titans model that has read something, got {type(self._cache).__name__}"
            )
        self._leave_graph()
        self._cache.states = unrolled(self._cache.states)  # rings are nobody else's
        return self._cache

    @property
    def state_bytes(self) -> int:
        """Size of the state: constant, however much is read (0 before the first token)."""
        states = self.cache.states if self.tokens_read else []
        return sum(leaf.nbytes for leaf in leaves(states).values() if isinstance(leaf, Tensor))

    def fork(self) -> Stream:
        """A stream that has read the same; what either reads from now on, the other does not.

        Behind `read` it costs nothing: states are replaced, never changed, so the two share theirs until they
        read; rings, which steps change, are copied.
        """
        if not self.tokens_read:
            return Stream(self.model, piece=self.piece, graph=self._by_graph)
        cache = self.cache.detach()
        return Stream(self.model, cache, logits=self.logits, piece=self.piece, graph=self._by_graph)

    @torch.inference_mode()
    def read(self, ids: Tensor, progress: Progress = lambda read: None) -> Tensor:
        """Read ids, int64 `[T]` on any device, T >= 1; the logits `[V]` after the last of them.

        `progress` is called after each piece with the tokens read in this call so far.
        """
        for piece, read in self._pieces(ids):
            out = self._forward(self.model, piece, logits_to_keep=1)
            self._advance(out, len(piece), out.logits[0, -1])
            progress(read)
        assert self.logits is not None
        return self.logits

    @torch.inference_mode()
    def losses(self, ids: Tensor, progress: Progress = lambda read: None) -> Tensor:
        """Read ids like `read`; the loss of each in nats, given all before it, at least fp32 `[T]`.

        `[T - 1]` where nothing was read before: nothing predicts a stream's first token.
        """
        parts = []
        for piece, read in self._pieces(ids):
            before = self.logits
            losses, logits, out = self._piece_losses(piece)
            if before is not None:
                losses.insert(0, _cross_entropy(before[None], piece[:1]))
            self._advance(out, len(piece), logits)
            parts += losses
            progress(read)
        return torch.cat(parts) if parts else torch.empty(0)

    @torch.inference_mode()
    def step(self, token: int | Tensor) -> Tensor:
        """Read one token, as when decoding; the logits `[V]` after it."""
        ids = torch.as_tensor(token, device=self.model.device).view(1)
        self._make_rings()
        self.logits = self._graph_step(ids) if self._by_graph else self._plain_step(ids)
        self.tokens_read += 1
        return self.logits

    def _plain_step(self, ids: Tensor) -> Tensor:
        out = self._forward(self.model, ids, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[0, -1]

    def _graph_step(self, ids: Tensor) -> Tensor:
        """By the graph; where there is none yet, a plain step, which shows whether there can be one."""
        if self._in_graph:
            assert self._graph is not None
            return self._graph.step(ids)[0]
        before = list(self._cache.states) if self._cache is not None else []
        logits = self._plain_step(ids)
        assert self._cache is not None
        after = self._cache.states
        if keeps_its_shape(before, after):
            if self._graph is None or not self._graph.fits(after):
                self._graph = StepGraph(self.model, after)
            self._graph.load(after)
            self._in_graph = True
        return logits

    def _make_rings(self) -> None:
        """Steps in place: the cache's states become the stream's alone."""
        if not isinstance(self._cache, TitansCache):
            return
        if self.tokens_read + 1 == self.model.config.window_size:
            self._leave_graph()
            self._cache.states = unrolled(self._cache.states)  # full now: rings without masks
        if not self._in_graph:
            self._cache.states = for_steps(self._cache.states, self.model.config)

    def _leave_graph(self) -> None:
        """Bring the cache up to where the graph's steps have come."""
        if self._in_graph:
            assert self._graph is not None
            assert self._cache is not None
            self._cache.states, self._cache.seen = self._graph.states(), self.tokens_read
            self._in_graph = False

    def _pieces(self, ids: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Each piece on the model's device, and the tokens up to its end."""
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"ids: expected shape [T] with T >= 1, got {list(ids.shape)}")
        read = 0
        for piece in ids.split(self.piece):
            read += len(piece)
            yield piece.to(self.model.device), read

    def _forward(self, module: torch.nn.Module, ids: Tensor, **options: int) -> Any:
        self._leave_graph()
        return module(input_ids=ids[None], past_key_values=self._cache, use_cache=True, **options)

    def _advance(self, out: Any, tokens: int, logits: Tensor) -> None:
        self._cache = out.past_key_values
        if isinstance(self._cache, TitansCache):
            self._cache.states = compact(self._cache.states)
        self.tokens_read += tokens
        self.logits = logits.clone()

    def _piece_losses(self, piece: Tensor) -> tuple[list[Tensor], Tensor, Any]:
        """Losses of all but the first token, the logits after the last, and the model's output."""
        if isinstance(self.model, TitansForCausalLM):
            # A piece's logits would be 2 GB (16,384 tokens of 32,000): the head is applied part by part.
            out = self._forward(self.model.model, piece)
            rows, head = out.last_hidden_state[0], cast(torch.nn.Module, self.model.lm_head)
        else:
            out = self._forward(self.model, piece)
            rows, head = out.logits[0], torch.nn.Identity()
        losses = []
        part = max(1, _LOGITS // self.model.config.vocab_size)
        for start in range(0, len(piece), part):
            logits = head(rows[start : start + part])
            targets = piece[start + 1 : start + 1 + part]
            if len(targets):
                losses.append(_cross_entropy(logits[: len(targets)], targets))
        return losses, logits[-1], out


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.to(at_least_fp32(logits.dtype)), targets, reduction="none")
