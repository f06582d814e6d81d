"""Inputs and independent results of the FP8 GEMMs, one place for every implementation; how any kernel is compared.

Payloads are random E4M3 numbers, scales spread over a factor of three; expected results are FP64 products of decoded
operands. Padding rows hold numbers, not zeros, so that a kernel that stores them where it must not is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div

# BF16 keeps 8 bits: a correctly rounded random result is off by 2^-9 / sqrt(3) * sqrt(2) in the mean square, 1.6e-3.
BF16_TOLERANCE = 2.5e-3
# FP32 sums of at most 33 partial sums, each of 128 products: measured 7e-8, a defect is above 1e-4.
FP32_TOLERANCE = 1e-6


@dataclass
class Problem:
    """Operands, and the FP64 result."""

    quantized: tuple[Quantized, Quantized]
    expected: Tensor
    group_ends: Tensor | None = None

    @property
    def operands(self) -> list[Tensor]:
        """Payload and scale of each operand, as the portable launchers take them."""
        return [tensor for q in self.quantized for tensor in (q.payload, q.scale)]


def payload(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def scales(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def decode_tiles(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.T.double().repeat_interleave(TILE, 1)[:, : values.shape[1]]


def decode_blocks(values: Tensor, scale: Tensor) -> Tensor:
    rows, cols = values.shape[-2:]
    return values.double() * scale.double().repeat_interleave(TILE, -2).repeat_interleave(TILE, -1)[..., :rows, :cols]


def slices(ends: Sequence[int]) -> list[slice]:
    """The rows of each group."""
    return [slice(*edges) for edges in pairwise([0, *ends])]


def tile_block(m: int, n: int, k: int, ends: list[int] | None = None) -> Problem:
    """fprop or dgrad; `ends` are the groups' ends, rows behind the last one expect zeros."""
    groups = [len(ends)] if ends else []
    a = Quantized(payload(m, k), scales(ceil_div(k, TILE), m))
    b = Quantized(payload(*groups, n, k), scales(*groups, ceil_div(n, TILE), ceil_div(k, TILE)))
    x, weights = exact_tiles(a), exact_blocks(b)
    if ends is None:
        return Problem((a, b), x @ weights.T)
    expected = torch.zeros(m, n, dtype=torch.float64)
    for rows, weight in zip(slices(ends), weights, strict=True):
        expected[rows] = x[rows] @ weight.T
    return Problem((a, b), expected, torch.tensor(ends, dtype=torch.int32))


def tile_tile(m: int, n: int, k: int, ends: list[int] | None = None) -> Problem:
    """wgrad; `ends` cut the contraction, one matrix for each group."""
    a, b = (Quantized(payload(rows, k), scales(ceil_div(k, TILE), rows)) for rows in (m, n))
    x, y = exact_tiles(a), exact_tiles(b)
    if ends is None:
        return Problem((a, b), x @ y.T)
    expected = torch.stack([x[:, part] @ y[:, part].T for part in slices(ends)])
    return Problem((a, b), expected, torch.tensor(ends, dtype=torch.int32))


def assert_same_bits(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    """Shapes, types and every bit, NaN's too; what was computed is contiguous."""
    pairs = [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    for got, wanted in pairs:
        assert isinstance(got, Tensor)
        assert isinstance(wanted, Tensor)
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert got.is_contiguous()
        assert torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8))


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit, signs of zero included, but NaN equals NaN whatever its payload."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    number = ~expected.isnan()
    assert torch.equal(actual.float().signbit()[number], expected.float().signbit()[number])


def assert_exact_up_to_accumulation(actual: Tensor, a: Tensor, b: Tensor) -> None:
    """|actual - a @ b.T| <= gamma_n sum |a||b|, the bound of docs/numerics.md for FP32 accumulation."""
    k = a.shape[1]
    roundings = min(k, TILE) + 3 + ceil_div(k, TILE)
    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    ratio = (actual.double() - a @ b.t()).abs() / (gamma * (a.abs() @ b.abs().t())).clamp_min(1e-300)
    assert bool((ratio <= 1).all()), f"error is {ratio.max():.3g} times the bound"


def random_quantized(payload_shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> Quantized:
    """Finite E4M3 codes of equal probability, subnormals and both zeros included; FP32 scales up to 2^20 apart."""
    codes = torch.randint(0, 254, payload_shape, dtype=torch.uint8)
    codes += (codes >= 0x7F).to(torch.uint8)
    scale = torch.ldexp(torch.rand(scale_shape) + 0.5, torch.randint(-10, 11, scale_shape))
    return Quantized(codes.view(torch.float8_e4m3fn), scale)


def random_tiles(rows: int, cols: int) -> Quantized:
    return random_quantized((rows, cols), (ceil_div(cols, TILE), rows))


def random_blocks(*shape: int) -> Quantized:
    *experts, rows, cols = shape
    return random_quantized(shape, (*experts, ceil_div(rows, TILE), ceil_div(cols, TILE)))


def exact_tiles(q: Quantized) -> Tensor:
    """fp64 values, exact: 4 bits times 24 bits; decoded by torch, not by our decoder."""
    return decode_tiles(q.payload, q.scale)


def exact_blocks(q: Quantized) -> Tensor:
    return decode_blocks(q.payload, q.scale)


def rolled(q: Quantized, dim: int) -> Quantized:
    """A neighbour's scale for each tile or block."""
    return Quantized(q.payload, q.scale.roll(1, dims=dim))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN where something was not written."""
    return float((actual.double() - expected).detach().norm() / expected.detach().norm())


def beside_reference(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *inputs: Tensor,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[Tensor, Tensor]]:
    """Output and the gradients of the inputs for a random one of the output; each with the reference's in `dtype`."""
    theirs = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    y, expected = function(*inputs), reference(*theirs)
    grad = torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, theirs, grad.to(dtype))
    return [(y, expected), *zip(*gradients, strict=True)]


def kept_for_backward(run: Callable[[], object]) -> list[Tensor]:
    """The tensors that autograd keeps of `run`."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept
