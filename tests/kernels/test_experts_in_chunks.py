"""Experts beyond a limit on rows: the bits of `fp8_experts`, and memory in closed form that the limit bounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from kernels import deferred
from kernels.experts_in_chunks import fp8_experts_in_chunks
from kernels.formats import TILE, CarriedTiles, GradientTiles, Quantized, ceil_div
from kernels.fp8_linear import fp8_experts, weight_fp8
from kernels.permute import Dispatched, group_gates, partial_grouping
from kernels.quantize import quantize_tiles
from tests.kernels.expert_layouts import KINDS, choices, layout_of
from tests.operator_calls import OperatorCalls
from train.studies.plan.live_bytes import LiveBytes

# 160 = 128 + 32 and 320 = 2 x 128 + 64: the last tile of both widths is short.
TOKENS, HIDDEN, INTER, TOPK = 300, 320, 160, 3


def run(kind: str, which: str, *, max_rows: int | None, arrived: bool = False, defer: bool = False) -> list[Tensor]:
    """Two micro-batches through the same experts: outputs, gradients of tokens and gates, and the sums of weights'."""
    torch.manual_seed(7)
    ids, grouping = layout_of(choices(kind, TOKENS, TOPK), which)
    experts = len(grouping.group_ends)
    shapes = (2 * INTER, HIDDEN), (HIDDEN, INTER)
    weights = [nn.Parameter(torch.randn(experts, *shape).bfloat16() / 16) for shape in shapes]
    for weight in weights:
        # The first micro-batch replaces it, the second adds.
        weight.main_grad = torch.randn(weight.shape)  # type: ignore[attr-defined]
        deferred.forget(weight)
    found: list[Tensor] = []
    with deferred.deferred() if defer else nullcontext():
        for _ in range(2):
            x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
            gates = torch.rand(ids.shape).requires_grad_()
            dy = torch.randn(TOKENS, HIDDEN).bfloat16()
            tiles = GradientTiles[Quantized]() if arrived else None
            dispatched = Dispatched(x, group_gates(gates, grouping), grouping, tiles, None)
            if max_rows is None:
                y = fp8_experts(dispatched, *weights, power_of_two=True)
            else:
                assert grouping.num_rows > max_rows
                y = fp8_experts_in_chunks(dispatched, *weights, max_rows=max_rows, power_of_two=True)
            if tiles is not None:
                tiles.put(quantize_tiles(dy, power_of_two=True))
                dy = torch.full((1, 1), torch.nan, dtype=torch.bfloat16).expand(TOKENS, HIDDEN)
            y.backward(dy)
            assert x.grad is not None
            assert gates.grad is not None
            found += [y.detach(), x.grad, gates.grad]
    deferred.take()()
    return found + [weight.main_grad for weight in weights]  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["whole", "partial"])
def test_no_bit_depends_on_the_limit(kind: str, which: str) -> None:
    """One expert beyond the limit alone, experts cut at any tile of rows, 255 that counts as 128, all tiles but one."""
    expected = run(kind, which, max_rows=None)
    rows = layout_of(choices(kind, TOKENS, TOPK), which)[1].num_rows
    for max_rows in {128, 255, rows - 128}:
        for index, (actual, whole) in enumerate(zip(run(kind, which, max_rows=max_rows), expected, strict=True)):
            assert torch.equal(actual, whole), (max_rows, index)


@pytest.mark.parametrize("defer", [False, True])
def test_a_gradient_that_arrives_in_tiles_and_weights_that_wait_keep_their_bits(defer: bool) -> None:
    expected = run("random", "partial", max_rows=None, arrived=True, defer=defer)
    found = run("random", "partial", max_rows=256, arrived=True, defer=defer)
    assert all(map(torch.equal, found, expected))


