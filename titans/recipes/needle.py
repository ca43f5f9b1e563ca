"""Small models that learn to find needles: one per memory and variant, equal parameters, minutes on a GPU.

All have three blocks of width 256, 4,096 tied ids and 3.7 million parameters within 2 %: the width of the
MLP makes up for what the mixers differ by. What the memory is made of follows a test at width 128
(docs/decisions.md): training at mixed lengths, a step that can be exactly zero and no forgetting are what
makes a needle survive far beyond the training length. What else does, and what does not: docs/recall.md.

Convolutions are of six tokens, not of the paper's four: the memory of the first block knows a token by those
before it, and in one UUID of eight three characters come again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from titans.tasks.settings import TaskSettings
from titans.training.recipe import ModelSettings, Recipe, TrainingSettings

HAYSTACK = Path("runs/recall/train.npz")
SINGLE_NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3")
WINDOW = 256  # of attention beside a memory, and segment of mac: what is further back is the memory's
# Of writing. Where gates see what attention made of a token, a high price keeps all noise out of the memory;
# gates that see the token alone cannot tell it from a needle, and a price of 5 cost answers.
PRICE_OF_SEEN, PRICE_OF_UNSEEN = 20.0, 0.5


def needle_lmm() -> Recipe:
    """The memory alone, an MLP of expansion 1, on single needles."""
    return Recipe(
        model=ModelSettings(
            size="tiny",
            variant="lmm",
            hidden_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=672,
            memory_head_dim=64,
            memory_expansion=1,
            memory_step_gate="hard",
            memory_step_init=0.1,
            memory_forget_gate="none",
            conv_size=6,
            chunk_size=64,
            num_persistent_tokens=0,
        ),
        data=TaskSettings(
            tasks=SINGLE_NEEDLES,
            haystack=HAYSTACK,
            lengths=(256, 512, 1024, 2048, 4096, 8192, 16384),
            tokens_per_batch=32768,
            curriculum_steps=800,
            keys=2,
            questions=4,
        ),
        training=TrainingSettings(
            steps=3000,
            batch_size=1,
            learning_rate=1e-3,
            min_learning_rate_ratio=0.0,
            warmup_steps=100,
            write_penalty=PRICE_OF_UNSEEN,
            max_skipped_steps=100,
            precision="bf16",
            cuda_graph=True,
            eval_every=250,
            save_every=1000,
            num_workers=4,
        ),
    )


def needle_lmm_rectified() -> Recipe:
    """The same with a forget gate that starts a hair above an exact zero."""
    return with_model(needle_lmm(), memory_forget_gate="rectified")


def needle_lmm_linear() -> Recipe:
    """The memory alone, linear and without momentum, which makes it diverge beyond the training length."""
    linear = {"memory_depth": 1, "memory_momentum": False}
    return with_model(needle_lmm(), **linear, intermediate_size=696)


def needle_lmm_f256() -> Recipe:
    """The memory alone, an MLP of expansion 4."""
    return with_model(needle_lmm(), memory_expansion=4, intermediate_size=544)


def needle_mag() -> Recipe:
    """Memory as a gate on attention with a window of 256, by which its gates know what a token is part of."""
    return _seen(with_model(needle_lmm(), **_hybrid("mag"), memory_gates_from="attention"))


def needle_mag_token() -> Recipe:
    """needle_mag with gates that see the token alone, as in the paper: in block one, digits are alike."""
    return with_model(needle_lmm(), **_hybrid("mag"))


def needle_mag_late() -> Recipe:
    """needle_mag_token with a first block of attention alone."""
    return with_model(needle_mag_token(), memory_from_layer=1, intermediate_size=544)


def needle_mag_c16() -> Recipe:
    """needle_mag with gradients taken anew every 16 tokens: a value of 36 tokens is written in three goes."""
    return with_model(needle_mag(), chunk_size=16)


def needle_mag_f256() -> Recipe:
    """needle_mag with a memory of expansion 4."""
    return with_model(needle_mag(), memory_expansion=4, intermediate_size=288)


def needle_mag_f256_second() -> Recipe:
    """A second leg from its weights, among sentences with numbers, of which a memory must write nothing."""
    recipe = _among_decoys(needle_mag_f256(), curriculum_steps=0)
    return replace(recipe, training=replace(recipe.training, learning_rate=5e-4))


def needle_mag_f256_told() -> Recipe:
    """A leg from the beginning, with those, that is told what is noise, with no other price on writing."""
    return told(_among_decoys(needle_mag_f256()))


def needle_mac_f256_told() -> Recipe:
    """The same with needle_mac_f256_token."""
    return told(_among_decoys(needle_mac_f256_token()))


def needle_mal() -> Recipe:
    """Memory as a layer below attention with a window of 256."""
    return with_model(needle_lmm(), **_hybrid("mal"))


def needle_mac() -> Recipe:
    """Memory as context, segments of 256: its gates see what attention made of a token, in every block."""
    return _seen(with_model(needle_lmm(), **_hybrid("mac")))


def needle_mac_f256() -> Recipe:
    """The same with a memory of expansion 4."""
    return with_model(needle_mac(), memory_expansion=4, intermediate_size=200)


def needle_mac_f256_token() -> Recipe:
    """needle_mac_f256 whose memory writes the token, not what attention made of it."""
    return with_model(needle_mac_f256(), memory_input="token")


def needle_attention() -> Recipe:
    """The baseline: full attention."""
    return with_model(needle_lmm(), variant="attention", window_size=0, intermediate_size=808)


def needle_sliding() -> Recipe:
    """The baseline with a window of 256: what needs no memory."""
    return with_model(needle_attention(), window_size=WINDOW)


def _hybrid(variant: str) -> dict[str, object]:
    width = {"mag": 416, "mal": 328, "mac": 328}[variant]
    return {"variant": variant, "window_size": WINDOW, "segment_size": WINDOW, "intermediate_size": width}


def _among_decoys(recipe: Recipe, **changes: Any) -> Recipe:
    assert isinstance(recipe.data, TaskSettings)
    return replace(recipe, data=replace(recipe.data, decoys=0.3, **changes))


def told(recipe: Recipe) -> Recipe:
    """With a price on noise in place of that on all writing, which small steps for facts lower, too."""
    return replace(recipe, training=replace(recipe.training, write_penalty=0.0, noise_penalty=1.0))


def _seen(recipe: Recipe) -> Recipe:
    return replace(recipe, training=replace(recipe.training, write_penalty=PRICE_OF_SEEN))


def with_model(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe with other fields of its model."""
    return replace(recipe, model=replace(recipe.model, **changes))  # type: ignore[arg-type]  # names of its fields
