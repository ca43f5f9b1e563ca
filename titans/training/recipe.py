"""A recipe: everything that decides a training run, as frozen dataclasses that check themselves.

A named experiment is a plain function that returns a ``Recipe`` (``titans.recipes``); one derives from
another with ``dataclasses.replace``. The command line overrides fields (``--training.steps 100``).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from titans.errors import UserError

if TYPE_CHECKING:  # the models import transformers, which takes seconds: recipes are listed without it
    from titans.models import TitansConfig
    from titans.training.data import TrainingData

Variant = Literal["lmm", "mac", "mag", "mal", "attention"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A named size of ``TitansConfig``, and the fields that differ from it (None: as the size has it)."""

    size: str = "tiny"
    """Named size: tiny, 170m, 340m, 400m, 760m, 1.3b."""
    variant: Variant = "mac"
    """The mixer: memory as context, gate, layer, alone, or the attention baseline."""
    hidden_size: int | None = None
    """Width of the token stream."""
    num_hidden_layers: int | None = None
    """Blocks."""
    num_attention_heads: int | None = None
    """Heads of the attention (the memory has hidden_size / memory_head_dim of its own)."""
    intermediate_size: int | None = None
    """Width of the SwiGLU MLP."""
    tie_word_embeddings: bool | None = None
    """One matrix for the embedding and the output."""
    memory_depth: int | None = None
    """Layers of the memory MLP; 1 is the linear memory."""
    memory_expansion: int | None = None
    """Width of the memory's hidden layers over memory_head_dim."""
    memory_head_dim: int | None = None
    """Width of a memory head."""
    memory_activation: str | None = None
    """Of the memory's hidden layers: gelu, gelu_tanh or silu."""
    memory_residual: bool | None = None
    """Add the memory's input to its output."""
    memory_norm: bool | None = None
    """Normalise the memory's output before the residual."""
    memory_momentum: bool | None = None
    """Carry past surprise (eta) in the memory's update."""
    memory_momentum_init: float | None = None
    """eta of an untrained layer."""
    memory_gates_per_layer: bool | None = None
    """Gates for every layer of the memory instead of one for all."""
    memory_forget_gate: str | None = None
    """rectified, sigmoid or none."""
    memory_forget_per_channel: bool | None = None
    """A forget gate for every output channel of every layer of the memory."""
    memory_step_gate: str | None = None
    """sigmoid, or hard: a token can write nothing at all."""
    memory_step_init: float | None = None
    """Share of the largest step that an untrained gate takes."""
    memory_max_step: float | None = None
    """Bound on the inner step over time."""
    memory_read_before_write: bool | None = None
    """A token reads the memory without its own write in it."""
    memory_gates_from: str | None = None
    """What the gates of mag see: token, or attention: what attention made of it, too."""
    memory_input: str | None = None
    """What mac writes: attention, what attention made of a token, as in the paper, or token, it alone."""
    memory_from_layer: int | None = None
    """Blocks before this one have sliding attention alone (mac, mag, mal)."""
    conv_size: int | None = None
    """Width of the convolution after q, k and v."""
    chunk_size: int | None = None
    """Tokens whose inner gradients share one anchor."""
    segment_size: int | None = None
    """Tokens that attend to one another in mac; a multiple of chunk_size."""
    window_size: int | None = None
    """Sliding window of attention in mag, mal and attention; 0: full attention (variant attention alone)."""
    num_persistent_tokens: int | None = None
    """Learned tokens before every segment or window."""

    def build(self, vocab_size: int, **token_ids: int | None) -> "TitansConfig":
        """The model's config for a vocabulary of ``vocab_size``; ``token_ids`` are bos, eos and pad ids.

        Raises:
            ValueError: the size is unknown, or fields contradict one another (chunk_size must divide
                segment_size).
        """
        from titans.models import TitansConfig

        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if own.get("window_size") == 0:
            own["window_size"] = None
        return TitansConfig.named(own.pop("size"), vocab_size=vocab_size, **own, **token_ids)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where training sequences come from; what is needed for it stands in the subclasses."""

    def open(self, training: "TrainingSettings") -> "TrainingData":
        """Sequences for the training loop.

        Raises:
            UserError: something that they are made of is missing or does not fit.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DataSettings(DataSource):
    """Which token shards to read (``titans prepare`` makes them), and how."""

    folder: Path
    """Folder of token shards."""
    sequence_length: int = 512
    """Tokens of one training sequence."""

    def __post_init__(self) -> None:
        at_least(self, 2, "sequence_length")

    def open(self, training: "TrainingSettings") -> "TrainingData":
        from titans.training.data import open_shards

        return open_shards(self, training)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """AdamW, its schedule (warm-up, then cosine), when to evaluate and save; steps are optimiser steps."""

    steps: int
    """Optimiser steps of the whole run."""
    batch_size: int = 8
    """Sequences per process in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    min_learning_rate_ratio: float = 0.1
    """Where the cosine ends, over the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """On the weights of linear layers and the embedding only."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_skipped_steps: int = 0
    """Steps whose gradient is not finite that are left out; one more ends the run. The gradient through the
    writes of a long sequence can overflow at one batch and be fine at the next."""
    write_penalty: float = 0.0
    """Weight in the loss of the mean step of all tokens over the largest one: tokens that hold nothing to be
    remembered learn to write nothing. Grows from 0 at a quarter of the run to this at its half."""
    noise_penalty: float = 0.0
    """Weight in the loss of the share of all writing that is spent on noise, from the first step on: for data
    that says which tokens are noise (rows of needle and BABILong tasks). Shrinking every step lowers the
    write penalty, but not this."""
    precision: Precision = "fp32"
    """bf16: matrix products in bfloat16 (autocast); parameters, gates and memory stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the model, block by block."""
    cuda_graph: bool = False
    """On a GPU: record forward and backward once for every length of rows, and replay them: small models wait
    for launches. Batches of several documents a row are taken without. Not with compile,
    gradient_checkpointing or gradient_accumulation_steps."""
    seed: int = 0
    """Of the initial weights and the data order."""
    eval_every: int = 100
    """Steps between evaluations on the validation split; one more follows the last step."""
    eval_sequences: int = 64
    """Validation sequences per evaluation, always the same."""
    save_every: int = 500
    """Steps between checkpoints; one more follows the last step."""
    keep: int = 2
    """Checkpoints kept."""
    num_workers: int = 0
    """Processes that read data."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            *("steps", "batch_size", "gradient_accumulation_steps"),
            *("eval_every", "eval_sequences", "save_every", "keep"),
        )
        at_least(
            self,
            0,
            "warmup_steps",
            "weight_decay",
            "write_penalty",
            "noise_penalty",
            "max_skipped_steps",
            "num_workers",
            "seed",
        )
        above_zero(self, "learning_rate", "max_grad_norm")
        unlike = self.compile or self.gradient_checkpointing or self.gradient_accumulation_steps > 1
        if self.cuda_graph and unlike:
            raise UserError(
                "training.cuda_graph: expected no compile, no gradient_checkpointing and "
                f"gradient_accumulation_steps 1, got {self.compile}, {self.gradient_checkpointing} and "
                f"{self.gradient_accumulation_steps}"
            )
        for name in ("beta1", "beta2", "min_learning_rate_ratio"):
            value = getattr(self, name)
            # A beta of 1 would never forget; a ratio of 1 is a constant rate, which is fine.
            if not 0 <= value <= 1 or (value == 1 and name != "min_learning_rate_ratio"):
                raise UserError(f"training.{name}: expected a number from 0 to 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Where the figures go, beside ``log.jsonl`` in the output folder, which is always written."""

    tensorboard: bool = False
    """Also to TensorBoard (pip install 'titans-ltm[tensorboard]')."""
    wandb: bool = False
    """Also to Weights & Biases (pip install 'titans-ltm[wandb]')."""
    memory_metrics_every: int = 0
    """Steps between measurements of the memory's norms and gates; 0: never."""

    def __post_init__(self) -> None:
        at_least(self, 0, "memory_metrics_every")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole training run."""

    model: ModelSettings
    data: DataSource
    training: TrainingSettings
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain


def at_least(settings: Any, least: int, *names: str) -> None:
    """Raise a UserError that names the option unless the fields ``names`` are at least ``least``."""
    for name in names:
        if not (value := getattr(settings, name)) >= least:  # written so that NaN fails
            raise UserError(f"{_section(settings)}.{name}: expected at least {least}, got {value}")


def above_zero(settings: Any, *names: str) -> None:
    """The same for fields that must be above 0."""
    for name in names:
        if not (value := getattr(settings, name)) > 0:
            raise UserError(f"{_section(settings)}.{name}: expected a number above 0, got {value}")


def _section(settings: Any) -> str:
    """ "training" for TrainingSettings: what the option is called on the command line."""
    return (
        "data"
        if isinstance(settings, DataSource)
        else type(settings).__name__.removesuffix("Settings").lower()
    )
