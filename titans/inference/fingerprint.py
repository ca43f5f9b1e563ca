"""Fingerprints: which model and which tokenizer a state belongs to. SHA-256 in hexadecimal digits."""

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from titans.models import TitansConfig, TitansForCausalLM

# What a forward pass does not depend on.
_IGNORED = {"initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


def model_fingerprint(model: TitansForCausalLM) -> str:
    """Of the config's sizes and switches and of every parameter's name, dtype, shape and bytes.

    The same on every device; another dtype is another model. Switches at their default do not count: a
    memory file outlives the day when the library gains one.
    """
    fields = {
        name: value
        for name in sorted(set(TitansConfig.__annotations__) - _IGNORED)
        if (value := getattr(model.config, name)) != getattr(TitansConfig, name)
    }
    digest = hashlib.sha256(_json(fields))
    for name, parameter in model.named_parameters():  # tied weights once
        digest.update(_json([name, str(parameter.dtype), list(parameter.shape)]))
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides how text becomes ids: vocabulary, merges, normalisation, <bos> and <eos>."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if (sentencepiece := getattr(tokenizer, "sp_model", None)) is not None:
        return hashlib.sha256(_json(special) + sentencepiece.serialized_model_proto()).hexdigest()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for settings in ("truncation", "padding"):  # of the last call, and of no effect here
        rules.pop(settings, None)
    return hashlib.sha256(_json([special, rules])).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
