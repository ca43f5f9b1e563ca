"""BABILong as training rows and tests: whole stories in order, questions where their answers are true."""

import pickle
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.test_answers import Knows
from tests.tasks.tiny import tiny_babi, tiny_haystack
from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.evaluation.babilong import BabiStory
from titans.tasks.babi import BabiRows, chains
from titans.tasks.dataset import open_tasks
from titans.tasks.needle_test import NeedleTest, length_counter, make_test, run_test
from titans.tasks.settings import TaskSettings
from titans.training.recipe import TrainingSettings

ASKED = re.compile(r"\nWhere is (\w+)\?$")
WENT = re.compile(r"(\w+) went to the (\w+)\.")


@pytest.fixture
def babi(tmp_path: Path) -> Path:
    return tiny_babi(tmp_path / "babi")


def settings(folder: Path, **changes) -> TaskSettings:
    tiny_haystack().save(folder / "h.npz")
    given = {
        "tasks": ("babilong_qa1",),
        "lengths": (512, 1024),
        "tokens_per_batch": 2048,
        "babi": folder,
        "keys": 1,
    }
    return TaskSettings(**given | {"haystack": folder / "h.npz"} | changes)


def test_stories_that_go_on_stand_together(babi):
    rows = open_tasks(settings(babi), TrainingSettings(steps=1, batch_size=1)).train.maker.rows
    (entries,) = rows._stories.values()
    assert max(len(chain) for _, chain, _ in entries) == 5
    for _, chain, place in entries:
        assert chain[-1].facts[: len(chain[place].facts)] == chain[place].facts
    first, second = (BabiStory(facts=(fact,), question="?", answer="!", supporting=()) for fact in "ab")
    longer = BabiStory(facts=("b", "c"), question="?", answer="!", supporting=())
    assert chains([first, second, longer]) == [[first], [second, longer]]


@pytest.mark.parametrize(("keys", "most"), [(1, 5), (4, 20)])
def test_rows_have_the_tokens_of_their_text_and_ask_for_what_is_true_there(babi, keys, most):
    rows = open_tasks(settings(babi, keys=keys), TrainingSettings(steps=1, batch_size=1)).train.maker.rows
    tokenizer = tiny_haystack().tokenizer
    encode = TextEncoder(tokenizer)
    questions = Counter()
    for seed in range(60):
        length = rows.shortest() if seed == 0 else random.Random(seed).randint(rows.shortest(), 1500)
        ids, labels, _ = rows.row(random.Random(seed), length)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert len(ids) == len(labels) == length
        assert np.array_equal(encode([text])[0], ids)
        asked = labels >= 0
        assert np.array_equal(labels[asked], ids[asked])
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False)).reshape(-1, 2)
        for first, last in edges:
            before = tokenizer.decode(ids[:first], skip_special_tokens=False)
            (person,) = ASKED.findall(before)
            # No fact is lost or out of place: the last one that names the person gives the answer.
            place = [place for who, place in WENT.findall(before) if who == person][-1]
            assert tokenizer.decode(ids[first:last]) == f" {place}."
        assert edges[-1][1] == length
        questions[len(edges)] += 1
    assert set(range(1, 6)) <= set(questions) <= set(range(1, most + 1))
    assert (max(questions) > 5) == (keys > 1)


def test_training_and_validation_share_neither_sentences_nor_stories(babi):
    data = open_tasks(settings(babi), TrainingSettings(steps=10, batch_size=1, seed=3))
    train, held_out = (part.maker.rows for part in (data.train, data.validation))
    facts = [
        {chain[-1].facts for entries in rows._stories.values() for _, chain, _ in entries}
        for rows in (train, held_out)
    ]
    assert [len(part) for part in facts] == [38, 2]
    assert not facts[0] & facts[1]
    assert len(train.sentences) > len(held_out.sentences)
    batch = pickle.loads(pickle.dumps(data.train))[2]
    assert batch["input_ids"].equal(data.train[2]["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("babilong_qa1", "niah_single_1")}, "mix with no other, got niah_single_1"),
        ({"tasks": ("babilong_qa9",)}, "unknown task 'babilong_qa9'"),
        ({"babi": None}, r"data\.babi: BABILong tasks need"),
        ({"haystack": None}, r"data\.haystack: babilong_qa1 needs one"),
        ({"lengths": (16,)}, r"data\.lengths: expected at least \d+ tokens"),
    ],
)
def test_what_does_not_fit_is_refused(babi, changes, message):
    with pytest.raises(UserError, match=message):
        open_tasks(settings(babi, **changes), TrainingSettings(steps=10, batch_size=1))
    rows = BabiRows(tiny_haystack(), {"babilong_qa1": [[STORY]]}, keys=1, questions=1)
    with pytest.raises(ValueError, match="length: expected at least"):
        rows.row(random.Random(0), 20)


STORY = BabiStory(
    facts=("John went to the garden.",), question="Where is John?", answer="garden", supporting=(0,)
)


def test_tests_come_from_the_test_file_and_have_one_bin(babi, tmp_path):
    haystack = tiny_haystack()
    count = length_counter(haystack, len)
    test = make_test("babilong_qa1", 3000, 6, haystack, count, seed=1, babi=babi)
    test.save(tmp_path / "t.npz")
    test = NeedleTest.load(tmp_path / "t.npz")
    assert all(2500 < tokens <= 3000 for tokens in test.tokens)
    lines = (babi / "qa1_single-supporting-fact_test.txt").read_text().splitlines()
    facts = "\n".join(line.partition(" ")[2] for line in lines if "?" not in line)
    for row in range(6):
        end = test.asked.places[test.asked.rows == row][-1] + 1
        text = haystack.tokenizer.decode(test.asked.ids[row, :end])
        who, answer = re.fullmatch(r"(?s).*\nWhere is (\w+)\? (\w+)", text).groups()
        went = WENT.findall(text)
        assert [place for person, place in went if person == who][-1] == answer
        assert "\n".join(f"{person} went to the {place}." for person, place in went) in facts
    (score,) = run_test(Knows(test.asked.ids, (2,)), test)
    assert (score.depth_from, score.depth_to) == (0, 1)
    assert (score.samples, score.correct) == (6, 5)
    with pytest.raises(UserError, match="babi: babilong_qa1 needs"):
        make_test("babilong_qa1", 3000, 1, haystack, count, seed=1)
    with pytest.raises(UserError, match="unknown task 'babilong_qa7'"):
        make_test("babilong_qa7", 3000, 1, haystack, count, seed=1)
