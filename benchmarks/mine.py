"""Decoys that a model finds itself: the sentences of a haystack that it writes into its memory.

    titans haystack books/ --characters 100000000 --tokenizer runs/recall/train.npz \\
        --without runs/recall/test.npz --out runs/recall/words.npz \\
        --words kitchen garden gardens bathroom bedroom hallway office Mary John Daniel Sandra \\
        went moved travelled journeyed
    python benchmarks/mine.py --recipe babilong_qa1_mag_f256_second --weights x.safetensors \\
        --haystack runs/recall/words.npz --least 1e-5 --tokens 9000000 --out runs/recall/mined.npz
    python benchmarks/recall.py --recipes babilong_qa1_mag_f256_second --start x.safetensors \\
        --mined runs/recall/mined.npz --steps 4000

Most of what a model of BABILong writes of books stands in sentences with a word of the stories: the first
command takes these of more books than a haystack for training need have. The weights are those that
benchmarks/recall.py has saved. What comes out is a haystack, for `data.mined`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass(frozen=True)
class Options:
    """recipe, weights: of the model. haystack: what it reads, of the tokenizer that it was trained with.
    out: the sentences with a token whose step is more than `least` of the largest. tokens: read of the
    haystack at most. threads: of PyTorch."""

    recipe: str
    weights: Path
    haystack: Path
    out: Path
    least: float = 1e-4
    tokens: int = 4_000_000
    threads: int = 2


def main(options: Options) -> None:
    import torch
    from rich.progress import Progress

    from titans.data.sentences import SentenceTokens
    from titans.recipes import load_recipe
    from titans.tasks.experiment import untrained
    from titans.tasks.mining import largest_steps, mine
    from titans.tasks.settings import TaskSettings

    torch.set_num_threads(options.threads)
    recipe = load_recipe(options.recipe)
    if not isinstance(recipe.data, TaskSettings):
        sys.exit(f"--recipe {options.recipe}: expected one on tasks")
    recipe = replace(recipe, data=replace(recipe.data, haystack=options.haystack))
    model = untrained(recipe, options.weights).model
    haystack = SentenceTokens.load(options.haystack)
    ids = haystack.ids[: options.tokens]
    with Progress() as progress:
        bar = progress.add_task("reading", total=len(ids))
        steps = largest_steps(model, ids, progress=lambda read: progress.update(bar, completed=read))
    try:
        mined = mine(haystack, steps, options.least)
    except ValueError as error:
        sys.exit(f"--{error}")
    mined.save(options.out)
    print(
        f"{len(ids):,} tokens read, {int((steps > options.least).sum()):,} written, "
        f"in {len(mined):,} sentences of {len(mined.ids):,} tokens: {options.out}"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
