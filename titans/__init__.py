"""Titans: learning to memorize at test time, for PyTorch.

``import titans`` registers the models with transformers' Auto classes. That is why importing any part of the
package, ``titans.ops`` included, imports transformers. Triton need not be there: only GPU kernels import it.
"""

# Above the import, so that submodules can read it while this package is still loading.
__version__ = "0.1.0"

from titans import models as models  # registers TitansConfig and the models with the Auto classes
