"""Steps by a CUDA graph are the steps without one. On a CPU a stand-in replays: the buffers are tested."""

from types import SimpleNamespace

import pytest
import torch

from tests.inference.tiny import randomised, tiny, tokens
from titans.inference import graph
from titans.inference.stream import Stream
from titans.models import VARIANTS
from titans.models.state import leaves


@pytest.fixture
def replays(monkeypatch):
    """How often a step was replayed; a "graph" is here the step itself, run on the same buffers."""
    count = []

    def stand_in(step):
        step()
        step()
        return SimpleNamespace(replay=lambda: (count.append(1), step()))

    monkeypatch.setattr(graph, "record", stand_in)
    return count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [1, 9])
def test_steps_reads_and_forks_by_a_graph(variant, first, replays):
    """To the bit, over the ends of chunks (4), windows (6) and segments (8), full at first or not."""
    model, ids = tiny(variant), tokens(60)
    plain, stream = Stream(model), Stream(model, graph=True)
    for each in (plain, stream):
        each.read(ids[:first])
    for token in ids[first:30].tolist():
        assert torch.equal(stream.step(token), plain.step(token))
    fork, plain_fork = stream.fork(), plain.fork()
    for token in ids[30:40].tolist():
        assert torch.equal(fork.step(token), plain_fork.step(token))
    for each in (plain, stream):
        each.read(ids[40:50])  # leaves the graph
    for token in ids[50:].tolist():
        assert torch.equal(stream.step(token), plain.step(token))
    assert stream.tokens_read == stream.cache.seen == plain.tokens_read
    ours, theirs = leaves(stream.cache.states), leaves(plain.cache.states)
    for name, leaf in ours.items():
        assert leaf == theirs[name] if isinstance(leaf, int) else torch.equal(leaf, theirs[name]), name
    assert replays


def test_what_a_stream_has_given_away_stays_as_it_is(replays):
    """A fork, the logits: the graph's buffers move on, what came out of them must not."""
    stream, ids = Stream(tiny("lmm"), graph=True), tokens(20).tolist()
    given = [stream.step(token) for token in ids[:6]]
    fork = stream.fork()
    kept = [logits.clone() for logits in given]
    state = {name: leaf.clone() for name, leaf in leaves(fork.cache.states).items()}
    for token in ids[6:]:
        stream.step(token)
    assert all(map(torch.equal, given, kept))
    assert all(torch.equal(leaf, state[name]) for name, leaf in leaves(fork.cache.states).items())


class _Fibonacci:
    """A model whose step hands one of its tensors on as another: (a, b) -> (a + b, a)."""

    device, config = torch.device("cpu"), SimpleNamespace(variant="lmm")

    def __call__(self, ids, past_key_values, use_cache, logits_to_keep):
        ((a, b),) = past_key_values.states
        past_key_values.states = [(a + b, a)]
        return SimpleNamespace(logits=(a + b).view(-1, 1, 1))


def test_tensors_that_change_places_are_not_overwritten_on_the_way(replays):
    """As when the weights become the anchor of the next chunk."""
    start = [(torch.tensor([1]), torch.tensor([1]))]
    step = graph.StepGraph(_Fibonacci(), start)
    step.load(start)
    assert [int(step.step(torch.tensor([0]))) for _ in range(6)] == [2, 3, 5, 8, 13, 21]
    assert start == [(torch.tensor([1]), torch.tensor([1]))]


def test_rows_step_together(replays):
    start = [(torch.tensor([1, 2]), torch.tensor([1, 0]))]
    step = graph.StepGraph(_Fibonacci(), start)
    step.load(start)
    assert [step.step(torch.tensor([0, 0])).flatten().tolist() for _ in range(3)] == [[2, 2], [3, 4], [5, 6]]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_graph_gives_the_plain_steps(variant):
    """In bfloat16, where the step kernel runs (head width and chunk are those that it takes)."""
    sizes = {"hidden_size": 64, "memory_head_dim": 32, "chunk_size": 16, "segment_size": 16}
    model, ids = randomised(variant, **sizes).to("cuda", torch.bfloat16), tokens(80)
    plain, stream = Stream(model, graph=False), Stream(model)
    for each in (plain, stream):
        each.read(ids[:20])
    for token in ids[20:].tolist():
        torch.testing.assert_close(stream.step(token), plain.step(token), rtol=0, atol=0)
