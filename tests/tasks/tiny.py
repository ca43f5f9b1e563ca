"""A haystack of made-up books, small enough to make in a test."""

import random
from functools import cache

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
