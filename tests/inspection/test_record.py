"""The figures of `record` and `dependence`, against the recurrence and against plain runs of the model."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from titans.errors import UserError
from titans.inspection import ablate
from titans.inspection.record import FrozenMemory, first_boundary, record
from titans.inspection.watch import MemoryWatch, Write, initial_cache, memories_of
from titans.ops.reference import inner_gradient, reference_rows

VARIANTS = ("lmm", "mac", "mag", "mal", "mac reading first", "mal per channel")
TOKENS = 45  # not a multiple of the chunk (4); persistent tokens (3) put the first boundary at token 1


def at(gate, token):
    """A gate, or its L tensors where it is one per channel, at the tokens of a slice."""
    return tuple(layer[:, token] for layer in gate) if isinstance(gate, tuple) else gate[:, token]


def alpha_of(decay):
    """What is forgotten, the mean over channels where each has its own."""
    if isinstance(decay, tuple):
        return torch.stack([1 - layer.exp().mean(-1) for layer in decay], dim=-1)
    return 1 - decay.exp()


class Calls(MemoryWatch):
    """Every write as it was."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model
        self.calls: list[list[Write]] = [[] for _ in self.memories]

    def look(self, index, write):
        self.calls[index].append(write)


@torch.no_grad()
def run(watch, ids):
    """Logits `[T, V]` of the stream with `watch` looking on, persistent tokens read before it began."""
    model, start = watch.model, initial_cache(watch.model)
    with watch:
        return model(ids[None], past_key_values=start, use_cache=True).logits[0]


@torch.no_grad()
def by_the_recurrence(model, ids):
    """Surprise by autograd at the anchor, and `||M - M_0||` before every token, `[M, H, T]` both."""
    watch = Calls(model)
    run(watch, ids)
    surprise, change = [], []
    for memory, calls in zip(watch.memories, watch.calls, strict=True):
        spec, initial = memory.spec.memory, memory.initial
        affine = (initial.norm_weight, initial.norm_bias)
        norms, changes = [], []
        state = calls[0].before.memory
        for call in calls:
            for t in range(call.k.shape[1]):
                token = slice(t, t + 1)
                anchor = state.anchor if state.position else state.weights
                gradient = inner_gradient(call.k[:, t], call.v[:, t], anchor, spec, *affine)
                norms.append(sum(layer.square().sum((-2, -1)) for layer in gradient).sqrt()[0])
                moved = [w[0] - start for w, start in zip(state.weights, initial.weights, strict=True)]
                changes.append(sum(layer.square().sum((-2, -1)) for layer in moved).sqrt())
                k, v, gates = call.k[:, token], call.v[:, token], [at(gate, token) for gate in call.gates]
                _, state = reference_rows(k, k, v, *gates, state, spec, *affine, memory.spec.chunk_size)
        surprise.append(torch.stack(norms, -1))
        change.append(torch.stack(changes, -1))
    return torch.stack(surprise), torch.stack(change)


