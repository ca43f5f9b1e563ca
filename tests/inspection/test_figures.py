"""PNG figures: written, not blank, and without what only some models have."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

import matplotlib.image
import numpy as np

from tests.inspection.test_page import HOSTILE, about, made_up
from titans.inspection.figures import _wrapped, averaged, draw


def test_every_figure_is_drawn(tmp_path):
    texts = list(HOSTILE + "word " * 40)
    record, dependence = made_up(len(texts))
    paths = draw(tmp_path / "figures", about(source=HOSTILE), texts, record, dependence)
    names = ["text", "surprise", "gates", "change", "loss", "dependence"]
    assert [path.stem for path in paths] == names
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] >= 1000
        assert np.ptp(picture[..., :3]) > 0.5, f"{path.name} is blank"


def test_a_model_without_momentum_and_a_run_without_spans(tmp_path):
    record, _ = made_up(50)
    paths = draw(tmp_path, about(), ["x"] * 50, replace(record, eta=None), None)
    assert "dependence" not in [path.stem for path in paths]


def test_averages_are_of_equal_stretches():
    at, values = averaged(np.arange(10.0)[None], 4)
    assert at.tolist() == [1.5, 4.5, 7.5, 9.5]
    assert values.tolist() == [[1, 4, 7, 9]]


def test_lines_break_after_words():
    lines = _wrapped(["word "] * 40 + ["\n", "x" * 200])
    text = ["".join(character for character, _ in line) for line in lines]
    assert all(len(line) <= 88 for line in text)
    assert text[0].endswith("word ")
    assert text[-1] == "x" * (200 - 2 * 88)
    assert lines[1][0] == ("w", 17)
