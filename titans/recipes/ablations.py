"""What each part of the memory is for: one small model, and what changes when a part of it is left out.

The base is a memory alone (lmm) of two blocks of width 128, as in the paper but for its size: two layers,
momentum, gates per layer, a forget gate, convolutions, persistent tokens. It learns MQAR in rows that are
short enough for what has no kernels; the depths also on short MQAR, minutes of a CPU core each. (On
needles, 700 steps were too few: two seeds of a base answered 10 and 85 % of the easiest.)
"""

from collections.abc import Callable

from titans.nn.gates import DEFAULT_MAX_STEP
from titans.recipes.mqar import mqar_lmm, shortened
from titans.recipes.needle import with_model
from titans.training.recipe import Recipe

LARGE_STEP = DEFAULT_MAX_STEP[2]  # the base's; three and four layers have smaller bounds of their own


def ablation_base() -> Recipe:
    """A memory alone, small, on MQAR: what the others are measured by."""
    return with_model(mqar_lmm(), memory_forget_gate="rectified", chunk_size=64, num_persistent_tokens=4)


def _ablation(name: str, says: str, **changes: object) -> Callable[[], Recipe]:
    """The recipe ``ablation_<name>``: the base, with other fields of its model."""

    def recipe() -> Recipe:
        return with_model(ablation_base(), **changes)

    recipe.__name__, recipe.__doc__ = f"ablation_{name}", says
    return recipe


ABLATIONS: tuple[Callable[[], Recipe], ...] = (
    ablation_base,
    _ablation("depth_1", "A linear memory.", memory_depth=1),
    _ablation("depth_3", "A memory of three layers.", memory_depth=3),
    _ablation("depth_4", "A memory of four layers.", memory_depth=4),
    _ablation(
        "depth_3_large_step",
        "Three layers whose steps are bounded as the base's.",
        memory_depth=3,
        memory_max_step=LARGE_STEP,
    ),
    _ablation(
        "depth_4_large_step",
        "Four layers whose steps are bounded as the base's.",
        memory_depth=4,
        memory_max_step=LARGE_STEP,
    ),
    _ablation("no_convolution", "Queries, keys and values of each token alone.", conv_size=1),
    _ablation("no_momentum", "No past surprise.", memory_momentum=False),
    _ablation("no_forgetting", "No forget gate.", memory_forget_gate="none"),
    _ablation(
        "forget_per_channel",
        "Chunks of 16 and a forget gate for every channel of a memory layer's output, whose parameters are "
        "taken from the MLP.",
        memory_forget_per_channel=True,
        intermediate_size=176,
        chunk_size=16,  # beside chunk_16: a matrix of gates for each channel is [C, C], on the chunked path
    ),
    _ablation("one_gate", "One gate for all layers of the memory.", memory_gates_per_layer=False),
    _ablation("read_before_write", "Every token reads before it is written.", memory_read_before_write=True),
    _ablation("no_persistent", "No persistent tokens.", num_persistent_tokens=0),
    _ablation("chunk_16", "Inner gradients taken anew every 16 tokens.", chunk_size=16),
    _ablation("chunk_256", "The same every 256 tokens.", chunk_size=256, segment_size=256),
)


def _short(ablation: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """The recipe ``short_ablation_<name>``."""

    def recipe() -> Recipe:
        return shortened(ablation())

    recipe.__name__, recipe.__doc__ = f"short_{ablation.__name__}", ablation.__doc__
    return recipe


SHORT_ABLATIONS = tuple(
    _short(each) for each in ABLATIONS if "depth" in each.__name__ or each is ablation_base
)
