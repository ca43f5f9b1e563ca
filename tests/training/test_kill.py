"""SIGKILL at any moment, in the middle of a save too, leaves a whole checkpoint to go on from."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.tiny import tiny_data, tiny_model, tiny_recipe
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.checkpoints import checkpoints_in
from titans.training.run import check_checkpoint, train

ROOT = Path(__file__).parents[2]

# Saves after every step, slowly: publish() waits between the files and the rename, where a kill hurts most.
PROGRAM = """
import dataclasses, sys, time
from pathlib import Path
import torch
from tests.training.tiny import tiny_data, tiny_model, tiny_recipe
from titans.training import trainer
torch.set_num_threads(1)
publish = trainer.publish
def slow_publish(staged, final):
    if final.name == "checkpoint-3":
        (staged / "optimizer.pt").write_bytes(b"half")
        print("in the middle of a save", flush=True)
        time.sleep(60)
    publish(staged, final)
trainer.publish = slow_publish
recipe = tiny_recipe()
from titans.training.run import train
settings = dataclasses.replace(recipe.training, save_every=1, keep=2)
train(dataclasses.replace(recipe, training=settings), tiny_data(), Path(sys.argv[1]), model=tiny_model())
"""


def test_a_kill_in_the_middle_of_a_save_costs_nothing_but_that_save(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(out)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().strip() == b"in the middle of a save"
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL

    assert list(
        out.glob(".saving-*")
    )  # the torn save is there, under a name that nobody takes for a checkpoint
    assert [path.name for path in checkpoints_in(out)] == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in checkpoints_in(out):
        check_checkpoint(checkpoint)

    resumed = train(tiny_recipe(), tiny_data(), out, model=tiny_model())
    assert resumed.ending == "finished"
    assert not list(out.glob(".saving-*"))
    train(tiny_recipe(), tiny_data(), tmp_path / "whole", model=tiny_model())
    losses, expected = (
        [(record["step"], record["loss"]) for record in read_log(folder / LOG_NAME) if "loss" in record]
        for folder in (out, tmp_path / "whole")
    )
    assert losses == expected


@pytest.mark.slow
def test_kills_at_arbitrary_moments(tmp_path):
    """Three runs in a row, each killed a little after it started stepping; whatever is left must be whole."""
    out = tmp_path / "run"
    program = PROGRAM.replace('final.name == "checkpoint-3"', "False").replace("steps=30", "steps=10_000")
    for extra in (0.0, 0.05, 0.11):
        before = len(read_log(out / LOG_NAME))
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(out)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(read_log(out / LOG_NAME)) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(extra)
        process.kill()
        process.wait(timeout=30)
        for checkpoint in checkpoints_in(out):
            check_checkpoint(checkpoint)
    assert train(tiny_recipe(), tiny_data(), out, model=tiny_model()).ending == "finished"
