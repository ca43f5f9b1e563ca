"""What a run shows: a bar at a terminal, plain lines elsewhere, and always loss, speed and time left."""

import dataclasses
import io

from rich.console import Console

from tests.training.tiny import tiny_data, tiny_model, tiny_recipe
from titans.training.run import train


def output_of_a_run(tmp_path, *, terminal: bool) -> str:
    recipe = tiny_recipe()
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, steps=8))
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    train(recipe, tiny_data(), tmp_path, model=tiny_model(), console=console)
    return written.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    output = output_of_a_run(tmp_path, terminal=False)
    lines = [line for line in output.splitlines() if line.startswith("step 8/8")]
    assert len(lines) == 1
    for part in ("loss 5.", "tokens/s", "lr ", "grad norm ", " s left"):
        assert part in lines[0]
    assert "step 7: validation loss" in output
    assert "\x1b" not in output  # no control characters in a log file


def test_a_bar_at_a_terminal(tmp_path):
    output = output_of_a_run(tmp_path, terminal=True)
    assert "8/8" in output
    assert "tokens/s" in output
    assert "\x1b[" in output
    assert output.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in output  # the cursor is shown again
