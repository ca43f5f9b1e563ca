"""Makes a folder of `titans/checkpoints` from what benchmarks/recall.py saved.

    python -m tools.ship_checkpoint runs/recall/weights/needle_mag-0.safetensors \
        --haystack runs/recall/train.npz --results results/recall.json \
        --model needle_mag --seed 0 --name needle-mag

The folder holds the weights as they were saved (bfloat16, gates and initial memory in float32), a config.json
that has them loaded in float32, the haystack's tokenizer and a README.md whose figures are the rows of the
JSON file. It is put in place once it loads, by our loader and by transformers' own, and gives the logits of
the saved weights, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from titans.data.sentences import SentenceTokens
from titans.data.tokenizer import save_tokenizer
from titans.errors import UserError
from titans.inference.checkpoint import load_checkpoint
from titans.inference.shipped import SHIPPED
from titans.models import TitansConfig, TitansForCausalLM
from tools.model_card import card

_CHECKED = 3000  # tokens whose logits are compared: many chunks, and some windows of attention


def ship(
    weights: Path,
    haystack: Path,
    results: Path,
    model: str,
    seed: int,
    name: str,
    *,
    start: tuple[Path, str] | None = None,
    folder: Path = SHIPPED,
    overwrite: bool = False,
) -> Path:
    """Make ``folder / name``, whole or not at all. start: results and model of the leg that it began from.

    Raises:
        UserError: it exists, or the weights, the tokenizer and the rows do not belong together.
    """
    final = folder / name
    if final.exists() and not overwrite:
        raise UserError(f"{final}: exists already (--overwrite replaces it)")
    record = json.loads(results.read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if (row.get("model"), row.get("seed")) == (model, seed)]
    kinds = {row["kind"] for row in rows}
    if not {"training", "test"} <= kinds:
        raise UserError(f"{results}: expected rows of training and tests of {model}, seed {seed}")
    sentences = SentenceTokens.load(haystack)
    saved = read_weights(weights)
    if len(sentences.tokenizer) != saved.config.vocab_size:
        raise UserError(
            f"{haystack}: expected a tokenizer of {saved.config.vocab_size} ids, "
            f"got {len(sentences.tokenizer)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as made:
        staged = Path(made) / name
        saved.save_pretrained(staged)
        _load_as_float32(staged / "config.json")
        (staged / "generation_config.json").unlink(missing_ok=True)
        save_tokenizer(sentences.tokenizer, staged)
        _make_compact(staged / "tokenizer.json")
        before = None if start is None else _training(*start, seed)
        text = card(name, model, seed, saved.config.vocab_size, record, rows, before)
        (staged / "README.md").write_text(text, encoding="utf-8")
        check(staged, saved, sentences)
        if final.exists():
            shutil.rmtree(final)
        staged.rename(final)
    return final


def read_weights(path: Path) -> TitansForCausalLM:
    """The model of a file of `titans.tasks.experiment.save_weights`, as it was saved."""
    with safe_open(path, "pt") as file:
        config = TitansConfig.from_dict(json.loads(file.metadata()["config"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    model = TitansForCausalLM(config).to(weights["model.embed_tokens.weight"].dtype)
    report = model.load_state_dict(weights, strict=False)
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    if set(report.missing_keys) - tied or report.unexpected_keys:
        raise UserError(f"{path}: the weights are not those of its config: {report}")
    for name, tensor in model.state_dict().items():
        if name in weights and weights[name].dtype != tensor.dtype:
            raise UserError(f"{path}: {name} has dtype {weights[name].dtype}, expected {tensor.dtype}")
    return model.eval()


@torch.inference_mode()
def check(folder: Path, saved: TitansForCausalLM, sentences: SentenceTokens) -> None:
    """That both ways to load the folder give the saved weights' logits and the haystack's ids.

    Raises:
        UserError: they do not.
    """
    stored = torch.from_numpy(sentences.ids[:_CHECKED].astype("int64"))
    text = "".join(" " + sentence for sentence in sentences.part(0, min(len(sentences), 50)).texts())
    ids = sentences.ids[: sentences.starts[min(len(sentences), 50)]].tolist()
    expected = saved.float()(stored[None]).logits
    ours = load_checkpoint(folder, device="cpu")
    theirs = (
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(),
        AutoTokenizer.from_pretrained(folder, local_files_only=True),
    )
    for model, tokenizer in (ours[:2], theirs):
        if not torch.equal(model(stored[None]).logits, expected):
            raise UserError(f"{folder}: its logits are not those of the saved weights")
        if tokenizer.encode(text, add_special_tokens=False) != ids:
            raise UserError(f"{folder}: its tokenizer does not give the haystack's ids")


def _training(results: Path, model: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    record = json.loads(results.read_text(encoding="utf-8"))
    for row in record["rows"]:
        if row["kind"] == "training" and (row["model"], row["seed"]) == (model, seed):
            return record, row
    raise UserError(f"{results}: expected a training of {model}, seed {seed}")


def _make_compact(tokenizer: Path) -> None:
    """108 KB instead of 259: no indents, and characters as they are."""
    fields = json.loads(tokenizer.read_text(encoding="utf-8"))
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    tokenizer.write_text(text + "\n", encoding="utf-8")


def _load_as_float32(config: Path) -> None:
    """What `dtype="auto"`, transformers' default, goes by: bfloat16 is for the size of the file alone."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["dtype"] = "float32"
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="safetensors file of benchmarks/recall.py --save")
    parser.add_argument("--haystack", type=Path, required=True, help="the training's .npz")
    parser.add_argument("--results", type=Path, required=True, help="the benchmark's JSON file")
    parser.add_argument("--model", required=True, help="the recipe in that file, needle_mag")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--name", required=True, help="of the checkpoint, needle-mag")
    parser.add_argument("--start", nargs=2, metavar=("RESULTS", "MODEL"), help="the leg it began from")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args()
    try:
        final = ship(
            given.weights,
            given.haystack,
            given.results,
            given.model,
            given.seed,
            given.name,
            start=given.start and (Path(given.start[0]), given.start[1]),
            overwrite=given.overwrite,
        )
    except (UserError, OSError) as error:
        print(f"ship_checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in final.iterdir())
    print(f"{final}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
