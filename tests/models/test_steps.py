"""`for_steps`: whole models whose windows and segments move on in place, and others, which did not ask."""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans.models import TitansCache
from titans.models.state import for_steps, leaves, unrolled
from titans.nn.attention_ring import Ring

TOLERANCE = {"rtol": 0, "atol": 1e-9}
LENGTHS = (2, 17, 11)  # tokens of each row before the steps


def rings(state):
    """All rings in nested states."""
    if isinstance(state, Ring):
        return [state]
    if isinstance(state, list | tuple):
        return [ring for part in state for ring in rings(part)]
    if is_dataclass(state):
        return [ring for field in fields(state) for ring in rings(getattr(state, field.name))]
    return []


def places(states):
    return [part.data_ptr() for ring in rings(states) for part in (ring.keys, ring.rotated, ring.values)]


def prompts(model, ids):
    """A cache whose rows have read LENGTHS tokens: the prompts were padded on the left."""
    width = max(LENGTHS)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in LENGTHS])
    padded = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        padded[row, width - length :] = ids[row, :length]
    return model(padded, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values


def at(ids, step):
    return torch.stack([row[length + step] for row, length in zip(ids, LENGTHS, strict=True)])[:, None]


@torch.no_grad()
def test_rows_anywhere_step_as_alone(variant, build, tokens):
    """Windows (6), segments (8) and chunks (4) end at different steps, several times; then all read on."""
    model, ids = build(variant), tokens(3, 60)
    whole = model(ids).logits
    cache = prompts(model, ids)
    cache.states = for_steps(cache.states, model.config)
    where = places(cache.states)
    assert bool(where) == (variant != "lmm")
    for step in range(30):
        logits = model(at(ids, step), past_key_values=cache, use_cache=True).logits[:, 0]
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(logits[row], whole[row, length + step], **TOLERANCE)
        assert places(cache.states) == where
        if step == 12:  # asked again: what is a ring stays
            cache.states = for_steps(cache.states, model.config)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert not rings(cache.states)
    cache.states = for_steps(cache.states, model.config)
    both = TitansCache.concatenate([cache, cache.detach()])
    for each, rows in ((cache, (2, 0, 1)), (both, (2, 0, 1, 2, 0, 1))):
        pieces = [slice(LENGTHS[row] + 30, LENGTHS[row] + 43) for row in rows]
        ids_of_rows = torch.stack([ids[row, piece] for row, piece in zip(rows, pieces, strict=True)])
        logits = model(ids_of_rows, past_key_values=each, use_cache=True).logits
        for place, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            torch.testing.assert_close(logits[place], whole[row, piece], **TOLERANCE)


@torch.no_grad()
def test_nothing_is_written_in_place_unless_asked(variant, build, tokens):
    """A cache's states outlive a step; so do those that rings were made of, and copies of rings."""
    model, ids = build(variant), tokens(3, 40)
    cache = prompts(model, ids)
    plain, stepped, twin = cache.detach(), cache.detach(), None
    old = {name: torch.as_tensor(leaf).clone() for name, leaf in leaves(cache.states).items()}
    stepped.states = for_steps(stepped.states, model.config)
    answers = []
    for step in range(10):
        if step == 4:
            twin = stepped.detach()
        for each in (plain, stepped):
            answers.append(model(at(ids, step), past_key_values=each, use_cache=True).logits)
    for step in range(4, 10):
        logits = model(at(ids, step), past_key_values=twin, use_cache=True).logits
        torch.testing.assert_close(logits, answers[2 * step], **TOLERANCE)
    for step in range(10):
        torch.testing.assert_close(answers[2 * step + 1], answers[2 * step], **TOLERANCE)
    for name, leaf in leaves(cache.states).items():
        assert torch.equal(torch.as_tensor(leaf), old[name]), name
    ours, theirs = leaves(unrolled(stepped.states)), leaves(plain.states)
    assert ours.keys() == theirs.keys()


class _LargeResults(TorchDispatchMode):
    """Operations that fill as many numbers as a window has, beside those that write one column."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        view = any(
            each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns
        )
        if not view and func is not torch.ops.aten.index_copy_.default:
            self.found += [
                str(func)
                for each in tree_leaves(result)
                if isinstance(each, torch.Tensor) and each.numel() >= self.size
            ]
        return result


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mag", "mal", "attention", "mac"])
@pytest.mark.parametrize("full", [True, False])
def test_a_step_copies_no_window(variant, full, build, tokens):
    """Nothing that a step makes is as large as one; a plain step, which must copy, shows that it counts."""
    model = build(variant, window_size=128, segment_size=128)
    ids = tokens(2, 200)
    read = 180 if full else 90
    cache = model(ids[:, :read], use_cache=True, logits_to_keep=1).past_key_values
    stepped = cache.detach()
    stepped.states = for_steps(stepped.states, model.config)
    size = 2 * 16 * (40 if variant == "mac" else 64)  # rows x width x fewer columns than there are
    found = []
    for each in (cache, stepped):
        with _LargeResults(size) as large:
            model(ids[:, read : read + 1], past_key_values=each, use_cache=True, logits_to_keep=1)
        found.append(large.found)
    assert found[0]
    assert not found[1]
