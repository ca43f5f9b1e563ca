"""The samples must be MAD's selective copying, and the tokens asked for where MAD asks: at the blanks."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from titans.evaluation.recall import accuracy
from titans.evaluation.selective_copy import SelectiveCopy

SMALL = SelectiveCopy(vocab_size=12, length=40, tokens=6)
TASKS = [
    SMALL,
    SelectiveCopy(),
    SelectiveCopy(vocab_size=4, length=5, tokens=1),
    SelectiveCopy(vocab_size=16, length=35, tokens=16),  # one blank to place
    SelectiveCopy(vocab_size=128, length=1024, tokens=96),
]


def gathered(task: SelectiveCopy, input_ids: Tensor) -> Tensor:
    """Logits [B, T, V] of a solver that gives the i-th token back at the i-th blank after the marker."""
    outputs = torch.zeros_like(input_ids)
    for row, ids in zip(outputs, input_ids, strict=True):
        marker = ids.tolist().index(task.marker)
        row[marker + 1 : marker + 1 + task.tokens] = ids[ids < task.blank]
    return F.one_hot(outputs, task.vocab_size).float()


@pytest.mark.parametrize("task", TASKS)
def test_the_tokens_come_back_in_order_after_the_marker(task):
    batch = task.batch(2, 20)
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        assert len(ids) == len(labels) == task.length
        marker = ids.index(task.marker)
        # The first answer is the output of the first blank, so its label stands one further.
        assert labels[: marker + 2] == [-100] * (marker + 2)
        copied = labels[marker + 2 :]
        assert copied == [token for token in ids[:marker] if token != task.blank]
        assert len(copied) == task.tokens
        assert ids[marker + 1 :] == [task.blank] * (task.tokens + 1)
        # What stands before the marker is tokens and blanks, a token last.
        assert max(ids[:marker]) <= task.blank
        assert ids[marker - 1] < task.blank


@pytest.mark.parametrize("task", TASKS)
def test_without_the_last_blank_a_sample_has_mads_parts(task):
    """MAD: seq_len = n tokens + (seq_len - 2n - 1) blanks + marker + n blanks, the last n asked for."""
    batch = task.batch(0, 5)
    ids, labels, seq_len = batch.input_ids[:, :-1], batch.labels[:, 1:], task.length - 1
    marker = seq_len - task.tokens - 1
    assert torch.equal((ids == task.marker).nonzero()[:, 1], torch.full((5,), marker))
    assert ((ids[:, :marker] == task.blank).sum(1) == seq_len - 2 * task.tokens - 1).all()
    asked = (labels != -100).nonzero()[:, 1].view(5, -1)
    assert torch.equal(asked, torch.arange(seq_len - task.tokens, seq_len).expand(5, -1))


def test_tokens_and_the_blanks_before_them_are_uniform():
    samples = 3000
    ids = SMALL.batch(0, samples).input_ids[:, :-8]  # without marker and what follows
    tokens = ids[ids < SMALL.blank].bincount()
    assert len(tokens) == SMALL.blank
    expected = samples * SMALL.tokens / SMALL.blank  # 1800; its deviation is 40
    assert (tokens - expected).abs().max() < 200
    positions = (ids < SMALL.blank).nonzero()[:, 1].view(samples, SMALL.tokens)
    blanks = positions.diff(dim=1, prepend=torch.full((samples, 1), -1)) - 1
    # 26 blanks, each before one of 6 tokens: binomial, of mean 26 / 6 and variance 26 * 5 / 36.
    assert (blanks.double().mean(0) - 26 / 6).abs().max() < 0.2
    assert (blanks.double().var(0) - 26 * 5 / 36).abs().max() < 0.5


@pytest.mark.parametrize("task", TASKS)
def test_gathering_is_right_and_another_samples_tokens_are_not(task):
    batch = task.batch(1, 200)
    outputs = gathered(task, batch.input_ids)
    assert accuracy(outputs, batch.labels) == 1.0
    assert accuracy(outputs.roll(1, 0), batch.labels) < 1.5 / (task.vocab_size - 2)  # chance


def test_transformers_loss_reads_the_blanks():
    batch = SMALL.batch(0, 8)
    outputs = 50 * gathered(SMALL, batch.input_ids)
    assert ForCausalLMLoss(outputs, batch.labels, SMALL.vocab_size) < 1e-6
    assert ForCausalLMLoss(outputs.roll(1, 1), batch.labels, SMALL.vocab_size) > 10


def test_a_batch_depends_on_seed_and_index_alone():
    again = SelectiveCopy(vocab_size=12, length=40, tokens=6)
    first = SMALL.batch(7, 6)
    torch.rand(1)
    assert all(map(torch.equal, first, again.batch(7, 6)))
    assert all(torch.equal(few, many[:6]) for few, many in zip(first, again.batch(7, 40), strict=True))
    for other in (again.batch(8, 6), dataclasses.replace(again, seed=1).batch(7, 6)):
        assert not torch.equal(first.input_ids, other.input_ids)


def test_the_device_is_the_batches_own():
    assert {(tensor.dtype, tensor.device.type) for tensor in SMALL.batch(0, 2)} == {(torch.int64, "cpu")}
    assert [tensor.device.type for tensor in SMALL.batch(0, 2, device="meta")] == ["meta", "meta"]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("vocab_size", 3, r"vocab_size: expected at least 4 \(two tokens, blank, marker\), got 3"),
        ("tokens", 0, "tokens: expected at least 1, got 0"),
        ("length", 14, r"length: expected at least 15 \(twice 6 tokens, .*got 14"),
        ("seed", -1, "seed: expected at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **{argument: value})


def test_a_bad_batch_is_named():
    with pytest.raises(ValueError, match="index: expected at least 0, got -1"):
        SMALL.batch(-1, 2)
