"""What an emulated Gluon kernel computes with: scalars, register tensors, pointers, and the errors it can meet.

`Int` is a kernel integer: division truncates as in C, and a result that leaves its 32 or 64 bits is an error instead
of a silent wrap. A plain Python number is a literal or a constexpr: it takes the type of what it meets, and has no
width and no method `to` of its own (a kernel writes `gl.cast`). `Tensor` is a register tensor, or a floating-point
scalar, around a torch tensor of the same type. `Pointer` is one address, or a tensor of them, in the storage of a host
tensor, checked against its bounds at each access.

Not emulated: layouts (every tensor is one torch tensor, whatever threads hold it), rounding that differs between torch
and the hardware (no FMA contraction), `~` of a comparison of scalars (Python's own: write `not`), types and methods
that no kernel of ours needs (an error when used).
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from kernels.formats import E4M3_MAX

# The globals of an emulated kernel carry this name, so that a report finds the kernel's line in the stack.
KERNEL_MARK = "__emulated_gluon_kernel__"
TORCH_DTYPES = {
    gl.float8e4nv: torch.float8_e4m3fn,
    **{getattr(gl, name): getattr(torch, name) for name in ("bfloat16", "float32", "int32", "int64")},
}


class KernelError(Exception):
    """Something that a GPU would hang on, fault on, or silently get wrong."""


class Deadlock(KernelError):
    """No partition can run; the message lists what each of them waits for."""


class Race(KernelError):
    """Two accesses to shared memory that nothing orders, or a missing proxy fence between them."""


class BarrierMisuse(KernelError):
    """An mbarrier whose arrivals, bytes or phases do not add up."""


class OutOfRange(KernelError):
    """A pointer, slice or index outside its memory, or a scalar outside its type."""


class Misuse(KernelError):
    """An operation used against its contract: shapes, types, limits, unfinished work."""


def where() -> str:
    """`function:line` of the kernel source being executed."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and KERNEL_MARK not in frame.f_globals:
        frame = frame.f_back
    return f"{frame.f_code.co_name}:{frame.f_lineno}" if frame is not None else "?"


class Int(int):
    """A kernel integer of 32 or 64 bits: C division, and leaving its width is an error."""

    bits: int

    def __new__(cls, value: int, bits: int = 32) -> Int:
        if not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise OutOfRange(f"scalar {int(value)} does not fit in int{bits}, at {where()}")
        self = super().__new__(cls, value)
        self.bits = bits
        return self

    def to(self, dtype: Any) -> Int:
        assert dtype.is_int(), dtype
        return Int(self, dtype.primitive_bitwidth)

    def __neg__(self) -> Int:
        return Int(-int(self), self.bits)

    def __invert__(self) -> Int:
        return Int(~int(self), self.bits)


class Tensor:
    """Values in registers; `pending` makes them later: a shared load not yet taken, or an unfinished wgmma."""

    def __init__(self, value: torch.Tensor | None = None, *, pending: Callable[[], torch.Tensor] | None = None) -> None:
        self._value, self.pending = value, pending

    @property
    def value(self) -> torch.Tensor:
        """The torch tensor, taken now if it was pending."""
        if self.pending is not None:
            self.settle(self.pending())
        assert self._value is not None
        return self._value

    def settle(self, value: torch.Tensor) -> None:
        self._value, self.pending = value, None

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    def to(self, dtype: Any) -> Int | Tensor:
        """The value in another Gluon type; FP8 saturates, as on the hardware."""
        return from_torch(cast_to(self.value, TORCH_DTYPES[dtype]))

    def reshape(self, *shape: Any) -> Tensor:
        return Tensor(self.value.reshape(*shape))

    def permute(self, *order: Any) -> Tensor:
        return Tensor(self.value.permute(*order))

    def split(self) -> tuple[Tensor, Tensor]:
        return Tensor(self.value[..., 0]), Tensor(self.value[..., 1])

    def __getitem__(self, key: Any) -> Tensor:
        if any(part not in (None, slice(None)) for part in (key if isinstance(key, tuple) else (key,))):
            raise Misuse(f"only None and : can index a register tensor, at {where()}")
        return Tensor(self.value[key])

    def __bool__(self) -> bool:
        if self.value.numel() != 1:
            raise Misuse(f"a tensor of shape {self.shape} is no branch condition, at {where()}")
        return bool(self.value)


