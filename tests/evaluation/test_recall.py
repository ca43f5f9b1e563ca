"""MQAR must be Zoology's task, and its labels must mean to a causal model what Zoology's mean to its own."""

import dataclasses
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from titans.evaluation.recall import MQAR, TokenBatch, accuracy, uniforms

SMALL = MQAR(vocab_size=64, length=48, pairs=5)
TASKS = [
    SMALL,
    dataclasses.replace(SMALL, noise=False),
    MQAR(vocab_size=26, length=48, pairs=12),  # every key there is, every slot there is
    MQAR(vocab_size=51, length=50, pairs=1, power_a=1.0),
    MQAR(length=256, pairs=64),
]


def looked_up(task: MQAR, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of a solver that looks each token up among the pairs, knowing nothing else."""
    pairs = input_ids[:, : 2 * task.pairs]
    found = input_ids[:, :, None] == pairs[:, None, 0::2]
    values = (found * pairs[:, None, 1::2]).sum(-1)
    return F.one_hot(values, task.vocab_size).float()


def slots(task: MQAR, batch: TokenBatch) -> Tensor:
    """The slot (from 0) of every key in the order of the pairs, [B, pairs], found by the value asked for."""
    values = batch.input_ids[:, 1 : 2 * task.pairs : 2]
    answers = (batch.labels[:, None, :] == values[:, :, None]).long().argmax(-1)
    return (answers - 1 - 2 * task.pairs) // 2


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_asked_for_once_after_it_was_given_with_that_value(task):
    batch = task.batch(3, 20)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        keys, values = ids[0 : 2 * task.pairs : 2], ids[1 : 2 * task.pairs : 2]
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert sorted(ids[t - 1] for t in asked) == sorted(keys)
        assert all(labels[t] == values[keys.index(ids[t - 1])] for t in asked)
        # Slots of two tokens, after the pairs.
        assert all(t - 1 >= 2 * task.pairs and (t - 1) % 2 == 0 for t in asked)


@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_are_of_disjoint_halves_and_none_comes_twice(task):
    pairs = task.batch(0, 400).input_ids[:, : 2 * task.pairs]
    keys, values = pairs[:, 0::2], pairs[:, 1::2]
    half = task.vocab_size // 2
    assert keys.min() >= 1
    assert keys.max() < half <= values.min()
    assert values.max() < task.vocab_size
    for tokens in (keys, values):
        assert all(len(set(row)) == task.pairs for row in tokens.tolist())
    if task.vocab_size < 100:  # enough draws to have seen them all
        assert set(keys.flatten().tolist()) == set(range(1, half))
        assert set(values.flatten().tolist()) == set(range(half, task.vocab_size))


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0, 2.0])
def test_the_first_key_follows_the_power_law(power_a):
    task = MQAR(vocab_size=32, length=48, pairs=4, power_a=power_a)
    samples = 20_000
    counts = slots(task, task.batch(0, samples))[:, 0].bincount(minlength=20).double()
    weights = torch.arange(1, 21, dtype=torch.float64) ** (power_a - 1)
    expected = samples * weights / weights.sum()
    # Chi-squared with 19 degrees of freedom: above 50 once in 7,500 seeds; a wrong power gives thousands.
    assert ((counts - expected) ** 2 / expected).sum() < 50


def test_all_keys_take_their_slots_as_numpy_draws_without_replacement():
    """Zoology's own draw. Each of the 5 keys by its rank: the first ones are asked for sooner."""
    task, samples = dataclasses.replace(SMALL, noise=False), 4000
    weights = np.arange(1, 20) ** (task.power_a - 1.0)
    rng = np.random.default_rng(0)
    draws = [
        rng.choice(19, 5, replace=False, p=weights / weights.sum(), shuffle=False) for _ in range(samples)
    ]
    ours = slots(task, task.batch(0, samples))
    for rank in range(5):
        other = torch.from_numpy(np.stack(draws)[:, rank]).bincount(minlength=19) / samples
        # Each share is good to sqrt(2 * 0.28 * 0.72 / 4000) = 0.01; 4.5 of those.
        assert (ours[:, rank].bincount(minlength=19) / samples - other).abs().max() < 0.045
    means = ours.double().mean(0)
    assert (means.diff() > 0).all(), means


def test_a_smaller_power_asks_sooner():
    means = [
        slots(task, task.batch(0, 500)).double().mean()
        for task in (dataclasses.replace(SMALL, power_a=power) for power in (0.01, 0.5, 1.0))
    ]
    assert means == sorted(means)
    assert means[2] == pytest.approx(9, abs=0.4)  # the middle of 19 slots: uniform


@pytest.mark.parametrize("noise", [True, False])
def test_what_is_neither_pair_nor_query_is_noise_of_the_whole_vocabulary(noise):
    task = dataclasses.replace(SMALL, noise=noise)
    batch = task.batch(0, 300)
    rest = torch.ones_like(batch.input_ids, dtype=torch.bool)
    rest[:, : 2 * task.pairs] = False
    rest[:, :-1] &= batch.labels[:, 1:] == -100
    seen = batch.input_ids[rest].bincount(minlength=64)
    if noise:
        assert seen.min() > 0.6 * seen.double().mean()  # about 155 each: five deviations below
    else:
        assert seen[0] == rest.sum()


@pytest.mark.parametrize("task", TASKS)
def test_looking_up_is_right_and_another_samples_pairs_are_not(task):
    batch = task.batch(1, 32)
    assert accuracy(looked_up(task, batch.input_ids), batch.labels) == 1.0
    others = batch.input_ids.clone()
    others[:, 1 : 2 * task.pairs : 2] = others[:, 1 : 2 * task.pairs : 2].roll(1, 0)
    assert accuracy(looked_up(task, others), batch.labels) < 0.3


def test_labels_are_zoologys_moved_by_one():
    """Zoology's label stands at its query; transformers' own loss must pair the same output with it."""
    batch = SMALL.batch(0, 8)
    zoology = torch.cat([batch.labels[:, 1:], torch.full((8, 1), -100)], 1)
    at_query = zoology != -100
    keys = batch.input_ids[:, : 2 * SMALL.pairs : 2]
    assert torch.equal(batch.input_ids[at_query].view(8, -1).sort(1).values, keys.sort(1).values)
    outputs = 50 * looked_up(SMALL, batch.input_ids)
    assert F.cross_entropy(outputs[at_query], zoology[at_query]) < 1e-6
    assert ForCausalLMLoss(outputs, batch.labels, SMALL.vocab_size) < 1e-6
    assert ForCausalLMLoss(outputs, zoology, SMALL.vocab_size) > 10


def test_accuracy_is_the_share_of_asked_tokens():
    labels = torch.tensor([[-100, 2, -100, 1], [0, -100, -100, 2]])  # the first of row 2 cannot be predicted
    logits = F.one_hot(torch.tensor([[2, 0, 0, 1], [0, 0, 2, 1]]), 3).float()
    assert accuracy(logits, labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3, 5), torch.zeros(2, 4), r"logits: expected shape \[2, 4, 'V'\], got \[2, 3, 5\]"),
        (torch.zeros(1, 2, 5), torch.tensor([[3, -100]]), "labels: expected a label other than -100 .*none"),
    ],
)
def test_accuracy_of_nothing_is_an_error(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(logits, labels)


def test_a_batch_depends_on_seed_and_index_alone():
    again = MQAR(vocab_size=64, length=48, pairs=5)
    first = SMALL.batch(7, 6)
    SMALL.batch(8, 2)
    torch.manual_seed(123)
    torch.rand(1)
    assert all(map(torch.equal, first, again.batch(7, 6)))
    assert torch.equal(torch.rand(1), torch.rand(2, generator=torch.Generator().manual_seed(123))[1:])
    # A larger batch begins with the smaller one.
    assert all(torch.equal(few, many[:6]) for few, many in zip(first, again.batch(7, 40), strict=True))
    for other in (again.batch(8, 6), dataclasses.replace(again, seed=1).batch(7, 6)):
        assert not torch.equal(first.input_ids, other.input_ids)


def test_the_numbers_stay_those_of_published_results():
    """What was trained and measured on these samples would no longer be what a new run sees."""
    task = MQAR(vocab_size=12, length=12, pairs=2, seed=5)
    assert task.batch(9, 1).input_ids.tolist() == [[2, 11, 1, 10, 0, 10, 4, 9, 1, 10, 2, 1]]


def test_seeds_and_indices_that_differ_by_more_than_32_bits_differ():
    """Torch's CPU generator would drop the upper half."""
    draws = [uniforms(seed, index, 1, 4) for seed in (1, 1 + 2**32) for index in (2, 2 + 2**32)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4


def test_the_device_is_the_batches_own():
    assert {tensor.dtype for tensor in SMALL.batch(0, 2)} == {torch.int64}
    assert [tensor.device.type for tensor in SMALL.batch(0, 2)] == ["cpu", "cpu"]
    elsewhere = SMALL.batch(0, 2, device="meta")
    assert [tensor.device.type for tensor in elsewhere] == ["meta", "meta"]
    assert [list(tensor.shape) for tensor in elsewhere] == [[2, 48], [2, 48]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_tokens():
    assert all(
        torch.equal(here, there.cpu())
        for here, there in zip(SMALL.batch(0, 4), SMALL.batch(0, 4, device="cuda"), strict=True)
    )


def test_a_batch_takes_milliseconds():
    """About 8 ms on a slow core; ten times that says that something goes sample by sample."""
    task = MQAR(length=1024, pairs=64)
    best = min(_seconds(lambda: task.batch(0, 64)) for _ in range(5))
    assert best < 0.1


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("pairs", 0, "pairs: expected at least 1, got 0"),
        ("length", 47, "length: expected an even number, got 47"),
        ("length", 18, r"length: expected at least 20 tokens \(4 a pair\), got 18"),
        ("vocab_size", 11, r"vocab_size: expected at least 12 \(5 keys .*got 11"),
        ("power_a", 0.0, "power_a: expected a finite number above 0, got 0.0"),
        ("power_a", float("nan"), "power_a: .*got nan"),
        ("power_a", float("inf"), "power_a: .*got inf"),
        ("seed", -1, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{argument: value})


def test_a_bad_batch_is_named():
    with pytest.raises(ValueError, match="index: expected at least 0, got -1"):
        SMALL.batch(-1, 2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        SMALL.batch(0, 0)
