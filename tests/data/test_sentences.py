"""Haystack files: what goes in comes out, and a test's sentences are not the training's."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.tiny import book, tiny_babi, tiny_haystack
from titans.cli.main import main
from titans.data.sentences import SentenceTokens, make, usable
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
    given = [texts[3], "A new one.", texts[5], "x" * 2000]
    made = make(usable(given, set(texts)), haystack.tokenizer)
    assert made.texts() == ["A new one."]
    with pytest.raises(UserError, match="at least one"):
        make(usable(texts[:3], texts), haystack.tokenizer)


def test_the_command_makes_a_training_and_a_test_haystack(tmp_path, capsys):
    """--characters counts for each source anew, but not what is left out; sources stay in their order."""
    train, test = str(tmp_path / "train.npz"), str(tmp_path / "test.npz")
    known = book(0, 20) + " "
    sources = [str(tmp_path / name) for name in ("train.txt", "z.txt", "a.txt")]
    for source, text in zip(sources, (book(0), known + book(2), book(3)), strict=True):
        Path(source).write_text(text)
    assert main(["haystack", sources[0], "--out", train, "--vocab-size", "320"]) == 0
    options = ["--tokenizer", train, "--without", train, "--characters", "5000"]
    assert main(["haystack", *sources[1:], "--out", test, *options]) == 0
    one, other = SentenceTokens.load(train), SentenceTokens.load(test)
    assert one.tokenizer_json == other.tokenizer_json
    texts = other.texts()
    assert not set(one.texts()) & set(texts)
    first, second = (split_sentences([book(seed)]) for seed in (2, 3))
    border = texts.index(second[0])
    assert texts == first[:border] + second[: len(texts) - border]
    characters = [sum(len(text) + 1 for text in part) for part in (texts[:border], texts[border:])]
    assert 5000 <= characters[0] < 5200
    assert 5000 <= characters[1] < 5200
    assert "sentences" in capsys.readouterr().out


def test_sentences_with_given_words_alone(tmp_path):
    """Whole words: "house" is in no "houses". What has none of them does not count for --characters."""
    source, out = tmp_path / "a.txt", str(tmp_path / "a.npz")
    source.write_text("The houses. A house (old). No sea. " * 3 + book(0))
    options = ["--vocab-size", "320", "--characters", "2000", "--words", "house", "sea"]
    assert main(["haystack", str(source), "--out", out, *options]) == 0
    texts = SentenceTokens.load(out).texts()
    expected = [text for text in split_sentences([source.read_text()]) if re.search(r"\b(house|sea)\b", text)]
    assert texts == expected[: len(texts)]
    assert 2000 <= sum(len(text) + 1 for text in texts) < 2200


def test_the_words_of_stories_become_tokens_and_no_hay(tmp_path):
    """BABILong's answers are words of bAbI's: a tokenizer that never saw them cuts them up."""
    babi = tiny_babi(tmp_path / "babi")
    for file in list(babi.glob("qa1_*.txt")):
        for number in range(2, 6):
            (babi / file.name.replace("qa1_", f"qa{number}_")).write_bytes(file.read_bytes())
    (tmp_path / "train.txt").write_text(book(0))
    made = []
    for name, options in (("with", ["--babi", str(babi)]), ("without", [])):
        out = str(tmp_path / f"{name}.npz")
        source = str(tmp_path / "train.txt")
        assert main(["haystack", source, "--out", out, "--vocab-size", "320", *options]) == 0
        made.append(SentenceTokens.load(out))
    assert made[0].texts() == made[1].texts()
    assert [len(each.tokenizer.tokenize(" kitchen")) == 1 for each in made] == [True, False]
