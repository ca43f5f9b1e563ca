"""From the benchmark's files to a folder that ships: the same logits, and a card with the same figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.tasks.shipped import benchmark_record, tiny_model
from tests.tasks.tiny import tiny_haystack
from titans.errors import UserError
from titans.inference.checkpoint import load_checkpoint
from titans.tasks.experiment import save_weights
from tools.ship_checkpoint import ship

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def made(tmp_path):
    """Weights, haystack and results, as the benchmark leaves them."""
    save_weights(tiny_model("mag"), tmp_path / "weights" / "needle_mag-0.safetensors", torch.bfloat16)
    tiny_haystack().save(tmp_path / "h.npz")
    (tmp_path / "recall.json").write_text(json.dumps(benchmark_record()))
    return tmp_path / "weights" / "needle_mag-0.safetensors", tmp_path / "h.npz", tmp_path / "recall.json"


def test_what_ships_is_what_was_saved(made, tmp_path):
    folder = ship(*made, "needle_mag", 0, "needle-mag", folder=tmp_path / "shipped")
    model, tokenizer, _ = load_checkpoint(folder, device="cpu")
    assert model.dtype == torch.float32
    exact = tiny_model("mag")
    for name, parameter in model.named_parameters():
        kept = "memory.gates" in name or "memory.initial" in name
        original = exact.get_parameter(name)
        assert torch.equal(parameter, original if kept else original.bfloat16().float()), name
    assert tokenizer.get_vocab() == tiny_haystack().tokenizer.get_vocab()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert [path.name for path in folder.parent.iterdir()] == ["needle-mag"]


def test_the_card_has_the_rows_figures(made, tmp_path):
    folder = ship(*made, "needle_mag", 0, "needle-mag", folder=tmp_path / "shipped")
    card = (folder / "README.md").read_text()
    for part in (
        "license: apache-2.0", "12,345 parameters (mag)", "Seed 0, 100 steps, 6,789 tokens, 12 s on a card",
        "| niah_single_1 | 13/16 | 13/16 |", "| 0% to 50% | 7/8 | 7/8 |", "| 50% to 100% | 6/8 | 6/8 |",
        "`python benchmarks/recall.py --seeds 0`, commit 0123456789ab, 2025-11-25", "384 ids",
        "4,096 for 2,048",
    ):  # fmt: skip
        assert part in card
    assert "where/it/was" not in card


def test_an_existing_one_stays_unless_it_is_to_be_replaced(made, tmp_path):
    folder = ship(*made, "needle_mag", 0, "needle-mag", folder=tmp_path / "shipped")
    (folder / "README.md").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        ship(*made, "needle_mag", 0, "needle-mag", folder=tmp_path / "shipped")
    assert (folder / "README.md").read_text() == "mine"
    ship(*made, "needle_mag", 0, "needle-mag", folder=tmp_path / "shipped", overwrite=True)
    assert (folder / "README.md").read_text() != "mine"


@pytest.mark.parametrize(
    ("weights", "model", "seed", "message"),
    [
        ("bfloat16", "needle_mag", 1, "expected rows of training and tests of needle_mag, seed 1"),
        ("bfloat16", "needle_other", 0, "expected rows of training"),  # tests alone
        ("other ids", "needle_mag", 0, "expected a tokenizer of 300 ids, got 384"),
        ("gates rounded", "needle_mag", 0, "dtype torch.bfloat16, expected torch.float32"),
    ],
)
def test_what_does_not_belong_together_leaves_nothing(made, tmp_path, weights, model, seed, message):
    from safetensors.torch import load_file, save_file

    path, *others = made
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    if weights == "other ids":
        config["vocab_size"] = 300
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:300].contiguous()
    elif weights == "gates rounded":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"config": json.dumps(config)})
    with pytest.raises(UserError, match=message):
        ship(path, *others, model, seed, "needle-mag", folder=tmp_path / "shipped")
    assert not list((tmp_path / "shipped").glob("*"))


def test_the_command_says_what_it_expects():
    command = [sys.executable, "-m", "tools.ship_checkpoint", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for option in ("--haystack", "--results", "--model", "--seed", "--name", "--overwrite"):
        assert option in run.stdout
