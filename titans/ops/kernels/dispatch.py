"""Launching a kernel without asking Triton about every argument again.

`kernel[grid](...)` looks at type, alignment and value of each of 25 to 40 arguments, builds a key from them
and compares all global constants. A linear memory's 13 launches forward and backward were bound by that
(docs/kernels.md, "The host"). What our launches vary in is less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# By kernel (its id: kernels live as long as their modules, and a JITFunction's own hash is slow), device,
# options, dtypes and constants. Triton keeps what it compiled as well: these are references.
_compiled: dict[tuple[Any, ...], Any] = {}
_runtime_arguments: dict[int, int] = {}

_LARGEST_INT32 = 2**31 - 1


def run_kernel(kernel: Any, grid: tuple[int, ...], options: dict[str, int], *arguments: Any) -> None:
    """`kernel[grid](*arguments, **options)`. All arguments are given, in order; constants come last.

    Integers that are no constants must be marked `do_not_specialize` (`functions.SIZES`).
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, **options)
        return
    key = _key(kernel, options, arguments)
    compiled = None if key is None else _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if key is not None:
            _compiled[key] = compiled
        return
    compiled[(*grid, 1, 1)[:3]](*arguments)


def _key(kernel: Any, options: dict[str, int], arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """None where Triton must look itself: a pointer that is not aligned to 16 bytes, an int64."""
    count = _runtime_arguments.get(id(kernel))
    if count is None:
        count = _runtime_arguments[id(kernel)] = sum(
            not parameter.is_constexpr for parameter in kernel.params
        )
        assert all(parameter.is_constexpr for parameter in kernel.params[count:]), kernel.__name__
    parts: list[Any] = [id(kernel), driver.active.get_current_device(), *options.values()]
    for argument in arguments[:count]:
        if isinstance(argument, Tensor):
            if argument.data_ptr() % 16:
                return None
            parts.append(argument.dtype)
        elif argument > _LARGEST_INT32:
            return None
    return (*parts, *arguments[count:])
