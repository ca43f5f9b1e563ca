"""Mined decoys: the sentences in which a model writes, and rows that hold them."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.inference.tiny import randomised
from tests.tasks.test_decoys import sentence_of
from tests.tasks.tiny import tiny_babi, tiny_haystack
from titans.errors import UserError
from titans.nn.memory import MemoryCore
from titans.tasks.dataset import open_tasks
from titans.tasks.decoys import Decoys
from titans.tasks.mining import CONTEXT, largest_steps, mine
from titans.tasks.settings import TaskSettings
from titans.training.recipe import TrainingSettings


def model(variant="mag", **fields):
    return randomised(variant, vocab_size=len(tiny_haystack().tokenizer), **fields)


def memories(net):
    return [module for module in net.modules() if isinstance(module, MemoryCore)]


@pytest.mark.parametrize("variant", ["mag", "mac", "lmm"])
def test_steps_are_those_of_the_gates(variant):
    """One piece of a few rows, persistent tokens before it: the gates' own numbers, memory by memory."""
    net, ids = model(variant), tiny_haystack().ids[:40]
    expected = torch.zeros(40)
    with torch.no_grad():
        for memory in memories(net):
            shares = []
            memory.gates.register_forward_hook(
                lambda gates, args, out, shares=shares: shares.append(
                    (out.theta / torch.tensor(gates.max_steps)).amax((2, 3))
                )
            )
            net(torch.from_numpy(ids.astype(np.int64))[None])
            expected = torch.maximum(expected, torch.cat(shares, dim=1)[0, -40:])
    assert np.allclose(largest_steps(net, ids, rows=1, length=CONTEXT + 1), expected, rtol=1e-5)
    assert all(memory.observer is None for memory in memories(net))


def test_pieces_must_be_longer_than_their_context():
    with pytest.raises(ValueError, match="length: expected more than 64 tokens, got 64"):
        largest_steps(model(), tiny_haystack().ids[:100], length=CONTEXT)


def test_pieces_give_what_one_gives():
    """The gates of one block see the window and the convolution: less than what is read twice."""
    net, ids = model(num_hidden_layers=1, memory_gates_from="attention"), tiny_haystack().ids[:700]
    read = []
    whole = largest_steps(net, ids, rows=1, length=700)
    pieces = largest_steps(net, ids, rows=3, length=CONTEXT + 50, progress=read.append)
    assert np.allclose(whole, pieces, atol=1e-5)
    assert (read[-1], sorted(read)) == (700, read)


def test_mined_are_the_sentences_with_large_steps(tmp_path: Path):
    haystack = tiny_haystack()
    steps = np.zeros(haystack.starts[9], np.float32)
    steps[haystack.starts[3]] = steps[haystack.starts[7] + 1] = 0.5
    steps[haystack.starts[5]] = 0.1
    mined = mine(haystack, steps, 0.2)
    mined.save(tmp_path / "mined.npz")
    assert [sentence_of(mined, i) for i in range(len(mined))] == [sentence_of(haystack, i) for i in (3, 7)]
    assert mined.counts.tolist() == haystack.counts[[3, 7]].tolist()
    with pytest.raises(ValueError, match="least"):
        mine(haystack, steps, 0.6)


def test_decoys_take_turns_with_mined_ones():
    haystack = tiny_haystack()
    mined = haystack.pick(np.array([3, 7]))
    mark = sentence_of(haystack, 20)[-2]
    decoys = Decoys(haystack, [mark], share=1.0, mined=mined)
    drawn = [tuple(ids) for seed in range(40) for ids in decoys.draw(random.Random(seed), 400)]
    of_mined = {tuple(sentence_of(haystack, i)) for i in (3, 7)}
    assert 0.3 < np.mean([ids in of_mined for ids in drawn]) < 0.7
    assert all(ids in of_mined or mark in ids for ids in drawn)


@pytest.mark.parametrize("task", ["niah_single_2", "babilong_qa1"])
def test_rows_hold_mined_sentences(task, tmp_path: Path):
    """From the recipe's field to the row: a sentence of letters that the haystack has nowhere."""
    haystack = tiny_haystack()
    haystack.save(tmp_path / "h.npz")
    strange = haystack.tokenizer.encode(" zqxj zqxj zqxj.", add_special_tokens=False)
    starts = np.array([0, len(strange)])
    mined = replace(haystack, ids=np.array(strange, np.uint16), starts=starts, counts=np.array([9]))
    mined.save(tmp_path / "mined.npz")
    settings = TaskSettings(
        tasks=(task,),
        lengths=(700,),
        haystack=tmp_path / "h.npz",
        babi=tiny_babi(tmp_path / "babi"),
        decoys=0.9,
        mined=tmp_path / "mined.npz",
    )
    rows = open_tasks(settings, TrainingSettings(steps=1, batch_size=1)).train.maker.rows
    texts = [haystack.tokenizer.decode(rows.row(random.Random(seed), 700)[0].tolist()) for seed in range(9)]
    assert any("zqxj zqxj zqxj." in text for text in texts)


def test_mined_sentences_must_fit(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.mined: expected data\.decoys above 0, got 0"):
        TaskSettings(tasks=("niah_single_2",), mined=tmp_path / "mined.npz")
    haystack = tiny_haystack()
    haystack.save(tmp_path / "h.npz")
    replace(haystack, tokenizer_json=haystack.tokenizer_json + " ").save(tmp_path / "mined.npz")
    settings = TaskSettings(
        **{"tasks": ("niah_single_2",), "lengths": (700,), "decoys": 0.5},
        **{"haystack": tmp_path / "h.npz", "mined": tmp_path / "mined.npz"},
    )
    with pytest.raises(UserError, match=r"data\.mined: .* has another tokenizer than data\.haystack"):
        open_tasks(settings, TrainingSettings(steps=1, batch_size=1))
