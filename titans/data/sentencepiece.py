"""A SentencePiece model as a transformers tokenizer (imported only when one is used)."""

from pathlib import Path
from typing import Any

import sentencepiece
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from titans.errors import UserError


class SentencePieceTokenizer(SentencePieceBackend):
    """SentencePiece's own encoder, exactly.

    transformers would convert the model to its fast form, which splits runs of spaces differently: on four
    English books the Llama-2 model gives 510,733 tokens, its conversion 511,263.

    Args:
        vocab_file: the ``.model`` file. Which pieces are <s>, </s>, padding and unknown is read from it.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  (transformers' own convention)
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromFile(vocab_file)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{vocab_file}: not a SentencePiece model, or a damaged one") from error
        for role in ("bos", "eos", "pad", "unk"):
            if (index := getattr(model, f"{role}_id")()) >= 0:
                kwargs.setdefault(f"{role}_token", model.id_to_piece(index))
        kwargs.setdefault("padding_side", "left")
        # As in training, where every document starts with <s> and "<s>" written in a text is text.
        kwargs.setdefault("special_tokens_pattern", "bos" if model.bos_id() >= 0 else "none")
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(vocab_file=vocab_file, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of ``tokens``; byte pieces such as <0x0A> become their bytes."""
        return str(self.sp_model.decode_pieces(tokens))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the model's bytes: the file that it was loaded from may be gone by then."""
        path = Path(
            save_directory, f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        )
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)
