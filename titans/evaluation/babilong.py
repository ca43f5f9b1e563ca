"""BABILong (arXiv:2406.10149), qa1 to qa5: bAbI's facts scattered in books, their question at the end.

As in the published generator (booydar/babilong), the facts keep their order and go to borders between two
sentences of the book (or before the first, after the last), drawn evenly with replacement, and ``score`` is
its rule. What differs:

* test samples come from bAbI's test files; the published ones come from its train files, which cannot test a
  model trained on the task;
* the prompt is the text, a line break and the question, for base models trained on the task. The published
  one puts an instruction, two or three worked examples and the answer's form in front, tags the context and
  writes "Question:" before the question;
* the length is that of the whole prompt, in whole sentences. The published one is of text and facts, less a
  flat 300 tokens for the rest, and cuts the last sentence; a story counts as too long for it by its lines,
  here by its tokens;
* every sentence of the books is used, as it follows on the one before it. The published generator leaves out
  those under 10 tokens, so that its shortest sentences are the facts, and goes on with a book drawn at random
  where one ends; its code puts no space between sentences.
"""

import itertools
import lzma
import random
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from titans.errors import UserError
from titans.evaluation.haystack import LengthCounter, SentenceRing, TokenCounter, fill, split_sentences

Split = Literal["train", "test"]

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_LINE = re.compile(r"(?P<id>\d+) (?P<text>[^\t]+?) *(?:\t(?P<answer>[^\t]+)\t(?P<support>\d+(?: \d+)*))?")
# Where the output ends for the published rule. It also names "Question", but after lowering the case.
_OUTPUT_END = re.compile(r"\.|<context>|<example>")
# (folder, kind of file) in bAbI's archive: the files of the first line that is there make the split.
_SOURCES: dict[Split, tuple[tuple[tuple[str, str], ...], ...]] = {
    "train": ((("en-10k", "train"),), (("en", "train"), ("en-valid-10k", "valid"))),
    "test": ((("en-10k", "test"),), (("en", "test"),)),
}


@dataclass(frozen=True, kw_only=True)
class BabiTask:
    """One of bAbI's tasks: its ``name`` there and the ``labels``, all the answers that it has."""

    name: str
    labels: tuple[str, ...]


TASKS = {
    task.name: task
    for task in (
        BabiTask(name="qa1", labels=_PLACES),
        BabiTask(name="qa2", labels=_PLACES),
        BabiTask(name="qa3", labels=_PLACES),
        BabiTask(name="qa4", labels=_PLACES),
        BabiTask(name="qa5", labels=("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")),
    )
}


@dataclass(frozen=True, kw_only=True)
class BabiStory:
    """Facts, a question about them and its answer.

    ``supporting`` are the indices in ``facts`` of those that the answer follows from, in bAbI's order.
    """

    facts: tuple[str, ...]
    question: str
    answer: str
    supporting: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BabiSample:
    """One prompt and the answer to it: a model trained on the task writes a space and ``answers[0]``.

    ``text`` is the book with the facts, ``question`` what follows it, its line break included.
    ``depths`` are the shares of the text's tokens that lie before each fact of ``story``, 0 to 1, ascending.
    ``tokens`` is the length of ``prompt`` (see ``samples``).
    """

    index: int
    task: BabiTask
    story: BabiStory
    text: str
    question: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    tokens: int

    @property
    def prompt(self) -> str:
        """What the model reads before it answers."""
        return self.text + self.question


def score(sample: BabiSample, answer_text: str) -> float:
    """1 where ``answer_text`` names the answer and no other label, else 0: BABILong's rule.

    Only what comes before the first full stop (or ``<context>``, ``<example>``) counts, upper and lower case
    being the same, and a label that the question names counts neither for nor against.
    """
    given = _OUTPUT_END.split(answer_text.lower(), maxsplit=1)[0]
    question = sample.question.lower()
    named = {
        label for label in sample.task.labels if label.lower() in given and label.lower() not in question
    }
    return float(named == set(sample.answers))


