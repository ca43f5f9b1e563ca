"""What a recipe's data folder becomes, and what is refused before training starts."""

import dataclasses
import shutil

import pytest

from tests.training.tiny import tiny_recipe
from titans.data.prepare import prepare
from titans.errors import UserError
from titans.recipes import load_recipe
from titans.training.data import open_data
from titans.training.recipe import DataSettings, Recipe


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 50)
    prepare([text], tmp_path / "data", validation_fraction=0.1)
    data = DataSettings(folder=tmp_path / "data", sequence_length=32)
    return dataclasses.replace(tiny_recipe(), data=data)


def test_batches_and_validation(recipe):
    opened = open_data(recipe)
    assert opened.vocab_size == len(opened.tokenizer) == 259
    batch = opened.collate([opened.train[0], opened.train[1]])
    assert batch["input_ids"].shape == (2, 32)
    assert opened.validation is not None
    assert len(opened.validation) == 5  # 171 tokens held out, 32 at a time


def test_the_validation_sequences_are_few_and_from_all_over_the_split(recipe):
    few = dataclasses.replace(recipe.training, eval_sequences=2)
    validation = open_data(dataclasses.replace(recipe, training=few)).validation
    assert len(validation) == 2
    assert validation.indices == [0, 2]


def test_another_seed_cuts_the_stream_elsewhere(recipe):
    firsts = {
        open_data(
            dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, seed=seed))
        ).train.first
        for seed in range(5)
    }
    assert len(firsts) > 1


def test_without_a_held_out_split_there_is_no_validation(recipe, tmp_path):
    prepare([tmp_path / "text.txt"], tmp_path / "all", validation_fraction=0)
    data = dataclasses.replace(recipe.data, folder=tmp_path / "all")
    assert open_data(dataclasses.replace(recipe, data=data)).validation is None


def test_a_tokenizer_with_more_ids_than_the_shards_is_refused(recipe):
    """Its ids would lie outside the model's vocabulary as soon as a prompt uses them."""
    meta = recipe.data.folder / "meta.json"
    meta.write_text(meta.read_text().replace('"vocab_size": 259', '"vocab_size": 256'))
    with pytest.raises(
        UserError, match=r"the tokenizer beside the shards has 259 ids, the shards .* with 256"
    ):
        open_data(recipe)


def test_a_price_on_noise_is_refused(recipe):
    priced = dataclasses.replace(recipe.training, noise_penalty=0.5)
    with pytest.raises(UserError, match=r"training\.noise_penalty: expected 0 for .*data, .* got 0\.5"):
        open_data(dataclasses.replace(recipe, training=priced))


def test_missing_and_short_data(recipe, tmp_path):
    long = dataclasses.replace(recipe.data, sequence_length=10**6)
    with pytest.raises(UserError, match="give more text or a shorter sequence"):
        open_data(dataclasses.replace(recipe, data=long))
    shutil.rmtree(recipe.data.folder)
    with pytest.raises(UserError, match="no such folder"):
        open_data(recipe)


def test_the_recipes_folder_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="titans prepare SOURCE --out"):
        open_data(load_recipe("tiny_mac"))