@pytest.mark.parametrize("variant", VARIANTS)
def test_surprise_and_change_are_those_of_the_recurrence(variant, build, tokens):
    """A gradient at the wrong anchor, a shifted token or a lost memory layer would show."""
    model, ids = build(variant, memory_depth=2), tokens(1, TOKENS)[0]
    found, _ = record(model, ids)
    surprise, change = by_the_recurrence(model, ids)
    torch.testing.assert_close(torch.from_numpy(found.surprise), surprise.float(), rtol=1e-5, atol=1e-6)
    assert found.change_at[0] == 0
    assert found.change_at[-1] == TOKENS
    assert set(found.change_at[1:-1]) == set(range(first_boundary(model), TOKENS, 4))
    torch.testing.assert_close(
        torch.from_numpy(found.change[..., :-1]),
        change[..., found.change_at[:-1]].float(),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_gates_and_losses_are_the_models_own(variant, build, tokens):
    model, ids = build(variant), tokens(1, TOKENS)[0]
    found, _ = record(model, ids)
    watch = Calls(model)
    logits = run(watch, ids)
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none").float()
    torch.testing.assert_close(torch.from_numpy(found.loss), expected, rtol=1e-5, atol=1e-6)
    for index, calls in enumerate(watch.calls):
        gates = [(call.gates[0], alpha_of(call.gates[1]), call.gates[2].exp()) for call in calls]
        for kept, parts in zip((found.theta, found.alpha, found.eta), zip(*gates, strict=True), strict=True):
            gate = torch.cat(parts, dim=1)[0]
            torch.testing.assert_close(
                torch.from_numpy(kept[index]).double(), gate.permute(1, 2, 0), rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_frozen_memory_is_read_as_the_first_token_found_it(variant, build, tokens):
    """Nothing written, nothing forgotten, and no momentum left from the persistent tokens."""
    model, ids = build(variant), tokens(1, TOKENS)[0]
    found, _ = record(model, ids)

    class Frozen(FrozenMemory, Calls):
        pass

    watch = Frozen(model)
    logits = run(watch, ids)
    for calls in watch.calls:
        for before, after in zip(calls[0].before.memory.weights, calls[-1].after.memory.weights, strict=True):
            torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none").float()
    torch.testing.assert_close(torch.from_numpy(found.frozen_loss), expected, rtol=1e-5, atol=1e-6)
    assert abs(found.frozen_loss - found.loss).max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dependence_is_the_difference_of_two_plain_runs(variant, build, tokens, monkeypatch):
    """Spans share runs (two rows here) that start from kept states: the figures must not notice."""
    monkeypatch.setattr(ablate, "ROWS", 2)
    model, ids = build(variant), tokens(1, TOKENS)[0]
    spans = ablate.equal_spans(TOKENS, 5, 4, first_boundary(model))
    _, caches = record(model, ids, ablate.starts_of(spans))
    seen = []
    found = ablate.dependence(model, ids, spans, caches, seen.append)
    assert seen[-1] == ablate.cost(spans, TOKENS)

    class Without(Calls):
        def __init__(self, model, first, last):
            super().__init__(model)
            self.first, self.last = first, last

        def change_gates(self, index, gates):
            at = torch.arange(gates.theta.shape[1]) + self.read[index]
            inside = (at >= self.first) & (at < self.last)
            return gates._replace(theta=torch.where(inside[None, :, None, None], 0.0, gates.theta))

    def reads_and_logs(first, last):
        watch = Without(model, first, last)
        logits = run(watch, ids)
        reads = [torch.cat([call.output for call in calls], 1)[0].flatten(1) for calls in watch.calls]
        return torch.stack(reads), logits.log_softmax(-1)

    control = found.retrieval[-1]
    assert 0 < control.max() < 1e-4  # float64 and 45 tokens: as small as it is
    reads, logs = reads_and_logs(0, 0)
    for index, (first, last) in enumerate(spans):
        other, other_logs = reads_and_logs(first, last)
        retrieval = (other - reads).norm(dim=-1) / reads.norm(dim=-1)
        torch.testing.assert_close(
            torch.from_numpy(found.retrieval[index]).double(), retrieval, rtol=2e-3, atol=1e-6
        )
        divergence = F.kl_div(other_logs, logs, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(
            torch.from_numpy(found.prediction[index]).double(), divergence, rtol=1e-3, atol=1e-5
        )
        assert not found.prediction[index, :first].any()
        if last < TOKENS:
            assert retrieval[:, last:].max() > 0
            at, targets = torch.arange(last - 1, TOKENS - 1), ids[last:]
            rise = (logs - other_logs)[at, targets].mean()
            assert found.gain[index] == pytest.approx(rise.item(), abs=1e-5)


def test_spans_cover_the_text_and_begin_where_chunks_begin():
    for tokens in (1, 5, 16, 17, 1000):
        for count in (1, 3, 16):
            for first in (1, 12, 16):
                spans = ablate.equal_spans(tokens, count, 16, first)
                assert spans[0][0] == 0
                assert spans[-1][1] == tokens
                assert len(spans) <= count
                assert all(a[1] == b[0] for a, b in pairwise(spans))
                assert all((start - first) % 16 == 0 for start, _ in spans[1:])


def test_a_model_without_memory_is_refused(build, tokens):
    with pytest.raises(UserError, match="no memory"):
        record(build("attention"), tokens(1, 9)[0])


def test_a_loss_that_is_not_finite_is_named(build, tokens):
    model, ids = build("lmm"), tokens(1, 9)[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[4]] = float("nan")
    with pytest.raises(UserError, match=r"the loss is not finite .* at token 1"):
        record(model, ids)


def test_nothing_is_left_behind(build, tokens):
    model, ids = build("mac"), tokens(1, 9)
    before = model(ids).logits
    record(model, ids[0])
    assert torch.equal(model(ids).logits, before)
    assert all("write" not in vars(memory) for memory in memories_of(model))
