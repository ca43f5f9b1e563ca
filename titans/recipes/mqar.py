"""Associative recall among random tokens (MQAR): the models of `titans.recipes.needle`, no text."""

from dataclasses import replace

from titans.recipes.needle import needle_attention, needle_lmm, needle_lmm_f256, needle_lmm_linear
from titans.tasks.settings import TaskSettings
from titans.training.recipe import Recipe


def mqar_lmm() -> Recipe:
    """The memory alone, an MLP of expansion 1, on 32 pairs of 8,192 tokens."""
    return _on_mqar(needle_lmm())


def mqar_lmm_linear() -> Recipe:
    """The memory alone, linear."""
    return _on_mqar(needle_lmm_linear())


def mqar_lmm_f256() -> Recipe:
    """The memory alone, an MLP of expansion 4."""
    return _on_mqar(needle_lmm_f256())


def mqar_attention() -> Recipe:
    """The baseline: full attention."""
    return _on_mqar(needle_attention())


def _on_mqar(recipe: Recipe) -> Recipe:
    data = TaskSettings(tasks=("mqar",), lengths=(64, 128, 256, 512), tokens_per_batch=32768)
    return replace(recipe, data=data)
