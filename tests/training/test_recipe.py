"""A recipe checks itself before any work begins, and every named one is complete."""

import dataclasses
import json
from pathlib import Path

import pytest

from titans.errors import UserError
from titans.recipes import RECIPES, load_recipe
from titans.training.checkpoints import provenance
from titans.training.recipe import DataSettings, LoggingSettings, ModelSettings, TrainingSettings


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_describe_a_model_that_exists(name):
    """A recipe with a field that the config lacks, or numbers that do not fit, would fail only when run."""
    recipe = load_recipe(name)
    config = recipe.model.build(259)
    assert config.variant == recipe.model.variant
    assert recipe.training.warmup_steps < recipe.training.steps
    assert RECIPES[name].__doc__  # `titans train --list` shows it


def test_every_model_setting_is_a_field_of_the_config():
    from titans.models import TitansConfig

    known = {field.name for field in dataclasses.fields(TitansConfig)}
    settings = {field.name for field in dataclasses.fields(ModelSettings)} - {"size"}
    assert settings <= known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "training.steps: expected at least 1, got 0"),
        ({"batch_size": -1}, "training.batch_size"),
        ({"learning_rate": 0.0}, "training.learning_rate: expected a number above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "training.learning_rate: expected a number above 0, got nan"),
        ({"beta2": 1.0}, "training.beta2: expected a number from 0 to 1, got 1.0"),
        ({"weight_decay": float("nan")}, "training.weight_decay"),
        ({"keep": 0}, "training.keep"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        TrainingSettings(**{"steps": 10, **changes})


def test_other_parts_check_themselves_too():
    with pytest.raises(UserError, match=r"data\.sequence_length: expected at least 2, got 1"):
        DataSettings(folder=Path("x"), sequence_length=1)
    with pytest.raises(UserError, match=r"logging\.memory_metrics_every"):
        LoggingSettings(memory_metrics_every=-1)


def test_a_chunk_that_does_not_divide_the_segment_names_both():
    with pytest.raises(ValueError, match=r"24[\s\S]*64|64[\s\S]*24"):
        ModelSettings(chunk_size=24, segment_size=64).build(259)


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(UserError, match="unknown recipe 'demo_mca': did you mean 'demo_mac'"):
        load_recipe("demo_mca")


def test_a_recipe_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from titans.recipes import RECIPES\n"
        "def longer():\n"
        "    base = RECIPES['tiny_mac']()\n"
        "    return replace(base, training=replace(base.training, steps=777))\n"
        "def wrong():\n"
        "    return 3\n"
    )
    assert load_recipe(f"{file}:longer").training.steps == 777
    with pytest.raises(UserError, match="did you mean 'longer'"):
        load_recipe(f"{file}:longr")
    with pytest.raises(UserError, match="expected the function to return a Recipe, got int"):
        load_recipe(f"{file}:wrong")
    with pytest.raises(UserError, match=r"expected path/to/file\.py:function"):
        load_recipe(str(file))
    with pytest.raises(UserError, match="no such file"):
        load_recipe(f"{tmp_path / 'absent.py'}:f")


def test_provenance_is_json_and_holds_what_repeats_a_run():
    recipe = load_recipe("tiny_mac")
    saved = json.loads(json.dumps(provenance(recipe)))
    assert saved["recipe"] == recipe.to_dict()
    assert {"seed", "commit", "date", "versions"} <= set(saved)
    assert saved["versions"]["torch"]
