"""BABILong: whole stories in order, at places as published, of the length and the split asked for."""

import dataclasses
import io
import itertools
import random
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from titans.data.sources import Corpus
from titans.data.tokenizer import byte_tokenizer
from titans.errors import UserError
from titans.evaluation.babilong import TASKS, BabiSample, BabiStory, read_stories, samples, score
from titans.evaluation.haystack import split_sentences

QA1 = """\
1 John travelled to the hallway.
2 Mary journeyed to the bathroom.
3 Where is John? \thallway\t1
4 Daniel went back to the bathroom.
5 Where is Mary? \tbathroom\t2
1 Sandra moved to the garden.
2 Sandra went to the office.
3 Where is Sandra? \toffice\t2
"""
QA2 = """\
1 Mary got the milk there.
2 Mary moved to the hallway.
3 Where is the milk? \thallway\t1 2
4 Mary went to the garden.
5 Where is the milk? \tgarden\t1 4
"""
BOOK = [
    "It was  a dark night.\nNobody was out! Who would be? He said so twice, in a low and careful voice.",
    "The second chapter is short. It ends here, as it must, with a long and rambling sentence of no use.",
]
SENTENCES = split_sentences(BOOK)


def story(number: int, places: str = "garden kitchen") -> BabiStory:
    """A story of ``number`` facts, no two alike."""
    names = places.split()
    facts = tuple(f"Mary came to door {i} of the {names[i % len(names)]}." for i in range(number))
    return BabiStory(
        facts=facts,
        question="Where is Mary?",
        answer=names[(number - 1) % len(names)],
        supporting=(number - 1,),
    )


STORIES = [story(number) for number in (1, 2, 3, 5, 8)]


def bytes_of(text: str) -> int:
    return len(text.encode())


def words_of(text: str) -> int:
    return len(text.split())


def draw(length: int = 4000, count=bytes_of, number: int = 1, stories=STORIES, **options) -> list[BabiSample]:
    options = {"seed": 1} | options
    stream = samples(TASKS["qa1"], stories, length, count, BOOK, **options)
    return list(itertools.islice(stream, number))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w:xz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


# Reading bAbI


def test_each_question_has_the_facts_before_it_and_not_the_other_questions(tmp_path):
    write(tmp_path, {"en-10k/qa1_single-supporting-fact_test.txt": QA1})
    first, second, third = read_stories(tmp_path, TASKS["qa1"], "test")
    john, mary = "John travelled to the hallway.", "Mary journeyed to the bathroom."
    # No space at the question's end, where bAbI has one.
    assert first == BabiStory(
        facts=(john, mary), question="Where is John?", answer="hallway", supporting=(0,)
    )
    assert second.facts == (john, mary, "Daniel went back to the bathroom.")
    assert (second.question, second.answer, second.supporting) == ("Where is Mary?", "bathroom", (1,))
    # ID 1 begins another story: no fact of the one before.
    assert third.facts == ("Sandra moved to the garden.", "Sandra went to the office.")


def test_supporting_facts_are_counted_without_the_question_lines(tmp_path):
    write(tmp_path, {"en-10k/qa2_two-supporting-facts_test.txt": QA2})
    first, second = read_stories(tmp_path, TASKS["qa2"], "test")
    assert first.supporting == (0, 1)
    assert second.supporting == (0, 2)  # IDs 1 and 4, and ID 3 is a question
    assert second.facts[2] == "Mary went to the garden."


def test_an_archive_its_folder_and_the_folder_within_read_alike(tmp_path):
    other = QA1.replace("John", "Bill")
    files = {
        "tasks/en-10k/qa1_single-supporting-fact_test.txt": QA1,
        "tasks/en-10k/qa1_single-supporting-fact_train.txt": QA2,
        # None of these may be taken for it.
        "tasks/en/qa1_single-supporting-fact_test.txt": other,
        "tasks/hn-10k/qa1_single-supporting-fact_test.txt": other,
        "tasks/shuffled-10k/qa1_single-supporting-fact_test.txt": other,
        "tasks/en-10k/qa10_indefinite-knowledge_test.txt": other,
    }
    packed = archive(tmp_path / "babi.tar.xz", files)
    folder = write(tmp_path / "unpacked", files)
    for split, number in (("test", 3), ("train", 2)):
        stories = read_stories(packed, TASKS["qa1"], split)
        assert len(stories) == number
        assert "Bill" not in str(stories)
        assert read_stories(folder, TASKS["qa1"], split) == stories
        assert read_stories(folder / "tasks" / "en-10k", TASKS["qa1"], split) == stories


