"""BABILong: models of `titans.recipes.needle` on bAbI's stories in books.

Convolutions are of eight tokens: where a place is written, the memory of the first block sees who went there
("Daniel went back to the kitchen": five tokens before; `titans haystack --babi` makes the words tokens).
Windows are of 64 tokens: with 256 the answers of training were within them, and the memory learned next to
nothing.
"""

from dataclasses import replace
from pathlib import Path

from titans.recipes.needle import (
    needle_lmm,
    needle_mag,
    needle_mag_f256,
    needle_sliding,
    told,
    with_model,
)
from titans.tasks.settings import TaskSettings
from titans.training.recipe import Recipe

BABI = Path("runs/recall/babi.tar.xz")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
WINDOW = 64
TASKS = tuple(f"babilong_qa{number}" for number in range(1, 6))


def babilong_mag() -> Recipe:
    """needle_mag on qa1 to qa5 together."""
    return _on_babilong(needle_mag())


def babilong_mag_f256() -> Recipe:
    """needle_mag_f256 on qa1 to qa5 together."""
    return _on_babilong(needle_mag_f256())


def babilong_lmm() -> Recipe:
    """needle_lmm on qa1 to qa5 together."""
    return _on_babilong(needle_lmm())


def babilong_sliding() -> Recipe:
    """needle_sliding on qa1 to qa5 together: what needs no memory."""
    return _on_babilong(needle_sliding())


def babilong_qa1_mag() -> Recipe:
    """needle_mag on qa1: where somebody went last."""
    return _on_babilong(needle_mag(), TASKS[:1])


def babilong_qa1_mag_f256() -> Recipe:
    """needle_mag_f256 on qa1."""
    return _on_babilong(needle_mag_f256(), TASKS[:1])


def babilong_qa1_mag_f256_second() -> Recipe:
    """A second leg from its weights: longer rows, more decoys, a higher price."""
    return _second(babilong_qa1_mag_f256())


def babilong_qa1_mag_f256_told() -> Recipe:
    """A leg like the second that is told what is noise: a price on the share of writing spent on it."""
    return told(babilong_qa1_mag_f256_second())


def babilong_mag_f256_second() -> Recipe:
    """The second leg on qa1 to qa5 together."""
    return _second(babilong_mag_f256())


def babilong_mag_f256_told() -> Recipe:
    """The leg that is told what is noise on qa1 to qa5 together."""
    return told(babilong_mag_f256_second())


def _second(recipe: Recipe) -> Recipe:
    assert isinstance(recipe.data, TaskSettings)
    data = replace(recipe.data, lengths=(*LENGTHS, 16384, 32768), decoys=0.6, curriculum_steps=0)
    training = replace(recipe.training, learning_rate=5e-4, write_penalty=400.0)
    return replace(recipe, data=data, training=training)


def _on_babilong(recipe: Recipe, tasks: tuple[str, ...] = TASKS) -> Recipe:
    assert isinstance(recipe.data, TaskSettings)
    # An answer is one word: rows of one story would leave a batch with next to nothing to learn from.
    data = replace(recipe.data, tasks=tasks, babi=BABI, lengths=LENGTHS, keys=4, questions=5, decoys=0.3)
    return replace(with_model(recipe, conv_size=8, window_size=WINDOW), data=data)
