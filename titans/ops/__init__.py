"""Pure functions of the memory. Start with `api.py`, then `reference.py`."""

from titans.ops.api import MemoryOutput, neural_memory, read_memory, resolve_implementation
from titans.ops.spec import MemorySpec, MemoryState

__all__ = [
    "MemoryOutput",
    "MemorySpec",
    "MemoryState",
    "neural_memory",
    "read_memory",
    "resolve_implementation",
]
