"""Associative recall among random tokens (MQAR): two blocks of width 128, as small as Zoology's models.

Its grid in one run: a batch draws its length and its number of pairs, up to one for 4 tokens, without noise
as in its figure 2. Windows of 64: what is further back is the memory's. 1,024 ids instead of 8,192, with
which 1,000 steps taught no model more than which ids are values. Writing costs nothing, as all pairs are
asked for, and an untrained memory writes with half of the largest step, not with a tenth as for needles.

The short ones are for one CPU core: 4 pairs of 64 ids in 32 or 64 tokens, windows of 16, width 64.
In ten minutes they show whether a variant takes what is outside of its window from its memory.
"""

from dataclasses import replace

from titans.recipes.needle import (
    needle_attention,
    needle_lmm,
    needle_lmm_f256,
    needle_lmm_linear,
    needle_mac,
    needle_mag,
    needle_mal,
    needle_sliding,
    with_model,
)
from titans.tasks.settings import TaskSettings
from titans.training.recipe import Recipe

PAIRS = (4, 8, 16, 32, 64)
WINDOW = 64


def mqar_lmm() -> Recipe:
    """The memory alone, an MLP of expansion 1, on 4 to 64 pairs in 64 to 256 tokens."""
    return _on_mqar(needle_lmm(), 256)


def mqar_lmm_linear() -> Recipe:
    """The memory alone, linear."""
    return _on_mqar(needle_lmm_linear(), 280)


def mqar_lmm_f256() -> Recipe:
    """The memory alone, an MLP of expansion 4."""
    return _on_mqar(needle_lmm_f256(), 128)


def mqar_mag() -> Recipe:
    """Memory as a gate on attention with a window of 64."""
    return _on_mqar(needle_mag(), 128)


def mqar_mac() -> Recipe:
    """Memory as context, segments of 64."""
    return _on_mqar(needle_mac(), 88)


def mqar_mac_token() -> Recipe:
    """mqar_mac whose memory writes the token, not what attention made of it."""
    return with_model(mqar_mac(), memory_input="token")


def mqar_mal() -> Recipe:
    """Memory as a layer below attention with a window of 64."""
    return _on_mqar(needle_mal(), 88)


def mqar_attention() -> Recipe:
    """The baseline: full attention."""
    return _on_mqar(needle_attention(), 352)


def mqar_sliding() -> Recipe:
    """The baseline with a window of 64: what needs no memory."""
    return _on_mqar(needle_sliding(), 352)


def short_mqar_mac() -> Recipe:
    """mqar_mac on the short ones."""
    return shortened(mqar_mac())


def short_mqar_mac_token() -> Recipe:
    """mqar_mac_token on the short ones."""
    return shortened(mqar_mac_token())


def short_mqar_mag() -> Recipe:
    """mqar_mag on the short ones."""
    return shortened(mqar_mag())


def short_mqar_sliding() -> Recipe:
    """mqar_sliding on the short ones: what needs no memory."""
    return shortened(mqar_sliding())


def shortened(recipe: Recipe) -> Recipe:
    """On the short ones, as small as fits them."""
    assert isinstance(recipe.data, TaskSettings)
    data = replace(recipe.data, lengths=(32, 64), pairs=(4,), vocab_size=64, tokens_per_batch=2048)
    small = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "chunk_size": 16}
    recipe = with_model(recipe, **small, window_size=16, segment_size=16)
    return replace(recipe, data=data, training=replace(recipe.training, warmup_steps=50))


def _on_mqar(recipe: Recipe, mlp_width: int) -> Recipe:
    data = TaskSettings(
        tasks=("mqar",),
        lengths=(64, 128, 256),
        pairs=PAIRS,
        vocab_size=1024,
        noise=False,
        tokens_per_batch=16384,
    )
    training = replace(recipe.training, learning_rate=2e-3, write_penalty=0.0)
    model = replace(
        recipe.model,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=mlp_width,
        memory_step_init=0.5,
        conv_size=4,
    )
    if model.window_size:  # neither full attention's 0 nor a memory without attention
        model = replace(model, window_size=WINDOW, segment_size=WINDOW)
    return replace(recipe, model=model, data=data, training=training)
