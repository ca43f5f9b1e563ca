"""Load a model and its tokenizer from a checkpoint, with one clear sentence for whatever is wrong with it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from titans.data.tokenizer import load_tokenizer
from titans.errors import UserError, unknown_name
from titans.inference.shipped import resolved, shipped_names
from titans.training.checkpoints import checkpoints_in


class LoadedCheckpoint(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the folder that they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def from_pretrained(name_or_folder: str | Path, device: str | torch.device | None = None) -> LoadedCheckpoint:
    """`titans.from_pretrained`: a shipped checkpoint by its name, or any other by its folder.

        model, tokenizer, folder = titans.from_pretrained("needle-mag")

    See `load_checkpoint`, which it calls.
    """
    return load_checkpoint(name_or_folder, device=device)


def load_checkpoint(
    path: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> LoadedCheckpoint:
    """Load the checkpoint at ``path``, the last one of the training run there, or one that is shipped.

    Args:
        path: a folder with config.json, weights in safetensors and a tokenizer; an output folder of
            ``titans train``; or the name of a shipped checkpoint (`shipped_names`).
        device: where to; None for a GPU where there is one.
        dtype: of the parameters (gates and initial memory stay at least fp32); None as config.json
            says (shipped ones: float32, though their files hold bfloat16).

    Raises:
        UserError: a file is missing, damaged or cut short, parameters are missing or not finite, or the
            tokenizer has ids that the model has not.
    """
    folder = _checkpoint_folder(resolved(path))
    _check_files(folder)
    try:
        # What does not fit is reported below, in one line instead of transformers' table.
        with _quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except safetensors.SafetensorError as error:
        raise UserError(f"{folder}: the weights are damaged or cut short: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the checkpoint cannot be loaded: {reason}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, report[problem])):
            raise UserError(f"{folder}: {problem.replace('_', ' ')} in the weights: {', '.join(names[:3])}")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(
                f"{folder}: the parameter {name} holds values that are not finite (NaN or infinity)"
            )
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} ids, "
            f"the model a vocabulary of {model.config.vocab_size}"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedCheckpoint(model.to(device).eval(), tokenizer, folder)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _checkpoint_folder(path: Path) -> Path:
    if not path.is_dir():
        expected = "expected a checkpoint, the output folder of titans train, or a shipped checkpoint's name"
        raise UserError(
            f"{path}: no such folder ({expected}): {unknown_name('checkpoint', str(path), shipped_names())}"
        )
    if (path / "config.json").is_file():
        return path
    if checkpoints := checkpoints_in(path):
        return checkpoints[-1]
    raise UserError(f"{path}: config.json is missing, and there is no checkpoint-<step> folder in it")


def _check_files(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder}: config.json is missing")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: expected a JSON object: {error}") from error
    if not model_type:
        raise UserError(f"{config}: no model_type: not a model's config")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder}: no *.safetensors file (weights in other formats are not read)")
    for file in weights:
        try:
            with safetensors.safe_open(file, "pt"):
                pass  # opening compares the header with the file's size
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: damaged or cut short: {error}") from error
