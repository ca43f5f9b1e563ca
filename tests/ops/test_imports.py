"""The op runs where Triton cannot be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    asked = 0
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            Refuse.asked += 1
            raise ImportError("triton is not here")

sys.meta_path.insert(0, Refuse())
try:
    import triton
except ImportError:
    assert Refuse.asked == 1
else:
    raise AssertionError("the finder does not refuse")

from titans.ops import MemorySpec
from titans.testing import assert_agreement, evaluate, random_inputs

inputs = random_inputs(MemorySpec(dim=4, depth=2), tokens=5, chunk_size=4)
assert_agreement(evaluate(inputs, "chunked"), evaluate(inputs, "reference"))
assert_agreement(evaluate(inputs, "auto"), evaluate(inputs, "reference"))
assert "triton" not in sys.modules
print("fine")
"""


def test_both_implementations_run_without_triton():
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr
