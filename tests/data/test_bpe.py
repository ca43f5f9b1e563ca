"""The BPE of the needle tasks: nothing is lost, numbers are regular, and words do not look at one another."""

import random
import uuid

import pytest

from tests.tasks.tiny import book, tiny_haystack
from titans.data.bpe import WordEncoder, train_bpe
from titans.data.tokenizer import TextEncoder, load_tokenizer
from titans.errors import UserError

TEXTS = [
    "One of the special magic uuids for olive-avenue is: 3f2a8b1c-dead-4beef-8def-0a23456789ab.",
    "\nWhat is it?  Two  spaces,\n\na break, a tab\t, “quotes”, naïve café, 日本 and 1,234.50 or 3rd-rate.",
    "x" * 40 + "7" + "y" * 40,
]


def test_any_text_comes_back_and_the_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = tiny_haystack().tokenizer
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in [*TEXTS, book(9, 30), "<eos> is text"]:
        (ids,) = TextEncoder(tokenizer)([text])
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert TextEncoder(again)([text])[0].tolist() == ids.tolist()
        assert tokenizer.eos_token_id not in ids


def test_numbers_and_uuids_are_one_token_a_character():
    """Also where a group of a UUID has letters alone, and where letters come last."""
    encode = TextEncoder(tiny_haystack().tokenizer)
    rng = random.Random(0)
    values = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(300)]
    values += ["1234567", "deadbeef-dead-4bad-beef-00aaaaaaaaaa", "aaaaaaaa-aaaa-4aaa-aaaa-aaaaaaaaaaaa"]
    for value, ids in zip(values, encode([" " + value for value in values]), strict=True):
        assert len(ids) == 1 + len(value), value


@pytest.mark.parametrize("text", TEXTS)
def test_texts_can_be_cut_before_spaces_and_at_line_breaks(text):
    """Else sentences tokenized once could not be put together."""
    encode = TextEncoder(tiny_haystack().tokenizer)
    whole = encode([text])[0].tolist()
    for cut in range(1, len(text)):
        if text[cut] == " " or text[cut] == "\n" or text[cut - 1] == "\n":
            first, second = encode([text[:cut], text[cut:]])
            assert [*first, *second] == whole, cut


def test_word_by_word_is_the_same():
    tokenizer = tiny_haystack().tokenizer
    encode, words = TextEncoder(tokenizer), WordEncoder(tokenizer)
    rng = random.Random(1)
    alphabet = "ab1-. \n(é"
    texts = [*TEXTS, *("".join(rng.choices(alphabet, k=60)) for _ in range(300))]
    for _ in range(2):  # from the tokenizer, then from the table
        for text, ids in zip(texts, encode(texts), strict=True):
            assert words(text) == ids.tolist(), text


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="at least 258"):
        train_bpe(["some text"], 200)
    with pytest.raises(UserError, match="ids only, got 4096"):
        train_bpe(["some text"], 4096)
