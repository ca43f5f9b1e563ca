"""Checkpoints of tiny untrained models with weights that show mistakes, and texts to read."""

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.inference.tiny import randomised
from titans.data.tokenizer import byte_tokenizer, save_tokenizer

# Numbered lines: no two pieces are alike, so nothing can be read twice or left out unseen.
TEXT = "".join(f"line {number}: the quick brown fox, número {number * 7919 % 1000}\n" for number in range(60))


def checkpoint(folder: Path, variant: str = "mac", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A byte-level model of `variant`, saved in `folder`."""
    model = randomised(variant, seed, vocab_size=259, bos_token_id=256, eos_token_id=257, pad_token_id=258)
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(byte_tokenizer(), folder)
    return folder


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 ids without <bos>, trained on `TEXT`; two line ends are one token of it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([TEXT, *["\n\n"] * 100], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
