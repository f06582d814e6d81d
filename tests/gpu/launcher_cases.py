"""Arguments for every launcher of `kernels/gpu/`, and how near its results must come to the reference's.

A case makes the operator's own arguments on the CPU, from a number of rows and a width. The reference is the operator
called with them as they are, the launcher the same operator called with them on a GPU. Pure copies, quantisers and
counts must give the same bits; where a rounding may fall the other way, the tolerance is a relative Frobenius error
with its origin beside it. No Triton here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.formats import TILE, ceil_div
from tests.kernels.gemm_inputs import decode_tiles

# Imports every kernel file, and with it registers every operator.
for module in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"kernels.{module.name}")

ROWS = (1, 63, 129, 4097)
WIDTHS = (2112, 576)
# Beside them for operators whose one kernel takes whole tiles; of other widths several kernels do its work.
WHOLE_TILES = dict.fromkeys(("swiglu_quantize", "swiglu_quantize_transposed", "swiglu_backward_quantize_both"), 512)
EXPERTS, TOPK = 16, 4
Results = tuple[Tensor, ...]

# One BF16 rounding of numbers that differ in their last FP32 bits: 2^-9 for one in hundreds of elements.
TIPPED = 2**-11
# A BF16 number that tips moves one E4M3 number in sixteen by up to 2^-4 of itself.
TIPPED_E4M3 = 5e-3
# FP8 tensor cores of Hopper keep some 14 bits of a sum (arXiv:2412.19437 §3.3.2); each 128 products are promoted.
FP8_SUM = 2**-10
# Correctly rounded BF16 of such sums: sqrt((2^-9 / sqrt(3))^2 x 2 + 2^-20).
FP8_SUM_BF16 = 2.5e-3
# FP32 sums of up to 4,224 exact products in another order, on tensor cores that truncate.
BF16_PRODUCTS = 1e-4
# Quotients, sums of four and differences in FP32, each 2^-24.
FP32 = 4e-6


@dataclass(frozen=True)
class Case:
    """One operator.

    Args:
        make: (rows, width) -> arguments on the CPU.
        tolerance: of every result; 0 means the same bits.
        results: (arguments, what the operator returned) -> tensors to compare; None: what it returned.
    """

    make: Callable[[int, int], Sequence[Any]]
    tolerance: float = 0.0
    results: Callable[[Sequence[Any], Any], Results] | None = None


def operator(name: str) -> Callable[..., Any]:
    """`torch.ops.v3fp8.<name>`: the launcher for tensors on a GPU, else the reference."""
    found: Callable[..., Any] = getattr(torch.ops.v3fp8, name).default
    return found


def run(name: str, arguments: Sequence[Any], device: torch.device) -> Results:
    """The results of an operator on a device, moved to the CPU."""
    moved = [_copy_on(value, device) if isinstance(value, Tensor) else value for value in arguments]
    returned = operator(name)(*moved)
    case = CASES[name]
    if case.results is not None:
        returned = case.results(moved, returned)
    return tuple(value.cpu() for value in ((returned,) if isinstance(returned, Tensor) else returned))


def _copy_on(x: Tensor, device: torch.device) -> Tensor:
    """With its strides: some rows lie apart."""
    copy = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)
    return copy.copy_(x)


def distance(actual: Tensor, expected: Tensor) -> float:
    """0 for the same bits, else the relative Frobenius error; infinite where shape, dtype or a NaN differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if torch.equal(bits(actual), bits(expected)):
        return 0.0
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if bool(error.isfinite()) else float("inf")


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself."""
    return x.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def tiles(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Payload and scales in 1x128 tiles, of numbers whose size differs from row to row."""
    found: tuple[Tensor, Tensor] = operator("quantize_tiles")(normal(rows, cols) * torch.rand(rows, 1).bfloat16(), True)
    return found


def blocks(*shape: int) -> tuple[Tensor, Tensor]:
    payload, scale, _ = operator("quantize_blocks")(normal(*shape), True)
    return payload, scale


def ends_of(rows: int) -> Tensor:
    """Groups of so many rows, none, and one row, each padded to 128; the second and the last are empty."""
    padded = torch.tensor([ceil_div(count, TILE) * TILE for count in (rows, 0, 1, 0)])
    return padded.cumsum(0).to(torch.int32)


