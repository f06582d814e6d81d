"""The `gl.*` operations of an emulated Gluon kernel: memory, shapes, arithmetic, and splitting into partitions.

Each function here stands for the Gluon function of its name, or for the one its docstring names, and takes the same
arguments; layouts, cache hints and alignment hints are accepted and ignored. A masked-off element without a given
value is NaN (the smallest integer in integer types), so that using it shows. Global memory is checked for bounds only.

Not emulated, and an error when called: atomics, scans and reductions with a function of the kernel's own, gathers,
inline assembly, and whatever else is missing in `OPERATIONS`. Not checked: what only the compiler can say, for example
types that change between iterations, or two programs that write one place of global memory.
"""

from __future__ import annotations

import linecache
import math
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
    cast_to,
    elementwise,
    from_torch,
    operands,
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
    if is_on is not None and not bool(is_on.all()):
        offset, data = offset[is_on], data[is_on]
    pointer.storage[offset] = data


def allocate_shared_memory(element_ty: Any, shape: Sequence[int], layout: Any, value: Tensor | None = None) -> Shared:
    """`gl.allocate_shared_memory`; reports call the buffer by the name it is assigned to."""
    program = now().program
    caller = sys._getframe(1)
    name = linecache.getline(caller.f_code.co_filename, caller.f_lineno).split("=")[0].strip() or "shared"
    view = Shared.whole(Allocation(shape, TORCH_DTYPES[element_ty], layout=layout, name=name))
    program.shared_bytes += view.size_bytes
    if program.shared_bytes > SHARED_LIMIT_BYTES:
        raise Misuse(f"{program.shared_bytes} bytes of shared memory, {SHARED_LIMIT_BYTES} exist, at {where()}")
    if value is not None:
        view.store(value)
    return view


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable[..., Any], Sequence[Any]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int] | None = None,
) -> Any:
    """`gl.warp_specialize`: each function is a partition, the first returns the result."""
    workers = len(functions_and_args) - 1
    for what, given in (("warp", worker_num_warps), ("register", worker_num_regs)):
        if given is not None and len(given) != workers:
            raise Misuse(f"warp_specialize: {len(given)} {what} counts for {workers} workers, at {where()}")
    results: dict[int, Any] = {}

    def body(position: int, function: Callable[..., Any], args: Sequence[Any]) -> Callable[[], None]:
        def run() -> None:
            results[position] = function(*args)

        return run

    now().machine.split(
        [
            (f"{function.__name__}[{position}]", body(position, function, args))
            for position, (function, args) in enumerate(functions_and_args)
        ]
    )
    return results[0]


def kernel_range(*bounds: int, **_: Any) -> Iterator[Int]:
    """`range` and `tl.range`: the loop variable is a kernel integer."""
    for position in range(*(int(bound) for bound in bounds)):
        yield Int(position)


def static_range(*bounds: int) -> Iterator[int]:
    """`gl.static_range`: unrolled, so its bounds must be constexpr, and so is the loop variable."""
    if any(isinstance(bound, Int) for bound in bounds):
        raise Misuse(f"static_range of a run-time value, at {where()}")
    yield from range(*bounds)


def constexpr(value: Any) -> Any:
    """`gl.constexpr(value)` inside a kernel: the value."""
    return value


def program_id(axis: int) -> Int:
    return Int(now().program.index[axis])


def num_programs(axis: int) -> Int:
    return Int(now().program.grid[axis])


def cdiv(x: Any, div: Any) -> Any:
    """`gl.cdiv`: constexpr for two constexpr."""
    if isinstance(x, Tensor) or isinstance(div, Tensor):
        return (x + (div - 1)) // div
    result = truncating_division(int(x) + int(div) - 1, int(div))
    return from_ints(result, x, div)


def from_ints(result: int, *sources: Any) -> int:
    """A result of integers: a literal if all of them are, else of the widest one's type."""
    widths = [source.bits for source in sources if isinstance(source, Int)]
    return Int(result, max(widths)) if widths else result


def minimum(x: Any, y: Any, **_: Any) -> Any:
    both = isinstance(x, int) and isinstance(y, int)
    return from_ints(min(x, y), x, y) if both else elementwise(torch.minimum)(x, y)


