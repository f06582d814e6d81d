"""What an emulated Gluon kernel computes with: scalars, register tensors, pointers, and the errors it can meet.

`Int` is a kernel integer: division truncates as in C, and a result that leaves its 32 or 64 bits is an error instead
of a silent wrap. A plain Python number is a literal or a constexpr: it takes the type of what it meets, and has no
width and no method `to` of its own (a kernel writes `gl.cast`). `Tensor` is a register tensor, or a floating-point
scalar, around a torch tensor of the same type. `Pointer` is one address, or a tensor of them, in the storage of a host
tensor, checked against its bounds at each access.

Not emulated: layouts (every tensor is one torch tensor, whatever threads hold it), rounding that differs between torch
and the hardware (no FMA contraction, exact exp and rsqrt), `~` of a comparison of scalars (Python's own: write `not`).
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from triton.experimental.gluon import language as gl

# The globals of an emulated kernel carry this name, so that a report finds the kernel's line in the stack.
KERNEL_MARK = "__emulated_gluon_kernel__"
TORCH_DTYPES = {
    gl.float8e4nv: torch.float8_e4m3fn,
    gl.float8e5: torch.float8_e5m2,
    gl.int1: torch.bool,
    **{
        getattr(gl, name): getattr(torch, name)
        for name in ("bfloat16", "float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")
    },
}
GLUON_DTYPES = {value: key for key, value in TORCH_DTYPES.items()}
FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


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

    @property
    def dtype(self) -> Any:
        return {8: gl.int8, 16: gl.int16, 32: gl.int32, 64: gl.int64}[self.bits]

    def to(self, dtype: Any) -> Int | Tensor:
        if dtype.is_int():
            return Int(self, dtype.primitive_bitwidth)
        return Tensor(torch.tensor(int(self)).to(TORCH_DTYPES[dtype]))

    def __neg__(self) -> Int:
        return Int(-int(self), self.bits)

    def __invert__(self) -> Int:
        return Int(~int(self), self.bits)

    def __abs__(self) -> Int:
        return Int(abs(int(self)), self.bits)


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

    @property
    def dtype(self) -> Any:
        return GLUON_DTYPES[self.value.dtype]

    def to(self, dtype: Any, **_: Any) -> Int | Tensor:
        """The value in another Gluon type; FP8 saturates, as on the hardware."""
        return from_torch(cast_to(self.value, TORCH_DTYPES[dtype]))

    def reshape(self, *shape: Any) -> Tensor:
        return Tensor(self.value.reshape(*shape))

    def permute(self, *order: Any) -> Tensor:
        return Tensor(self.value.permute(*order))

    def split(self) -> tuple[Tensor, Tensor]:
        return Tensor(self.value[..., 0]), Tensor(self.value[..., 1])

    def expand_dims(self, axis: int) -> Tensor:
        return Tensor(self.value.unsqueeze(axis))

    def sum(self, axis: int | None = None, *, keep_dims: bool = False, **_: Any) -> Int | Tensor:
        """The sum over one axis, or over all; narrow integers are added as int32."""
        value = self.value
        if not value.is_floating_point() and value.element_size() < 4:
            value = value.to(torch.int32)
        return from_torch(torch.sum(value, axis, keepdim=keep_dims, dtype=value.dtype))

    def max(self, axis: int | None = None, *, keep_dims: bool = False, **_: Any) -> Int | Tensor:
        return from_torch(torch.amax(self.value, () if axis is None else axis, keepdim=keep_dims))

    def min(self, axis: int | None = None, *, keep_dims: bool = False, **_: Any) -> Int | Tensor:
        return from_torch(torch.amin(self.value, () if axis is None else axis, keepdim=keep_dims))

    def __getitem__(self, key: Any) -> Tensor:
        return Tensor(self.value[_new_dims(key)])

    def __bool__(self) -> bool:
        if self.value.numel() != 1:
            raise Misuse(f"a tensor of shape {self.shape} is no branch condition, at {where()}")
        return bool(self.value)

    def __neg__(self) -> Tensor:
        return Tensor(-self.value)

    def __invert__(self) -> Tensor:
        return Tensor(~self.value)


class Pointer:
    """Addresses in a host tensor's storage, in elements: one offset, or a torch tensor of them."""

    def __init__(self, storage: torch.Tensor, offset: int | torch.Tensor) -> None:
        self.storage, self.offset = storage, offset

    @classmethod
    def to_first_element(cls, tensor: torch.Tensor) -> Pointer:
        """What a kernel gets for a tensor argument."""
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        return cls(storage, int(tensor.storage_offset()))

    @property
    def dtype(self) -> Any:
        """The Gluon pointer type; its `element_ty` is the type of an element."""
        return gl.pointer_type(GLUON_DTYPES[self.storage.dtype])

    def __add__(self, other: Any) -> Pointer:
        step = other.value.long() if isinstance(other, Tensor) else int(other)
        return Pointer(self.storage, self.offset + step)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Pointer:
        return self.__add__(-other)

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.storage, torch.as_tensor(self.offset)[_new_dims(key)])

    def select(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The offsets, and which of them are on (None: all), after the bounds check."""
        offset, is_on = torch.as_tensor(self.offset), None
        if mask is not None:
            offset, is_on = torch.broadcast_tensors(offset, torch.as_tensor(raw(mask)))
            offset = torch.where(is_on, offset, 0)
        if offset.numel():
            low, high, size = int(offset.min()), int(offset.max()), self.storage.numel()
            if low < 0 or high >= size:
                raise OutOfRange(f"global offset {low}..{high} outside 0..{size - 1}, at {where()}")
        return offset, is_on


def _new_dims(key: Any) -> Any:
    for part in key if isinstance(key, tuple) else (key,):
        if part is not None and part != slice(None):
            raise Misuse(f"only None and : can index a register tensor, at {where()}")
    return key


def raw(value: Any) -> Any:
    """The torch tensor of a register tensor; any other value as it is."""
    return value.value if isinstance(value, Tensor) else value


def from_torch(value: torch.Tensor) -> Int | Tensor:
    """A torch value as the kernel sees it: an integer without dims must work as loop bound and coordinate."""
    if value.ndim or value.is_floating_point() or value.dtype == torch.bool:
        return Tensor(value)
    # uint8 needs a ninth bit.
    return Int(int(value), 16 if value.dtype == torch.uint8 else 8 * value.element_size())


def cast_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value in another torch type. The hardware's conversion to FP8 saturates, torch's gives NaN."""
    if dtype in FLOAT8_DTYPES:
        top = torch.finfo(dtype).max
        return value.float().clamp(-top, top).to(dtype)
    return value.to(dtype)


def _operand(value: Any, other: Any) -> torch.Tensor:
    """One operand as a torch tensor; a literal takes the other operand's type where that can hold it."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Int):
        return torch.tensor(int(value), dtype=TORCH_DTYPES[value.dtype])
    if isinstance(other, torch.Tensor):
        fits = other.is_floating_point() or (isinstance(value, int) and other.dtype != torch.bool)
        if fits:
            return torch.tensor(value, dtype=other.dtype)
    return torch.tensor(value, dtype={float: torch.float32, bool: torch.bool, int: torch.int32}[type(value)])


def operands(left: Any, right: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both operands in their common type, which torch would not find for a tensor without dims."""
    left, right = raw(left), raw(right)
    left, right = _operand(left, right), _operand(right, left)
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype), right.to(dtype)


