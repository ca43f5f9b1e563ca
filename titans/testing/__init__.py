"""Input factories and comparisons for whoever checks an implementation: our tests, `titans doctor`, yours.

`random_inputs` draws the arguments of one `neural_memory` call, `evaluate` runs an implementation forward
and backward, `assert_agreement` compares two such results tensor by tensor.
"""

from titans.testing.comparison import assert_agreement, evaluate, relative_error
from titans.testing.inputs import MemoryInputs, random_inputs

__all__ = ["MemoryInputs", "assert_agreement", "evaluate", "random_inputs", "relative_error"]
