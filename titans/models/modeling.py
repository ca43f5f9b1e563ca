"""The models: one Llama-like shell around five mixers (`mixers.py`), in transformers' form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from titans.models.cache import TitansCache
from titans.models.configuration import TitansConfig
from titans.models.layout import Layout
from titans.models.mac import MacMixer
from titans.models.mixers import build_mixer
from titans.nn import (
    InitialMemory,
    MemoryGates,
    PersistentTokens,
    RMSNorm,
    Rows,
    ShortConv,
    SwiGLU,
    at_least_fp32,
)

logger = logging.get_logger(__name__)


class TitansBlock(GradientCheckpointingLayer):
    """RMSNorm, mixer, RMSNorm, SwiGLU, each pair with a residual."""

    def __init__(self, config: TitansConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = build_mixer(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, hidden: Tensor, state: Any = None, rows: Rows | None = None, keep_state: bool = False
    ) -> tuple[Tensor, Any]:
        """hidden `[B, T, C]` or packed; returns its successor and the mixer's state (None unless kept)."""
        mixed, state = self.mixer(self.input_norm(hidden), state, rows)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), state if keep_state else None

    def compile_parts(self, **options: Any) -> None:
        """torch.compile for the block; of MAC, whose loop over segments it unrolls, for its body."""
        if isinstance(self.mixer, MacMixer):
            self.mixer.compile_step(**options)
            self.mlp.compile(**options)
        else:
            self.compile(**options)


class TitansPreTrainedModel(PreTrainedModel):
    config: TitansConfig
    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansBlock"]  # noqa: RUF012  (transformers declares them so)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Loaded in fp32 even with dtype=bfloat16; `FullPrecision` keeps them there afterwards.
    _keep_in_fp32_modules_strict = ["memory.gates", "memory.initial"]  # noqa: RUF012
    _is_stateful = True  # what has been read cannot be unread: no assisted decoding

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile, block by block: they are alike, so what is compiled is one, not all of them.

        options: torch.compile's; by default shapes are taken as they come (``dynamic=False``).
        """
        for module in self.modules():
            if isinstance(module, TitansBlock):
                module.compile_parts(**{"dynamic": False} | options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers guards torch.nn.init while it calls this: parameters that were loaded stay as they are.
        super()._init_weights(module)
        if isinstance(module, (ShortConv, MemoryGates, InitialMemory, PersistentTokens)):
            module.reset_parameters()


class TitansModel(TitansPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TitansBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """See `TitansForCausalLM.forward`; last_hidden_state is `[B, T, C]`, zeros at padding."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        inputs = input_ids if input_ids is not None else inputs_embeds
        assert inputs is not None
        refuse_unknown(kwargs)
        layout = Layout.of(inputs, attention_mask, cu_seqlens)
        keep_state = self._keeps_state(use_cache)
        states = self._past_states(past_key_values, layout)

        inputs = layout.pack(inputs)
        hidden = self.embed_tokens(inputs) if input_ids is not None else inputs
        every_hidden = [hidden]
        new_states = []
        for layer, state in zip(self.layers, states, strict=True):
            hidden, state = layer(hidden, state, layout.rows, keep_state)
            every_hidden.append(hidden)
            new_states.append(state)
        hidden = self.norm(hidden)

        cache = None
        if keep_state:
            # The caller's object goes on: whoever holds it holds the stream.
            cache = past_key_values if past_key_values is not None else TitansCache()
            cache.states, cache.variant = new_states, self.config.variant
            cache.seen += layout.tokens
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=layout.unpack(hidden),
            past_key_values=cache,
            hidden_states=(
                tuple(layout.unpack(each) for each in every_hidden) if output_hidden_states else None
            ),
        )

    def _keeps_state(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            return bool(self.config.use_cache) and not self.training
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
            return False
        return use_cache

    def _past_states(self, cache: TitansCache | None, layout: Layout) -> list[Any]:
        if cache is None:
            return [None] * len(self.layers)
        if not isinstance(cache, TitansCache):
            raise ValueError(
                f"past_key_values must be a TitansCache (or None to start), got {type(cache).__name__}"
            )
        if not cache.states:
            return [None] * len(self.layers)
        if len(cache.states) != len(self.layers) or cache.batch_size != layout.states:
            raise ValueError(
                f"past_key_values must hold {len(self.layers)} blocks of {layout.states} rows, got "
                f"{len(cache.states)} blocks of {cache.batch_size} rows"
            )
        if cache.variant != self.config.variant:
            raise ValueError(
                f"past_key_values must come from a model of variant {self.config.variant!r}, got one from "
                f"{cache.variant!r}"
            )
        return cache.states


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """A language model: `TitansModel` and a head, tied to the embeddings unless the config says not."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """What `generate` calls before the first token: a `TitansCache` in place of transformers' own."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TitansCache()

    def prepare_inputs_for_generation(
        self, *args: Any, tokenizer: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`generate` hands the tokenizer that stop strings need on to the model, which takes none."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, and with labels the loss.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, 1 = real; padding may be anywhere and is skipped as if it were not
                there. More columns than T are the history's; the last T count.
            cu_seqlens: int32 `[N + 1]` with input_ids `[1, total]`: packed documents, between which no
                information crosses.
            past_key_values: the `TitansCache` of the tokens before; it is updated.
            labels: `[B, T]`, shifted inside; -100 is ignored.
            use_cache: return a cache. Default: the config's `use_cache`, but not in training.
            logits_to_keep: only the last so many positions' logits (0: all), or an index tensor.
            num_items_in_batch: tokens that the loss is divided by, instead of this batch's own count.

        Returns:
            logits `[B, T, V]` (of no meaning at padding), loss, past_key_values.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        loss = None if labels is None else causal_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise `TypeError` for arguments that transformers' models may have and this one would ignore."""
    unknown = [name for name, value in arguments.items() if value is not None and value is not False]
    if "position_ids" in unknown:
        raise TypeError(
            "position_ids are not used: nothing depends on absolute positions. Packed documents need "
            "cu_seqlens, without which memory would cross from one to the next"
        )
    if unknown:
        raise TypeError(f"a Titans model takes no argument named {', '.join(sorted(unknown))}")


def causal_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of `labels[:, t + 1]` under `logits[:, t]` in nats a token, in at least fp32.

    transformers' own loss rounds fp64 logits to fp32; otherwise they agree.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must have shape {list(logits.shape[:2])}, got {list(labels.shape)}")
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(logits.device)
    wide = logits.to(at_least_fp32(logits.dtype)).flatten(0, 1)
    if num_items_in_batch is None:
        return F.cross_entropy(wide, targets)
    return F.cross_entropy(wide, targets, reduction="sum") / num_items_in_batch
