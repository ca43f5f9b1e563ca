"""The serial kernels of a two-layer memory, its hidden width split over programs that wait for each other.

Triton's interpreter runs the programs of a launch one after another. Here every launch becomes as many
processes as a head has parts, over shared memory: each takes the next place when it has finished its last, as
a core of a GPU does.
"""

import os
import time

import pytest
import torch

from titans.ops import MemorySpec
from titans.testing import evaluate, random_inputs, relative_error

pytest.importorskip("triton")
from titans.ops.kernels import mlp_passes
from titans.ops.kernels.launch import Call, Launch

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="test_kernels.py runs the same programs on the card"
    ),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

COLUMNS = 16
SECONDS = 60


class InProcesses:
    """Launches `kernel` as `parts` processes that share its tensors."""

    def __init__(self, kernel, parts):
        self.kernel, self.parts, self.launches = kernel, parts, 0

    def __getitem__(self, grid):
        (programs,) = grid
        assert programs % self.parts == 0
        self.launches += 1

        def launch(*arguments, **options):
            shared = {id(a): a.clone().share_memory_() for a in arguments if isinstance(a, torch.Tensor)}
            given = [shared.get(id(a), a) for a in arguments]
            children = [self._start(given, programs // self.parts, options) for _ in range(self.parts)]
            self._wait(children)
            for argument in arguments:
                if isinstance(argument, torch.Tensor):
                    argument.copy_(shared[id(argument)])

        return launch

    def _start(self, arguments, programs, options):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                self.kernel[(programs,)](*arguments, **options)
                code = 0
            finally:
                os._exit(code)
        return child

    def _wait(self, children):
        deadline = time.monotonic() + SECONDS
        codes = {}
        while len(codes) < len(children) and time.monotonic() < deadline:
            for child in children:
                if child not in codes:
                    done, status = os.waitpid(child, os.WNOHANG)
                    if done:
                        codes[child] = status
            time.sleep(0.01)
        for child in children:
            if child not in codes:
                os.kill(child, 9)
                os.waitpid(child, 0)
        assert list(codes.values()) == [0] * len(children), "a program failed, or waits for ever"


@pytest.mark.parametrize("expansion", [2, 4])
def test_parts_agree_with_the_oracle(expansion, monkeypatch):
    """Outputs, final state and every gradient, several heads, rows and chunks: more places than processes."""
    spec = MemorySpec(dim=16, depth=2, expansion=expansion)
    # No step of a row is empty: of a place without work one process could take both parts, and end early.
    inputs = random_inputs(spec, batch=2, tokens=49, position=[15, 15])
    expected = evaluate(inputs, "chunked")
    parts = spec.layer_shapes[0][1] // COLUMNS
    monkeypatch.setattr(Call, "one_after_another", False)
    kernels = []
    for name, launch in (("mlp_write", "WRITE"), ("mlp_write_backward", "WRITE_BACKWARD")):
        kernels.append(InProcesses(getattr(mlp_passes, name), parts))
        monkeypatch.setattr(mlp_passes, name, kernels[-1])
        monkeypatch.setattr(mlp_passes, launch, Launch(warps=4, block=COLUMNS))
    actual = evaluate(inputs.cast(torch.float32), "triton")
    assert [kernel.launches for kernel in kernels] == [4 + 1, 1]  # of four segments, which become one launch
    for name, value in expected.items():
        if value.is_floating_point() and value.numel():
            assert relative_error(actual[name], value) < 1e-4, name
