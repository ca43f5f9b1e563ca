"""Tokens as text: nothing lost, nothing invisible."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from titans.data.tokenizer import TextEncoder, byte_tokenizer
from titans.inspection.tokens import token_texts, visible

TEXT = "Hello  wörld, 日本語 🙂 \ttab\n\n<bos> \ufffd \x1b end"


def merges() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges across words' ends, as most vocabularies have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello world, hello there"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("make", [byte_tokenizer, merges])
def test_token_texts_joined_are_the_text(make):
    """A character of several byte tokens stands once; a U+FFFD of the text itself is no half character."""
    tokenizer = make()
    ids = TextEncoder(tokenizer)([TEXT])[0].tolist()
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TEXT
    place = texts.index("🙂")
    assert texts[place + 1 : place + 4] == ["", "", ""]


def test_bytes_that_are_no_text_are_shown_as_such():
    """A text never holds them, but it may be cut inside a character."""
    texts = token_texts(byte_tokenizer(), [104, 0xFF, 0xC3, 0x28, 105, 0xF0, 0x9F])
    assert len(texts) == 7
    assert "".join(texts) == "h\ufffd\ufffd(i\ufffd"


def test_special_tokens_are_shown():
    assert token_texts(byte_tokenizer(), [256, 104, 105]) == ["<bos>", "h", "i"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b\tc\nd", "a b\tc\nd"),
        ("\x00\x1b\x7f\r", "␀␛␡␍"),
        ("\u202eevil\u2066", "⟨U+202E⟩evil⟨U+2066⟩"),
        ("\u200b\ufeff\u2028\ue000", "⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+E000⟩"),
        ("naïve 日本 🙂 <b>", "naïve 日本 🙂 <b>"),
    ],
)
def test_what_is_not_drawn_has_a_sign(text, shown):
    assert visible(text) == shown