@pytest.mark.parametrize("valid", ["en-valid-10k_qa3_valid.txt", "en-valid-10k/qa3_valid.txt"])
def test_a_missing_train_file_is_replaced_by_train_files_alone(tmp_path, valid):
    files = {
        "en-10k/qa3_three-supporting-facts_test.txt": QA1,
        "en/qa3_three-supporting-facts_test.txt": QA1.replace("Sandra", "Bill"),
        "en/qa3_three-supporting-facts_train.txt": QA2,
        valid: QA2.replace("milk", "apple"),
        "en-valid-10k/qa3_test.txt": QA1.replace("Sandra", "Fred"),
    }
    write(tmp_path, files)
    train = read_stories(tmp_path, TASKS["qa3"], "train")
    assert [s.question for s in train] == ["Where is the milk?"] * 2 + ["Where is the apple?"] * 2
    assert len(read_stories(tmp_path, TASKS["qa3"], "test")) == 3
    # With the file there, nothing else is read.
    write(tmp_path, {"en-10k/qa3_three-supporting-facts_train.txt": QA2})
    assert read_stories(tmp_path, TASKS["qa3"], "train") == train[:2]


def test_train_stories_that_are_tested_are_left_out(tmp_path):
    again = QA1.split("1 Sandra")[0] + QA2
    files = {"en-10k/qa1_x_test.txt": QA1, "en-10k/qa1_x_train.txt": again}
    write(tmp_path, files)
    train = read_stories(tmp_path, TASKS["qa1"], "train")
    assert [s.question for s in train] == ["Where is the milk?"] * 2
    assert len(read_stories(tmp_path, TASKS["qa1"], "test")) == 3


def test_bad_files_are_named(tmp_path):
    task = TASKS["qa1"]
    with pytest.raises(UserError, match="absent: no such file or folder, expected bAbI's archive"):
        read_stories(tmp_path / "absent", task, "test")
    with pytest.raises(UserError, match=r"expected bAbI's en-10k/qa1_\*_test.txt in it .* got none"):
        read_stories(tmp_path, task, "test")
    with pytest.raises(UserError, match="split: expected 'train' or 'test', got 'valid'"):
        read_stories(tmp_path, task, "valid")
    for line, number in (("Mary went.", 3), ("3 Where? \thallway", 3), ("3 Where? \thallway\t7", 3)):
        text = "\n".join([*QA1.split("\n")[: number - 1], line])
        write(tmp_path, {"en-10k/qa1_x_test.txt": text})
        with pytest.raises(UserError, match=rf"en-10k, qa1 test, line {number}: expected 'ID fact' or"):
            read_stories(tmp_path, task, "test")


