"""Launching a kernel without asking Triton about every argument again.

`kernel[grid](...)` looks at type, alignment and value of each of 25 to 60 arguments, builds a key from them
and compares all global constants. A linear memory's 13 launches forward and backward were bound by that
(docs/kernels.md). What our launches vary in is less.
"""

from __future__ import annotations

from functools import reduce
from operator import attrgetter, or_
from typing import Any

from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# By kernel (its id: kernels live as long as their modules, and a JITFunction's own hash is slow), device,
# options, dtypes and constants. Triton keeps what it compiled as well: these are references.
_compiled: dict[tuple[Any, ...], Any] = {}
_counts: dict[int, tuple[int, int]] = {}

_LARGEST_INT32 = 2**31 - 1
_dtype_of = attrgetter("dtype")


def run_kernel(kernel: Any, grid: tuple[int, ...], options: dict[str, int], *arguments: Any) -> None:
    """`kernel[grid](*arguments, **options)`. All arguments are given: tensors, then integers, then constants.

    The integers must be marked `do_not_specialize` (`functions.SIZES`).
    """
    if not isinstance(kernel, JITFunction):  # the interpreter's
        is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        assert all(is_tensor[: sum(is_tensor)]), kernel.__name__
        kernel[grid](*arguments, **options)
        return
    tensors, end = _counts.get(id(kernel)) or _count(kernel, arguments)
    addresses = [tensor.data_ptr() for tensor in arguments[:tensors]]
    if reduce(or_, addresses) % 16 or max(arguments[tensors:end], default=0) > _LARGEST_INT32:
        kernel[grid](*arguments, **options)  # compiled in another way: Triton must look itself
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, *options.values(), *map(_dtype_of, arguments[:tensors]), *arguments[end:])
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **options)
    else:
        # Addresses as they are: of every tensor the launcher would ask the driver what it points to.
        compiled[(*grid, 1, 1)[:3]](*addresses, *arguments[tensors:])


def _count(kernel: Any, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Where the tensors among a kernel's arguments end, and where its constants begin."""
    is_constant = [parameter.is_constexpr for parameter in kernel.params]
    end = len(is_constant) - sum(is_constant)
    is_tensor = [isinstance(argument, Tensor) for argument in arguments[:end]]
    tensors = sum(is_tensor)
    assert all([*is_constant[end:], *is_tensor[:tensors]]), kernel.__name__
    _counts[id(kernel)] = tensors, end
    return tensors, end
