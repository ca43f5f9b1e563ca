"""`titans bench`: workloads run, a row that fails is a row, and the table says what the numbers say."""

import json

import pytest
import torch

from titans.benchmark import ops, worker
from titans.benchmark.harness import Measurement, RowFailed, Session
from titans.benchmark.ops_rows import PEER, ROWS, Plan, cells, summarise
from titans.cli.main import main

SMALL = {
    "device": "cpu",
    "dtype": "bfloat16",
    "batch": 2,
    "tokens": 16,
    "heads": 2,
    "dim": 8,
    "passes": "both",
    "depth": 2,
    "expansion": 2,
    "chunk_size": 4,
    "impl": "chunked",
}
SHAPE = (16, 2048, 16, 64)


@pytest.mark.parametrize("workload", ["our_op", "attention", "our_layer"])
def test_workloads_take_a_step(workload):
    getattr(ops, workload)(SMALL)()


def test_backward_reaches_every_input():
    """q, k, v, three gates and two matrices: a gradient left out would not be timed."""
    gradients = ops.our_op(SMALL)()
    assert len(gradients) == 8
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_forward_alone_keeps_nothing_for_a_backward():
    assert not ops.our_op(SMALL | {"passes": "forward"})().requires_grad


def test_the_timed_memory_is_stable():
    """At the first shape's length: a memory that explodes would be timed on infinities."""
    length = {"batch": 1, "tokens": 2048, "heads": 1, "dim": 64, "chunk_size": 64, "passes": "forward"}
    for memory in ({"depth": 1, "expansion": 1}, {"depth": 2, "expansion": 1}):
        assert ops.our_op(SMALL | length | memory)().abs().max() < 100


def test_a_row_that_fails_is_a_row(tmp_path):
    """The next ones follow, also where it took the process along, as an illegal access on a GPU does."""
    script = tmp_path / "workloads.py"
    script.write_text(
        "import os\n\n\n"
        "def work(settings):\n"
        "    if settings['do'] == 'raise':\n"
        "        raise ModuleNotFoundError('no such peer')\n"
        "    if settings['do'] == 'die':\n"
        "        os._exit(3)\n"
        "    return lambda: print('said in between')\n"
    )
    session = Session("name", script, {}, threads=1, command="made", commit="abc", output=tmp_path)
    results = session.measure_each("work", [{"do": word} for word in ("step", "raise", "die", "step")])
    assert [isinstance(result, RowFailed) for result in results] == [False, True, True, False]
    record = json.loads(session.save().read_text())
    errors = [row.get("error") for row in record["rows"]]
    assert errors == [None, "ModuleNotFoundError: no such peer", "exit code 3", None]
    assert (record["command"], record["commit"]) == ("made", "abc")
    deaths = session.measure_each("work", [{"do": "die"}] * 5)
    assert [str(result).rpartition(": ")[2] for result in deaths] == [
        *["exit code 3"] * 3,
        *["given up after 3 lost processes"] * 2,
    ]
    late = session.measure_each("work", [{"do": "step"}] * 2, timeout=0.01)
    assert all(str(result).endswith("not measured: out of time") for result in late)


def test_the_command_stores_what_it_prints(tmp_path, capsys):
    """The peer is not there, or has no driver for a CPU: its row says so, ours are measured."""
    sizes = ["--device", "cpu", "--tokens", "16", "--batches", "2", "--heads", "1x8", "--impl", "chunked"]
    rows = ["--rows", PEER, "linear-c64"]
    assert main(["bench", "ops", *rows, *sizes, "--commit", "abc", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "ops_check.json").read_text())
    assert record["commit"] == "abc"
    assert record["command"] == "titans bench ops " + " ".join(rows + sizes)
    peer, ours = record["summary"]["table"]
    assert (peer["both_ms"], ours["error"]) == (None, None)
    assert ours["forward_ms"] > 0
    assert ours["both_ms"] > 0
    printed = capsys.readouterr().out
    assert "failed" in printed
    assert "linear-c64" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "linear"], "unknown row 'linear'"),
        (["--heads", "16"], "--heads '16': expected heads x width"),
        (["--batches", "3"], "--batches 3: expected a divisor of --tokens 32768"),
    ],
)
def test_mistakes_are_told_before_anything_runs(words, message, capsys):
    assert main(["bench", "ops", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def found(**milliseconds: float) -> dict:
    """Measurements of forward with backward at the first shape, 1 GB each."""
    return {
        (name.replace("_", "-"), SHAPE, "both"): Measurement([value / 1e3], 10**9, {})
        for name, value in milliseconds.items()
    }


def test_targets_are_ratios_within_the_run():
    entries = summarise(found(gated_deltanet=3.0, linear_c64=2.4, linear_c16=5.0, mlp1_c64=4.0), 4.3)
    peer, linear, chunk_16, mlp = entries
    assert peer["ratio"] == 1
    assert linear["ratio"] == pytest.approx(0.8)
    # 3.12 GB at 4.3 TB/s are 0.73 ms, counted by hand.
    values = {target["what"]: (round(target["value"], 2), target["met"]) for target in linear["targets"]}
    assert values == {"time": (0.8, True), "memory": (1.0, True), "byte floor": (3.3, False)}
    assert [target["met"] for target in chunk_16["targets"]] == [False]
    assert [target["met"] for target in mlp["targets"]] == [False]
    assert "MISSED" in cells(mlp)[-1]


def test_a_missing_peer_leaves_the_times_and_takes_the_ratios():
    failed = {(PEER, SHAPE, "both"): RowFailed("gated_deltanet {'a': 1}: ImportError: no fla")}
    peer, ours = summarise(failed | found(mlp4_c64=9.0), 4.3)
    assert cells(peer)[-1] == "failed: ImportError: no fla"
    assert (ours["both_ms"], ours["ratio"], ours["targets"]) == (9.0, None, [])


def test_every_row_has_settings_at_the_shapes_of_the_issue():
    plan = Plan("cuda", 32768, (16, 4, 1), ((16, 64), (8, 128)), "triton")
    assert all(plan.settings(row) for row in ROWS.values())
    assert len(plan.settings(ROWS["mlp4-c16"])) == 3 * 2 * 2
    assert {setting["impl"] for setting in plan.settings(ROWS["mlp4-c64-chunked"])} == {"chunked"}


@pytest.mark.gpu
def test_time_on_a_gpu_is_that_of_its_kernels():
    """A product that takes milliseconds, launched in microseconds; its result is the peak."""
    a = torch.randn(8192, 8192, device="cuda")
    seconds, peak = worker.time_on_gpu(lambda: a @ a, repeats=3)
    assert min(seconds) > 1e-3
    assert 2**28 <= peak < 2**29
