"""``titans train``: train a recipe on token shards."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from titans.cli.arguments import parse_arguments
from titans.errors import UserError
from titans.recipes import RECIPES, load_recipe
from titans.training.recipe import Recipe

_USAGE = """usage: titans train RECIPE [--out FOLDER] [--training.steps N ...]
       titans train --list

RECIPE is a name that --list shows, or path/to/file.py:function. titans train RECIPE --help shows the fields
that can be overridden, with the recipe's values."""


@dataclass(frozen=True, kw_only=True)
class Options(Recipe):
    """Train a recipe. Every field shown can be overridden; the values are the recipe's."""

    out: Path
    """Output folder: checkpoints and log.jsonl."""
    resume: str = "auto"
    """auto: go on from the last checkpoint in the output folder, if there is one; never: expect none; or the
    folder of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The recipe after overriding; None when the answer is ``message``."""

    options: Options | None = None
    name: str = ""
    message: str = field(default="")


def parse(argv: list[str]) -> Arguments:
    """The recipe's name comes first, because the other options are its fields."""
    if "--list" in argv:
        return Arguments(message=_list())
    if argv and argv[0] in ("-h", "--help"):
        return Arguments(message=_USAGE)
    if not argv or argv[0].startswith("-"):
        raise UserError("titans train: expected a recipe's name first (titans train --list shows them)")
    name, rest = argv[0], argv[1:]
    recipe = load_recipe(name)
    parts = {part.name: getattr(recipe, part.name) for part in fields(Recipe)}
    folder = name.rpartition(":")[2] if ".py" in name else name
    default = Options(**parts, out=Path("runs") / folder)
    return Arguments(
        options=parse_arguments(Options, rest, command=f"train {name}", default=default), name=name
    )


def run(arguments: Arguments) -> int:
    """Open the data, train, and say where the checkpoint is and what to do with it."""
    options = arguments.options
    if options is None:
        print(arguments.message)
        return 0
    recipe = Recipe(
        model=options.model, data=options.data, training=options.training, logging=options.logging
    )
    recipe.model.build(vocab_size=256)  # its mistakes show before the data is read

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from titans.training.checkpoints import checkpoints_in
    from titans.training.data import open_data
    from titans.training.run import train

    transformers_logging.disable_progress_bar()
    console = Console()
    data = open_data(recipe)
    if (before := checkpoints_in(options.out)) and options.resume == "auto":
        console.print(f"going on from {before[-1]}", highlight=False, soft_wrap=True)
    result = train(recipe, data, options.out, resume=options.resume, console=console)
    console.print(result.message, highlight=False, soft_wrap=True)
    if result.checkpoint:
        console.print(f"checkpoint: {result.checkpoint}", highlight=False, soft_wrap=True)
    if result.ending == "interrupted":
        console.print("go on with the same command", highlight=False)
    if result.ending == "diverged":
        console.print("the weights before this step are kept: go on with a lower --training.learning-rate")
    return {"finished": 0, "interrupted": 130, "diverged": 1}[result.ending]


def _list() -> str:
    width = max(map(len, RECIPES))
    lines = [f"{name:<{width}}  {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()]
    return "\n".join(lines)
