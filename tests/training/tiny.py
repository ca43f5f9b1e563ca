"""A model and data so small that a step takes milliseconds: the loop is under test here, not the model."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from titans.data.tokenizer import byte_tokenizer
from titans.training.data import TrainingData
from titans.training.recipe import DataSettings, ModelSettings, Recipe, TrainingSettings


class Lines(Dataset[dict[str, torch.Tensor]]):
    """Forty rows of sixteen bytes with something to learn: each byte is the one before it plus one."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(16) + 7 * index) % 256
        return {"input_ids": row, "labels": row}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def tiny_data() -> TrainingData:
    return TrainingData(
        train=Lines(), validation=Lines(), collate=stack, tokenizer=byte_tokenizer(), vocab_size=259
    )


def tiny_recipe() -> Recipe:
    return Recipe(
        model=ModelSettings(),
        data=DataSettings(folder=Path("unused")),
        training=TrainingSettings(
            steps=30,
            batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=3,
            eval_every=7,
            save_every=10,
        ),
    )


def tiny_model() -> PreTrainedModel:
    """A fresh one per run, as a new process would have; dropout makes the random state matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    return LlamaForCausalLM(config)
