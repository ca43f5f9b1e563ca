"""Training on tasks through the one loop, and the whole way from a recipe to scores."""

import dataclasses
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.inference.tiny import randomised
from tests.tasks.test_answers import needle_test
from tests.tasks.tiny import tiny_babi, tiny_haystack
from titans.errors import UserError
from titans.recipes import RECIPES, load_recipe
from titans.tasks.experiment import (
    load_weights,
    needle_rows,
    save_weights,
    seconds_a_step,
    token_rows,
    train_model,
    untrained,
)
from titans.tasks.settings import TaskSettings
from titans.training.answers import right_answers
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.data import open_data
from titans.training.recipe import ModelSettings, Recipe, TrainingSettings
from titans.training.run import train

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


def test_a_price_on_noise_lowers_its_share(tmp_path):
    """On the same batches; nothing else has a price."""
    shares = {}
    for price in (1e-9, 30.0):
        recipe = tiny_recipe(
            tmp_path, steps=40, noise_penalty=price, learning_rate=5e-3, eval_every=100, save_every=100
        )
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, memory_step_init=0.1))
        out = tmp_path / str(price)
        assert train(recipe, open_data(recipe), out).ending == "finished"
        shares[price] = [record["noise_share"] for record in figures(out) if "noise_share" in record]
    assert shares[1e-9][0] == shares[30.0][0] > 0.5
    assert shares[30.0][-1] < 0.5 * shares[1e-9][-1]


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


@torch.no_grad()
def test_a_convolution_may_grow_between_two_legs(tmp_path):
    small, large = randomised("mag", 0, conv_size=4), randomised("mag", 1, conv_size=6)
    save_weights(small, tmp_path / "m.safetensors", torch.float64)
    load_weights(large, tmp_path / "m.safetensors")
    ids = torch.randint(3, 23, (1, 30))
    torch.testing.assert_close(large(ids).logits, small(ids).logits)
    save_weights(large, tmp_path / "l.safetensors", torch.float64)
    with pytest.raises(UserError, match="not this model's"):  # it never shrinks
        load_weights(small, tmp_path / "l.safetensors")


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
    settings = TaskSettings(tasks=("mqar",), lengths=(64,), tokens_per_batch=256, vocab_size=64, pairs=(4, 8))
    recipe = Recipe(
        model=ModelSettings(variant="lmm", num_hidden_layers=1),
        data=settings,
        training=TrainingSettings(steps=2, batch_size=1, warmup_steps=0),
    )
    model = train_model(recipe).model
    rows = list(token_rows(model, settings, (16, 64, 256), samples=2, seed=9))
    found = [(row["length"], row["pairs"], row["tokens_asked"]) for row in rows]
    assert found == [(16, 4, 8), *((length, pairs, 2 * pairs) for length in (64, 256) for pairs in (4, 8))]


@pytest.mark.parametrize(("family", "size"), [("needle", 3.7e6), ("babilong", 3.7e6), ("mqar", 5.3e5)])
def test_recipes_of_a_family_have_equal_sizes(family, size):
    from titans.models import TitansForCausalLM

    sizes = {}
    for name in RECIPES:
        if name.startswith(f"{family}_"):
            recipe = load_recipe(name)
            vocab_size = recipe.data.vocab_size if recipe.data.of_tokens else 4096
            model = TitansForCausalLM(recipe.model.build(vocab_size))
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert len(sizes) >= 6
    assert all(abs(found / size - 1) < 0.02 for found in sizes.values()), sizes


def test_an_ablation_leaves_out_one_part_and_keeps_the_size():
    from titans.models import TitansForCausalLM

    base, size = load_recipe("ablation_base"), 0
    for number, recipe in enumerate(map(load_recipe, filter(re.compile("ablation_").match, RECIPES))):
        assert dataclasses.replace(recipe, model=base.model) == base
        assert (recipe == base) == (number == 0)
        model = TitansForCausalLM(recipe.model.build(recipe.data.vocab_size))
        found = sum(parameter.numel() for parameter in model.parameters())
        size = size or found
        assert abs(found / size - 1) < 0.07


def test_the_command_line_overrides_a_task():
    from titans.cli.train import parse

    options = parse(["needle_lmm", "--data.keys", "3", "--data.haystack", "x.npz"]).options
    assert options is not None
    assert isinstance(options.data, TaskSettings)
    assert (options.data.keys, options.data.haystack) == (3, Path("x.npz"))


