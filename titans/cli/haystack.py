"""``titans haystack``: books -> one small file of tokenized sentences for the needle tasks."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.data.sources import Corpus
from titans.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from titans.data.sentences import SentenceTokens

_TRAINED_ON = 200_000  # sentences, some 20 million characters: a BPE of 4,096 ids learns no more from others


@dataclass(frozen=True)
class Arguments:
    """Tokenize the sentences of books into one file, from which needle tasks are made without the books.

    Example: titans haystack books/ --out train.npz
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """As for titans prepare."""
    out: Path
    """The file to make (.npz); it holds the tokenizer, too."""
    tokenizer: Path | None = None
    """Another haystack whose tokenizer to take; by default one is trained on these sources."""
    vocab_size: int = 4096
    """Of the tokenizer trained: a byte-level BPE in which digits and the characters of UUIDs stand alone."""
    babi: Path | None = None
    """bAbI's archive or folder: the tokenizer is trained on the stories of its train files, too, so that the
    words of BABILong's answers are tokens. The haystack has no sentence of them."""
    characters: int = 30_000_000
    """Take so many of each source, at most; what is left out does not count."""
    without: Path | None = None
    """Another haystack whose sentences to leave out: the training's, for a test."""
    words: tuple[str, ...] = ()
    """Take sentences with one of these words alone: of much text, those that look like facts (decoys)."""
    llama_tokenizer: Path | None = None
    """SentencePiece model by which tests tell their lengths (Llama-2's in the paper); needed for tests."""


def run(arguments: Arguments) -> int:
    """Check the sources, then tokenize; the order of the books is kept."""
    if not arguments.sources:
        raise UserError("expected at least one source")
    if arguments.out.suffix != ".npz":
        raise UserError(f"--out: expected a name that ends in .npz, got {arguments.out}")
    corpora = [Corpus((source,)) for source in arguments.sources]

    from titans.data.sentences import SentenceTokens, make

    without = set() if arguments.without is None else set(SentenceTokens.load(arguments.without).texts())
    made = make(
        _sentences(corpora, arguments.characters, without, arguments.words),
        _tokenizer(arguments, corpora),
        count=None if arguments.llama_tokenizer is None else _count(arguments.llama_tokenizer),
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(arguments.out)
    _print(arguments.out, made)
    return 0


def _sentences(
    corpora: list[Corpus], characters: int, without: Collection[str] = (), words: Collection[str] = ()
) -> Iterator[str]:
    from titans.data.sentences import usable

    # Without words every sentence is found.
    wanted = re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b" if words else "")
    for corpus in corpora:
        taken = 0
        for sentence in usable(_all_sentences(corpus), without):
            if not wanted.search(sentence):
                continue
            yield sentence
            taken += len(sentence) + 1
            if taken >= characters:
                break


def _all_sentences(corpus: Corpus) -> Iterator[str]:
    from titans.evaluation.haystack import split_sentences

    for document in corpus:
        yield from split_sentences([document.text])


def _tokenizer(arguments: Arguments, corpora: list[Corpus]) -> "PreTrainedTokenizerBase":
    from titans.data.bpe import train_bpe
    from titans.data.sentences import SentenceTokens

    if arguments.tokenizer is not None:
        return SentenceTokens.load(arguments.tokenizer).tokenizer
    sentences = islice(_sentences(corpora, arguments.characters), _TRAINED_ON)
    stories = () if arguments.babi is None else _stories(arguments.babi)
    return train_bpe((" " + text for text in chain(sentences, stories)), arguments.vocab_size)


def _stories(babi: Path) -> Iterator[str]:
    """Facts, questions and answers of all five tasks, as often as they come in stories."""
    from titans.evaluation.babilong import TASKS, read_stories

    for task in TASKS.values():
        for story in read_stories(babi, task, "train"):
            yield from (*story.facts, story.question, f"{story.answer}.")


def _count(path: Path) -> Callable[[str], int]:
    from titans.data.tokenizer import load_tokenizer

    model = getattr(load_tokenizer(path), "sp_model", None)
    if model is None:
        raise UserError(f"--llama-tokenizer: expected a SentencePiece model, got {path}")
    return lambda text: len(model.encode(text))


def _print(path: Path, made: "SentenceTokens") -> None:
    size = path.stat().st_size / 2**20
    print(f"{path}: {len(made):,} sentences, {len(made.ids):,} tokens, {size:.1f} MiB")
