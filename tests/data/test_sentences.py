"""Haystack files: what goes in comes out, and a test's sentences are not the training's."""

import numpy as np
import pytest

from tests.tasks.tiny import book, tiny_haystack
from titans.cli.main import main
from titans.data.sentences import SentenceTokens, make
from titans.errors import UserError
from titans.evaluation.haystack import split_sentences


def test_a_saved_haystack_is_the_same(tmp_path):
    haystack = tiny_haystack()
    haystack.save(tmp_path / "h.npz")
    again = SentenceTokens.load(tmp_path / "h.npz")
    texts = split_sentences([book(0), book(1)])
    assert again.texts() == haystack.texts() == texts
    assert np.array_equal(again.ids, haystack.ids)
    assert again.counts.tolist() == [len(text) + 2 for text in texts]
    assert again.part(10, 20).texts() == texts[10:20]
    assert haystack.at_least(3 * len(haystack.ids)).texts() == 3 * texts
    with pytest.raises(UserError, match="expected a haystack"):
        SentenceTokens.load(tmp_path / "absent.npz")


def test_sentences_of_another_haystack_are_left_out():
    haystack = tiny_haystack()
    texts = haystack.texts()
    made = make([texts[3], "A new one.", texts[5], "x" * 2000], haystack.tokenizer, without=haystack)
    assert made.texts() == ["A new one."]
    with pytest.raises(UserError, match="at least one"):
        make(texts[:3], haystack.tokenizer, without=haystack)


def test_the_command_makes_a_training_and_a_test_haystack(tmp_path, capsys):
    train, test = str(tmp_path / "train.npz"), str(tmp_path / "test.npz")
    (tmp_path / "train.txt").write_text(book(0))
    (tmp_path / "test.txt").write_text(book(0, 100) + " " + book(2))
    made = ["haystack", str(tmp_path / "train.txt"), "--out", train, "--vocab-size", "320"]
    assert main(made) == 0
    options = ["--tokenizer", train, "--without", train, "--characters", "5000"]
    assert main(["haystack", str(tmp_path / "test.txt"), "--out", test, *options]) == 0
    one, other = SentenceTokens.load(train), SentenceTokens.load(test)
    assert one.tokenizer_json == other.tokenizer_json
    assert not set(one.texts()) & set(other.texts())
    assert 4900 < sum(map(len, other.texts())) < 5100
    assert "sentences" in capsys.readouterr().out