@pytest.fixture
def recall(monkeypatch):
    """benchmarks/recall.py as a module."""
    spec = importlib.util.spec_from_file_location("recall", ROOT / "benchmarks" / "recall.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_options_of_the_benchmark_reach_its_processes_as_they_were_given(recall):
    given = recall.Options(mined=Path("a/mined.npz"), start=Path("weights"), recipes=("x", "y"), seeds=(1, 2))
    for options in (recall.Options(), given):
        sent = json.loads(json.dumps(dataclasses.asdict(options), default=str))
        assert recall._options(sent) == options


def test_runs_are_named_by_pattern_and_by_seed(recall):
    runs = recall.named(("needle_mag@3", "babilong_qa1_mag_f256_*", "mine.py:recipe"), (0, 1))
    second, told = "babilong_qa1_mag_f256_second", "babilong_qa1_mag_f256_told"
    assert runs == [
        *((second, 0), (told, 0), ("mine.py:recipe", 0)),
        *((second, 1), (told, 1), ("mine.py:recipe", 1)),
        ("needle_mag", 3),
    ]


def benchmark(folder: Path, *options: object) -> list[dict[str, Any]]:
    """Rows of benchmarks/recall.py on the recipe ``mine`` in ``folder``; two processes at once, samples made
    beside them, RULER's form counted by a SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    haystack = tiny_haystack()
    (folder / "text.txt").write_text("\n".join(haystack.texts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "sp"), vocab_size=340, minloglevel=2,
        model_type="bpe", byte_fallback=True,
    )  # fmt: skip
    haystack.save(folder / "h.npz")
    command = [
        *(sys.executable, "benchmarks/recall.py", "--recipes", f"{folder / 'mine.py'}:mine"),
        *("--train", folder / "h.npz", "--test", folder / "h.npz", "--llama-tokenizer", folder / "sp.model"),
        *("--lengths", "2048", "--samples", "2", "--short-samples", "2", "--jobs-per-gpu", "2"),
        *("--workers", "0", "--sample-jobs", "1", "--threads", "1", "--dtype", "float32"),
        *("--work", folder / "work", "--output", folder, "--commit", "test", *options),
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "recall.json").read_text())
    assert record["commit"] == "test"
    return record["rows"]


@pytest.mark.slow
def test_the_benchmark_trains_tests_and_writes_one_file(tmp_path):
    """And what it has saved can be tested again without training, with the same answers."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom tests.tasks.test_experiment import tiny_recipe\n"
        f"def mine():\n    return tiny_recipe(Path({str(tmp_path)!r}))\n"
    )
    rows = benchmark(tmp_path, "--seeds", 0, 1, "--steps", 2, "--save", tmp_path / "weights")
    kinds = [row["kind"] for row in rows]
    assert kinds.count("training") == 2, rows
    assert sum(row["samples"] for row in rows if row["kind"] == "test") == 2 * 2 * 2
    again = benchmark(tmp_path, "--seeds", 1, "--steps", 0, "--start", tmp_path / "weights")
    assert [row["ending"] for row in again if row["kind"] == "training"] == ["not trained"]

    def answers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        tests = [row for row in rows if row["kind"] == "test" and row["seed"] == 1]
        return sorted((row["task"], row["depth_from"], row["tokens_correct"]) for row in tests)

    assert answers(again) == answers(rows)


@pytest.mark.slow
def test_the_benchmark_runs_babilong(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "from tests.tasks.test_experiment import tiny_recipe\n"
        f"def mine():\n    recipe = tiny_recipe(Path({str(tmp_path)!r}))\n"
        "    return replace(recipe, data=replace(recipe.data, tasks=('babilong_qa1',)))\n"
    )
    rows = benchmark(tmp_path, "--steps", 2, "--babi", tiny_babi(tmp_path))
    (test,) = [row for row in rows if row["kind"] == "test"]
    assert (test["task"], test["length"], test["samples"]) == ("babilong_qa1", 2048, 2)


@pytest.mark.gpu
def test_what_is_tested_without_training_is_where_training_leaves_it(tmp_path):
    """Left on the CPU, three needle tests of 64K to 10M tokens came no further than the first in 456 s."""
    recipe = tiny_recipe(tmp_path)
    trained = train_model(recipe)
    save_weights(trained.model, tmp_path / "w.safetensors", torch.float32)
    again = untrained(recipe, tmp_path / "w.safetensors")
    assert again.model.device.type == trained.model.device.type == "cuda"
    assert again.row["ending"] == "not trained"
    assert not again.model.training
    for name, weight in again.model.state_dict().items():
        assert weight.equal(trained.model.state_dict()[name]), name