def maximum(x: Any, y: Any, **_: Any) -> Any:
    both = isinstance(x, int) and isinstance(y, int)
    return from_ints(max(x, y), x, y) if both else elementwise(torch.maximum)(x, y)


def select(condition: Any, x: Any, y: Any) -> Any:
    if isinstance(condition, int):
        chosen = x if condition else y
        if isinstance(x, int) and isinstance(y, int):
            return from_ints(chosen, x, y)
        if not isinstance(x, Tensor) and not isinstance(y, Tensor):
            return chosen
        condition = Tensor(torch.tensor(bool(condition)))
    if isinstance(x, Pointer):
        return Pointer(x.storage, torch.where(condition.value, torch.as_tensor(x.offset), torch.as_tensor(y.offset)))
    return from_torch(torch.where(condition.value, *operands(x, y)))


def arange(start: int, end: int, layout: Any = None) -> Tensor:
    return Tensor(torch.arange(start, end, dtype=torch.int32))


def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Tensor:
    return full(shape, 0, dtype)


def full(shape: Sequence[int], value: Any, dtype: Any, layout: Any = None) -> Tensor:
    data = cast_to(torch.as_tensor(raw(value)), TORCH_DTYPES[dtype])
    return Tensor(data.expand(*shape).clone())


def zeros_like(input: Tensor, **_: Any) -> Tensor:
    return Tensor(torch.zeros_like(input.value))


def full_like(input: Tensor, value: Any, **_: Any) -> Tensor:
    return full(input.shape, value, input.dtype)


def cast(input: Any, dtype: Any, **_: Any) -> Any:
    if isinstance(input, int) and not isinstance(input, Int):
        input = Int(input, 64)
    return (Tensor(torch.tensor(input)) if isinstance(input, float) else input).to(dtype)


def join(x: Tensor, y: Tensor) -> Tensor:
    """`gl.join`: a new last dim of extent 2."""
    return Tensor(torch.stack([x.value, y.value], -1))


def fma(x: Any, y: Any, z: Any) -> Any:
    """`gl.fma`, rounded twice."""
    return x * y + z


def unchanged(value: Any, *_: Any, **__: Any) -> Any:
    """A hint or a layout change: the same values."""
    return value


def nothing(*_: Any, **__: Any) -> None:
    """Printing, and barriers of the threads of a partition: no effect here."""


def static_assert(condition: Any, message: str = "") -> None:
    """`gl.static_assert`, and `gl.device_assert` of a scalar or tensor."""
    holds = bool(condition.value.all()) if isinstance(condition, Tensor) else bool(condition)
    if not holds:
        raise Misuse(f"assertion {message!r} at {where()}")


def _four_warps() -> int:
    return 4


def _one_cta() -> int:
    return 1


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def apply(x: Any, **_: Any) -> Any:
        return from_torch(function(torch.as_tensor(raw(x))))

    return apply


def _absolute(x: Any) -> Any:
    return abs(x) if isinstance(x, int) else from_torch(x.value.abs())


# Functions of Gluon's own name, methods of a register tensor, hints without effect, and the rest.
OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        function.__name__: function
        for function in (
            *(
                allocate_shared_memory,
                arange,
                cast,
                cdiv,
                constexpr,
                fma,
                full,
                full_like,
                join,
                load,
                maximum,
                minimum,
            ),
            *(num_programs, program_id, static_assert, static_range, store, warp_specialize, zeros, zeros_like),
        )
    },
    **{name: getattr(Tensor, name) for name in ("expand_dims", "max", "min", "permute", "reshape", "split", "sum")},
    **dict.fromkeys(("assume", "convert_layout", "max_constancy", "max_contiguous", "multiple_of"), unchanged),
    **dict.fromkeys(("barrier", "device_print", "static_print", "thread_barrier"), nothing),
    "abs": _absolute,
    "device_assert": static_assert,
    "num_ctas": _one_cta,
    "num_warps": _four_warps,
    "set_auto_layout": unchanged,
    "where": select,
    **{
        name: _unary(getattr(torch, name))
        for name in ("ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "rsqrt", "sin", "sqrt")
    },
}
