"""The workloads of `titans bench stream`: reading and decoding at positions up to millions of tokens.

Settings: device, dtype of the weights, size and `config` (fields that override the size's), batch, tokens.
Weights and tokens are random. Gates and initial memory stay in fp32, as they do in inference.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans.inference.graph import StepGraph, keeps_its_shape
from titans.inference.stream import Stream
from titans.models import TitansCache, TitansConfig, TitansForCausalLM
from titans.models.state import for_steps, leaves
from titans.nn.cuda_graph import record
from titans.nn.rope import RotaryTable

# What the prefill rows of this process have read, by model and tokens: decoding there starts from it.
_read: dict[tuple[str, int], TitansCache] = {}


class Prefill:
    """One stream reads `tokens` tokens from nothing, in the pieces that `Stream` makes (or `piece`)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.key, self.model = _model(settings)
        self.tokens, self.piece = settings["tokens"], settings.get("piece")
        self.ids = _tokens(self.model, self.tokens)
        self.facts = {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}
        if self.model.device.type == "cuda":
            # Kernels are loaded. (On a CPU it would hide memory: what a process has freed stays resident.)
            Stream(self.model, piece=self.piece).read(self.ids[:4096])

    def __call__(self) -> None:
        stream = Stream(self.model, piece=self.piece)
        stream.read(self.ids)
        self.facts |= {"piece": stream.piece, "state_bytes": _bytes(stream.cache)}
        _read[self.key, self.tokens] = stream.cache


class AttentionPrefill:
    """Full attention reads `tokens` tokens in one forward: the flash kernel's causal case."""

    def __init__(self, settings: dict[str, Any]) -> None:
        _, self.model = _model(settings)
        self.ids = _tokens(self.model, settings["tokens"])[None]
        self.facts: dict[str, Any] = {"piece": settings["tokens"]}
        self._read(self.ids[:, :4096])

    def __call__(self) -> None:
        self.facts["state_bytes"] = _bytes(self._read(self.ids))

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> TitansCache:
        cache: TitansCache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        return cache


class Decode:
    """One token for each of `batch` streams that have read `tokens` tokens.

    The one-row state has read them, every one: it is the prefill row's of this process, or read now. All rows
    of a batch get it, which takes the time that other states would take. On a GPU by a CUDA graph, as in
    `Stream`, where the state keeps its shape.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        key, self.model = _model(settings)
        tokens, batch = settings["tokens"], settings["batch"]
        if (key, tokens) not in _read:
            stream = Stream(self.model)
            stream.read(_tokens(self.model, tokens))
            _read[key, tokens] = stream.cache
        self.cache = _read[key, tokens].detach()
        self.facts = {"state": f"read {self.cache.seen} tokens", "state_bytes": _bytes(self.cache)}
        self.cache.batch_repeat_interleave(batch)
        self.cache.states = for_steps(self.cache.states, self.model.config)
        self.ids = _tokens(self.model, batch)[:, None]
        self.graph: StepGraph | None = None
        if self.model.device.type == "cuda":
            before = list(self.cache.states)
            self._plain_step()  # shows whether it can be recorded
            if keeps_its_shape(before, self.cache.states):
                self.graph = StepGraph(self.model, self.cache.states)
                self.graph.load(self.cache.states)
        self.facts["graph"] = self.graph is not None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.step(self.ids[:, 0])
        else:
            self._plain_step()

    @torch.inference_mode()
    def _plain_step(self) -> None:
        self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)


class AttentionDecode:
    """The same for full attention, which finds `tokens` random keys and values in its cache.

    As fast as it can be made in PyTorch: the cache has its final size and holds rotated keys, the new ones
    are written in place, and SDPA sees no mask. (The library's own full attention keeps keys unrotated and
    copies them at every token; as a baseline it would flatter us.)
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        _, self.model = _model(settings)
        self.tokens, batch = settings["tokens"], settings["batch"]
        attention = self.model.model.layers[0].mixer.attention
        shape = (batch, attention.heads, self.tokens + 1, attention.head_dim)
        like = attention.k_proj.weight
        layers = len(self.model.model.layers)
        # Uninitialised memory may hold NaN, which some devices compute slowly.
        self.keys, self.values = (
            [torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(layers)] for _ in "kv"
        )
        per_stream = sum(cache[0].nbytes for cache in (*self.keys, *self.values))
        self.facts = {"state": "random keys and values", "state_bytes": per_stream}
        table = RotaryTable(self.tokens + 1, attention.head_dim, attention.rope_theta, like)
        table.cos, table.sin = table.cos[-1:].clone(), table.sin[-1:].clone()
        self.table = table
        self.ids = _tokens(self.model, batch)[:, None]
        on_gpu = self.model.device.type == "cuda"
        self.step = record(self._step).replay if on_gpu else self._step
        self.facts["graph"] = on_gpu

    def __call__(self) -> None:
        self.step()

    @torch.inference_mode()
    def _step(self) -> None:
        self.logits()

    def logits(self) -> Tensor:
        hidden = self.model.model.embed_tokens(self.ids)
        for number, block in enumerate(self.model.model.layers):
            hidden = hidden + self._attend(number, block.mixer.attention, block.input_norm(hidden))
            hidden = hidden + block.mlp(block.mlp_norm(hidden))
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    def _attend(self, number: int, attention: Any, x: Tensor) -> Tensor:
        q, k, v = (attention.split(project(x)) for project in _projections(attention))
        keys, values = self.keys[number], self.values[number]
        keys[:, :, -1:], values[:, :, -1:] = self.table.rotate(k), v
        output = F.scaled_dot_product_attention(self.table.rotate(q), keys, values)
        merged: Tensor = attention.o_proj(attention.merge(output))
        return merged


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def prefill(settings: dict[str, Any]) -> Prefill:
    return Prefill(settings)


def attention_prefill(settings: dict[str, Any]) -> AttentionPrefill:
    return AttentionPrefill(settings)


def decode(settings: dict[str, Any]) -> Decode:
    return Decode(settings)


def attention_decode(settings: dict[str, Any]) -> AttentionDecode:
    return AttentionDecode(settings)


def _model(settings: dict[str, Any]) -> tuple[str, Any]:
    """The row's model, with a name for it; the last one is kept, for rows that follow one another."""
    key = json.dumps([settings[name] for name in ("device", "dtype", "size", "config")])
    return key, _build(key)


@lru_cache(maxsize=1)
def _build(key: str) -> TitansForCausalLM:
    device, dtype, size, fields = json.loads(key)
    _read.clear()  # states of the model before: they hold memory that the next one's rows would pay for
    with torch.device(device):
        model = TitansForCausalLM(TitansConfig.named(size, **fields))
    return model.to(getattr(torch, dtype)).eval()


def _tokens(model: Any, count: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (count,), device=model.device)


def _bytes(cache: TitansCache) -> int:
    """Of one stream's state; persistent tokens are the model's."""
    return sum(leaf.nbytes for leaf in leaves(cache.states).values() if isinstance(leaf, Tensor))
