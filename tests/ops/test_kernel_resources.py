"""The Triton kernels compile for Hopper, which no interpreter shows, and spill no more than before."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "results" / "kernel_resources.json").read_text())
SHARED_BYTES = 227 * 1024  # that a block may have on sm_90
SPILL_SLACK = 64  # bytes a thread: 16 registers, more than reordering a few lines moves
ONLY = ("C16 bf16", "scan D64 bf16", "scan_backward D64 bf16", "layer")  # every kernel once: 20 seconds
SMALL = [name for name in RECORD["kernels"] if any(part in name for part in ONLY)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler runs on Linux")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, Any]]:
    # Not in the interpreter, whose functions cannot be compiled, and not from an earlier run's cache.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tools.kernel_resources", "--only", *ONLY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {row.pop("name"): row for row in rows}


def test_the_record_names_the_kernels_that_are(found):
    """A kernel added to the table, or renamed, without `python -m tools.kernel_resources --write`."""
    assert list(found) == SMALL


@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_compiles_and_spills_no_more_than_recorded(found, name):
    """After a deliberate change: `python -m tools.kernel_resources --write`, and commit what it bought."""
    now, before = found[name], RECORD["kernels"][name]
    assert "error" not in now, now["error"]
    assert now["shared_bytes"] <= SHARED_BYTES
    if triton.__version__ == RECORD["triton"]:  # another compiler allocates registers in another way
        assert now["spill_bytes"] <= before["spill_bytes"] + SPILL_SLACK


@pytest.mark.parametrize("name", RECORD["kernels"])
def test_every_recorded_kernel_fits_the_device(name):
    """One that does not would raise at its first launch: OutOfResources."""
    assert RECORD["kernels"][name]["shared_bytes"] <= SHARED_BYTES
