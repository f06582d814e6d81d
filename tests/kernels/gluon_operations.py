"""The `gl.*` operations of an emulated Gluon kernel: memory, shapes, arithmetic, and splitting into partitions.

Each function here stands for the Gluon function of its name, or for the one its docstring names, and takes the same
arguments; layouts and cache hints are accepted and ignored. A masked-off element without a given value is NaN (the
smallest integer in integer types), so that using it shows. Global memory is checked for bounds only.

Not emulated, and an error when called: whatever no kernel of ours calls, and so is missing in `OPERATIONS`. Not
checked: what only the compiler can say, for example types that change between iterations, or two programs that write
one place of global memory.
"""

from __future__ import annotations

import functools
import linecache
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.kernels.gluon_machine import now
from tests.kernels.gluon_shared import Allocation, Shared
from tests.kernels.gluon_values import (
    TORCH_DTYPES,
    Int,
    Misuse,
    Pointer,
    Tensor,
    by_name,
    cast_to,
    from_torch,
    raw,
    truncating_division,
    where,
)

# What one Hopper CTA may have: 227 KiB.
SHARED_LIMIT_BYTES = 227 * 1024


def load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Int | Tensor:
    offset, is_on = pointer.select(mask)
    value = pointer.storage[offset]
    if is_on is not None:
        fill = torch.as_tensor(math.nan if other is None else raw(other)).to(value.dtype)
        value = torch.where(is_on, value, fill)
    return from_torch(value)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    offset, is_on = pointer.select(mask)
    data = cast_to(torch.as_tensor(raw(value)), pointer.storage.dtype).expand(offset.shape)
    if is_on is not None:
        offset, data = offset[is_on], data[is_on]
    pointer.storage[offset] = data


def allocate_shared_memory(element_ty: Any, shape: Sequence[int], layout: Any) -> Shared:
    """`gl.allocate_shared_memory`; reports call the buffer by the name it is assigned to."""
    program = now().program
    caller = sys._getframe(1)
    name = linecache.getline(caller.f_code.co_filename, caller.f_lineno).split("=")[0].strip() or "shared"
    view = Shared.whole(Allocation(shape, TORCH_DTYPES[element_ty], layout=layout, name=name))
    program.shared_bytes += view.size_bytes
    if program.shared_bytes > SHARED_LIMIT_BYTES:
        raise Misuse(f"{program.shared_bytes} bytes of shared memory, {SHARED_LIMIT_BYTES} exist, at {where()}")
    return view


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], Sequence[Any]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int],
) -> None:
    """`gl.warp_specialize`: each function is a partition; none returns a result."""
    workers = len(functions_and_args) - 1
    for what, given in (("warp", worker_num_warps), ("register", worker_num_regs)):
        if len(given) != workers:
            raise Misuse(f"warp_specialize: {len(given)} {what} counts for {workers} workers, at {where()}")
    now().machine.split(
        [
            (f"{function.__name__}[{position}]", functools.partial(function, *args))
            for position, (function, args) in enumerate(functions_and_args)
        ]
    )


def kernel_range(*bounds: int, **_: Any) -> Iterator[Int]:
    """`range` and `tl.range`: the loop variable is a kernel integer."""
    for position in range(*(int(bound) for bound in bounds)):
        yield Int(position)


def static_range(*bounds: int) -> Iterator[int]:
    """`gl.static_range`: unrolled, so its bounds must be constexpr, and so is the loop variable."""
    if any(isinstance(bound, Int) for bound in bounds):
        raise Misuse(f"static_range of a run-time value, at {where()}")
    yield from range(*bounds)


def program_id(axis: int) -> Int:
    return Int(now().program.index[axis])


def num_programs(axis: int) -> Int:
    return Int(now().program.grid[axis])


def _of_ints(function: Callable[..., int]) -> Callable[..., int]:
    """An operation on integers: its result is a literal if all of them are, else of the widest one's type."""

    def apply(*values: int) -> int:
        result = function(*map(operator.index, values))
        widths = [value.bits for value in values if isinstance(value, Int)]
        return Int(result, max(widths)) if widths else result

    return apply


def select(condition: Any, x: int, y: int) -> int:
    """`gl.where` of integers."""
    return _of_ints(lambda x, y: x if condition else y)(x, y)


def arange(start: int, end: int, layout: Any) -> Tensor:
    return Tensor(torch.arange(start, end, dtype=torch.int32))


def zeros(shape: Sequence[int], dtype: Any, layout: Any) -> Tensor:
    return Tensor(torch.zeros(*shape, dtype=TORCH_DTYPES[dtype]))


def cast(input: Any, dtype: Any) -> Any:
    return (Int(input, 64) if type(input) is int else input).to(dtype)


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Misuse(f"assertion {message!r} at {where()}")


OPERATIONS: dict[str, Callable[..., Any]] = {
    **by_name(
        allocate_shared_memory, arange, cast, load, num_programs, program_id, static_assert, static_range, store,
        warp_specialize, zeros,
    ),
    **{name: getattr(Tensor, name) for name in ("permute", "reshape", "split")},
    "cdiv": _of_ints(lambda x, y: truncating_division(x + y - 1, y)),
    "maximum": _of_ints(max),
    "minimum": _of_ints(min),
    "where": select,
}  # fmt: skip
