"""`Sessions`: whatever happens around a session, it gets the answers that it would get alone."""

import pytest
import torch

from titans.inference.sessions import Sessions
from titans.models import VARIANTS, TitansCache, TitansConfig, TitansForCausalLM

VOCAB = 29
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32; logits are about 1
# Chunk 4, segment 8, window 6: within 30 tokens every boundary is met, and every two of them apart.
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "memory_head_dim": 16,
    "memory_expansion": 2,
    "chunk_size": 4,
    "segment_size": 8,
    "window_size": 6,
    "num_persistent_tokens": 3,
}


def build(variant: str, **fields) -> TitansForCausalLM:
    """float32, as served; weights larger than fresh ones, so that a state that is mixed up shows."""
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansConfig(variant=variant, **{**FIELDS, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            std = 0.3 if parameter.dim() == 1 else 0.5 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def prompt(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))


class Client:
    """Someone who decodes greedily: the tokens and logits that a session has given so far."""

    def __init__(self, sessions: Sessions, ids: torch.Tensor) -> None:
        self.sessions, self.ids = sessions, ids
        self.number = sessions.admit()
        self.logits = [sessions.read(self.number, ids)]

    @property
    def tokens(self) -> list[int]:
        return [int(each.argmax()) for each in self.logits]

    def check(self) -> None:
        """Against one forward over everything that the session has read: no state, no neighbours."""
        history = torch.cat([self.ids, torch.tensor(self.tokens[:-1], dtype=torch.int64)])
        with torch.no_grad():
            alone = self.sessions.model(history[None]).logits[0, len(self.ids) - 1 :]
        torch.testing.assert_close(torch.stack(self.logits), alone, **TOLERANCE)
        assert self.tokens == alone.argmax(-1).tolist()
        assert self.sessions.seen(self.number) == len(history)


def step(*clients: Client) -> None:
    answers = clients[0].sessions.step({client.number: client.tokens[-1] for client in clients})
    for client in clients:
        client.logits.append(answers.pop(client.number))
    assert not answers


@pytest.mark.parametrize("variant", [*VARIANTS, "full attention"])
def test_every_session_is_answered_as_alone(variant):
    """Prompts of any length, admitted in the middle, left out of steps, read on, dropped and re-admitted."""
    model = build("attention", window_size=None) if variant == "full attention" else build(variant)
    sessions = Sessions(model)
    a, b = Client(sessions, prompt(1)), Client(sessions, prompt(13))
    for _ in range(3):
        step(a, b)
    c = Client(sessions, prompt(22))  # between steps of the others
    step(b, c)
    for _ in range(6):
        step(c, a, b)
    # A session that waits is read on by itself, and steps as another kind of neighbour.
    sessions.read(c.number, torch.tensor(c.tokens[-1:]))
    c.logits.append(sessions.step({c.number: 5})[c.number])
    more = prompt(9)
    c.ids = torch.cat([c.ids, torch.tensor([*c.tokens[:-1], 5]), more])
    c.logits = [sessions.read(c.number, more)]
    # One ends and comes back with the state it had, under another number; the others have gone on.
    step(a, b, c)
    b.check()
    saved = sessions.drop(b.number)
    assert b.number not in sessions
    for _ in range(4):
        step(a, c)
    b.number = sessions.admit(saved)
    d = Client(sessions, prompt(4))
    for _ in range(9):
        step(d, b, a, c)
    for client in (a, b, c, d):
        client.check()
    assert len(sessions) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_tokens_can_come_in_a_batch(variant):
    """Sessions that have read nothing start together with one that has."""
    sessions = Sessions(build(variant))
    old = Client(sessions, prompt(7))
    new = [sessions.admit(), sessions.admit(TitansCache())]
    answers = sessions.step({new[0]: 3, old.number: old.tokens[-1], new[1]: 4})
    for number, token in zip(new, (3, 4), strict=True):
        with torch.no_grad():
            alone = sessions.model(torch.tensor([[token]])).logits[0, -1]
        torch.testing.assert_close(answers[number], alone, **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_is_nobody_elses(variant):
    """Two sessions from one state, and the state itself, go separate ways."""
    sessions = Sessions(build(variant))
    first = Client(sessions, prompt(11))
    kept = sessions.state(first.number)
    twin = sessions.admit(kept)
    step(first)
    answer = sessions.step({first.number: 2, twin: first.tokens[0]})[twin]
    torch.testing.assert_close(answer, first.logits[1], **TOLERANCE)
    again = sessions.step({sessions.admit(kept): first.tokens[0]}).popitem()[1]
    torch.testing.assert_close(again, first.logits[1], **TOLERANCE)


def test_a_session_is_as_large_as_its_own_state():
    """Full attention: a short stream that was batched with a long one keeps no columns of it."""
    sessions = Sessions(build("attention", window_size=None))
    long, short = Client(sessions, prompt(40)), Client(sessions, prompt(3))
    step(long, short)
    assert sessions.drop(short.number).states[0].keys.shape[2] == 4
    assert sessions.drop(long.number).states[0].keys.shape[2] == 41


def test_mistakes_leave_every_session_as_it_was():
    sessions = Sessions(build("mac"))
    client = Client(sessions, prompt(5))
    for mistake, message in [
        (
            lambda: sessions.step({client.number: 1, 7: 1}),
            r"no session has the number 7: expected one of \[0\]",
        ),
        (lambda: sessions.step({client.number: VOCAB}), "tokens must be from 0 to 28, got 29 to 29"),
        (lambda: sessions.read(client.number, torch.tensor([3, -1])), "from 0 to 28, got -1 to 3"),
        (lambda: sessions.read(client.number, torch.tensor([[3]])), r"expected shape \[T\] .*, got \[1, 1\]"),
        (lambda: sessions.read(client.number, torch.tensor([])), r"expected shape \[T\] .*, got \[0\]"),
        (lambda: sessions.read(7, torch.tensor([3])), "no session has the number 7"),
        (lambda: sessions.drop(7), "no session has the number 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            mistake()
    step(client)
    client.check()
    state = sessions.drop(client.number)
    with pytest.raises(ValueError, match="1 row and 2 blocks of variant 'lmm', got 1 rows and 2 blocks of v"):
        Sessions(build("lmm")).admit(state)
    state.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="got 2 rows"):
        sessions.admit(state)
    assert sessions.step({}) == {}
    with pytest.raises(ValueError, match="must come from one model"):
        TitansCache.concatenate([state, TitansCache()])


def test_a_step_that_fails_loses_nothing(monkeypatch):
    """Out of memory, say, while a newcomer joins: everyone goes on where he was."""
    sessions = Sessions(build("mag"))
    a, b, c = (Client(sessions, prompt(length)) for length in (3, 8, 12))
    step(a, b)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    last = sessions.model.model.layers[-1].mlp  # behind windows that have been written in place
    for target, name in [(TitansCache, "concatenate"), (sessions.model, "forward"), (last, "forward")]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(torch.OutOfMemoryError):
                step(a, c)
            if target is not TitansCache:
                with pytest.raises(torch.OutOfMemoryError):
                    step(a, c)  # the batch is there, as rings
    step(a, c)
    step(a, b, c)
    for client in (a, b, c):
        client.check()
