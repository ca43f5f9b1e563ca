"""`Sessions`: streams with states of their own that decode together in one batch.

Rows of a batch may stand anywhere: the memory's place in its chunk, the convolutions' tails, the keys of the
window and MAC's place in its segment are kept row by row, so nothing has to be grouped by position.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from itertools import count
from typing import Any

import torch
from torch import Tensor

from titans.inference.stream import Stream
from titans.models import TitansCache, TitansForCausalLM
from titans.models.state import for_steps, unrolled


class Sessions:
    """Many streams through one model; each gets the answers that it would get alone, to rounding.

    A session is admitted and dropped at any time, with the state of an earlier one or none. `step` feeds one
    token to each of the sessions that it names, in one forward. `read` feeds many tokens to one session: a
    server that gives it a piece at a time, between steps, keeps the others going through a long prompt.

    The sessions of the last step lie in one batch. A step of other sessions copies the states of all that it
    names once, about what a step itself moves; a session that waits costs its state and no time. An error in
    a forward leaves every session as it was. Not for several threads at once.
    """

    def __init__(self, model: TitansForCausalLM) -> None:
        self.model = model
        self._numbers = count()
        self._seen: dict[int, int] = {}  # tokens that each session has read
        # A session's state is in one of two places: a cache of one row, or a row of the batch. Rows of the
        # batch that nobody has (theirs was dropped, or is read by itself) go at the next step.
        self._alone: dict[int, TitansCache] = {}
        self._rows: dict[int, int] = {}
        self._batch = TitansCache()

    def __len__(self) -> int:
        return len(self._seen)

    def __contains__(self, session: object) -> bool:
        return session in self._seen

    def seen(self, session: int) -> int:
        """Tokens that the session has read, those of the state that it began with included."""
        self._expect([session])
        return self._seen[session]

    @torch.no_grad()
    def admit(self, state: TitansCache | None = None) -> int:
        """A new session's number. state: what an earlier one had read, one row; it is left as it is.

        Raises:
            ValueError: the state has not one row, or is not of a model like this one.
        """
        blocks: Any = self.model.model.layers
        variant = self.model.config.variant
        if state is None or not state.is_initialized:
            # Nothing is read yet, but the rows are there: the first token may come in a batch.
            cache = TitansCache()
            cache.states, cache.variant = [block.mixer.initial_state(1) for block in blocks], variant
        elif state.batch_size != 1 or state.variant != variant or len(state.states) != len(blocks):
            raise ValueError(
                f"state must have 1 row and {len(blocks)} blocks of variant {variant!r}, got "
                f"{state.batch_size} rows and {len(state.states)} blocks of variant {state.variant!r}"
            )
        else:
            cache = state.detach()
        session = next(self._numbers)
        self._alone[session], self._seen[session] = cache, cache.seen
        return session

    def read(self, session: int, ids: Tensor) -> Tensor:
        """Feed ids `[T]`, T >= 1, to one session; logits `[V]` after the last of them."""
        self._expect([session])
        self._expect_tokens(ids)
        stream = Stream(self.model, self.state(session))
        logits = stream.read(ids)
        self._rows.pop(session, None)
        self._alone[session], self._seen[session] = stream.cache, stream.tokens_read
        return logits

    @torch.no_grad()
    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """Feed one token to each of the sessions named, all at once; the logits `[V]` of each."""
        self._expect(tokens)
        if not tokens:
            return {}
        self._expect_tokens(torch.tensor(list(tokens.values())))
        self._gather(tokens)
        self._make_rings()
        ids = torch.tensor([[tokens[session]] for session in self._rows], device=self.model.device)
        out = self.model(ids, past_key_values=self._batch, use_cache=True, logits_to_keep=1)
        for session in tokens:
            self._seen[session] += 1
        return dict(zip(self._rows, out.logits[:, -1], strict=True))

    @torch.no_grad()
    def state(self, session: int) -> TitansCache:
        """What a session has read so far: for `admit`, or to keep. Nothing that follows changes it."""
        self._expect([session])
        state = self._alone[session].detach() if session in self._alone else self._from_batch([session])
        state.seen = self._seen[session]
        return state

    def drop(self, session: int) -> TitansCache:
        """End a session; its state, with which `admit` goes on."""
        state = self.state(session)
        for place in (self._alone, self._rows, self._seen):
            place.pop(session, None)
        if not self._rows:
            self._batch = TitansCache()  # nobody's rows need no memory
        return state

    def _gather(self, sessions: Collection[int]) -> None:
        """Make the batch of these sessions' states; `_rows` has them in its order."""
        if self._rows.keys() == set(sessions) and len(self._rows) == self._batch.batch_size:
            return
        stay = [session for session in self._rows if session in sessions]
        leave = {session: self._from_batch([session]) for session in self._rows if session not in sessions}
        join = [session for session in sessions if session not in self._rows]
        parts = [self._from_batch(stay)] if stay else []
        self._batch = TitansCache.concatenate([*parts, *(self._alone[session] for session in join)])
        self._rows = {session: row for row, session in enumerate([*stay, *join])}
        for session in join:
            del self._alone[session]
        self._alone |= leave

    def _make_rings(self) -> None:
        """Windows of the batch, a copy that nobody else has, are written in place.

        A step that fails on the way leaves them as they were, in all that a row can see.
        """
        config = self.model.config
        if min(self._seen[session] for session in self._rows) + 1 == config.window_size:
            self._batch.states = unrolled(self._batch.states)  # the last one is full: no masks from here
        self._batch.states = for_steps(self._batch.states, config)

    def _from_batch(self, sessions: Sequence[int]) -> TitansCache:
        chosen = copy(self._batch)
        chosen.batch_select_indices(torch.tensor([self._rows[session] for session in sessions]))
        return TitansCache.concatenate([chosen])  # a short row needs no columns of a long one

    def _expect(self, sessions: Collection[int]) -> None:
        if unknown := [session for session in sessions if session not in self._seen]:
            raise ValueError(f"no session has the number {unknown[0]}: expected one of {list(self._seen)}")

    def _expect_tokens(self, ids: Tensor) -> None:
        """On a GPU a token outside the vocabulary would end the process, and every session with it."""
        vocabulary = self.model.config.vocab_size
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"tokens must be from 0 to {vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
