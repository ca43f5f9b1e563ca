"""Training rows of needle tasks: the right tokens, questions that can be answered, and nothing else asked."""

import pickle
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tasks.tiny import tiny_haystack
from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.evaluation.needle import TASKS
from titans.tasks.dataset import open_tasks
from titans.tasks.needles import NeedleRows
from titans.tasks.settings import TaskSettings
from titans.training.recipe import TrainingSettings

NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")
ASKED = re.compile(
    r"\nWhat (?:is|are all) the special magic (?:number|uuid)s? for (.+?) mentioned in the provided text\? "
    r"The special magic (?:number|uuid)s? for \1 mentioned in the provided text (?:is|are)$"
)


def rows_of(*names: str, **options) -> NeedleRows:
    options = {"keys": 6, "questions": 6, "dense": 0.8, "middle": 0.5} | options
    return NeedleRows(tiny_haystack().at_least(4000), [TASKS[name] for name in names], **options)


def settings(path: Path, **changes) -> TaskSettings:
    tiny_haystack().save(path / "h.npz")
    given = {"tasks": ("niah_single_1", "niah_single_2"), "lengths": (640, 1024), "tokens_per_batch": 2048}
    return TaskSettings(**given | {"haystack": path / "h.npz"} | changes)


@pytest.mark.parametrize("name", TASKS)
def test_rows_have_the_tokens_of_their_text_and_ask_for_answers_alone(name):
    rows = rows_of(name)
    tokenizer = tiny_haystack().tokenizer
    encode = TextEncoder(tokenizer)
    questions = 0
    for seed in range(12):
        length = rows.shortest() if seed == 0 else random.Random(seed).randint(rows.shortest(), 1900)
        ids, labels, worth = rows.row(random.Random(seed), length)
        assert len(ids) == len(labels) == len(worth) == length
        text = tokenizer.decode(ids, skip_special_tokens=False)
        facts, noise = (NEEDLE.findall(tokenizer.decode(ids[part])) for part in (worth > 0, worth < 0))
        assert sorted(facts + noise) == sorted(NEEDLE.findall(text))
        assert not noise or TASKS[name].haystack == "needle"  # made of such that nobody asks for
        assert not worth[labels >= 0].any()
        assert np.array_equal(encode([text])[0], ids)
        assert text.startswith(("A special magic ", "Some special magic "))

        asked = labels >= 0
        assert np.array_equal(labels[asked], ids[asked])
        edges = np.flatnonzero(np.diff(asked, prepend=False, append=False)).reshape(-1, 2)
        for first, last in edges:
            before = tokenizer.decode(ids[:first], skip_special_tokens=False)
            answer = tokenizer.decode(ids[first:last], skip_special_tokens=False)
            (question,) = ASKED.findall(before[-1000:])
            keys = re.split(r", and |, ", question)
            hidden = NEEDLE.findall(before)
            # All values of each key asked for, in the order of the text, and all of them come before.
            assert answer == " " + ", ".join(v for key in keys for k, v in hidden if k == key) + "."
            assert len(NEEDLE.findall(text)) == len(hidden) or first < edges[-1][0]
            questions += 1
    assert questions > 12


def test_rows_differ_in_what_they_hide_and_ask():
    rows = rows_of("niah_single_1", "niah_single_2", "niah_single_3")
    made = [rows.row(random.Random(seed), 1900) for seed in range(40)]
    texts = [tiny_haystack().tokenizer.decode(row.ids) for row in made]
    needles = [len(NEEDLE.findall(text)) for text in texts]
    assert min(needles) == 1
    assert max(needles) == 6
    assert sum("The grass is green" in text for text in texts) > 3
    middle = sum(NEEDLE.search(text, text.find("\nWhat")) is not None for text in texts)
    assert middle > 3  # asked before another needle comes


def test_a_batch_depends_on_seed_and_index_alone(tmp_path):
    training = TrainingSettings(steps=10, batch_size=1, seed=3)
    one, other = (open_tasks(settings(tmp_path), training) for _ in range(2))
    other.train[5]
    for batch in (pickle.loads(pickle.dumps(other.train))[2], one.train[2]):
        assert batch["input_ids"].equal(other.train[2]["input_ids"])
        assert batch["labels"].equal(other.train[2]["labels"])
    shape = one.train[2]["input_ids"].shape
    assert shape in ((3, 640), (2, 1024))
    assert {one.train[i]["input_ids"].shape[1] for i in range(10)} == {640, 1024}
    assert len({one.train[i]["input_ids"].sum().item() for i in range(10)}) == 10
    assert [one.validation[i]["input_ids"].shape[1] for i in range(2)] == [640, 1024]


