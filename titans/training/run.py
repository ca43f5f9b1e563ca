"""One training run from a recipe: what ``titans train`` does."""

import contextlib
import importlib.util
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
from rich.console import Console
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from titans.errors import UserError
from titans.models import TitansForCausalLM
from titans.training.callbacks import GracefulStop, JsonLinesLog, TerminalProgress, stop_on_signals
from titans.training.checkpoints import (
    SKIPPED,
    checkpoints_in,
    provenance,
    read_recipe,
    remove_leftovers,
    step_of,
)
from titans.training.data import TrainingData
from titans.training.recipe import LoggingSettings, Recipe
from titans.training.trainer import NonFiniteError, TitansTrainer

Ending = Literal["finished", "interrupted", "diverged"]

# What a resumed run may not change: it would be another model, or another order of the data.
_FIXED = (
    *("model.", "data."),
    *("training.seed", "training.batch_size", "training.gradient_accumulation_steps"),
)
_WHERE = ("data.folder", "data.haystack", "data.babi", "data.mined")  # the same files may lie elsewhere


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended, and where: ``checkpoint`` is the last whole one (None: there is none yet)."""

    ending: Ending
    step: int
    checkpoint: Path | None
    message: str


def train(
    recipe: Recipe,
    data: TrainingData,
    out: Path,
    *,
    resume: str = "auto",
    console: Console | None = None,
    model: TitansForCausalLM | None = None,
) -> TrainingResult:
    """Train ``recipe`` on ``data``, writing checkpoints and ``log.jsonl`` to the folder ``out``.

    On one machine with the same number of threads, an interrupted run that is resumed gives the same numbers,
    bit for bit on a CPU, as one that was not.

    Args:
        resume: "auto" goes on from the last checkpoint in ``out`` where there is one, "never" refuses to, and
            the path of a checkpoint starts from that one.
        console: where progress goes; None for standard error.
        model: instead of the one that the recipe describes.

    Raises:
        UserError: the recipe and the data, or the recipe and the checkpoint, do not fit; a checkpoint is
            damaged.
    """
    _check_extras(recipe.logging)
    checkpoint = _checkpoint_to_resume(recipe, data, out, resume)
    set_seed(recipe.training.seed)
    if model is None:
        model = build_model(recipe, data)
    if model.config.vocab_size < data.vocab_size:
        raise UserError(
            f"the model has a vocabulary of {model.config.vocab_size}, "
            f"the data's tokenizer one of {data.vocab_size}"
        )
    log = JsonLinesLog(out)
    progress = TerminalProgress(console or Console(stderr=True))
    with stop_on_signals() as request:
        callbacks: list[TrainerCallback] = [log, progress, GracefulStop(request)]
        trainer = TitansTrainer(
            model,
            settings=recipe.training,
            out=out,
            train_dataset=data.train,
            eval_dataset=data.validation,
            in_order=data.in_order,
            answers=data.answers,
            data_collator=data.collate,
            processing_class=data.tokenizer,
            provenance=provenance(recipe),
            skipped=read_recipe(checkpoint).get(SKIPPED, 0) if checkpoint else 0,
            memory_metrics_every=recipe.logging.memory_metrics_every,
            callbacks=callbacks
            + _reporters(recipe.logging, out, _step_saved_in(checkpoint) if checkpoint else 0),
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            remove_leftovers(out)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            done = (
                trainer.state.global_step >= recipe.training.steps
            )  # a signal in the last step changes nothing
            ending: Ending = "finished" if done else "interrupted"
            message = f"{ending} after step {trainer.state.global_step}"
        except NonFiniteError as error:
            trainer.save_now()
            ending, message = "diverged", str(error)
        finally:
            log.close()
            progress.close()
    saved = checkpoints_in(out)
    return TrainingResult(
        ending=ending,
        step=trainer.state.global_step,
        checkpoint=saved[-1] if saved else None,
        message=message,
    )


def build_model(recipe: Recipe, data: TrainingData) -> TitansForCausalLM:
    """The recipe's model for the data's vocabulary, freshly initialised from the global random state."""
    config = recipe.model.build(
        data.vocab_size,
        bos_token_id=getattr(data.tokenizer, "bos_token_id", None),
        eos_token_id=getattr(data.tokenizer, "eos_token_id", None),
        pad_token_id=getattr(data.tokenizer, "pad_token_id", None),
    )
    return TitansForCausalLM(config)


def check_checkpoint(checkpoint: Path) -> None:
    """Look for damage that shows without reading everything: missing files, and files cut short.

    Raises:
        UserError: it says which file and what is wrong.
    """
    for name in ("config.json", "trainer_state.json"):
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint}: not a checkpoint to resume from: {name} is missing")
        with _as_user_error(path, ValueError):
            json.loads(path.read_text(encoding="utf-8"))
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{checkpoint}: not a checkpoint to resume from: no *.safetensors")
    for path in weights:
        with _as_user_error(path, safetensors.SafetensorError), safetensors.safe_open(path, "pt"):
            pass  # opening compares the header with the file's size
    for name in ("optimizer.pt", "scheduler.pt"):
        path = checkpoint / name
        with _as_user_error(path, OSError, zipfile.BadZipFile), zipfile.ZipFile(path):
            pass  # a zip archive's directory stands at its end


@contextlib.contextmanager
def _as_user_error(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kinds as error:
        raise UserError(f"{path}: damaged or cut short: {error}") from error


def _checkpoint_to_resume(recipe: Recipe, data: TrainingData, out: Path, resume: str) -> Path | None:
    present = checkpoints_in(out)
    if resume == "never":
        if present:
            raise UserError(
                f"{out} holds {present[-1].name}: --resume never expects an output folder without checkpoints"
            )
        return None
    if resume == "auto":
        if not present:
            return None
        chosen = present[-1]
    else:
        chosen = Path(resume)
        if not chosen.is_dir():
            raise UserError(f"--resume {resume}: expected auto, never or a checkpoint's folder")
        later = [path for path in present if step_of(path) > _step_saved_in(chosen)]
        if later:
            raise UserError(f"{out} holds {later[-1].name}, later than {chosen}: choose another --out")
    check_checkpoint(chosen)
    _check_same_run(recipe, data, chosen)
    return chosen


def _step_saved_in(checkpoint: Path) -> int:
    path = checkpoint / "trainer_state.json"
    if not path.is_file():
        raise UserError(f"{checkpoint}: not a checkpoint to resume from: {path.name} is missing")
    with _as_user_error(path, ValueError, KeyError):
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])


def _check_same_run(recipe: Recipe, data: TrainingData, checkpoint: Path) -> None:
    """Refuse to continue a run as another one; what may change (steps, rates, intervals) changes silently."""
    vocab_size = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    if vocab_size != data.vocab_size:
        raise UserError(
            f"{checkpoint} has a vocabulary of {vocab_size}, the data's tokenizer one of {data.vocab_size}"
        )
    saved = read_recipe(checkpoint).get("recipe")
    if saved is None:
        return
    before, now = _flat(saved), _flat(recipe.to_dict())
    for name in now:
        if name in _WHERE:
            continue
        if name.startswith(_FIXED) and before.get(name) != now[name]:
            raise UserError(
                f"{checkpoint} was made with {name} = {before.get(name)}, the recipe now says {now[name]}: "
                "choose another --out for a new run"
            )


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"seed": 0}} -> {"training.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_extras(logging: LoggingSettings) -> None:
    for name in ("tensorboard", "wandb"):
        if getattr(logging, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"logging.{name}: the package is missing: pip install 'titans-ltm[{name}]'")


def _reporters(logging: LoggingSettings, out: Path, step: int) -> list[TrainerCallback]:
    reporters: list[TrainerCallback] = []
    if logging.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        # purge_step: what an interrupted run wrote after its last checkpoint is not shown twice.
        writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        reporters.append(TensorBoardCallback(writer))
    if logging.wandb:
        from transformers.integrations import WandbCallback

        reporters.append(WandbCallback())
    return reporters
