"""The short form of benchmarks/stability.py: 60 steps of every variant and of the memory's extremes."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stability.py"


@pytest.fixture(scope="module")
def stability():
    spec = importlib.util.spec_from_file_location("stability", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["stability"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "row",
    [
        *("lmm", "mac", "mag", "mal", "attention"),
        *("lmm, depth 1", "lmm, depth 4", "lmm, chunk 64", "lmm, bf16 autocast"),
    ],
)
def test_sixty_steps_train_without_a_spike(stability, row):
    """Initial values or a step bound that let the memory diverge show within the warm-up.

    With fan-in initial values lmm reached outer gradients of 1e5 within ten steps and did not learn.
    """
    result = stability.run_row(row, steps=60, threads=1, sequence_length=64)
    assert result["ending"] == "finished", result["message"]
    first, last = result["loss"][0][1], result["loss"][-1][1]
    assert last < first - 1.5, (first, last)
    assert result["max_grad_norm"] < 1000