def test_broken_files_are_the_users_errors(tmp_path):
    # Of random text, to be longer than what the readers take at once.
    texts = {f"en-10k/qa1_{i}_test.txt": str(random.getrandbits(3000)) for i in range(50)}
    xz, gz = (archive(tmp_path / name, texts).read_bytes() for name in ("a.tar.xz", "a.tar.gz"))
    half = len(xz) // 2
    contents = [b"none", xz[:half], gz[: len(gz) // 2], xz[:40] + b"\xff" * 400 + xz[440:]]
    for i, content in enumerate(contents):
        (tmp_path / f"archive{i}").write_bytes(content)
    path = write(tmp_path / "archive4", {"en-10k/qa1_x_test.txt": ""}) / "en-10k" / "qa1_x_test.txt"
    path.write_bytes(b"1 M\xff")
    for i in range(5):
        with pytest.raises(UserError, match=f"archive{i}: expected a folder or a whole tar archive of text"):
            read_stories(tmp_path / f"archive{i}", TASKS["qa1"], "test")


# Samples


def test_facts_lie_whole_and_in_order_in_the_unchanged_book():
    for sample in draw(3000, number=20):
        found = split_sentences([sample.text])
        facts = [sentence for sentence in found if sentence.startswith("Mary came")]
        assert tuple(facts) == sample.story.facts
        book = [sentence for sentence in found if not sentence.startswith("Mary came")]
        first = SENTENCES.index(book[0])
        assert book == [SENTENCES[(first + i) % len(SENTENCES)] for i in range(len(book))]
        assert " ".join(found) == sample.text
        assert sample.prompt == sample.text + "\nWhere is Mary?"
        assert sample.answers == (sample.story.answer,)


@pytest.mark.parametrize("count", [bytes_of, words_of, lambda text: bytes_of(" " + text)])
@pytest.mark.parametrize("length", [600, 601, 2500])
def test_the_length_is_within_one_sentence_of_the_target(count, length):
    """The third counter puts a space before every text, as SentencePiece does: no text may pay for it."""
    longest = max(count("." + " " + sentence) for sentence in SENTENCES)
    for sample in draw(length, count, number=5):
        assert sample.tokens == count(sample.prompt)
        assert length - longest < sample.tokens <= length


def test_length_0_is_the_facts_alone():
    for sample in draw(0, number=20):
        assert sample.text == " ".join(sample.story.facts)
        assert sample.tokens == bytes_of(sample.prompt)
    # Without a book, too.
    (bare,) = itertools.islice(samples(TASKS["qa1"], STORIES, 0, bytes_of, seed=1), 1)
    assert bare == draw(0)[0]


def test_a_tokenizer_counts_without_its_special_tokens():
    assert draw(1500, byte_tokenizer()) == draw(1500)


def test_places_are_sentence_borders_drawn_evenly_with_replacement():
    """One fact over all borders, first and last included; two facts at the same as often as chance has it."""
    one, two = [story(1)], [story(2)]
    places = Counter()
    for sample in draw(600, number=2000, stories=one):
        found = split_sentences([sample.text])
        places[sample.text.startswith("Mary"), sample.text.endswith("garden."), len(found)] += 1
    borders = sum(n * number for (_, _, n), number in places.items()) / 2000  # sentences + 1, on average
    for edge in (0, 1):
        share = sum(number for key, number in places.items() if key[edge]) / 2000
        assert share == pytest.approx(1 / borders, abs=4 * (1 / borders / 2000) ** 0.5)
    together = sum(
        re.search(r"door 0 of the garden\. Mary came", sample.text) is not None
        for sample in draw(600, number=2000, stories=two)
    )
    # Drawn without replacement, no two facts would ever lie at one border.
    assert together / 2000 == pytest.approx(1 / borders, rel=0.3)
    depths = [sample.depths[0] for sample in draw(6000, number=400, stories=one)]
    for low in (0.0, 0.25, 0.5, 0.75):
        assert 65 < sum(low <= depth < low + 0.25 for depth in depths) < 135


def test_depths_are_where_the_facts_are():
    for sample in draw(3000, number=10) + draw(0, number=3):
        assert len(sample.depths) == len(sample.story.facts)
        assert list(sample.depths) == sorted(sample.depths)
        for fact, depth in zip(sample.story.facts, sample.depths, strict=True):
            # A byte more or less for the space before the first sentence.
            assert depth * len(sample.text) == pytest.approx(sample.text.index(fact), abs=1.01)


def test_a_sample_depends_on_its_index_alone():
    several = draw(number=6)
    assert draw(start=4, number=2) == several[4:]
    assert [sample.index for sample in several] == list(range(6))
    assert len({sample.prompt for sample in several}) == 6
    assert draw(seed=2)[0].text != several[0].text
    random.seed(5)
    assert draw(number=6) == several


def test_a_book_is_read_from_different_sentences():
    starts = {sample.text[:12] for sample in draw(number=60, stories=[story(2)])} - {"Mary came to"}
    assert len(starts) == len(SENTENCES) == 6


def test_all_stories_come_and_the_same_ones_at_every_length_that_has_room():
    long, short, bare = draw(4000, number=60), draw(250, number=60), draw(0, number=60)
    assert {sample.story for sample in long} == set(STORIES)
    assert [sample.story for sample in bare] == [sample.story for sample in long]
    fits = 0
    for one, other in zip(long, short, strict=True):
        room = bytes_of(" ".join(one.story.facts) + one.question) <= 250
        fits += room
        assert (other.story == one.story) == room
        assert other.tokens <= 250
    assert 20 < fits < 60


def test_a_fact_is_counted_once():
    """bAbI's 10,000 stories of 20 facts are made of some hundred: else 200,000 calls before a sample."""
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return bytes_of(text)

    stream = samples(TASKS["qa1"], STORIES * 100, 20_000, count, BOOK, seed=0)
    next(stream)
    first = len(counted)
    assert first < 8 + 1 + 6 + 10  # facts, question, sentences and the frame
    next(stream)
    assert len(counted) == first


def test_bad_arguments_are_named_before_work_begins():
    task = TASKS["qa1"]
    with pytest.raises(ValueError, match=r"length: expected .* or 0 for the facts alone, got -1"):
        samples(task, STORIES, -1, bytes_of, BOOK, seed=0)
    with pytest.raises(ValueError, match="stories: expected at least one story of qa1, got none"):
        samples(task, [], 4000, bytes_of, BOOK, seed=0)
    with pytest.raises(
        ValueError, match=r"stories: expected answers among the labels of qa5, .*; got garden"
    ):
        samples(TASKS["qa5"], STORIES[:1], 4000, bytes_of, BOOK, seed=0)
    with pytest.raises(ValueError, match="haystack: expected texts to hide the facts in, got none"):
        samples(task, STORIES, 4000, bytes_of, [" "], seed=0)
    shortest = bytes_of("Mary came to door 0 of the garden.\nWhere is Mary?")
    with pytest.raises(
        ValueError, match=rf"length: the shortest story of qa1 .* alone take {shortest} tokens"
    ):
        samples(task, STORIES, shortest - 1, bytes_of, BOOK, seed=0)
    assert draw(shortest)[0].tokens == shortest


# Scoring


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" garden", 1),
        (" The milk is in the GARDEN.", 1),
        ("garden. Or the office, or the hallway.", 1),  # only the first sentence counts
        ("garden, for it was in the kitchen before", 1),  # the question names the kitchen
        ("garden <example> the office", 1),
        ("gardens", 1),  # the published rule looks for the letters, not for the word
        ("the garden or the office", 0),
        ("not the garden but the hallway", 0),
        ("office", 0),
        ("kitchen", 0),
        ("I think. The garden", 0),
        ("garden Question: bedroom", 0),  # published, but without effect there, and so here
        ("", 0),
    ],
)
def test_the_score_is_the_published_rule(answer, expected):
    asked = dataclasses.replace(
        story(1), question="Where was the milk before the kitchen?", answer="garden", supporting=(0,)
    )
    (sample,) = itertools.islice(samples(TASKS["qa3"], [asked], 0, bytes_of, seed=0), 1)
    assert score(sample, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Fred", 1), ("fred gave the apple to jeff", 1), ("Bill", 0), ("Fred gave the milk to Jeff", 0)],
)
def test_the_score_of_qa5_ignores_names_in_the_question(answer, expected):
    given = BabiStory(
        facts=("Fred gave the apple to Jeff.",),
        question="Who gave the apple to Jeff?",
        answer="Fred",
        supporting=(0,),
    )
    (sample,) = itertools.islice(samples(TASKS["qa5"], [given], 0, bytes_of, seed=0), 1)
    assert score(sample, answer) == expected