def read_stories(path: str | Path, task: BabiTask, split: Split) -> list[BabiStory]:
    """The stories of one split of a bAbI task, one for each question, in the files' order.

    They are those of ``en-10k`` (10,000 questions for training, 1,000 to test). Where its file is missing, as
    qa3's train file may be, those of ``en`` (1,000), for training together with the valid file of
    ``en-valid-10k``, which is a part of en-10k's train file: 2,000 for qa3, 75 of them in both.

    Train stories that are in the test file as well are left out: 1,480 of qa4's 10,000 (it has few stories),
    19 of qa1's and 1 of qa5's.

    Args:
        path: bAbI's tar archive, compressed or not, or a folder with its text files somewhere below it.
        split: "train" or "test".

    Raises:
        UserError: no such path, no archive, no file of the task and split, or a line not of bAbI's form.
    """
    if split not in _SOURCES:
        raise UserError(f"split: expected 'train' or 'test', got {split!r}")
    files = _files_of(Path(path), task)
    stories = _stories_of(files, Path(path), task, split)
    if split == "test":
        return stories
    tested = {(story.facts, story.question) for story in _stories_of(files, Path(path), task, "test")}
    return [story for story in stories if (story.facts, story.question) not in tested]


def samples(
    task: BabiTask,
    stories: Sequence[BabiStory],
    length: int,
    count_tokens: TokenCounter | PreTrainedTokenizerBase,
    haystack: Iterable[str] = (),
    *,
    seed: int,
    start: int = 0,
) -> Iterator[BabiSample]:
    """Samples without end; the one at an index depends on nothing but the arguments, not on those before.

    Stories are drawn evenly, with replacement. That of an index is the same at every length which has room
    for it; where there is none, another is drawn, so short lengths have the short stories only.

    Args:
        task: whose labels the answers are.
        stories: of one split (``read_stories``).
        length: tokens of the whole prompt at most; the text is filled up to the last sentence that fits.
            0 for the facts alone, however long ("0K" in the paper).
        count_tokens: as for ``needle.samples``: a function, or a tokenizer.
        haystack: texts or sentences of the same split, read from a sentence drawn at random, from the start
            again at the end.
        seed: of all draws, together with the task's name and the index.
        start: index of the first sample, to continue where an earlier run ended.

    Raises:
        ValueError: (at once) no story, an answer that is no label of the task, no haystack for a length above
            0, a length too short for every story.
    """
    if length < 0:
        raise ValueError(f"length: expected the prompt's tokens, or 0 for the facts alone, got {length}")
    if not stories:
        raise ValueError(f"stories: expected at least one story of {task.name}, got none")
    if foreign := {story.answer for story in stories} - set(task.labels):
        raise ValueError(
            f"stories: expected answers among the labels of {task.name}, {', '.join(task.labels)}; "
            f"got {', '.join(sorted(foreign))}"
        )
    sentences = split_sentences(haystack) if length else []
    if length and not sentences:
        raise ValueError(
            f"haystack: expected texts to hide the facts in, got none (for the facts alone: length 0, "
            f"got {length})"
        )
    maker = _Maker(task, stories, length, LengthCounter(count_tokens), sentences)
    return (
        maker.sample(index, random.Random(f"{task.name}/{seed}/{index}")) for index in itertools.count(start)
    )


