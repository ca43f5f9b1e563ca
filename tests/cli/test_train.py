"""`titans train`: overrides, resuming, and one line for every mistake."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.trained import trained
from titans.cli.main import main
from titans.recipes import RECIPES
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.checkpoints import checkpoints_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return trained(tmp_path)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed as the error: exactly one line, no traceback."""
    error = capsys.readouterr().err.strip()
    assert error.startswith("titans: error: ")
    assert "\n" not in error
    return error


def test_a_run_leaves_checkpoints_that_describe_themselves(folder):
    last = checkpoints_in(folder / "run")[-1]
    assert last.name == "checkpoint-4"
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.json"} <= set(os.listdir(last))
    assert not list(last.glob("*.bin"))  # no pickle of arguments
    saved = json.loads((last / "recipe.json").read_text())
    assert saved["recipe"]["training"]["steps"] == 4
    assert json.loads((last / "config.json").read_text())["use_cache"] is True
    records = read_log(folder / "run" / LOG_NAME)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["tokens_seen"] for record in steps] == [32, 64, 96, 128]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(steps[0])
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]


def test_overrides_and_going_on(folder, capsys):
    """The same output folder goes on from its last checkpoint by itself, and says so."""
    recipe = f"{folder / 'recipe.py'}:small"
    assert main(["train", recipe, "--out", str(folder / "run"), "--training.steps", "6"]) == 0
    assert "going on from" in capsys.readouterr().out
    steps = [record["step"] for record in read_log(folder / "run" / LOG_NAME) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("variant", ["lmm", "mag", "mal", "attention"])
def test_every_variant_trains_from_the_command_line(folder, variant):
    options = ["--model.variant", variant, "--model.window-size", "8", "--training.steps", "2"]
    out = folder / variant
    assert main(["train", f"{folder / 'recipe.py'}:small", "--out", str(out), *options]) == 0
    losses = [record["loss"] for record in read_log(out / LOG_NAME) if "loss" in record]
    assert all(math.isfinite(loss) for loss in losses)


def test_bf16_checkpointing_and_tensorboard(folder):
    """The options that take other paths through the loop."""
    pytest.importorskip("tensorboard")
    out = folder / "options"
    options = ["--training.precision", "bf16", "--training.gradient-checkpointing", "--logging.tensorboard"]
    options += ["--training.gradient-accumulation-steps", "2"]
    assert main(["train", f"{folder / 'recipe.py'}:small", "--out", str(out), *options]) == 0
    assert list((out / "tensorboard").iterdir())
    weights = load_file(checkpoints_in(out)[-1] / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_memory_metrics_are_logged_when_asked(folder):
    """Norms of memory and inner gradient, gates; the outer gradient's norm is always there."""
    out = folder / "metrics"
    options = ["--logging.memory-metrics-every", "2"]
    assert main(["train", f"{folder / 'recipe.py'}:small", "--out", str(out), *options]) == 0
    records = [record for record in read_log(out / LOG_NAME) if "loss" in record]
    assert ["memory_weight_norm" in record for record in records] == [False, True, False, True]
    assert {"memory_inner_gradient_norm", "memory_theta", "grad_norm"} <= set(records[1])
    plain = [record["loss"] for record in read_log(folder / "run" / LOG_NAME) if "loss" in record]
    assert [record["loss"] for record in records] == plain  # looking does not disturb


def test_the_list_and_the_usage(capsys):
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["train", "--help"]) == 0
    assert "RECIPE" in capsys.readouterr().out
    assert main(["train", "tiny_mac", "--help"]) == 0
    assert "--training.learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a recipe's name first"),
        (["demo_mca"], "unknown recipe 'demo_mca': did you mean 'demo_mac'?"),
        (["absent.py:f"], "absent.py: no such file"),
        (["tiny_mac", "--training.stepss", "3"], "did you mean --training.steps?"),
        (["tiny_mac", "--training.steps", "many"], "many"),
        (["tiny_mac", "--training.steps", "0"], "training.steps: expected at least 1, got 0"),
        (["tiny_mac", "--model.variant", "mad"], "mad"),
        (["tiny_mac", "--model.size", "tinny"], "did you mean 'tiny'?"),
        (["tiny_mac", "--model.chunk-size", "24"], "24"),
        (["tiny_mac", "--data.folder", "absent"], "absent: no such folder"),
    ],
)
def test_mistakes_take_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_checkpoint_cut_short_is_named(folder, capsys):
    weights = checkpoints_in(folder / "run")[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    recipe = f"{folder / 'recipe.py'}:small"
    assert main(["train", recipe, "--out", str(folder / "run"), "--training.steps", "6"]) == 2
    assert "model.safetensors: damaged or cut short" in one_line(capsys)


def test_nan_weights_stop_the_run_with_code_1(folder, capsys):
    weights = checkpoints_in(folder / "run")[-1] / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    recipe = f"{folder / 'recipe.py'}:small"
    assert main(["train", recipe, "--out", str(folder / "run"), "--training.steps", "6"]) == 1
    assert "step 5: loss nan" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_ends_with_130(folder, number):
    """A real process, as Ctrl-C or a scheduler ends it."""
    out = folder / "signalled"
    command = [sys.executable, "-m", "titans.cli.main", "train", f"{folder / 'recipe.py'}:small"]
    command += ["--out", str(out), "--training.steps", "100000", "--training.save-every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(read_log(out / LOG_NAME)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last_step = read_log(out / LOG_NAME)[-1]["step"]
    assert checkpoints_in(out)[-1].name == f"checkpoint-{last_step}"
    assert "interrupted after step" in output
