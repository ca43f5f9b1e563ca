"""An interrupted run that goes on must be the run that was never interrupted, bit for bit."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import tiny_data, tiny_model, tiny_recipe
from titans.errors import UserError
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.checkpoints import checkpoints_in
from titans.training.recipe import Recipe
from titans.training.run import TrainingResult, train
from titans.training.trainer import ShuffledForever


def with_training(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))


def figures(out: Path) -> list[tuple[Any, ...]]:
    """What must not differ between runs: everything in the log but speed."""
    records = read_log(out / LOG_NAME)
    return [tuple((key, record[key]) for key in record if key != "tokens_per_second") for record in records]


class KillAfter(tiny_data().train.__class__):  # type: ignore[misc]  # the tiny data set's class
    """Data that sends a signal to this process while a batch is being read, as Ctrl-C would at any time."""

    def __init__(self, reads: int, number: signal.Signals):
        self.left, self.number = reads, number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return super().__getitem__(index)


def run(
    out: Path, recipe: Recipe, stop_at_read: int = 0, number: signal.Signals = signal.SIGINT
) -> TrainingResult:
    data = tiny_data()
    if stop_at_read:
        data = dataclasses.replace(data, train=KillAfter(stop_at_read, number))
    return train(recipe, data, out, model=tiny_model())


def test_two_interruptions_change_no_bit(tmp_path):
    """Loses nothing: optimiser, schedule, random state (there is dropout), data order over several epochs."""
    recipe = tiny_recipe()
    whole = run(tmp_path / "whole", recipe)
    assert whole.ending == "finished"

    first = run(tmp_path / "cut", recipe, stop_at_read=30, number=signal.SIGINT)
    second = run(tmp_path / "cut", recipe, stop_at_read=40, number=signal.SIGTERM)
    third = run(tmp_path / "cut", recipe)

    assert [first.ending, second.ending, third.ending] == ["interrupted", "interrupted", "finished"]
    assert 0 < first.step < second.step < third.step == 30
    assert first.step % recipe.training.save_every != 0  # it saved because it was asked to
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    assert (whole.checkpoint / "model.safetensors").read_bytes() == (
        third.checkpoint / "model.safetensors"
    ).read_bytes()


def test_the_log_drops_what_came_after_the_checkpoint(tmp_path):
    """A crash loses the steps since the last save: their lines must not stand twice, nor a torn one stay."""
    recipe = tiny_recipe()
    run(tmp_path, with_training(recipe, steps=20))
    with (tmp_path / LOG_NAME).open("a") as log:
        log.write('{"step": 21, "loss": 1.0}\n{"step": 22, "lo')
    run(tmp_path, recipe)
    steps = [record["step"] for record in read_log(tmp_path / LOG_NAME) if "loss" in record]
    assert steps == list(range(1, 31))


def test_a_finished_run_does_nothing_when_started_again(tmp_path):
    run(tmp_path, tiny_recipe())
    before = figures(tmp_path)
    again = run(tmp_path, tiny_recipe())
    assert (again.ending, again.step) == ("finished", 30)
    assert figures(tmp_path) == before


def test_only_the_last_checkpoints_stay(tmp_path):
    run(tmp_path, with_training(tiny_recipe(), save_every=5, keep=3))
    assert [path.name for path in checkpoints_in(tmp_path)] == [f"checkpoint-{step}" for step in (20, 25, 30)]
    assert not list(tmp_path.glob(".saving-*"))


def test_never_refuses_a_folder_with_checkpoints(tmp_path):
    recipe = with_training(tiny_recipe(), steps=3)
    run(tmp_path, recipe)
    with pytest.raises(UserError, match="holds checkpoint-3: --resume never"):
        train(recipe, tiny_data(), tmp_path, model=tiny_model(), resume="never")


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 3}, {"gradient_accumulation_steps": 1}])
def test_a_run_does_not_go_on_as_another(tmp_path, change):
    """Another seed or batch size would silently read the data in another order."""
    recipe = with_training(tiny_recipe(), steps=3)
    run(tmp_path, recipe)
    name = f"training.{next(iter(change))}"
    with pytest.raises(UserError, match=f"was made with {name}"):
        run(tmp_path, with_training(recipe, **change))


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
    recipe = with_training(tiny_recipe(), steps=3)
    run(tmp_path, recipe)
    data = dataclasses.replace(tiny_data(), vocab_size=300)
    with pytest.raises(UserError, match="has a vocabulary of 259, the data's tokenizer one of 300"):
        train(recipe, data, tmp_path, model=tiny_model())


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    recipe = with_training(tiny_recipe(), steps=3)
    path = run(tmp_path, recipe).checkpoint / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"safetensors" if "safetensors" in name else name):
        run(tmp_path, recipe)


def test_the_sampler_repeats_itself_and_covers_every_sequence():
    order = list(ShuffledForever(10, 25, seed=3))
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert list(ShuffledForever(10, 40, seed=3))[:25] == order  # a longer run starts the same
    assert list(ShuffledForever(10, 25, seed=4)) != order
