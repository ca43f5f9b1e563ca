"""Checkpoint folders: written whole or not at all, found again, and described by where they came from."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from titans.errors import UserError
from titans.files import replace_file, sync
from titans.training.recipe import Recipe

RECIPE_NAME = "recipe.json"
SKIPPED = "skipped_steps"  # in that file and in the log
_PREFIX = "checkpoint-"  # transformers' own name, so that its tools find our checkpoints
_STAGING = ".saving-"


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints in an output folder, oldest first. Unfinished ones have another name."""
    found = {
        int(match.group(1)): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(rf"{_PREFIX}(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies in an output folder."""
    return folder / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which ``checkpoint`` was saved."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def staging_folder(folder: Path) -> Path:
    """A sibling of the checkpoints in which one is written until it is whole; the same on all processes."""
    return folder / f"{_STAGING}checkpoint"


def publish(staged: Path, final: Path) -> None:
    """Turn the folder ``staged`` into ``final``, in one step that a crash or a power cut cannot halve.

    Every file reaches the disk before the rename, and the rename before we return: a checkpoint under its
    final name is whole.
    """
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            sync(path)
    sync(staged)
    os.rename(staged, final)
    sync(final.parent)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves nothing that looks like one."""
    doomed = path.with_name(f"{_STAGING}{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or removal left behind."""
    for path in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(path)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: a reader, or a crash, meets the old or the new content, never a part."""
    replace_file(path, text.encode())


def provenance(recipe: Recipe) -> dict[str, Any]:
    """What is needed to repeat a run: recipe, seed, the code's commit, date, versions, hardware."""
    import torch

    packages = ("titans-ltm", "torch", "transformers", "accelerate", "safetensors", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "recipe": recipe.to_dict(),
        "seed": recipe.training.seed,
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": sys.argv,
    }


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """The recipe and provenance saved with a checkpoint; empty when it was made elsewhere.

    Raises:
        UserError: the file is damaged.
    """
    path = checkpoint / RECIPE_NAME
    if not path.is_file():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON: {error}") from error
    return saved if isinstance(saved, dict) else {}


def _commit() -> str | None:
    """The commit of this checkout, with "-dirty" for uncommitted changes; None outside git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return described.stdout.strip()
    return None