def test_validation_hides_its_needles_in_other_sentences(tmp_path):
    data = open_tasks(settings(tmp_path, tasks=("niah_single_2",)), TrainingSettings(steps=10, batch_size=1))
    train, held_out = (set(part.maker.rows.sentences.texts()) for part in (data.train, data.validation))
    assert len(train) > 10 * len(held_out) > 0
    assert len(train & held_out) < len(held_out) / 4  # made-up sentences of two words do occur twice


def test_a_curriculum_starts_with_the_shortest_rows(tmp_path):
    changes = {"lengths": (640, 700, 1024), "curriculum_steps": 6}
    data = open_tasks(settings(tmp_path, **changes), TrainingSettings(steps=60, batch_size=1))
    lengths = [data.train.length(index) for index in range(60)]
    assert set(lengths[:2]) == {640}
    assert 1024 not in lengths[:4]
    assert 1024 in lengths


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("niah_singel_1",)}, "did you mean 'niah_single_1'"),
        ({"tasks": ("mqar", "niah_single_1")}, "mix with no other"),
        ({"haystack": None}, r"data\.haystack: niah_single_1 needs one"),
        ({"lengths": (64, 1024)}, r"data\.lengths: expected at least \d+ tokens"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_tasks(settings(tmp_path, **changes), TrainingSettings(steps=10, batch_size=1))
    with pytest.raises(UserError, match="batch_size"):
        open_tasks(settings(tmp_path), TrainingSettings(steps=10))


def test_batches_say_what_is_noise_where_that_has_a_price(tmp_path):
    training = TrainingSettings(steps=10, batch_size=1)
    plain = open_tasks(settings(tmp_path), training)
    priced = open_tasks(settings(tmp_path), replace(training, noise_penalty=1.0))
    assert set(plain.train[0]) == set(priced.validation[0]) == {"input_ids", "labels"}
    batch = priced.train[0]
    assert batch["input_ids"].equal(plain.train[0]["input_ids"])
    assert batch["worth"].shape == batch["input_ids"].shape
    assert set(batch["worth"].unique().tolist()) == {-1, 0, 1}
    tokens = TaskSettings(tasks=("mqar",), lengths=(64,))
    with pytest.raises(UserError, match=r"training\.noise_penalty: expected 0 for mqar"):
        open_tasks(tokens, replace(training, noise_penalty=1.0))


@pytest.mark.parametrize("task", ["mqar", "selective_copy"])
def test_tasks_of_tokens_need_no_haystack(task):
    given = TaskSettings(tasks=(task,), lengths=(64, 128), tokens_per_batch=256, vocab_size=300, pairs=(4,))
    data = open_tasks(given, TrainingSettings(steps=4, batch_size=1))
    batch = data.train[0]
    assert batch["input_ids"].numel() == 256
    assert (batch["labels"] >= 0).sum(1).tolist() == [4] * len(batch["labels"])
    assert data.vocab_size == 300


def test_each_batch_draws_a_number_of_pairs_that_fits():
    shared = {"tasks": ("mqar",), "tokens_per_batch": 256, "vocab_size": 300}
    given = TaskSettings(lengths=(16, 64), pairs=(2, 4, 16, 64), **shared)
    training = TrainingSettings(steps=60, batch_size=1)
    data, again = open_tasks(given, training), open_tasks(given, training)
    asked = {16: set(), 64: set()}
    for index in range(60):
        batch = data.train[index]
        assert batch["labels"].equal(again.train[index]["labels"])
        (pairs,) = {int(row) for row in (batch["labels"] >= 0).sum(1)}
        asked[batch["labels"].shape[1]].add(pairs)
    assert asked == {16: {2, 4}, 64: {2, 4, 16}}
    assert open_tasks(TaskSettings(lengths=(16,), **shared), training).train[0]["labels"].shape == (16, 16)
    with pytest.raises(UserError, match=r"data\.pairs: expected numbers of at least 1, got \(0,\)"):
        TaskSettings(lengths=(16,), pairs=(0,), **shared)
