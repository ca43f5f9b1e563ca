"""Tokenizers: bytes, any Hugging Face tokenizer, any SentencePiece model; saved with shards and checkpoints.

All are transformers tokenizers: ``Trainer(processing_class=...)``, padding and ``generate`` work with them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from titans.errors import UserError

BYTES = "bytes"
BYTE_VOCABULARY_SIZE = 259
_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}

TokenIds = npt.NDArray[np.integer[Any]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is <bos>, 257 <eos>, 258 <pad>; padding goes left.

    ``tokenizer(text)`` puts <bos> first, as training does. "<bos>" written in a text is five bytes, not the
    token: text cannot forge a document boundary. Bytes that are no UTF-8 decode to U+FFFD.

    It is an ordinary Hugging Face tokenizer without merges (not a class of ours), so ``AutoTokenizer`` loads
    a saved one where this package is not installed.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary |= {token: 256 + i for i, token in enumerate(_SPECIAL.values())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids 0..255 are bytes, as in ``byte_tokenizer``: numpy then encodes, 100 times faster."""
    return len(tokenizer) == BYTE_VOCABULARY_SIZE and (
        tokenizer.convert_ids_to_tokens(list(range(256))) == _byte_characters()
    )


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``spec`` names.

    Args:
        spec: ``bytes``; a folder with a saved tokenizer (of ``save_pretrained``, of prepared shards, of a
            checkpoint); a ``tokenizer.json`` file; or a SentencePiece ``.model`` file.

    Raises:
        UserError: there is no tokenizer at ``spec``, or it cannot be read.
    """
    if str(spec) == BYTES:
        return byte_tokenizer()
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(
            f"tokenizer {str(spec)!r}: no such file or folder (expected 'bytes', a tokenizer's folder, "
            "a tokenizer.json or a SentencePiece .model file)"
        )
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.suffix == ".json":
            return _load_json(path)
        return _load_sentencepiece(path)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError, json ValueError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer {str(spec)!r} cannot be read: {reason}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer's files into ``folder``, from where ``load_tokenizer(folder)`` reads them."""
    tokenizer.save_pretrained(str(folder))


def boundary_token(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int | None]:
    """How documents are told apart in the token stream: ("bos", id) before each, else ("eos", id) after each.

    ("none", None) for a tokenizer with neither; the shards' index still knows the documents.
    """
    if tokenizer.bos_token_id is not None:
        return "bos", int(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        return "eos", int(tokenizer.eos_token_id)
    return "none", None


class TextEncoder:
    """Encodes batches of texts without special tokens, as quickly as the tokenizer allows.

    What looks like a special token inside a text is text. Ids come as one integer array per text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._bytes = is_byte_tokenizer(tokenizer)
        self._sentencepiece = getattr(tokenizer, "sp_model", None)
        self._backend: Tokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # A copy, because a tokenizer.json may ask for truncation, which would cut every document short.
            self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[TokenIds]:
        if self._bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        if self._sentencepiece is not None:
            rows = self._sentencepiece.encode(list(texts), num_threads=-1)
        elif self._backend is not None:
            # The backend itself: transformers' wrapper would build offsets and masks that nobody reads.
            rows = [row.ids for row in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        else:
            rows = [
                self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
                for text in texts
            ]
        return [np.asarray(row, dtype=np.int64) for row in rows]


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _load_folder(folder: Path) -> PreTrainedTokenizerBase:
    config = folder / "tokenizer_config.json"
    described = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if described.get("tokenizer_class") == "SentencePieceTokenizer":
        return _sentencepiece_class().from_pretrained(folder, local_files_only=True)
    if config.is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / "tokenizer.json").is_file():
        return _load_json(folder / "tokenizer.json")
    models_here = sorted(folder.glob("*.model"))
    if len(models_here) == 1:
        return _load_sentencepiece(models_here[0])
    raise UserError(
        f"tokenizer {str(folder)!r}: the folder holds no tokenizer "
        "(expected tokenizer_config.json, tokenizer.json or one .model file)"
    )


def _load_json(path: Path) -> PreTrainedTokenizerFast:
    """A bare ``tokenizer.json`` says no roles: <s>, <bos> and the like are recognised by their names."""
    config = path.with_name("tokenizer_config.json")
    if path.name == "tokenizer.json" and config.is_file():
        return AutoTokenizer.from_pretrained(path.parent, local_files_only=True)
    backend = Tokenizer.from_file(str(path))
    known = {
        "bos_token": ("<bos>", "<s>", "<|begin_of_text|>", "[BOS]"),
        "eos_token": ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[EOS]"),
        "pad_token": ("<pad>", "[PAD]"),
        "unk_token": ("<unk>", "[UNK]"),
    }
    roles = {
        role: next((name for name in names if backend.token_to_id(name) is not None), None)
        for role, names in known.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{role: name for role, name in roles.items() if name is not None},
    )


def _load_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    cls = _sentencepiece_class()
    return cls(vocab_file=str(path))


def _sentencepiece_class() -> Any:
    try:
        from titans.data.sentencepiece import SentencePieceTokenizer
    except ImportError as error:
        raise UserError(
            "a SentencePiece model needs the package 'sentencepiece': pip install 'titans-ltm[sentencepiece]'"
        ) from error
    return SentencePieceTokenizer
