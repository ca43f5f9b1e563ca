"""Tiny byte-level models, one per variant: minutes on a CPU. For trying and comparing."""

from dataclasses import replace
from pathlib import Path

from titans.training.recipe import DataSettings, ModelSettings, Recipe, TrainingSettings, Variant


def tiny_mac() -> Recipe:
    """Memory as context, tiny, on CPython's documentation text."""
    return Recipe(
        model=ModelSettings(size="tiny", variant="mac", segment_size=64, window_size=64),
        data=DataSettings(folder=Path("runs/data/python-docs"), sequence_length=256),
        training=TrainingSettings(steps=500, batch_size=8, learning_rate=2e-3, warmup_steps=50),
    )


def tiny_lmm() -> Recipe:
    """The memory alone, without attention."""
    return _with_variant(tiny_mac(), "lmm")


def tiny_mag() -> Recipe:
    """Memory as a gate on sliding-window attention."""
    return _with_variant(tiny_mac(), "mag")


def tiny_mal() -> Recipe:
    """Memory as a layer below sliding-window attention."""
    return _with_variant(tiny_mac(), "mal")


def tiny_attention() -> Recipe:
    """The baseline: sliding-window attention in the same shell."""
    return _with_variant(tiny_mac(), "attention")


def _with_variant(recipe: Recipe, variant: Variant) -> Recipe:
    return replace(recipe, model=replace(recipe.model, variant=variant))
