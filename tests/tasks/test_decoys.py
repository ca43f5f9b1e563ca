"""Decoys: sentences with something of a fact, which leave facts, answers and lengths alone."""

import random
import re

import numpy as np
import pytest

from tests.tasks.tiny import tiny_babi, tiny_haystack
from titans.errors import UserError
from titans.tasks.dataset import open_tasks
from titans.tasks.decoys import Decoys, digits, rare
from titans.tasks.settings import TaskSettings
from titans.training.recipe import TrainingSettings


def sentence_of(haystack, number):
    return haystack.ids[haystack.starts[number] : haystack.starts[number + 1]].tolist()


def test_decoys_are_the_sentences_with_marks():
    haystack = tiny_haystack()
    mark = sentence_of(haystack, 3)[-2]
    marked = [sentence_of(haystack, i) for i in range(len(haystack)) if mark in sentence_of(haystack, i)]
    decoys = Decoys(haystack, [mark], share=1.0)
    drawn = [ids for seed in range(30) for ids in decoys.draw(random.Random(seed), 400)]
    assert drawn
    assert all(ids in marked for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 10
    assert len(marked) < len(haystack)


def test_decoys_take_no_more_than_their_share():
    haystack = tiny_haystack()
    decoys = Decoys(haystack, range(300), share=0.5)
    totals = [sum(map(len, decoys.draw(random.Random(seed), 1000))) for seed in range(100)]
    assert max(totals) <= 500
    assert max(totals) > 350
    assert min(totals) < 100


def test_without_marked_sentences_values_alone_are_dropped_into_sentences():
    haystack = tiny_haystack()
    assert not list(Decoys(haystack, [], share=1.0).draw(random.Random(0), 1000))
    whole = [sentence_of(haystack, i) for i in range(len(haystack))]
    value = [7, 8, 9]
    for ids in Decoys(haystack, [], share=1.0).draw(random.Random(0), 1000, lambda: value):
        places = [i for i in range(len(ids)) if ids[i : i + 3] == value]
        assert any(ids[:i] + ids[i + 3 :] in whole for i in places)


def test_digits_and_rare_words():
    haystack = tiny_haystack()
    assert haystack.tokenizer.convert_ids_to_tokens(digits(haystack)) == list("0123456789")
    common = int(np.bincount(haystack.ids).argmax())
    unseen = digits(haystack)[0]
    assert rare(haystack, [common, unseen]) == [unseen]


@pytest.mark.parametrize("task", ["niah_single_2", "babilong_qa1"])
def test_rows_with_decoys_have_their_length_and_their_answers(task, tmp_path):
    tiny_haystack().save(tmp_path / "h.npz")
    given = {"haystack": tmp_path / "h.npz", "babi": tiny_babi(tmp_path / "babi"), "keys": 2}
    settings = TaskSettings(tasks=(task,), lengths=(512, 1024), tokens_per_batch=2048, decoys=0.5, **given)
    plain = TaskSettings(tasks=(task,), lengths=(512, 1024), tokens_per_batch=2048, **given)
    training = TrainingSettings(steps=1, batch_size=1)
    with_decoys, without = (open_tasks(each, training).train.maker.rows for each in (settings, plain))
    different = 0
    for seed in range(20):
        ids, labels, _ = with_decoys.row(random.Random(seed), 700)
        assert len(ids) == len(labels) == 700
        assert (labels >= 0).any()
        asked = labels >= 0
        assert np.array_equal(labels[asked], ids[asked])
        # The draws before those of the decoys are the same: facts, questions and answers.
        others = without.row(random.Random(seed), 700).labels
        assert np.array_equal(labels[asked], others[others >= 0])
        different += not np.array_equal(labels, others)
    assert different > 5


@pytest.mark.parametrize("decoys", [0.0, 0.9])
def test_babilong_rows_hold_parts_of_facts_that_are_none(decoys, tmp_path):
    """Somebody's going without a place, a place to which nobody goes: with decoys, and only with them."""
    haystack = tiny_haystack()
    haystack.save(tmp_path / "h.npz")
    settings = TaskSettings(
        **{"tasks": ("babilong_qa1",), "lengths": (512, 1024), "decoys": decoys},
        **{"haystack": tmp_path / "h.npz", "babi": tiny_babi(tmp_path / "babi")},
    )
    rows = open_tasks(settings, TrainingSettings(steps=1, batch_size=1)).train.maker.rows
    made = [rows.row(random.Random(seed), 700) for seed in range(20)]
    text = " ".join(haystack.tokenizer.decode(row.ids) for row in made)
    names, places = "(?:John|Mary|Sandra)", "(?:bathroom|garden|hallway|kitchen)"
    told = re.sub(rf"{names} went to the {places}\.|Where is {names}\? {places}\.?", "", text)
    assert bool(re.search(rf"{names} went(?: to)?(?: the)?", told)) == bool(decoys)
    assert bool(re.search(r"(?:went )?to the (?:bathroom|kitchen)\.", told)) == bool(decoys)
    assert "Where" in text
    # What is worth remembering are the whole facts, and of decoys and sentences nothing is.
    facts = "".join(haystack.tokenizer.decode(row.ids[row.worth > 0]) for row in made)
    assert re.fullmatch(rf"(?: ?{names} went to the {places}\.)+", facts)
    noise = " ".join(haystack.tokenizer.decode(row.ids[row.worth < 0]) for row in made)
    assert "Where" not in noise
    assert bool(re.search(rf"{names} went(?: to)?(?: the)?", noise)) == bool(decoys)


def test_a_share_above_one_is_refused():
    with pytest.raises(UserError, match=r"data\.decoys: expected at most 1, got 1\.5"):
        TaskSettings(tasks=("niah_single_1",), decoys=1.5)
