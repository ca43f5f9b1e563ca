"""Training on tasks through the one loop, and the whole way from a recipe to scores."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.tasks.test_answers import needle_test
from tests.tasks.tiny import tiny_haystack
from titans.recipes import RECIPES, load_recipe
from titans.tasks.experiment import needle_rows, save_weights, seconds_a_step, token_rows, train_model
from titans.tasks.settings import TaskSettings
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.data import open_data
from titans.training.recipe import ModelSettings, Recipe, TrainingSettings
from titans.training.run import train
from titans.training.trainer import right_answers

ROOT = Path(__file__).parent.parent.parent


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    tiny_haystack().save(folder / "h.npz")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return Recipe(
        model=ModelSettings(variant="lmm", memory_expansion=1, chunk_size=64, **small),
        data=TaskSettings(
            tasks=("niah_single_1", "niah_single_2"),
            lengths=(640, 700),
            tokens_per_batch=1400,
            validation_batches=2,
            haystack=folder / "h.npz",
        ),
        training=TrainingSettings(
            **{"steps": 6, "batch_size": 1, "warmup_steps": 1, "eval_every": 2, "save_every": 2, **changes}
        ),
    )


def figures(out: Path) -> list[dict[str, Any]]:
    return [
        {key: record[key] for key in record if key != "tokens_per_second"}
        for record in read_log(out / LOG_NAME)
    ]


def test_an_interrupted_run_goes_on_exactly(tmp_path):
    recipe = tiny_recipe(tmp_path, gradient_accumulation_steps=2)
    whole = train(recipe, open_data(recipe), tmp_path / "whole")
    data = open_data(recipe)

    class Stops(type(data.train)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if index == 6:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    train_set = Stops.__new__(Stops)
    train_set.__dict__.update(data.train.__dict__)
    first = train(recipe, dataclasses.replace(data, train=train_set), tmp_path / "cut")
    assert first.ending == "interrupted"
    assert 0 < first.step < 6
    second = train(recipe, open_data(recipe), tmp_path / "cut")
    assert second.ending == whole.ending == "finished"
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    evaluations = [record for record in figures(tmp_path / "whole") if "eval_loss" in record]
    assert all(
        0 <= record["eval_answer_accuracy"] <= record["eval_token_accuracy"] <= 1 for record in evaluations
    )


def test_workers_give_the_same_batches(tmp_path):
    recipe = tiny_recipe(tmp_path, steps=3)
    train(recipe, open_data(recipe), tmp_path / "alone")
    workers = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, num_workers=2))
    train(workers, open_data(workers), tmp_path / "workers")
    assert figures(tmp_path / "alone") == figures(tmp_path / "workers")


def test_right_answers_counts_tokens_and_whole_answers():
    labels = torch.full((2, 8), -100)
    labels[0, 2:4], labels[0, 6:8], labels[1, 3:6] = 1, 2, 3
    likeliest = torch.zeros(2, 8, dtype=torch.int64)
    likeliest[:, :-1] = labels[:, 1:].clamp(min=0)
    likeliest[1, 4] = 0  # one token of three
    logits = torch.nn.functional.one_hot(likeliest, 4).float()
    assert [int(x) for x in right_answers(logits, labels)] == [6, 2, 3]


def test_from_a_recipe_to_scores(tmp_path):
    recipe = tiny_recipe(tmp_path)
    trained = train_model(recipe)
    assert trained.row["ending"] == "finished"
    assert trained.row["steps"] == 6
    assert len(trained.row["validation"]) == 3
    needle_test(number=2).save(tmp_path / "a.npz")
    rows = list(needle_rows(trained.model, [tmp_path / "a.npz", tmp_path / "absent.npz"], rows=1, wait=0))
    assert sum(row.get("samples", 0) for row in rows) == 2
    assert "not there" in rows[-1]["error"]
    late = list(needle_rows(trained.model, [tmp_path / "a.npz"], until=0.0))
    assert late == [{"test": "a", "error": "not measured: out of time"}]
    json.dumps([trained.row, *rows])

    save_weights(trained.model, tmp_path / "w" / "m.safetensors", torch.bfloat16)
    saved = safetensors.torch.load_file(tmp_path / "w" / "m.safetensors")
    missing, unexpected = trained.model.load_state_dict(saved, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])


def test_a_budget_in_seconds_fixes_the_steps_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("titans.tasks.experiment.seconds_a_step", lambda recipe, out, seconds: 0.5)
    row = train_model(tiny_recipe(tmp_path), seconds=4.0).row
    assert row["steps"] in (6, 7)
    assert row["recipe"]["training"]["steps"] == row["steps"] or row["ending"] == "interrupted"


def test_a_probe_ends_after_its_time(tmp_path, monkeypatch):
    """By the signal of an orderly end: what it has measured by then counts."""
    monkeypatch.setattr("titans.tasks.experiment.PROBE_STEPS", 10**6)
    started = time.monotonic()
    per_step = seconds_a_step(tiny_recipe(tmp_path), tmp_path / "probe", 4.0)
    assert 0 < per_step < 4
    assert time.monotonic() - started < 30


def test_tasks_of_tokens_are_tested_at_any_length():
    settings = TaskSettings(tasks=("mqar",), lengths=(64,), tokens_per_batch=256, vocab_size=64, pairs=4)
    recipe = Recipe(
        model=ModelSettings(variant="lmm", num_hidden_layers=1),
        data=settings,
        training=TrainingSettings(steps=2, batch_size=1, warmup_steps=0),
    )
    model = train_model(recipe).model
    rows = list(token_rows(model, settings, (64, 256), samples=2, seed=9))
    assert [(row["length"], row["tokens_asked"]) for row in rows] == [(64, 8), (256, 8)]


def test_recipes_for_needles_have_equal_sizes():
    from titans.models import TitansForCausalLM

    sizes = {}
    for name in RECIPES:
        if name.startswith("needle_"):
            model = TitansForCausalLM(load_recipe(name).model.build(4096))
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert len(sizes) == 13
    assert all(abs(size / 3.7e6 - 1) < 0.02 for size in sizes.values()), sizes


def test_the_command_line_overrides_a_task():
    from titans.cli.train import parse

    options = parse(["needle_lmm", "--data.keys", "3", "--data.haystack", "x.npz"]).options
    assert options is not None
    assert isinstance(options.data, TaskSettings)
    assert (options.data.keys, options.data.haystack) == (3, Path("x.npz"))


@pytest.mark.slow
def test_the_benchmark_trains_tests_and_writes_one_file(tmp_path):
    """Two processes at once, samples made beside them; RULER's form counted by a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    haystack = tiny_haystack()
    (tmp_path / "text.txt").write_text("\n".join(haystack.texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=340, minloglevel=2,
        model_type="bpe", byte_fallback=True,
    )  # fmt: skip
    haystack.save(tmp_path / "train.npz")
    recipe_file = tmp_path / "mine.py"
    recipe_file.write_text(
        "from pathlib import Path\nfrom tests.tasks.test_experiment import tiny_recipe\n"
        f"def mine():\n    return tiny_recipe(Path({str(tmp_path)!r}))\n"
    )
    command = [
        *(sys.executable, "benchmarks/recall.py", "--recipes", f"{recipe_file}:mine", "--seeds", "0", "1"),
        *("--steps", "2", "--train", str(tmp_path / "train.npz"), "--test", str(tmp_path / "train.npz")),
        *(
            "--llama-tokenizer",
            str(tmp_path / "sp.model"),
            "--lengths",
            "2048",
            "--samples",
            "2",
            "--short-samples",
            "2",
        ),
        *("--jobs-per-gpu", "2", "--workers", "0", "--sample-jobs", "1", "--threads", "1"),
        *("--work", str(tmp_path / "work"), "--output", str(tmp_path), "--commit", "test"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "recall.json").read_text())
    kinds = [row["kind"] for row in record["rows"]]
    assert kinds.count("training") == 2, record["rows"]
    assert sum(row["samples"] for row in record["rows"] if row["kind"] == "test") == 2 * 3 * 2
    assert record["commit"] == "test"
