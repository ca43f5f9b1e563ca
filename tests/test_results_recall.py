"""Recall on the page of results: several seeds and several files are one measurement."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TOKENS = {"task": "mqar", "pairs": 16, "length": 1024}
TEXT = {"samples": 16, "depth_from": 0.2, "rows": 16, "length": 2048}


@pytest.fixture
def report(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(model: str, seed: int, share: float, of_test: dict[str, Any]) -> list[dict[str, Any]]:
    shared = {"model": model, "seed": seed}
    trained = {"kind": "training", "parameters": 3.7e6, "ending": "finished", "steps": 10}
    trained |= {"recipe": {"data": {"lengths": [64, 4096]}, "model": {"hidden_size": 48}}}
    answered = {"kind": "test", "tokens_asked": 100, "tokens_correct": int(100 * share)}
    if "samples" in of_test:
        answered["correct"] = int(share * of_test["samples"])
    return [shared | trained, shared | answered | of_test]


@pytest.mark.parametrize(
    ("section", "plot", "model", "of_test", "line"),
    [
        ("mqar", "plot_mqar", "mqar_mag", TOKENS, "| mag | 16 | 75 (50-100) |"),
        ("ablations", None, "ablation_depth_1", TOKENS, "| depth_1 | A linear memory | MQAR | 75 (50-100) |"),
        (
            *("ablations", None, "ablation_depth_1", TEXT | {"task": "niah_single_3"}),
            "| depth_1 | A linear memory | W | 75 (50-100) |",
        ),
        (
            *("babilong", "plot_babilong", "babilong_mag"),
            *(TEXT | {"task": "babilong_qa2"}, "| mag | qa2 | 75 (50-100) |"),
        ),
        (
            *("needles", "plot_needles", "needle_mag"),
            *(TEXT | {"task": "niah_single_2"}, "| mag | N | 75 (50-100) |"),
        ),
    ],
)
def test_tables_show_mean_and_range_over_seeds(report, section, plot, model, of_test, line):
    """One of two seeds, 50 and 100 percent, shown alone would hide the other."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    rows = [row for seed in (0, 1) for row in rows_of(model, seed, (1 + seed) / 2, of_test)]
    title = ("Needles",) if section == "needles" else ()
    page = getattr(report, section)({"rows": rows}, report.table, *title)
    assert line in page
    assert "| 3.70 | finished | 10 |" in page
    assert ("blocks of width 48" in page) == (section == "ablations")
    if plot is not None:
        getattr(report, plot)({"rows": rows}, figure)
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        assert texts == ([] if section == "babilong" else ["75"])


def test_a_measurement_in_parts_is_one(report, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "origin", lambda record, file: file)
    for seed, name in enumerate(("mqar.json", "mqar_part2.json")):
        rows = rows_of("mqar_mag", seed, (1 + seed) / 2, TOKENS)
        (tmp_path / name).write_text(json.dumps({"rows": rows, "summary": {}}))
    (record,) = report.results().values()
    assert record["origins"] == ["mqar.json", "mqar_part2.json"]
    assert "75 (50-100)" in report.mqar(record, report.table)
