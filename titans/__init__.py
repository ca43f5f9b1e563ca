"""Titans: learning to memorize at test time, for PyTorch.

``import titans`` registers the models with transformers' Auto classes. That is why importing any part of the
package, ``titans.ops`` included, imports transformers. Triton need not be there: only GPU kernels import it.
"""

from typing import Any

# Above the import of models, so that submodules can read it while this package is still loading.
__version__ = "0.1.0"

from titans import models as models  # registers TitansConfig and the models with the Auto classes


def __getattr__(name: str) -> Any:
    """``titans.Memory``, imported when it is first asked for: training needs none of it."""
    if name == "Memory":
        from titans.inference.memory import Memory

        return Memory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
