"""The benchmark of the op runs: every workload takes a step, every row ends in the file. Nothing is timed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from titans.benchmark.harness import RowFailed, Session

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_ops_cpu", FOLDER / "bench_ops_cpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_ops_cpu", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workload", ["our_layer", "our_op"])
def test_workloads_take_a_step(benchmark, workload):
    """Odd sizes: heads x head_dim is not the hidden size."""
    shape = {"hidden_size": 24, "heads": 2, "head_dim": 8, "depth": 2, "expansion": 2, "chunk_size": 4}
    getattr(benchmark, workload)({**shape, "tokens": 10})()


def test_counts(benchmark):
    """About 11 MFLOP a token for the shape that is compared, as counted by hand."""
    head = 92 * 64 * 256 + 18 * 64 * (64 + 256) + 10 * 64 * 64
    assert benchmark.op_flops(benchmark.SHAPE) == 4 * head
    assert benchmark.layer_flops(benchmark.SHAPE) / 1e6 == pytest.approx(10.6, abs=0.05)


def test_rows_end_in_the_file(tmp_path):
    session = Session("name", FOLDER / "bench_ops_cpu.py", {"a": 1}, threads=1, output=tmp_path)
    row = session.measure("matmul", {"size": 8}, repeats=3, warmup=1)
    assert len(row.seconds) == 3
    assert 0 < min(row.seconds) <= row.median <= max(row.seconds)
    with pytest.raises(RowFailed, match="KeyError: 'size'"):
        session.measure("matmul", {}, repeats=1)
    record = json.loads(session.save().read_text())
    assert [row.get("error") for row in record["rows"]] == [None, "KeyError: 'size'"]
    assert record["rows"][0]["seconds"] == row.seconds
    assert record["machine"]["threads"] == 1
    assert {"commit", "date", "seed", "command", "options", "summary"} <= record.keys()
