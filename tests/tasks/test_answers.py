"""Streaming tests: cuts change nothing, and only a model that knows the answers gets them right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.tasks.tiny import tiny_haystack
from titans.data.tokenizer import TextEncoder
from titans.evaluation.needle import TASKS, samples
from titans.evaluation.recall import MQAR, accuracy
from titans.models import TitansConfig, TitansForCausalLM
from titans.tasks.answers import Asked, right
from titans.tasks.needle_test import NeedleTest, answer_text, length_counter, make_test, run_test


class Knows:
    """Stands in for a model: it predicts the next token of the rows that it is given, or one next to it."""

    device = torch.device("cpu")

    def __init__(self, ids: np.ndarray, wrong_rows: tuple[int, ...] = ()):
        self.next = np.roll(ids.astype(np.int64), -1, axis=1)
        for row in wrong_rows:
            self.next[row] = (self.next[row] + 1) % 384
        self.pieces: list[int] = []

    def model(self, ids, past_key_values, use_cache):
        start = 0 if past_key_values is None else past_key_values.seen
        stop = start + ids.shape[1]
        self.pieces.append(ids.shape[1])
        hidden = F.one_hot(torch.from_numpy(self.next[:, start:stop]), 384).float()
        return SimpleNamespace(
            last_hidden_state=hidden, past_key_values=SimpleNamespace(seen=stop, states=[])
        )

    def lm_head(self, hidden):
        return hidden


def needle_test(name: str = "niah_single_2", number: int = 4, length: int = 3000) -> NeedleTest:
    haystack = tiny_haystack()
    return make_test(name, length, number, haystack, length_counter(haystack, len), seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_the_tokens_are_those_of_the_published_samples(name):
    test, haystack = needle_test(name, 2, 4000), tiny_haystack()
    encode = TextEncoder(haystack.tokenizer)
    published = samples(TASKS[name], 4000, len, haystack.texts(), seed=1)
    for row, sample in enumerate(published):
        if row == 2:
            break
        text = sample.prompt + answer_text(TASKS[name], sample)
        (ids,) = encode([text])
        assert test.asked.ids[row, : len(ids)].tolist() == ids.tolist()
        here = test.asked.rows == row
        assert haystack.tokenizer.decode(test.asked.targets[here]) == answer_text(TASKS[name], sample)
        assert test.asked.places[here][-1] == len(ids) - 1
        assert test.depths[row] == sample.depth
        assert test.tokens[row] == sample.tokens


@pytest.mark.parametrize("tokens", [None, 4, 256, 1 << 20])
def test_a_model_that_knows_gets_all_and_one_that_does_not_nothing(tokens):
    test = needle_test()
    scores = run_test(Knows(test.asked.ids), test, tokens=tokens)
    assert sum(score.samples for score in scores) == 4
    assert all(score.correct == score.samples for score in scores)
    assert all(score.tokens_correct == score.tokens_asked for score in scores)
    scores = run_test(Knows(test.asked.ids, (0, 1, 2, 3)), test, tokens=tokens)
    assert sum(score.correct for score in scores) == sum(score.tokens_correct for score in scores) == 0


def test_each_sample_counts_for_the_depth_of_its_needle():
    test = needle_test(number=8)
    wrong = (1, 4)
    scores = run_test(Knows(test.asked.ids, wrong), test, bins=4)
    for score in scores:
        members = [i for i, depth in enumerate(test.depths) if score.depth_from <= depth < score.depth_to]
        assert score.samples == len(members)
        assert score.correct == len([i for i in members if i not in wrong])


def test_an_answer_with_one_wrong_token_is_wrong():
    test = needle_test(number=2)
    model = Knows(test.asked.ids)
    model.next[0, test.asked.places[3] - 1] += 1
    (tokens, correct) = np.sum(
        [(score.tokens_asked - score.tokens_correct, score.correct) for score in run_test(model, test)],
        axis=0,
    )
    assert (tokens, correct) == (1, 1)


def test_a_saved_test_is_the_same(tmp_path):
    test = needle_test()
    test.save(tmp_path / "t.npz")
    again = NeedleTest.load(tmp_path / "t.npz")
    assert (again.task, again.length) == (test.task, test.length)
    for one, other in zip((*again.asked, again.depths), (*test.asked, test.depths), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("variant", ["lmm", "mag", "mac", "attention"])
def test_pieces_and_padding_change_nothing(variant):
    """Against one forward pass over each row alone; ends of rows that are shorter must not matter."""
    config = TitansConfig.named("tiny", variant=variant, vocab_size=384, num_hidden_layers=1)
    model = TitansForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 384, (3, 150))
    lengths = [150, 131, 98]
    rows, places = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 149, 100, 130, 64, 97])
    with torch.no_grad():
        likeliest = [
            model(torch.from_numpy(row[:length])[None]).logits[0].argmax(-1)
            for row, length in zip(ids, lengths, strict=True)
        ]
    targets = np.array([int(likeliest[row][place - 1]) for row, place in zip(rows, places, strict=True)])
    targets[3] += 1
    for tokens in (3 * 7, 3 * 64, 3 * 1000):
        assert right(model, Asked(ids, rows, places, targets), tokens=tokens).tolist() == [
            *[True] * 3,
            False,
            *[True] * 2,
        ]


def test_labels_of_a_batch_are_asked_as_accuracy_does():
    batch = MQAR(vocab_size=64, length=64, pairs=8, noise=False).batch(0, 16)
    config = TitansConfig.named("tiny", variant="lmm", vocab_size=64, num_hidden_layers=1)
    model = TitansForCausalLM(config).eval()
    with torch.no_grad():
        expected = accuracy(model(batch.input_ids).logits, batch.labels)
    assert right(model, Asked.of_batch(batch)).mean() == pytest.approx(expected)
