"""A tiny MAC model trained for a few steps through the command line: what the commands' tests work on."""

import functools
import shutil
import tempfile
from pathlib import Path

from titans.cli.main import main

RECIPE = """
from dataclasses import replace
from pathlib import Path
from titans.training.recipe import DataSettings, ModelSettings, Recipe, TrainingSettings

def small():
    model = ModelSettings(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, memory_head_dim=8,
        memory_expansion=1, chunk_size=4, segment_size=8, num_persistent_tokens=2,
    )
    data = DataSettings(folder=Path({data!r}), sequence_length=16)
    training = TrainingSettings(
        steps=4, batch_size=2, warmup_steps=1, eval_every=2, eval_sequences=4, save_every=2,
    )
    return Recipe(model=model, data=data, training=training)
"""


@functools.cache
def _made() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="titans-tests-"))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = folder / "text.txt"
    text.write_text("".join(f"line {number}: the quick brown fox\n" for number in range(100)))
    assert main(["prepare", str(text), "--out", str(folder / "data"), "--validation-fraction", "0.2"]) == 0
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(data=str(folder / "data")))
    assert main(["train", f"{recipe}:small", "--out", str(folder / "run")]) == 0
    return folder


def trained(tmp_path: Path) -> Path:
    """A copy, to do harm to: folder with ``text.txt``, ``data``, ``recipe.py`` (``small``) and ``run``."""
    copy = tmp_path / "trained"
    shutil.copytree(_made(), copy)
    return copy
