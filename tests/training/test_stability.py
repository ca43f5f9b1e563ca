"""The short form of benchmarks/stability.py: 60 steps of every variant and of the memory's extremes."""

import dataclasses
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import pytest

from titans.data.prepare import prepare
from titans.data.sources import PYTHON_DOCS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stability.py"


@pytest.fixture(scope="module")
def stability():
    spec = importlib.util.spec_from_file_location("stability", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["stability"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the shards that every row reads."""
    folder = tmp_path_factory.mktemp("rows")
    prepare([PYTHON_DOCS], folder / "data", validation_fraction=0.1)
    return folder


@pytest.mark.parametrize(
    "row",
    [
        *("lmm", "mac", "mag", "mal", "attention"),
        *("lmm, depth 1", "lmm, depth 4", "lmm, chunk 64", "lmm, bf16 autocast"),
    ],
)
def test_sixty_steps_train_without_a_spike(stability, folder, row):
    """Initial values or a step bound that let the memory diverge show within the warm-up.

    With fan-in initial values lmm reached outer gradients of 1e5 within ten steps and did not learn.
    """
    result = stability.run_row(row, steps=60, threads=1, folder=folder, sequence_length=64)
    assert result["ending"] == "finished", result["message"]
    first, last = result["loss"][0][1], result["loss"][-1][1]
    assert last < first - 1.5, (first, last)
    assert result["max_grad_norm"] < 1000


def test_what_was_cut_off_is_trained_again_on_any_card(stability, monkeypatch, tmp_path):
    """Resumed: rows that have ended stay, no row gets shorter, and the settings must be the same."""
    monkeypatch.setattr(stability, "ROOT", tmp_path)
    monkeypatch.setattr(stability, "Session", partial(stability.Session, output=tmp_path))
    monkeypatch.setattr(stability, "visible_gpus", lambda: ["3", "5"])
    cards, lengths = [], {"lmm": (500, "finished"), "mac": (90, "interrupted"), "mag": None}

    def launch(name, options, folder, gpu, until):
        assert (folder / "data").is_dir()
        cards.append(gpu)
        ended = lengths[name]
        return ended and {"row": name, "steps": ended[0], "ending": ended[1], "message": ""}

    monkeypatch.setattr(stability, "launch", launch)
    options = stability.Options(only=tuple(lengths), commit="abc", jobs=2)
    stability.main(options)
    assert set(cards) == {"3", "5"}
    lengths |= {"lmm": None, "mac": (80, "interrupted"), "mag": (500, "diverged")}
    stability.main(dataclasses.replace(options, resume=True, commit="def"))
    rows = json.loads((tmp_path / "stability.json").read_text())["rows"]
    assert [(row["row"], row["steps"], row["commit"]) for row in rows] == [
        *(("lmm", 500, "abc"), ("mac", 90, "abc"), ("mag", 500, "def"))
    ]
    assert len(cards) == 5
    with pytest.raises(SystemExit, match="was made with"):
        stability.main(dataclasses.replace(options, resume=True, steps=9))


def test_a_spike_shows_in_the_peaks(stability):
    assert stability.peaks([(1, 2.0), (2, 9.0), (3, 1.0)], 2) == [(2, 9.0), (3, 1.0)]