class Pointer:
    """Addresses in a host tensor's storage, in elements: one offset, or a torch tensor of them."""

    def __init__(self, storage: torch.Tensor, offset: int | torch.Tensor) -> None:
        self.storage, self.offset = storage, offset

    @classmethod
    def to_first_element(cls, tensor: torch.Tensor) -> Pointer:
        """What a kernel gets for a tensor argument."""
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        return cls(storage, int(tensor.storage_offset()))

    def __add__(self, other: Any) -> Pointer:
        step = other.value.long() if isinstance(other, Tensor) else int(other)
        return Pointer(self.storage, self.offset + step)

    def select(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The offsets, and which of them are on (None: all), after the bounds check."""
        offset, is_on = torch.as_tensor(self.offset), None
        if mask is not None:
            offset, is_on = torch.broadcast_tensors(offset, torch.as_tensor(raw(mask)))
            offset = torch.where(is_on, offset, 0)
        low, high, size = int(offset.min()), int(offset.max()), self.storage.numel()
        if low < 0 or high >= size:
            raise OutOfRange(f"global offset {low}..{high} outside 0..{size - 1}, at {where()}")
        return offset, is_on


def raw(value: Any) -> Any:
    """The torch tensor of a register tensor; any other value as it is."""
    return value.value if isinstance(value, Tensor) else value


def from_torch(value: torch.Tensor) -> Int | Tensor:
    """A torch value as the kernel sees it: an integer without dims must work as loop bound and coordinate."""
    if value.ndim or value.is_floating_point() or value.dtype == torch.bool:
        return Tensor(value)
    return Int(int(value), 8 * value.element_size())


def cast_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value in another torch type. The hardware's conversion to FP8 saturates, torch's gives NaN."""
    return (value.float().clamp(-E4M3_MAX, E4M3_MAX) if dtype == torch.float8_e4m3fn else value).to(dtype)


def by_name(*functions: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {function.__name__: function for function in functions}


def _operand(value: Any, other: Any) -> torch.Tensor:
    """One operand as a torch tensor; a literal takes the other operand's type where that can hold it."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Int):
        return torch.tensor(int(value), dtype=getattr(torch, f"int{value.bits}"))
    has_type = isinstance(other, torch.Tensor) and other.dtype != torch.bool
    if has_type and (other.is_floating_point() or isinstance(value, int)):
        return torch.tensor(value, dtype=other.dtype)
    return torch.tensor(value, dtype={float: torch.float32, bool: torch.bool, int: torch.int32}[type(value)])


def _operands(left: Any, right: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in their common type, which torch would not find for a tensor without dims."""
    left, right = raw(left), raw(right)
    left, right = _operand(left, right), _operand(right, left)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def _elementwise(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], Int | Tensor]:
    """A torch function of two tensors as an operation on kernel values."""
    return lambda left, right: from_torch(function(*_operands(left, right)))


def truncating_division(left: int, right: int) -> int:
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


# Method name without underscores -> the operation; `_install_operators` adds the reflected one.
INT_OPERATORS: dict[str, Callable[[int, int], int]] = {
    **{
        name: getattr(operator, f"__{name}__") for name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift")
    },
    "floordiv": truncating_division,
    "mod": lambda left, right: left - right * truncating_division(left, right),
}
TENSOR_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul")},
    **{name: getattr(torch, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "truediv": torch.true_divide,
    "floordiv": functools.partial(torch.div, rounding_mode="trunc"),
    "mod": torch.fmod,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


def width(value: int) -> int:
    """The bits of a kernel integer, or those that Triton gives a literal."""
    return value.bits if isinstance(value, Int) else 32 if -(1 << 31) <= value < 1 << 31 else 64


def _int_method(name: str) -> Callable[[Any, Any], Int | Tensor]:
    """The operation of an `Int`: with an integer it is an integer of the wider type, else one on tensors."""
    on_tensors = _elementwise(TENSOR_OPERATORS[name])

    def method(left: Any, right: Any) -> Int | Tensor:
        if name in INT_OPERATORS and isinstance(left, int) and isinstance(right, int):
            return Int(INT_OPERATORS[name](int(left), int(right)), max(width(left), width(right)))
        return on_tensors(left, right)

    return method


def _reflected(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda right, left: method(left, right)


def _install_operators() -> None:
    for name, function in TENSOR_OPERATORS.items():
        for kind, method in ((Int, _int_method(name)), (Tensor, _elementwise(function))):
            setattr(kind, f"__{name}__", method)
            setattr(kind, f"__r{name}__", _reflected(method))
    for name in COMPARISONS:
        setattr(Tensor, f"__{name}__", _elementwise(getattr(torch, name)))


_install_operators()
