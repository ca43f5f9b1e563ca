"""What each part of the memory is for: one small model, and what changes when a part of it is left out.

The base is a memory alone (lmm) of two blocks of width 128, as in the paper but for its size: two layers,
momentum, gates per layer, a forget gate, convolutions, persistent tokens. It learns needles in rows of at
most 1,024 tokens, which are short enough for what has no kernels.
"""

from collections.abc import Callable
from dataclasses import replace

from titans.recipes.needle import HAYSTACK, PRICE_OF_UNSEEN, SINGLE_NEEDLES
from titans.tasks.settings import TaskSettings
from titans.training.recipe import ModelSettings, Recipe, TrainingSettings


def ablation_base() -> Recipe:
    """A memory alone, small, on needles in short rows: what the others are measured by."""
    return Recipe(
        model=ModelSettings(
            size="tiny",
            variant="lmm",
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            memory_head_dim=64,
            memory_expansion=1,
            memory_step_gate="hard",
            memory_step_init=0.1,
            chunk_size=64,
            num_persistent_tokens=4,
        ),
        data=TaskSettings(
            tasks=SINGLE_NEEDLES,
            haystack=HAYSTACK,
            lengths=(256, 512, 1024),
            tokens_per_batch=32768,
            keys=2,
            questions=4,
        ),
        training=TrainingSettings(
            steps=800,
            batch_size=1,
            learning_rate=2e-3,
            min_learning_rate_ratio=0.0,
            warmup_steps=50,
            write_penalty=PRICE_OF_UNSEEN,
            max_skipped_steps=20,
            precision="bf16",
            eval_every=200,
            save_every=800,
            num_workers=2,
        ),
    )


def _ablation(name: str, says: str, **changes: object) -> Callable[[], Recipe]:
    """The recipe ``ablation_<name>``: the base, with other fields of its model."""

    def recipe() -> Recipe:
        base = ablation_base()
        return replace(base, model=replace(base.model, **changes))  # type: ignore[arg-type]  # its fields

    recipe.__name__, recipe.__doc__ = f"ablation_{name}", says
    return recipe


ABLATIONS: tuple[Callable[[], Recipe], ...] = (
    ablation_base,
    _ablation("depth_1", "A linear memory.", memory_depth=1),
    _ablation("depth_3", "A memory of three layers.", memory_depth=3),
    _ablation("depth_4", "A memory of four layers.", memory_depth=4),
    _ablation("no_convolution", "Queries, keys and values of each token alone.", conv_size=1),
    _ablation("no_momentum", "No past surprise.", memory_momentum=False),
    _ablation("no_forgetting", "No forget gate.", memory_forget_gate="none"),
    _ablation("one_gate", "One gate for all layers of the memory.", memory_gates_per_layer=False),
    _ablation("no_persistent", "No persistent tokens.", num_persistent_tokens=0),
    _ablation("chunk_16", "Inner gradients taken anew every 16 tokens.", chunk_size=16),
    _ablation("chunk_256", "The same every 256 tokens.", chunk_size=256, segment_size=256),
)
