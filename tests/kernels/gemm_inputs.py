"""Inputs and independent results of the FP8 GEMMs: one place for the tests of every implementation.

Payloads are random E4M3 numbers, scales spread over a factor of three; expected results are FP64 products of decoded
operands. Padding rows hold numbers, not zeros, so that a kernel that stores them where it must not is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div

# BF16 keeps 8 bits: a correctly rounded random result is off by 2^-9 / sqrt(3) * sqrt(2) in the mean square, 1.6e-3.
BF16_TOLERANCE = 2.5e-3
# FP32 sums of at most 33 partial sums, each of 128 products: measured 7e-8, a defect is above 1e-4.
FP32_TOLERANCE = 1e-6


@dataclass
class Problem:
    """Operands as the launchers take them, and the FP64 result."""

    a: Tensor
    a_scale: Tensor
    b: Tensor
    b_scale: Tensor
    expected: Tensor
    group_ends: Tensor | None = None

    @property
    def quantized(self) -> tuple[Quantized, Quantized]:
        return Quantized(self.a, self.a_scale), Quantized(self.b, self.b_scale)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.a, self.a_scale, self.b, self.b_scale


def payload(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def decode_tiles(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.T.double().repeat_interleave(TILE, 1)[:, : values.shape[1]]


def decode_blocks(values: Tensor, scale: Tensor) -> Tensor:
    rows, cols = values.shape
    return values.double() * scale.double().repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :cols]


def tile_block(m: int, n: int, k: int, ends: list[int] | None = None) -> Problem:
    """fprop or dgrad; `ends` are the groups' ends, rows behind the last one expect zeros."""
    groups = [len(ends)] if ends else []
    a, a_scale = payload(m, k), scales(ceil_div(k, TILE), m)
    b, b_scale = payload(*groups, n, k), scales(*groups, ceil_div(n, TILE), ceil_div(k, TILE))
    x = decode_tiles(a, a_scale)
    if ends is None:
        return Problem(a, a_scale, b, b_scale, x @ decode_blocks(b, b_scale).T)
    expected = torch.zeros(m, n, dtype=torch.float64)
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        expected[start:end] = x[start:end] @ decode_blocks(b[group], b_scale[group]).T
    return Problem(a, a_scale, b, b_scale, expected, torch.tensor(ends, dtype=torch.int32))


def tile_tile(m: int, n: int, k: int, ends: list[int] | None = None) -> Problem:
    """wgrad; `ends` cut the contraction, one matrix for each group."""
    a, a_scale = payload(m, k), scales(ceil_div(k, TILE), m)
    b, b_scale = payload(n, k), scales(ceil_div(k, TILE), n)
    x, y = decode_tiles(a, a_scale), decode_tiles(b, b_scale)
    if ends is None:
        return Problem(a, a_scale, b, b_scale, x @ y.T)
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    expected = torch.stack([x[:, part] @ y[:, part].T for part in parts])
    return Problem(a, a_scale, b, b_scale, expected, torch.tensor(ends, dtype=torch.int32))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN where something was not written."""
    return float((actual.double() - expected).norm() / expected.norm())
