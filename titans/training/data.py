"""From a recipe's data to what the training loop needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from titans.data.dataset import PackedCollator, PackedDataset
from titans.data.shards import TokenShards
from titans.data.tokenizer import load_tokenizer
from titans.errors import UserError
from titans.training.recipe import DataSettings, Recipe, TrainingSettings


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Map-style sequences, the function that makes batches of them, and the vocabulary.

    ``validation`` is None when nothing was held out, ``tokenizer`` where the tokens are no text.
    ``in_order``: item i is for step i, not to be shuffled. ``answers``: labels ask for answers, and
    validation counts how many are right.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    collate: Callable[[list[Any]], dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    in_order: bool = False
    answers: bool = False


def open_data(recipe: Recipe) -> TrainingData:
    """Open what ``recipe`` is to be trained on.

    Raises:
        UserError: it is missing or damaged, or does not fit.
    """
    return recipe.data.open(recipe.training)


def refuse_noise_penalty(training: TrainingSettings, data: object) -> None:
    """Raise a UserError where the data does not say which tokens are noise, and that is to have a price."""
    if training.noise_penalty:
        raise UserError(
            f"training.noise_penalty: expected 0 for {data}, which does not say what is noise, "
            f"got {training.noise_penalty}"
        )


def open_shards(settings: DataSettings, training: TrainingSettings) -> TrainingData:
    """Open the token shards that ``settings`` name.

    Raises:
        UserError: the folder is missing or damaged, or holds fewer tokens than one sequence.
    """
    refuse_noise_penalty(training, settings.folder)
    train = TokenShards(settings.folder)
    validation: Dataset[Any] | None = None
    # A validation split shorter than one sequence would be no measure: it is shortened to fit, not refused.
    if train.meta.splits["val"].tokens >= 2:
        held_out = TokenShards(settings.folder, "val")
        windows = PackedDataset(held_out, min(settings.sequence_length, len(held_out)))
        validation = _evenly_spaced(windows, training.eval_sequences)
    tokenizer = load_tokenizer(settings.folder)
    if len(tokenizer) > train.vocab_size:
        raise UserError(
            f"{settings.folder}: the tokenizer beside the shards has {len(tokenizer)} ids, "
            f"the shards were made with {train.vocab_size}"
        )
    return TrainingData(
        train=PackedDataset(train, settings.sequence_length, seed=training.seed),
        validation=validation,
        collate=PackedCollator(),
        tokenizer=tokenizer,
        vocab_size=train.vocab_size,
    )


def _evenly_spaced(windows: PackedDataset, count: int) -> Dataset[Any]:
    """``count`` windows from all over the split, always the same ones."""
    if len(windows) <= count:
        return windows
    return Subset(windows, [index * len(windows) // count for index in range(count)])
