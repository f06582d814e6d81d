"""The mended interpreter converts and multiplies as torch does: every code, every midpoint, both overflows."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.gemm_inputs import assert_same_values

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def _convert_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count)
    tl.store(y_ptr + place, x.to(y_ptr.dtype.element_ty), mask=place < count)


@triton.jit
def _multiply_add_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    a = tl.load(a_ptr + place)
    tl.store(y_ptr + place, a * tl.load(b_ptr + place) + a)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, y_ptr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    place = row[:, None] * SIZE + row[None, :]
    tl.store(y_ptr + place, tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place)))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _convert_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), 1024)
    return y


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_fp8_code_decodes(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert_same_values(converted(codes, torch.float32), codes.float())


def test_fp32_rounds_to_e4m3_as_torch_does() -> None:
    values = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()  # all finite, ascending
    middles = (values[1:] + values[:-1]) / 2
    near = torch.cat([middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1])])
    x = torch.cat([values, near, torch.randn(20_000) * 100, torch.tensor([1e9, float("inf")])])
    x = torch.cat([x, -x, torch.tensor([float("nan")])])
    assert_same_values(converted(x, E4M3), x.clamp(-448, 448).to(E4M3))


def test_fp32_rounds_to_bf16_as_torch_does() -> None:
    x = torch.cat([torch.randn(20_000).exp(), 1 + torch.arange(512) * 2.0**-9, torch.tensor([3e38, float("inf")])])
    x = torch.cat([x, -x, torch.tensor([float("nan")])])
    assert_same_values(converted(x, torch.bfloat16), x.bfloat16())


def test_bf16_arithmetic_rounds_each_operation() -> None:
    a, b = torch.randn(2, 1024).bfloat16()
    y = torch.empty(1024, dtype=torch.bfloat16)
    _multiply_add_kernel[(1,)](a, b, y, 1024)
    assert_same_values(y, a * b + a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3, E5M2])
def test_dot_multiplies_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64).to(dtype)
    y = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, y, 64)
    # FP32 sums of 64 products in two orders: 64 roundings of 2^-24 at most.
    torch.testing.assert_close(y.double(), a.double() @ b.double(), rtol=0, atol=64 * 2**-24 * 64)
