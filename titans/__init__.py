"""Titans: learning to memorize at test time, for PyTorch.

``import titans`` registers the models with transformers' Auto classes. That is why importing any part of the
package, ``titans.ops`` included, imports transformers. Triton need not be there: only GPU kernels import it.
"""

from typing import Any

# Above the import of models, so that submodules can read it while this package is still loading.
__version__ = "0.1.0"

from titans import models as models  # registers TitansConfig and the models with the Auto classes


def __getattr__(name: str) -> Any:
    """``titans.Memory`` and ``titans.from_pretrained``, imported when asked for: training needs neither."""
    if name == "Memory":
        from titans.inference.memory import Memory

        return Memory
    if name == "from_pretrained":
        from titans.inference.checkpoint import from_pretrained

        return from_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
