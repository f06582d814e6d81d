"""Triton's own CPU interpreter, with the numerics of BF16 and FP8 mended.

With TRITON_INTERPRET=1 (set in tests/conftest.py, before anything imports Triton) every `@triton.jit` function runs in
NumPy, program after program, on CPU tensors. Triton 3.6 and 3.7 get three things wrong there, which `mend` puts right
through torch's conversions:

- BF16 is kept as raw 16-bit integers, and arithmetic on it is arithmetic on those integers;
- FP32 to BF16 truncates, and to E4M3 rounds halves up without carrying; a GPU rounds to nearest even and saturates;
- `tl.dot` of BF16 multiplies the raw integers.

`tests/kernels/test_triton_interpreter.py` compares every code and every midpoint with torch. Not modelled: races
between programs and between threads, reduced-precision accumulation of tensor cores, approximate exp2, layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
# Types whose values the interpreter keeps as raw bits.
RAW_TYPES = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_plain_binary = interpreter.InterpreterBuilder.binary_op
_plain_launch = interpreter.GridExecutor.__call__
_plain_patch = interpreter._patch_lang
_plain_np_dtype = interpreter._get_np_dtype
# What of Triton's language the present launch has turned into NumPy.
_patched: set[str] = set()
# Module -> what of the language its functions use; name of a type -> NumPy's.
_languages: dict[str, set[str]] = {}
_np_dtypes: dict[str, np.dtype[Any]] = {}


def _as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The interpreter's array as a torch tensor of the type that it stands for."""
    signed = np.ascontiguousarray(data).view(SIGNED[data.itemsize]) if data.dtype.kind == "u" else data
    return torch.from_numpy(np.array(signed)).view(TORCH_TYPES[dtype]).reshape(np.shape(data))


def _as_fp32(handle: Any) -> np.ndarray:
    raw = handle.dtype.scalar in RAW_TYPES
    return _as_torch(handle.data, handle.dtype.scalar).float().numpy() if raw else handle.data


def _convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
    """Between float types as a GPU does it: nearest even, FP8 saturating, NaN kept."""
    values = _as_torch(data, source)
    if target in LARGEST:
        values = values.float().clamp(-LARGEST[target], LARGEST[target])
    converted = values.to(TORCH_TYPES[target]).contiguous()
    size = converted.element_size()
    return converted.view(getattr(torch, f"int{8 * size}")).numpy().view(UNSIGNED[size]).reshape(np.shape(data))


def _cast(self: Any, source: Any, target_type: Any) -> Any:
    source_type, target = source.dtype.scalar, target_type.scalar
    if source_type in TORCH_TYPES and target in TORCH_TYPES and tl.bfloat16 in (source_type, target):
        data = _convert(source.data, source_type, target, None).view(interpreter._get_np_dtype(target_type))
    elif source_type == tl.bfloat16:
        data = _as_fp32(source).astype(interpreter._get_np_dtype(target_type))
    elif target == tl.bfloat16:
        data = _convert(source.data.astype(np.float32), tl.float32, target, None)
    else:
        data = source.data.astype(interpreter._get_np_dtype(target_type))
    return interpreter.TensorHandle(data, target)


def _dot(self: Any, a: Any, b: Any, c: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    product = np.matmul(_as_fp32(a), _as_fp32(b), dtype=c.data.dtype)
    return interpreter.TensorHandle(product + c.data, c.dtype.scalar)


def _binary(self: Any, left: Any, right: Any, operation: Callable[[Any, Any], np.ndarray]) -> Any:
    dtype = left.dtype.scalar
    if dtype != tl.bfloat16:
        return _plain_binary(self, left, right, operation)
    result = operation(_as_fp32(left), _as_fp32(right))
    if result.dtype == np.bool_:
        return interpreter.TensorHandle(result, tl.int1)
    return interpreter.TensorHandle(_convert(result.astype(np.float32), tl.float32, dtype, None), dtype)


def _np_dtype(dtype: Any) -> np.dtype[Any]:
    """Looked up, where Triton makes the table of all types again for each operation."""
    scalar = dtype.scalar
    name = "pointer" if isinstance(scalar, tl.pointer_type) else scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _plain_np_dtype(scalar)
    return _np_dtypes[name]


def _patch_once(function: Any) -> Any:
    """Once a launch, where Triton searches its whole language again for each call of a device function."""
    if function.__module__ not in _languages:
        found = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        _languages[function.__module__] = found
    modules = _languages[function.__module__]
    if modules <= _patched:
        return interpreter._LangPatchScope()
    _patched.update(modules)
    return _plain_patch(function)


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    _patched.clear()
    # A GPU divides infinity by infinity in silence.
    with np.errstate(all="ignore"):
        _plain_launch(self, *args, **kwargs)


def mend() -> None:
    """Replace the wrong parts for the rest of the process; calling it again changes nothing."""
    interpreter._convert_float = _convert
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.binary_op = _binary
    interpreter.GridExecutor.__call__ = _launch
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _np_dtype