class _Maker:
    """What all samples of one call share: the stories, the sentences and their lengths, each counted once."""

    def __init__(
        self,
        task: BabiTask,
        stories: Sequence[BabiStory],
        length: int,
        counter: LengthCounter,
        sentences: Sequence[str],
    ):
        self.task, self.stories, self.length, self.counter = task, stories, length, counter
        self.ring = SentenceRing(sentences, counter)
        self.counted: dict[str, int] = {}  # some hundred facts and questions make all stories of a task
        # Sentences are counted with a space before them, which the first of the prompt does not have.
        self.first_tokens = counter.count("The") - counter.after_stop(" The")
        self.fixed = [
            self.first_tokens
            + sum(self._tokens(" " + fact) for fact in story.facts)
            + self._tokens("\n" + story.question)
            for story in stories
        ]
        if 0 < length < min(self.fixed):
            raise ValueError(
                f"length: the shortest story of {task.name} and its question alone take {min(self.fixed)} "
                f"tokens, got {length}"
            )

    def sample(self, index: int, rng: random.Random) -> BabiSample:
        # Drawn again rather than from those that fit: the same story at other lengths.
        while self.fixed[drawn := rng.randrange(len(self.stories))] > self.length > 0:
            pass
        story, fixed = self.stories[drawn], self.fixed[drawn]
        pieces, ends = fill(self.ring.read(rng), self.length - fixed) if self.length else ([], [0])
        places = sorted(rng.randrange(len(pieces) + 1) for _ in story.facts)

        text: list[str] = []
        before: list[int] = []  # tokens before each fact
        of_facts = placed = 0
        for place, fact in zip(places, story.facts, strict=True):
            text += [*pieces[placed:place], fact]
            before.append(ends[place] + of_facts)
            of_facts += self._tokens(" " + fact)
            placed = place
        text += pieces[placed:]
        return BabiSample(
            index=index,
            task=self.task,
            story=story,
            text=" ".join(text),
            question="\n" + story.question,
            answers=(story.answer,),
            depths=tuple(tokens / (ends[-1] + of_facts) for tokens in before),
            tokens=fixed + ends[-1],
        )

    def _tokens(self, text: str) -> int:
        tokens = self.counted.get(text)
        if tokens is None:
            tokens = self.counted[text] = self.counter.after_stop(text)
        return tokens


def _stories_of(
    files: dict[tuple[str, str], str], path: Path, task: BabiTask, split: Split
) -> list[BabiStory]:
    for source in _SOURCES[split]:
        if found := [key for key in source if key in files]:
            return [
                story
                for folder, kind in found
                for story in _parse(files[folder, kind], f"{path}: {folder}, {task.name} {kind}")
            ]
    wanted = f"en-10k/{task.name}_*_{split}.txt"
    raise UserError(f"{path}: expected bAbI's {wanted} in it (or the same in en), got none")


def _files_of(path: Path, task: BabiTask) -> dict[tuple[str, str], str]:
    """Texts of the task's files by folder and kind, from an archive or a folder."""
    name = re.compile(rf"(?:^|/)(en|en-10k|en-valid-10k)[/_]{task.name}_(?:[^/]*_)?(train|valid|test)\.txt$")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder, expected bAbI's archive or its folder")
    texts = {}
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.txt")):
                # The full path, so that the folder given may be en-10k itself.
                if match := name.search(file.resolve().as_posix()):
                    texts[match[1], match[2]] = file.read_bytes().decode()
        else:
            with tarfile.open(path) as archive:
                for member in archive:
                    match = name.search(member.name)
                    if match and (stream := archive.extractfile(member)):
                        texts[match[1], match[2]] = stream.read().decode()
    except (tarfile.TarError, OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]  # tarfile lists what every kind of archive said
        raise UserError(
            f"{path}: expected a folder or a whole tar archive of text files: {reason}"
        ) from error
    return texts


def _parse(text: str, name: str) -> Iterator[BabiStory]:
    """One story for each question: the facts since the last line with the ID 1, without other questions."""
    facts: list[str] = []
    indices: dict[int, int] = {}  # line ID -> index in facts
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match and match["id"] == "1":
            facts, indices = [], {}
        if match and not match["answer"]:
            indices[int(match["id"])] = len(facts)
            facts.append(match["text"])
            continue
        support = [int(i) for i in match["support"].split()] if match else []
        if not match or not indices.keys() >= set(support):
            raise UserError(
                f"{name}, line {number}: expected 'ID fact' or 'ID question<tab>answer<tab>IDs of facts "
                f"before it', got {line[:80]!r}"
            )
        yield BabiStory(
            facts=tuple(facts),
            question=match["text"],
            answer=match["answer"],
            supporting=tuple(indices[i] for i in support),
        )
