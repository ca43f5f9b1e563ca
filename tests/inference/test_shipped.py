"""Checkpoints by name, from Python and on the command line; those of the repository are small and load."""

from pathlib import Path

import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import titans
from tests.inference.saved import TEXT, checkpoint
from titans.cli.main import main
from titans.errors import UserError
from titans.inference.memory_file import read_memory
from titans.inference.shipped import SHIPPED, resolved, shipped_names

ROOT = Path(__file__).parent.parent.parent
MEGABYTES = 16


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Two made-up ones in another folder, and a folder there that is none; the current folder is empty."""
    folder = tmp_path / "checkpoints"
    for name, variant in (("needle-one", "mag"), ("needle-two", "mal")):
        checkpoint(folder / name, variant)
    (folder / ".needle-three-unfinished").mkdir()
    for module in ("shipped", "memory"):
        monkeypatch.setattr(f"titans.inference.{module}.SHIPPED", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_name_is_enough(shipped):
    assert shipped_names() == ["needle-one", "needle-two"]
    model, tokenizer, folder = titans.from_pretrained("needle-one", device="cpu")
    assert (folder, model.config.variant, len(tokenizer)) == (shipped / "needle-one", "mag", 259)
    assert not model.training


def test_a_folder_of_the_users_comes_first(shipped):
    mine = checkpoint(Path("needle-one"), "lmm")
    assert resolved("needle-one") == mine
    assert titans.from_pretrained("needle-one").model.config.variant == "lmm"


def test_an_unknown_name_tells_the_known_ones(shipped):
    with pytest.raises(UserError, match=r"did you mean 'needle-two'.* known: needle-one, needle-two"):
        titans.from_pretrained("needle-tow")


def test_every_command_takes_a_name(shipped, capsys):
    text = Path("text.txt")
    text.write_text(TEXT)
    commands = [
        ["generate", "needle-one", "--prompt", "line", "--max-new-tokens", "2"],
        ["eval-loss", "needle-one", "text.txt", "--max-tokens", "50"],
        ["memorize", "text.txt", "--model", "needle-one", "--out", "x.memory"],
        ["ask", "x.memory", "line", "--max-new-tokens", "2"],
        ["ask", "x.memory", "line", "--model", "needle-one", "--max-new-tokens", "2"],
        ["generate", "needle-one", "--memory", "x.memory", "--max-new-tokens", "2"],
        ["inspect", "text.txt", "--model", "needle-one", "--max-tokens", "20", "--spans", "0"],
    ]
    for command in commands:
        assert main(command) == 0, command
    capsys.readouterr()
    assert main(["generate", "needle-on", "--prompt", "line"]) == 2
    assert "known: needle-one, needle-two" in capsys.readouterr().err


def test_a_memory_of_a_shipped_model_moves_to_another_installation(shipped, tmp_path, monkeypatch):
    """The file names the checkpoint, not a folder of the machine where it was made."""
    memory = titans.Memory.new("needle-one")
    memory.read("some text")
    memory.save("x.memory")
    assert read_memory(Path("x.memory")).header.model_path == "needle-one"
    moved = shipped.rename(tmp_path / "elsewhere")
    for module in ("shipped", "memory"):
        monkeypatch.setattr(f"titans.inference.{module}.SHIPPED", moved)
    assert titans.Memory.load("x.memory").stream.tokens_read == memory.stream.tokens_read


# What is in the repository


def test_all_checkpoints_together_are_small():
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    assert size <= MEGABYTES * 10**6, f"titans/checkpoints has {size:,} bytes"


def test_the_wheel_holds_them():
    """A .gitignore line or another target in pyproject.toml would leave `pip install` without weights."""
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    wanted = {file.relative_to(ROOT).as_posix() for file in SHIPPED.rglob("*") if file.is_file()}
    assert wanted <= files
    assert "titans/inspection/template/search.html" in files


@pytest.mark.parametrize("name", shipped_names())
def test_each_is_complete(name):
    folder = SHIPPED / name
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
    }
    card = (folder / "README.md").read_text()
    for part in ("license: apache-2.0", "Project Gutenberg", "Seed ", "commit", f'from_pretrained("{name}")'):
        assert part in card
    with safe_open(folder / "model.safetensors", "pt") as file:
        dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  (no mapping)
    assert dtypes <= {"BF16", "F32"}
    ours = titans.from_pretrained(name, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    # bfloat16 halves the file; a CPU without instructions for it would take ten times as long.
    assert ours.model.dtype == theirs.dtype == torch.float32
    ids = AutoTokenizer.from_pretrained(folder)("One of the numbers is: 1234567.", return_tensors="pt")
    with torch.inference_mode():
        assert torch.equal(ours.model(ids.input_ids).logits, theirs(ids.input_ids).logits)