def elementwise(function: Callable[..., torch.Tensor]) -> Callable[..., Int | Tensor]:
    """A torch function of two tensors as an operation on kernel values."""

    def apply(left: Any, right: Any, **_: Any) -> Int | Tensor:
        return from_torch(function(*operands(left, right)))

    return apply


def truncating_division(left: int, right: int) -> int:
    quotient = abs(left) // abs(right)
    return quotient if (left < 0) == (right < 0) else -quotient


def _remainder(left: int, right: int) -> int:
    return left - right * truncating_division(left, right)


def _tensor_truncating_division(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.div(left, right, rounding_mode="trunc")


# Method name without underscores -> the operation; `_install_operators` adds the reflected one.
INT_OPERATORS: dict[str, Callable[[int, int], int]] = {
    **{
        name: getattr(operator, f"__{name}__") for name in ("add", "sub", "mul", "and", "or", "xor", "lshift", "rshift")
    },
    "floordiv": truncating_division,
    "mod": _remainder,
}
TENSOR_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul")},
    "truediv": torch.true_divide,
    "floordiv": _tensor_truncating_division,
    "mod": torch.fmod,
    **{name: getattr(torch, f"bitwise_{name}") for name in ("and", "or", "xor")},
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
}
COMPARISONS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(torch, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")
}


def _bits(value: int) -> int:
    """The width of a kernel integer, or the one that Triton gives a literal."""
    return value.bits if isinstance(value, Int) else 32 if -(1 << 31) <= value < 1 << 31 else 64


def _int_method(name: str, *, reflected: bool) -> Callable[[Int, Any], Any]:
    """`Int.__name__`: with an integer it is an integer of the wider type, with a Python float a float scalar."""
    on_floats = elementwise(TENSOR_OPERATORS[name])

    def method(self: Int, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        if isinstance(other, float) or (isinstance(other, int) and name == "truediv"):
            return on_floats(left, right)
        if not isinstance(other, int):
            return NotImplemented
        return Int(INT_OPERATORS[name](int(left), int(right)), max(self.bits, _bits(other)))

    return method


def _tensor_method(function: Callable[..., torch.Tensor], *, reflected: bool) -> Callable[[Tensor, Any], Any]:
    apply = elementwise(function)

    def method(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return apply(other, self) if reflected else apply(self, other)

    return method


def _install_operators() -> None:
    for name in (*INT_OPERATORS, "truediv"):
        setattr(Int, f"__{name}__", _int_method(name, reflected=False))
        setattr(Int, f"__r{name}__", _int_method(name, reflected=True))
    for name, function in TENSOR_OPERATORS.items():
        setattr(Tensor, f"__{name}__", _tensor_method(function, reflected=False))
        setattr(Tensor, f"__r{name}__", _tensor_method(function, reflected=True))
    for name, function in COMPARISONS.items():
        setattr(Tensor, f"__{name}__", _tensor_method(function, reflected=False))


_install_operators()
