"""`TitansConfig`: every size and switch of a model, flat, in transformers' form."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from titans.errors import unknown_name
from titans.nn import GateSpec, NeuralMemorySpec
from titans.ops import MemorySpec

VARIANTS = ("lmm", "mac", "mag", "mal", "attention")

# Blocks, hidden size and heads: the paper's table, but for "tiny" and "400m", which it does not have.
SIZES = {
    "tiny": (4, 128, 4),
    "170m": (12, 768, 16),
    "340m": (24, 1024, 16),
    "400m": (24, 1024, 16),
    "760m": (24, 1536, 16),
    "1.3b": (18, 2048, 8),
}
SIZE_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads")
# Width of the MLP. Mixers differ by up to 5.6 hidden_size^2 a block (mac against attention), so one width for
# all would make a "340m" anything from 340 to 480 million. These multiples of 64 bring every variant within
# 1 % of the name (32,000 tied tokens): variants of one size can be compared at equal parameters.
MLP_WIDTHS = {
    "tiny": {"lmm": 384, "mac": 384, "mag": 384, "mal": 384, "attention": 384},
    "170m": {"lmm": 3712, "mac": 2688, "mag": 2944, "mal": 2688, "attention": 4224},
    "340m": {"lmm": 2240, "mac": 832, "mag": 1216, "mal": 832, "attention": 2752},
    "400m": {"lmm": 3008, "mac": 1664, "mag": 1984, "mal": 1664, "attention": 3584},
    "760m": {"lmm": 3584, "mac": 1536, "mag": 2048, "mal": 1536, "attention": 4352},
    "1.3b": {"lmm": 7488, "mac": 4736, "mag": 5440, "mal": 4736, "attention": 8384},
}
# The rest of "tiny", for tests and trials: lengths at which every boundary is met within 100 tokens.
TINY_FIELDS = {"memory_head_dim": 32, "segment_size": 64, "window_size": 64, "num_persistent_tokens": 4}


class TitansConfig(PreTrainedConfig):
    """Configuration of `TitansModel` and `TitansForCausalLM`; `named` gives the usual sizes.

    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, rms_norm_eps,
    rope_theta, tie_word_embeddings, use_cache: as in Llama.

    initializer_range: standard deviation of untrained weights and embeddings. None: 1 / sqrt(hidden_size), so
        that embeddings are not drowned by what normalised mixers add to them.
    variant: the mixer of every block. "lmm": the memory alone. "mac": memory as context. "mag": memory as
        gate. "mal": memory as layer. "attention": no memory, the baseline.
    memory_head_dim: width of a memory head; memory heads = hidden_size / memory_head_dim.
    memory_depth, memory_expansion, memory_activation, memory_residual, memory_norm: the memory network,
        see `MemorySpec`. None: on for depth >= 2.
    memory_momentum, memory_momentum_init, memory_gates_per_layer, memory_forget_gate,
        memory_forget_per_channel, memory_step_gate, memory_step_init, memory_max_step: its gates, see
        `GateSpec`.
    memory_read_before_write: a token reads the memory as the one before it left it, see `NeuralMemorySpec`.
    memory_gates_from: what the gates of "mag" see of a token: "token", it alone, as in the paper, or
        "attention", what attention made of it and of the window before it, too, as those of "mac" do.
    memory_input: what the memory of "mac" writes and is asked for: "attention", what attention made of a
        token, as in the paper, or "token", it alone, as that of "mag"; its gates then see both.
    memory_from_layer: blocks before this one mix by sliding attention alone ("mac", "mag", "mal"). What a
        gate knows of a token's context comes from below it: in the first block of "mag" and "mal" nothing.
    conv_size: width of the causal depthwise convolution after q, k and v.
    chunk_size: tokens whose inner gradients are taken at the same weights.
    segment_size: tokens that attend to one another in "mac"; a multiple of chunk_size.
    window_size: sliding window of "mag", "mal" and "attention"; None: full attention.
    num_persistent_tokens: learned, input-independent tokens of each block.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers declares it so)

    variant: str = "mac"
    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None

    memory_head_dim: int = 64
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_activation: str = "gelu"
    memory_residual: bool | None = None
    memory_norm: bool | None = None
    memory_momentum: bool = True
    memory_momentum_init: float = 0.5
    memory_gates_per_layer: bool = True
    memory_forget_gate: str = "rectified"
    memory_forget_per_channel: bool = False
    memory_step_gate: str = "sigmoid"
    memory_step_init: float = 0.5
    memory_max_step: float | None = None
    memory_read_before_write: bool = False
    memory_gates_from: str = "token"
    memory_input: str = "attention"
    memory_from_layer: int = 0
    conv_size: int = 4
    chunk_size: int = 16
    segment_size: int = 512
    window_size: int | None = 2048
    num_persistent_tokens: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check()
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5

    @classmethod
    def named(cls, size: str, **overrides: Any) -> TitansConfig:
        """The configuration of a named size: `tiny`, `170m`, `340m`, `400m`, `760m`, `1.3b`.

        From 170m on all variants of a size have as many parameters as its name says (with the default
        vocabulary). Any field can be overridden: `TitansConfig.named("tiny", variant="mag", vocab_size=259)`.
        """
        if size not in SIZES:
            raise unknown_name("model size", size, SIZES)
        variant = overrides.get("variant", cls.variant)
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        fields: dict[str, Any] = dict(zip(SIZE_FIELDS, SIZES[size], strict=True))
        fields["intermediate_size"] = MLP_WIDTHS[size][variant]
        if size == "tiny":
            fields.update(TINY_FIELDS)
        return cls(**{**fields, **overrides})

    @property
    def memory_spec(self) -> NeuralMemorySpec:
        """What the memory layer is built from."""
        return NeuralMemorySpec(
            hidden_size=self.hidden_size,
            memory=MemorySpec(
                dim=self.memory_head_dim,
                depth=self.memory_depth,
                expansion=self.memory_expansion,
                activation=self.memory_activation,  # type: ignore[arg-type]  # checked by MemorySpec
                residual=self.memory_residual,
                norm=self.memory_norm,
            ),
            gates=GateSpec(
                momentum=self.memory_momentum,
                momentum_init=self.memory_momentum_init,
                per_layer=self.memory_gates_per_layer,
                forget=self.memory_forget_gate,  # type: ignore[arg-type]  # checked by GateSpec
                forget_per_channel=self.memory_forget_per_channel,
                step=self.memory_step_gate,  # type: ignore[arg-type]
                step_init=self.memory_step_init,
                max_step=self.memory_max_step,
            ),
            chunk_size=self.chunk_size,
            conv_size=self.conv_size,
            norm_eps=self.rms_norm_eps,
            read_before_write=self.memory_read_before_write,
        )

    def _check(self) -> None:
        """Raise `ValueError` for a configuration that cannot be built, naming the numbers."""
        if self.variant not in VARIANTS:
            raise unknown_name("variant", self.variant, VARIANTS)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "memory_head_dim",
            "conv_size",
            "chunk_size",
            "segment_size",
        ):
            _expect_integer(name, getattr(self, name), minimum=1)
        _expect_integer("num_persistent_tokens", self.num_persistent_tokens, minimum=0)
        _expect_integer("memory_from_layer", self.memory_from_layer, minimum=0)
        if self.window_size is not None:
            _expect_integer("window_size", self.window_size, minimum=1)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be an even multiple of num_attention_heads "
                f"({self.num_attention_heads}): RoPE turns pairs of channels"
            )
        if self.hidden_size % self.memory_head_dim:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of memory_head_dim "
                f"({self.memory_head_dim})"
            )
        if self.segment_size % self.chunk_size:
            raise ValueError(
                f"segment_size ({self.segment_size}) must be a multiple of chunk_size ({self.chunk_size})"
            )
        if self.window_size is None and self.variant in ("mag", "mal"):
            raise ValueError(
                f"window_size must be an integer for variant {self.variant!r}, got None: its attention "
                "slides so that a stream needs constant memory"
            )
        if self.memory_gates_from not in ("token", "attention"):
            raise ValueError(
                f"memory_gates_from must be 'token' or 'attention', got {self.memory_gates_from!r}"
            )
        if self.memory_gates_from == "attention" and self.variant != "mag":
            raise ValueError(
                f"memory_gates_from must be 'token' for variant {self.variant!r}, got 'attention'"
            )
        if self.memory_input not in ("token", "attention"):
            raise ValueError(f"memory_input must be 'token' or 'attention', got {self.memory_input!r}")
        if self.memory_input == "token" and self.variant != "mac":
            raise ValueError(f"memory_input must be 'attention' for variant {self.variant!r}, got 'token'")
        if self.memory_from_layer and self.variant not in ("mac", "mag", "mal"):
            raise ValueError(
                f"memory_from_layer must be 0 for variant {self.variant!r}, which does not join attention to "
                f"a memory, got {self.memory_from_layer}"
            )
        if self.memory_from_layer >= self.num_hidden_layers:
            raise ValueError(
                f"memory_from_layer ({self.memory_from_layer}) must be less than num_hidden_layers "
                f"({self.num_hidden_layers})"
            )
        if self.memory_from_layer and self.window_size is None:
            raise ValueError("window_size must be an integer with memory_from_layer, got None")
        if self.variant != "attention":
            assert self.memory_spec  # builds MemorySpec and GateSpec, which check their own fields


def _expect_integer(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
