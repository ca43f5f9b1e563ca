"""Launches of kernels that are compiled already: what reaches them, and when Triton looks at it again.

A stand-in takes the place of a compiled kernel and of the driver: neither exists without a GPU.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from titans.ops.kernels import dispatch

OPTIONS = {"num_warps": 4, "num_stages": 1}


class Compiled:
    """What Triton returns from the first launch."""

    def __init__(self, started):
        self.started = started

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append(("again", grid, arguments))


class Kernel:
    """`(a, b, size, WIDTH: tl.constexpr)`"""

    __name__ = "kernel"

    def __init__(self, started):
        self.started = started
        self.params = [SimpleNamespace(is_constexpr=constant) for constant in (False, False, False, True)]

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.started.append(("by Triton", grid, arguments))
            return Compiled(self.started)

        return launch


@pytest.fixture
def launch(monkeypatch):
    """`run_kernel` of one such kernel; returns how it was started, with which grid and arguments."""
    started = []
    kernel = Kernel(started)
    device = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(dispatch, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(dispatch, "JITFunction", Kernel)
    for name in ("_compiled", "_counts"):
        monkeypatch.setattr(dispatch, name, {})

    def run(*arguments, grid=(2,), options=OPTIONS):
        dispatch.run_kernel(kernel, grid, options, *arguments)
        return started.pop()

    return run


def test_the_second_launch_asks_triton_nothing(launch):
    a, b, c = torch.zeros(3, 8)
    assert launch(a, b, 5, 16) == ("by Triton", (2,), (a, b, 5, 16))
    addresses = (c.data_ptr(), b.data_ptr())
    assert launch(c, b, 7, 16, grid=(3, 4)) == ("again", (3, 4, 1), (*addresses, 7, 16))


@pytest.mark.parametrize(
    "change",
    [{"b": torch.zeros(8, dtype=torch.float16)}, {"width": 32}, {"options": OPTIONS | {"num_warps": 8}}],
    ids=["dtype", "constant", "options"],
)
def test_what_is_compiled_anew(change, launch):
    a = torch.zeros(8)

    def start(b=a, width=16, options=OPTIONS):
        return launch(a, b, 5, width, options=options)[0]

    assert [start(), start(), start(**change), start(**change), start()] == [
        *("by Triton", "again"),
        *("by Triton", "again", "again"),
    ]


def test_what_triton_must_look_at_every_time(launch):
    """It compiles for addresses that are multiples of 16 and for integers of 32 bits, or for others."""
    a = torch.zeros(8)
    for odd in ((a[1:], a, 5, 16), (a, a[3:], 5, 16), (a, a, 2**31, 16)):
        launch(a, a, 5, 16)
        assert [launch(*odd)[0] for _ in range(2)] == ["by Triton"] * 2
    assert launch(a, a[4:], 2**31 - 1, 16)[0] == "again"
