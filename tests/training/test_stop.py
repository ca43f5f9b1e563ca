"""A step that would ruin the model must not reach the optimiser, and nothing learnt so far may be lost."""

import dataclasses
import math

import pytest
import torch

from tests.training.tiny import tiny_data, tiny_model, tiny_recipe
from titans.errors import UserError
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.run import train
from titans.training.trainer import TitansTrainer


def poison(monkeypatch, step: int, what: str) -> None:
    """From optimiser step ``step`` on, the loss or a gradient is NaN."""
    original = TitansTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step + 1 >= step:
            if what == "loss":
                loss = loss * math.nan
                self._last_loss = loss
            else:
                next(model.parameters()).grad[0, 0] = math.inf
        return loss

    monkeypatch.setattr(TitansTrainer, "training_step", training_step)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_stops_before_the_optimiser_and_keeps_the_weights(tmp_path, monkeypatch, what):
    recipe = tiny_recipe()
    good = train(
        dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, save_every=14, keep=3)),
        tiny_data(),
        tmp_path / "good",
        model=tiny_model(),
    )
    assert good.ending == "finished"
    poison(monkeypatch, 15, what)
    bad = train(recipe, tiny_data(), tmp_path / "bad", model=tiny_model())
    assert (bad.ending, bad.step) == ("diverged", 14)
    assert "step 15: loss" in bad.message
    assert "before the optimiser" in bad.message
    # Saved although step 14 is no multiple of save_every, and equal to the run that met no bad step.
    assert bad.checkpoint.name == "checkpoint-14"
    expected = tmp_path / "good" / "checkpoint-14" / "model.safetensors"
    assert (bad.checkpoint / "model.safetensors").read_bytes() == expected.read_bytes()
    assert read_log(tmp_path / "bad" / LOG_NAME)[-1]["step"] == 14


def test_steps_left_out_are_counted_over_an_interruption(tmp_path, monkeypatch):
    """A run that diverges must not be allowed as many bad steps again each time it goes on."""
    recipe = tiny_recipe()
    poison(monkeypatch, 3, "gradient")
    for steps, ending, step in ((4, "finished", 4), (9, "diverged", 4)):
        training = dataclasses.replace(recipe.training, steps=steps, max_skipped_steps=2)
        again = dataclasses.replace(recipe, training=training)
        result = train(again, tiny_data(), tmp_path, model=tiny_model())
        assert (result.ending, result.step) == (ending, step)
    steps = [record for record in read_log(tmp_path / LOG_NAME) if "loss" in record]
    assert steps[-1]["skipped_steps"] == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A model that starts with NaN fails in its first step and leaves no checkpoint that hides it."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    result = train(tiny_recipe(), tiny_data(), tmp_path, model=model)
    assert (result.ending, result.step, result.checkpoint) == ("diverged", 0, None)


def test_a_model_with_too_small_a_vocabulary_is_refused(tmp_path):
    data = dataclasses.replace(tiny_data(), vocab_size=1000)
    with pytest.raises(
        UserError, match="the model has a vocabulary of 259, the data's tokenizer one of 1000"
    ):
        train(tiny_recipe(), data, tmp_path, model=tiny_model())


def test_weight_decay_falls_on_matrices_only(tmp_path):
    """Decay on norm gains, or on the memory's initial weights and gates, pulls towards a dead model."""
    trainer = TitansTrainer(
        tiny_model(),
        settings=tiny_recipe().training,
        out=tmp_path,
        train_dataset=tiny_data().train,
        eval_dataset=None,
        provenance={},
    )
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    others = {name for name, _ in trainer.model.named_parameters()} - decayed
    assert others
    assert all("norm" in name for name in others)
    assert "model.embed_tokens.weight" in decayed
    assert {name for name in decayed if "norm" in name} == set()
