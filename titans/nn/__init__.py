"""Layers of the models. `NeuralMemory` is the memory as a layer; everything here needs torch alone."""

from titans.nn.attention import Attention, AttentionState, Prefix, SlidingAttention
from titans.nn.context_attention import ContextAttention, Segment
from titans.nn.conv import ShortConv
from titans.nn.feedforward import SwiGLU
from titans.nn.gates import Gates, GateSpec, MemoryGates
from titans.nn.memory import InitialMemory, MemoryCore, NeuralMemory, NeuralMemorySpec, NeuralMemoryState
from titans.nn.metrics import MemoryMetrics
from titans.nn.norms import RMSNorm, l2_normalize
from titans.nn.persistent import PersistentTokens
from titans.nn.precision import FullPrecision, at_least_fp32
from titans.nn.rows import Rows

__all__ = [
    "Attention",
    "AttentionState",
    "ContextAttention",
    "FullPrecision",
    "GateSpec",
    "Gates",
    "InitialMemory",
    "MemoryCore",
    "MemoryGates",
    "MemoryMetrics",
    "NeuralMemory",
    "NeuralMemorySpec",
    "NeuralMemoryState",
    "PersistentTokens",
    "Prefix",
    "RMSNorm",
    "Rows",
    "Segment",
    "ShortConv",
    "SlidingAttention",
    "SwiGLU",
    "at_least_fp32",
    "l2_normalize",
]