def grouped_rows(rows: int) -> int:
    """Rows of the groups of `ends_of`, and 128 padding rows."""
    return int(ends_of(rows)[-1]) + TILE


def other(width: int) -> int:
    """A GEMM's other width."""
    return WIDTHS[1] if width == WIDTHS[0] else WIDTHS[0]


# lr, both betas, eps, decay.
ADAMW = (1e-2, 0.9, 0.95, 1e-8, 0.1)


def _after_swiglu(_: Sequence[Any], returned: Any) -> Results:
    """The kept input as it is, the activation as numbers: a scale may double where a rounding tips."""
    *kept_input, payload, scale = returned
    return *kept_input, decode_tiles(payload, scale)


def _after_norm(_: Sequence[Any], returned: Any) -> Results:
    """The tiles as numbers, and without the NaN of carriers."""
    total, y, payload, scale, rstd, nan = returned
    assert bool(nan.isnan())
    return total, y, decode_tiles(payload, scale), rstd


def _accumulated(arguments: Sequence[Any], _: Any) -> Results:
    return (arguments[-2],)


def routing(rows: int, width: int) -> Sequence[Any]:
    """Logits whose choice no rounding can change: a token's scores are a shuffled grid, groups by far apart."""
    del width
    grid = (torch.arange(EXPERTS) + 1.0) / (EXPERTS + 2)
    scores = torch.stack([grid[torch.randperm(EXPERTS)] for _ in range(rows)])
    # Sums of two grid points tie; a bias by group keeps groups apart, and is less than half a step in all.
    bias = torch.arange(EXPERTS) // 4 * (0.1 / EXPERTS)
    return scores.logit(), bias, 4, 2, TOPK, 2.5, True


def choices(rows: int) -> Tensor:
    """[rows, TOPK] distinct experts; the first expert gets no token."""
    return torch.rand(rows, EXPERTS - 1).topk(TOPK, dim=-1).indices + 1


