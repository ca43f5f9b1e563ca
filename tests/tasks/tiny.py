"""A haystack of made-up books and stories as bAbI's, small enough to make in a test."""

import random
from functools import cache
from pathlib import Path

from titans.data.bpe import train_bpe
from titans.data.sentences import SentenceTokens, make
from titans.evaluation.haystack import split_sentences

_TEXT = """the a of and old man woman ship sea house garden light dark winter road river said went saw held
quietly never again three cold warm letter captain morning voice window 1885 “so” don't"""
_WORDS = _TEXT.split()


def book(seed: int, sentences: int = 400) -> str:
    rng = random.Random(seed)
    made = []
    for _ in range(sentences):
        words = rng.choices(_WORDS, k=rng.randint(2, 20))
        made.append(" ".join(words).capitalize() + rng.choice([".", ".", "!", "?", '."']))
    return " ".join(made)


@cache
def tiny_haystack() -> SentenceTokens:
    """Counted in characters, like every haystack here."""
    sentences = split_sentences([book(0), book(1)])
    return make(sentences, train_bpe((" " + text for text in sentences), 384), count=len)


def tiny_babi(folder: Path) -> Path:
    """Files of qa1: 40 stories for training, 20 for tests, in each a question after every two facts."""
    rng = random.Random(0)
    (folder := folder / "en-10k").mkdir(parents=True)
    for split, stories in (("train", 40), ("test", 20)):
        lines = []
        for _ in range(stories):
            where: dict[str, str] = {}
            for line in range(1, 16):
                if line % 3:
                    person = rng.choice(["John", "Mary", "Sandra"])
                    place = rng.choice(["bathroom", "garden", "hallway", "kitchen"])
                    where[person] = f"{place}\t{line}"
                    lines.append(f"{line} {person} went to the {place}.")
                else:
                    person = rng.choice(list(where))
                    lines.append(f"{line} Where is {person}? \t{where[person]}")
        path = folder / f"qa1_single-supporting-fact_{split}.txt"
        path.write_text("\n".join(lines) + "\n")
    return folder
