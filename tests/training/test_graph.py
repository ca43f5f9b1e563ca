"""Training by CUDA graphs is training without. On a CPU a stand-in replays: the buffers are tested."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tasks.test_experiment import figures, tiny_recipe
from titans.errors import UserError
from titans.models import TitansForCausalLM
from titans.training import graph, trainer
from titans.training.data import open_data
from titans.training.recipe import Recipe, TrainingSettings
from titans.training.run import train

PENALTY = 0.5


def logs(recipe: Recipe, out: Path, **training: Any) -> list[dict[str, Any]]:
    recipe = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))
    assert train(recipe, open_data(recipe), out).ending == "finished"
    return figures(out)


def assert_alike(first: list[dict[str, Any]], second: list[dict[str, Any]], tolerance: float) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=tolerance)


@pytest.fixture
def replays(monkeypatch):
    """Names of what was done; a "graph" is here the step itself, run on the same buffers."""
    done: list[str] = []

    def stand_in(step, pool):
        step()
        done.append("recorded")
        return SimpleNamespace(pool=lambda: "pool", replay=lambda: (done.append("replayed"), step()))

    monkeypatch.setattr(graph, "record", stand_in)
    monkeypatch.setattr(trainer, "can_record", lambda device: True)
    return done


def test_graphs_take_the_same_steps(tmp_path, replays):
    """Two lengths of rows, a price that rises, measurements of the memory in between."""
    recipe = tiny_recipe(tmp_path, steps=8, write_penalty=PENALTY, noise_penalty=PENALTY)
    recipe = dataclasses.replace(recipe, logging=dataclasses.replace(recipe.logging, memory_metrics_every=3))
    plain = logs(recipe, tmp_path / "plain")
    assert not replays
    recorded = logs(recipe, tmp_path / "graph", cuda_graph=True)
    assert replays.count("replayed") == 6  # of 8 steps, two are measured
    assert 2 <= replays.count("recorded") < 6  # lengths, perhaps with two numbers of answers
    assert_alike(plain, recorded, 1e-5)
    assert sum({"write_share", "noise_share"} <= set(record) for record in recorded) == 8


def test_a_step_that_is_left_out_changes_nothing(tmp_path, replays, monkeypatch):
    """Gradients lie in buffers: without any, the optimiser must not see the last ones."""
    recipe = tiny_recipe(tmp_path, steps=4, max_skipped_steps=4)
    monkeypatch.setattr(
        trainer.TitansTrainer.__mro__[1], "_get_grad_norm", lambda *args: torch.tensor(torch.inf)
    )
    logs(recipe, tmp_path / "out", cuda_graph=True)
    evaluations = [record["eval_loss"] for record in figures(tmp_path / "out") if "eval_loss" in record]
    assert len(evaluations) == 2
    assert evaluations[0] == evaluations[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_take_the_same_steps(tmp_path, monkeypatch):
    """By Dynamo alone: the compiler behind it takes a minute."""
    recipe = tiny_recipe(tmp_path, steps=3)
    plain = logs(recipe, tmp_path / "plain")
    asked = []

    def compile_blocks(model: TitansForCausalLM) -> None:
        asked.append(model)
        whole(model, backend="eager")

    whole = TitansForCausalLM.compile_blocks
    monkeypatch.setattr(TitansForCausalLM, "compile_blocks", compile_blocks)
    assert_alike(plain, logs(recipe, tmp_path / "compiled", compile=True), 1e-5)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "others", [{"compile": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}]
)
def test_what_it_cannot_be_together_with(others):
    with pytest.raises(UserError, match=r"training\.cuda_graph: expected no compile"):
        TrainingSettings(steps=1, cuda_graph=True, **others)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "model",
    [
        {"variant": "lmm"},
        {"variant": "mag", "window_size": 64, "memory_gates_from": "attention"},
        {"variant": "mac", "segment_size": 64},
        {"variant": "mal", "window_size": 64, "memory_depth": 3},
        {"variant": "attention", "window_size": 0},
    ],
    ids=lambda model: model["variant"],
)
def test_recorded_steps_on_a_gpu(tmp_path, model, precision):
    """fp32 and three layers are the chunked path's; the others the kernels'."""
    prices = {"write_penalty": PENALTY, "noise_penalty": PENALTY}
    recipe = tiny_recipe(tmp_path, steps=8, precision=precision, **prices)
    sizes = {"hidden_size": 64, "memory_head_dim": 64}
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, **sizes, **model))
    plain = logs(recipe, tmp_path / "plain")
    recorded = logs(recipe, tmp_path / "graph", cuda_graph=True)
    assert_alike(plain, recorded, 0.02 if precision == "bf16" else 1e-3)