def test_gate_and_up_alone_are_multiplied_twice() -> None:
    """Each product runs as often as it is cut, that of gate and up once more."""
    with OperatorCalls() as calls:
        run("all to the same", "partial", max_rows=384)
    # Two experts here with 300 rows each: 2 chunks of 384; 320 channels in 3 slices of 128. Two micro-batches.
    chunks, slices = 2, 3
    expected = {"grouped_gemm_tile_block": 2 * (3 * chunks + 2 * slices), "grouped_gemm_tile_tile": 2 * 2 * slices}
    assert calls.of(*expected) == expected


def tiles_bytes(rows: int, cols: int) -> int:
    """E4M3 in 1x128 tiles."""
    return rows * cols + 4 * rows * ceil_div(cols, TILE)


def test_a_popular_expert_holds_what_the_limit_allows() -> None:
    """All tokens at two experts: nothing of a row is kept; the highest moments are a closed form, to the byte."""
    tokens, hidden, inter, experts, limit = 1024, 2048, 256, 2, 512
    grouping = partial_grouping(torch.tensor([0, 1]).expand(tokens, 2).int(), experts, num_rows=experts * tokens)
    rows, gates, dy = grouping.num_rows, torch.ones(grouping.num_rows), torch.randn(tokens, hidden).bfloat16()
    weights = [nn.Parameter(torch.randn(experts, *s).bfloat16() / 16) for s in ((2 * inter, hidden), (hidden, inter))]
    arrived = quantize_tiles(dy, power_of_two=True)

    def highest(experts_of: Callable[..., Tensor]) -> tuple[int, int, int]:
        """Bytes kept, and at the highest moments of forward and backward, beside tokens, sums and weights."""
        carrier, gradient = (
            torch.zeros(1, 1).bfloat16().expand(tokens, hidden).requires_grad_(),
            GradientTiles[Quantized](),
        )
        gradient.put(arrived)
        x = CarriedTiles(carrier, arrived, lambda taken: dy[taken])
        given = [*vars(arrived).values(), *vars(grouping).values(), *weights, gates]
        for weight in weights:
            weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
            given += [weight.main_grad, *vars(weight_fp8(weight, power_of_two=True)).values()]  # type: ignore[attr-defined]
        with LiveBytes() as live:
            # Views count what they are of: once, before.
            given = [each.detach() for each in given if isinstance(each, Tensor)]
            before = live.peak = live.now
            y = experts_of(Dispatched(x, gates, grouping, gradient, None), *weights, power_of_two=True)
            kept, forward = live.now - y.nbytes - before, live.peak - before
            live.peak = live.now
            y.backward(dy)
        return kept, forward, live.peak - y.nbytes - before

    kept, forward, backward = highest(partial(fp8_experts_in_chunks, max_rows=limit))
    assert kept == 0
    # Of a slice: all rows in BF16, no more than a chunk of whole rows; with the tokens' sums of these channels.
    width = 128
    assert width == limit // (2 * experts)
    activated = tiles_bytes(limit, 2 * inter) + tiles_bytes(limit, inter)
    activate = 2 * limit * 2 * inter + max(tiles_bytes(limit, hidden), activated)
    sums = 2 * tokens * hidden + 2 * (rows + tokens) * width
    assert forward == tiles_bytes(rows, inter) + max(activate, sums)
    # In backward: SwiGLU's output and the gradient of its input for weights, the same gradient by row; then sums, or a
    # slice of a weight's FP32 gradient with its operand. 4 bytes a row: the gates' gradients.
    both = tiles_bytes(inter, rows) + tiles_bytes(2 * inter, rows)
    product = 4 * experts * 2 * inter * width + tiles_bytes(width, rows)
    assert backward == both + tiles_bytes(rows, 2 * inter) + 4 * rows + max(activate, sums, product)
    # Whole rows are kept as wide as SwiGLU's input, and in BF16, 2 bytes a channel, on their way to sums.
    kept, whole, whole_backward = highest(fp8_experts)
    assert kept == tiles_bytes(rows, 2 * inter)
    assert whole > 2 * rows * hidden + 2 * tokens * hidden > 1.5 * forward
    assert whole_backward > 1.3 * backward