# The real files


@pytest.fixture(scope="module")
def babi(data_dir) -> Path:
    (path,) = (data_dir / "babi").glob("*.tar.xz")
    return path


@pytest.fixture(scope="module")
def book(data_dir) -> str:
    return next(iter(Corpus([data_dir / "books" / "books_test.jsonl.xz"]))).text[:300_000]


@pytest.mark.parametrize(
    ("name", "train", "facts"),
    [
        ("qa1", 10_000 - 19, 10),
        ("qa2", 10_000, 88),
        ("qa3", 2_000, 228),
        ("qa4", 10_000 - 1480, 2),
        ("qa5", 9_999, 126),
    ],
)
def test_real_splits_are_whole_apart_and_can_be_scored(name, train, facts, babi, book):
    task = TASKS[name]
    stories = {split: read_stories(babi, task, split) for split in ("train", "test")}
    assert {split: len(stories[split]) for split in stories} == {"train": train, "test": 1000}
    pairs = {split: {(s.facts, s.question) for s in stories[split]} for split in stories}
    assert not pairs["train"] & pairs["test"]
    both = stories["train"] + stories["test"]
    assert max(len(s.facts) for s in both) == facts
    assert {s.answer for s in both} == set(task.labels)
    # An answer named by its question could never score.
    assert not [s for s in both if s.answer.lower() in s.question.lower()]
    assert all(s.supporting and max(s.supporting) < len(s.facts) for s in both)

    for sample in itertools.islice(samples(task, stories["test"], 20_000, bytes_of, [book], seed=3), 5):
        assert sample.tokens == bytes_of(sample.prompt) <= 20_000
        assert sample.story in stories["test"]
        assert score(sample, f" {sample.answers[0]}") == 1
        position = 0
        for fact in sample.story.facts:
            position = sample.text.index(fact, position) + len(fact)