def layout(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = (rows * TOPK + EXPERTS * (TILE - 1)) // TILE * TILE
    found: tuple[Tensor, Tensor, Tensor] = operator("lay_out")(choices(rows), EXPERTS, num_rows)
    return found


def _route_backward(rows: int, width: int) -> Sequence[Any]:
    scores, ids, gates, _ = operator("route")(*routing(rows, width))
    return scores, ids, torch.randn_like(scores), torch.randn_like(gates), 2.5, True


def _sequence_balance_backward(rows: int, width: int) -> Sequence[Any]:
    scores = torch.rand(2, rows, EXPERTS)
    return torch.tensor(0.5), scores, operator("sequence_balance")(scores, TOPK)[1]


def _sum_rows(rows: int, width: int) -> Sequence[Any]:
    slot_of_row, rows_of_token, _ = layout(rows)
    return normal(len(slot_of_row), width), rows_of_token, False, torch.bfloat16


def tables(rows: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 32 pairs, for sequences of a third of the rows where that is a whole number."""
    angles = torch.randn(rows // 3 if rows % 3 == 0 else rows, 32)
    return angles.cos(), angles.sin()


def heads(rows: int, width: int) -> Tensor:
    """Of V3's dims, as many as fit the width, an even number, at least two."""
    return normal(rows, max(2, width // 192 // 2 * 2), 192)


CASES: dict[str, Case] = {
    "quantize_tiles": Case(lambda rows, width: (normal(rows, width), True)),
    "quantize_tiles_transposed": Case(lambda rows, width: (normal(rows, width), False)),
    "quantize_tiles_both": Case(lambda rows, width: (normal(rows, width), True)),
    "requantize_transposed": Case(lambda rows, width: (*tiles(rows, width), True)),
    "quantize_blocks": Case(lambda rows, width: (normal(2, rows, width), True)),
    "dequantize_tiles": Case(lambda rows, width: (*tiles(rows, width), torch.bfloat16)),
    "swiglu": Case(lambda rows, width: (normal(rows, 2 * width),), TIPPED),
    "swiglu_backward": Case(lambda rows, width: (normal(rows, 2 * width), normal(rows, width)), TIPPED),
    "gated_swiglu": Case(lambda rows, width: (normal(rows, 2 * width), torch.rand(rows)), TIPPED),
    "gated_swiglu_backward": Case(
        lambda rows, width: (normal(rows, 2 * width), torch.rand(rows), normal(rows, width)), TIPPED
    ),
    "swiglu_quantize": Case(
        lambda rows, width: (normal(rows, 2 * width), torch.rand(rows), True), TIPPED_E4M3, _after_swiglu
    ),
    "swiglu_quantize_transposed": Case(
        lambda rows, width: (*tiles(rows, 2 * width), None, torch.bfloat16, True), TIPPED_E4M3, _after_swiglu
    ),
    "swiglu_backward_kept": Case(lambda rows, width: (*tiles(rows, 2 * width), normal(rows, width)), TIPPED),
    "gated_swiglu_backward_kept": Case(
        lambda rows, width: (*tiles(rows, 2 * width), torch.rand(rows), normal(rows, width)), TIPPED
    ),
    "swiglu_backward_quantize_both": Case(
        lambda rows, width: (*tiles(rows, 2 * width), torch.rand(rows), normal(rows, width), True),
        TIPPED_E4M3,
        lambda _, returned: (decode_tiles(*returned[:2]), decode_tiles(*returned[2:4]), returned[4]),
    ),
    "gather_tiles": Case(lambda rows, width: (*tiles(rows, width), layout(rows)[0], TOPK)),
    "gather_requantize_transposed": Case(lambda rows, width: (*tiles(rows, width), layout(rows)[0], TOPK, True)),
    "gather_quantize_both": Case(lambda rows, width: (normal(rows, width), layout(rows)[0], TOPK, True)),
    # rstd is within four units of the last place, and y tips where it decides.
    "add_norm_quantize": Case(
        lambda rows, width: (
            *(normal(2, rows, width) * torch.randn(rows, 1).exp().bfloat16()),
            normal(width),
            1e-6,
            True,
            True,
            True,
        ),
        TIPPED_E4M3,
        _after_norm,
    ),
    "norm_again": Case(
        lambda rows, width: (normal(rows, width + 64)[:, 64:], normal(width), torch.rand(rows), *3 * [True])
    ),
    # Two BF16 roundings on top of FP32 sums in another order.
    "norm_backward": Case(
        lambda rows, width: (
            *normal(5, rows, width),
            normal(width),
            torch.rand(rows) + 0.5,
            torch.zeros(rows, width + 64).bfloat16()[:, :width],
        ),
        TIPPED,
        lambda arguments, returned: (returned.sum(0), arguments[-1]),
    ),
    # A sum in another order, then a BF16 rounding.
    "norm_gain_gradient": Case(
        lambda rows, width: (torch.randn(rows, width), torch.randn(width), torch.bfloat16, True),
        TIPPED,
        lambda arguments, _: (arguments[1],),
    ),
    # Of two matrices the last row of the first and all of the second but its last element.
    "range_amax": Case(lambda rows, width: (normal((rows + 1) * width - 1), (2, rows, width), (rows - 1) * width)),
    "quantize_range": Case(
        lambda rows, width: (
            normal((rows + 1) * width - 1),
            torch.rand(2, ceil_div(rows, TILE), ceil_div(width, TILE)) + 0.01,
            (2, rows, width),
            (rows - 1) * width,
        )
    ),
    "transpose_blocks": Case(lambda rows, width: blocks(2, rows, width)[:1]),
    # FP32 quotients and differences in another order; a rounding of what is stored in BF16 may tip.
    "adamw": Case(
        lambda rows, width: (
            *torch.randn(2, rows * width),
            torch.randn(rows * width).bfloat16(),
            torch.rand(rows * width).bfloat16(),
            torch.zeros(rows * width).bfloat16(),
            ADAMW,
            3,
        ),
        TIPPED,
        lambda arguments, _: (arguments[0], *arguments[2:5]),
    ),
    # A log-sum-exp in another order; every third row has no target.
    "cross_entropy": Case(
        lambda rows, width: (
            normal(rows, width),
            torch.randint(width, (rows,)).masked_fill(torch.arange(rows) % 3 == 1, -100),
            0.3,
        ),
        TIPPED,
        lambda arguments, losses: (arguments[0], losses),
    ),
    # Norms of 128 elements in FP32.
    "sums_of_squares": Case(lambda rows, width: (torch.randn(rows * TILE),), FP32),
    "heads_forward": Case(
        lambda rows, width: (
            q := heads(rows, width),
            normal(rows, q.shape[1], 256),
            normal(rows, 2112)[:, 2048:],
            *tables(rows),
        ),
        results=lambda arguments, returned: (arguments[0], returned),
    ),
    "turn_back": Case(
        lambda rows, width: (
            q := heads(rows, width),
            *tables(rows),
            torch.zeros(rows, q[0].numel() + 64).bfloat16()[:, 64:],
        ),
        results=lambda arguments, _: (arguments[-1],),
    ),
    # A sum over heads in another order, before two roundings.
    "rope_key_backward": Case(
        lambda rows, width: (heads(rows, width), *tables(rows), torch.zeros(rows, 128).bfloat16()[:, 64:]),
        TIPPED,
        lambda arguments, _: (arguments[-1],),
    ),
    "turn_back_quantize_both": Case(lambda rows, width: (heads(rows, width), *tables(rows), True)),
    "heads_quantize_both": Case(
        lambda rows, width: (q := heads(rows, width), normal(rows, q.shape[1], 128), 128, False)
    ),
    "gemm_tile_block": Case(
        lambda rows, width: (*tiles(rows, width), *blocks(other(width), width), torch.bfloat16), FP8_SUM_BF16
    ),
    "gemm_tile_tile": Case(
        lambda rows, width: (*tiles(width, rows), *tiles(576, rows), torch.randn(width, 576), True),
        FP8_SUM,
        _accumulated,
    ),
    "grouped_gemm_tile_block": Case(
        lambda rows, width: (
            *tiles(grouped_rows(rows), width),
            *blocks(4, other(width), width),
            ends_of(rows),
            torch.bfloat16,
        ),
        FP8_SUM_BF16,
    ),
    "grouped_gemm_tile_tile": Case(
        lambda rows, width: (
            *tiles(width, grouped_rows(rows)),
            *tiles(576, grouped_rows(rows)),
            ends_of(rows),
            torch.randn(4, width, 576),
            False,
        ),
        FP8_SUM,
        _accumulated,
    ),
    "pack_e5m6": Case(lambda rows, width: (normal(rows, width), True)),
    "unpack_e5m6": Case(lambda rows, width: (*operator("pack_e5m6")(normal(rows, width), True), torch.bfloat16)),
    "quantize_pack": Case(lambda rows, width: (normal(rows, width), True)),
    "unpack_quantize_transposed": Case(
        lambda rows, width: (*operator("pack_e5m6")(normal(rows, width), True), torch.bfloat16, True)
    ),
    "grouped_matmul": Case(
        lambda rows, width: (normal(grouped_rows(rows), width), normal(4, width, other(width)), ends_of(rows)),
        FP8_SUM_BF16,
    ),
    "grouped_wgrad": Case(
        lambda rows, width: (normal(grouped_rows(rows), width), normal(grouped_rows(rows), 576), ends_of(rows)),
        BF16_PRODUCTS,
    ),
    "router_logits": Case(lambda rows, width: (normal(rows, width), torch.randn(EXPERTS, width)), BF16_PRODUCTS),
    # What is left out of a product is some 2^-17 of it.
    "router_dgrad": Case(
        lambda rows, width: (torch.randn(rows, EXPERTS), torch.randn(EXPERTS, width), torch.bfloat16), TIPPED
    ),
    "router_wgrad": Case(
        lambda rows, width: (torch.randn(rows, EXPERTS), normal(rows, width), torch.randn(EXPERTS, width), True),
        BF16_PRODUCTS,
        _accumulated,
    ),
    "route": Case(routing, FP32),
    "route_backward": Case(_route_backward, FP32),
    "sequence_balance": Case(lambda rows, width: (torch.rand(2, rows, EXPERTS), TOPK), FP32),
    "sequence_balance_backward": Case(_sequence_balance_backward, FP32),
    "lay_out": Case(lambda rows, width: (choices(rows), EXPERTS, (rows * TOPK + EXPERTS * 127) // 128 * 128)),
    "copy_tokens": Case(lambda rows, width: (normal(rows, width), layout(rows)[0], TOPK)),
    "sum_rows": Case(_sum_rows),
    "scatter_gates": Case(lambda rows, width: (torch.rand(len(slots := layout(rows)[0])), slots, rows, TOPK)),
}
# Their results do not depend on a width.
WITHOUT_WIDTH = ("route", "route_backward", "sequence_balance", "sequence_balance_backward", "lay_out", "scatter_gates")
