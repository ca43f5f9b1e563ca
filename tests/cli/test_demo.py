"""`titans demo` from text to picture, at a size of seconds."""

import dataclasses
import importlib.util
import sys

import pytest

from titans.cli.demo import RECIPE, _draw, demo
from titans.cli.main import main
from titans.data.ngrams import NgramLosses
from titans.data.sources import PYTHON_DOCS
from titans.errors import UserError
from titans.evaluation.stream_loss import Bucket, StreamLoss
from titans.recipes import load_recipe
from titans.training.callbacks import LOG_NAME, read_log


def small(**training):
    """The demo's recipe with everything small."""
    recipe = load_recipe(RECIPE)
    model = dataclasses.replace(
        recipe.model, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        memory_head_dim=16, memory_expansion=1, chunk_size=8, segment_size=16,
    )  # fmt: skip
    settings = {
        "steps": 4,
        "batch_size": 2,
        "warmup_steps": 1,
        "eval_every": 2,
        "eval_sequences": 4,
    } | training
    return dataclasses.replace(
        recipe,
        model=model,
        data=dataclasses.replace(recipe.data, sequence_length=16),
        training=dataclasses.replace(recipe.training, **settings),
    )


def test_the_whole_way(tmp_path, capsys):
    out = tmp_path / "demo"
    assert demo(small(), PYTHON_DOCS, out) == 0
    printed = capsys.readouterr().out
    for part in ("unigram", "bigram", "validation loss", ">>>", "times the training length", "try next"):
        assert part in printed
    assert (out / "demo.png").exists() == (importlib.util.find_spec("matplotlib") is not None)

    # Again: nothing is trained twice, and the rest is shown.
    before = read_log(out / LOG_NAME)
    assert demo(small(), PYTHON_DOCS, out) == 0
    assert read_log(out / LOG_NAME) == before


def test_a_file_of_the_users(tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("".join(f"{number} squared is {number**2}.\n" for number in range(300)))
    assert demo(small(), str(text), tmp_path / "demo") == 0
    capsys.readouterr()
    with pytest.raises(UserError, match=r"holds a run on .*mine\.txt, not python-docs: choose another --out"):
        demo(small(), PYTHON_DOCS, tmp_path / "demo")


def test_too_little_text_is_one_line(tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("too short")
    assert main(["demo", "--source", str(text), "--out", str(tmp_path / "demo")]) == 2
    error = capsys.readouterr().err.strip()
    assert "too little text" in error
    assert "\n" not in error
    # A folder of its own: after `make demo` the default one holds a run.
    assert main(["demo", "--source", str(tmp_path / "absent.txt"), "--out", str(tmp_path / "new")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_text_that_grew_is_read_again(tmp_path, capsys):
    """Shards of the first try must not stay when nothing was trained on them."""
    text = tmp_path / "mine.txt"
    text.write_text("too short")
    assert main(["demo", "--source", str(text), "--out", str(tmp_path / "demo")]) == 2
    text.write_text("long enough by now. " * 100)
    assert demo(small(steps=1), str(text), tmp_path / "demo") == 0
    capsys.readouterr()


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # Python's "not installed"
    bucket = Bucket(start=0, stop=9, tokens=8, loss=1.0, tokens_per_second=1.0, memory_bytes=1)
    stream = StreamLoss(
        tokens=9, loss=1.0, tokens_per_second=1.0, peak_memory_bytes=1, piece=9, buckets=(bucket,)
    )
    log = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}]
    assert _draw(tmp_path / "picture.png", log, NgramLosses(3.0, 2.5), stream) is None
    assert not (tmp_path / "picture.png").exists()


def test_the_demos_model_has_one_to_two_million_parameters():
    from titans.models import TitansForCausalLM

    model = TitansForCausalLM(load_recipe(RECIPE).model.build(259))
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
