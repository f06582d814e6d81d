"""The linears quantise, keep, defer and refuse what they should; accuracy has a file of its own.

The linears of FFN and attention output keep SwiGLU's input in FP8, or nothing of their own. Their errors are relative
Frobenius norms against FP64 on normal data, power-of-two scales. One E4M3 rounding leaves 2.6 %, a product of two
rounded operands 3.7 % (docs/numerics.md). SwiGLU's input rounded once more adds its two halves, gate and up: sqrt(2) *
2.6 % in its output and in its derivative. So dx has sqrt(3.7^2 + 3.7^2) = 5.2 %, and so has dW, whose operand is
rounded once again from there; the limit leaves a sixth above.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import deferred, probe
from kernels.formats import GradientTiles
from kernels.fp8_linear import (
    carried,
    fp8_experts,
    fp8_linear_of_kept,
    fp8_swiglu_linear,
    grouped_fp8_linear,
    grouped_fp8_swiglu_linear,
    grouped_linear,
    linear,
    weight_fp8,
)
from kernels.fp8_linear import fp8_linear as fp8
from kernels.permute import Dispatched, combine_tokens, group_gates, group_tokens
from kernels.quantize import dequantize_tiles, quantize_tiles
from kernels.swiglu import gated_swiglu, swiglu
from tests.kernels.expert_layouts import choices, layout_of
from tests.kernels.gemm_inputs import kept_for_backward, relative_error
from tests.operator_calls import FP8_GEMMS, OperatorCalls

LIMIT = 0.06
ENDS = torch.tensor([128, 128, 512], dtype=torch.int32)


def weight_of(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    weight.main_grad = torch.zeros(*shape)  # type: ignore[attr-defined]
    return weight


def main_grad(weight: nn.Parameter) -> Tensor:
    gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
    return gradient


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, each storage once."""
    storages = [tensor.untyped_storage() for tensor in kept_for_backward(run)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_a_bf16_weight_serves_an_fp32_input_in_fp32() -> None:
    x, weight = torch.randn(3, 64), nn.Parameter(torch.randn(5, 64).bfloat16())
    y = linear(x, weight)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x, weight.detach().float()))


def test_leading_dims_and_input_dtype_are_kept() -> None:
    x, weight = torch.randn(2, 3, 64, dtype=torch.bfloat16), nn.Parameter(torch.randn(5, 64))
    y = fp8(x, weight, power_of_two=False)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fp8(x.view(6, 64), weight, power_of_two=False).view(2, 3, 5))
    assert torch.equal(linear(x, weight), linear(x.view(6, 64), weight).view(2, 3, 5))


def test_autograd_gets_no_weight_gradient_and_micro_batches_add_up() -> None:
    weight = weight_of(64, 128)
    x, dy = torch.randn(256, 128), torch.randn(256, 64)
    parts = []
    for rows in (slice(0, 128), slice(128, 256)):
        alone = nn.Parameter(weight.detach().clone())
        fp8(x[rows], alone, power_of_two=False).backward(dy[rows])
        parts.append(alone.grad)
        fp8(x[rows], weight, power_of_two=False).backward(dy[rows])
    assert weight.grad is None
    assert torch.equal(main_grad(weight), parts[0] + parts[1])


def test_a_weight_is_quantised_once_per_optimizer_step() -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True)
    outputs = []
    for _ in range(3):
        with OperatorCalls() as calls:
            for _ in range(3):
                y = fp8(x, weight, power_of_two=False)
                y.sum().backward()
        assert calls.of("quantize_blocks") == {"quantize_blocks": 1}
        outputs.append(y.detach())
        with torch.no_grad():
            weight.copy_(2 * weight)
    # Doubling a weight doubles scales and outputs exactly: the second and third copies are fresh.
    assert torch.equal(outputs[1], 2 * outputs[0])
    assert torch.equal(outputs[2], 4 * outputs[0])


def test_the_copy_follows_new_storage_and_the_kind_of_scale() -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    first = weight_fp8(weight, power_of_two=False)
    assert weight_fp8(weight, power_of_two=False) is first
    version = weight._version
    weight.data = 3 * weight.data
    assert weight._version == version, "the version alone would not tell"
    assert weight_fp8(weight, power_of_two=False).scale.item() == (weight.abs().max() / 448).item()
    mantissa, _ = torch.frexp(weight_fp8(weight, power_of_two=True).scale)
    assert mantissa.item() == 0.5


def test_backward_keeps_one_byte_per_input_element_and_the_scales() -> None:
    rows, inputs = 256, 576
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, requires_grad=True)
    weight, experts = (nn.Parameter(torch.randn(64, inputs)), nn.Parameter(torch.randn(2, 64, inputs)))
    ends = torch.tensor([128, 256], dtype=torch.int32)
    expected = rows * inputs + 4 * rows * 5
    assert kept_bytes(lambda: fp8(x, weight, power_of_two=False)) == expected
    assert kept_bytes(lambda: grouped_fp8_linear(x, experts, ends, power_of_two=False)) == expected + ends.nbytes


def test_the_input_itself_is_freed_after_forward() -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True) * 2
    reference = weakref.ref(x)
    y = fp8(x, weight, power_of_two=False)
    del x
    assert reference() is None
    y.sum().backward()


@pytest.mark.parametrize("grouped", [False, True])
def test_under_deferred_each_gemm_runs_once_and_wgrad_waits(grouped: bool) -> None:
    ends = torch.tensor([128, 256], dtype=torch.int32)
    weight = nn.Parameter(torch.randn(2, 64, 128) if grouped else torch.randn(64, 128))
    x = torch.randn(256, 128, requires_grad=True)
    tile_block, tile_tile = FP8_GEMMS[2:] if grouped else FP8_GEMMS[:2]
    expected = dict.fromkeys(FP8_GEMMS, 0) | {tile_block: 2}
    with OperatorCalls() as calls, deferred.deferred():
        y = grouped_fp8_linear(x, weight, ends, power_of_two=False) if grouped else fp8(x, weight, power_of_two=False)
        y.sum().backward()
        assert calls.of(*FP8_GEMMS) == expected
        assert x.grad is not None
        assert weight.grad is None
        deferred.take()()
    assert calls.of(*FP8_GEMMS) == expected | {tile_tile: 1}
    assert weight.grad is not None


@pytest.mark.parametrize("layer", [linear, lambda x, w: fp8(x, w, power_of_two=False)])
def test_deferred_weight_gradients_equal_immediate_ones_bit_for_bit(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    first, second = torch.randn(64, 128), torch.randn(32, 64)
    x = torch.randn(129, 128)
    grads = []
    for defer in (False, True):
        w1, w2 = nn.Parameter(first.clone()), nn.Parameter(second.clone())
        leaf = x.clone().requires_grad_()
        with deferred.deferred() if defer else nullcontext():
            layer(layer(leaf, w1), w2).square().sum().backward()
        assert deferred.pending() == (2 if defer else 0)
        deferred.take()()
        grads.append((w1.grad, w2.grad, leaf.grad))
    assert all(map(torch.equal, *grads))


def test_a_frozen_weight_gets_no_wgrad() -> None:
    x = torch.randn(128, 128, requires_grad=True)
    ends = torch.tensor([128], dtype=torch.int32)
    with OperatorCalls() as calls, deferred.deferred():
        fp8(x, torch.randn(64, 128), power_of_two=False).sum().backward()
        linear(x, torch.randn(64, 128)).sum().backward()
        grouped_fp8_linear(x, torch.randn(1, 64, 128), ends, power_of_two=False).sum().backward()
        grouped_linear(x, torch.randn(1, 64, 128), ends).sum().backward()
        assert deferred.pending() == 0
    fprop_and_dgrad = {"gemm_tile_block": 2, "grouped_gemm_tile_block": 2}
    assert calls.of(*FP8_GEMMS) == dict.fromkeys(FP8_GEMMS, 0) | fprop_and_dgrad


def test_an_activation_checkpoint_changes_nothing() -> None:
    x = torch.randn(129, 128)
    results = []
    for recompute in (False, True):
        leaf, weight = x.clone().requires_grad_(), weight_of(128, 128)
        layer = partial(fp8, weight=weight, power_of_two=False)
        y = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        y.square().sum().backward()
        results.append((leaf.grad, main_grad(weight)))
    for plain, recomputed in zip(*results, strict=True):
        assert int(plain.count_nonzero()) > 0
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("layer", [linear, lambda x, w: fp8(x, w, power_of_two=False)])
def test_changing_a_weight_between_forward_and_backward_is_an_error(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    y = layer(torch.randn(5, 128, requires_grad=True), weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(AssertionError, match="changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_number_reaches_every_gradient_it_enters(poison: float, power_of_two: bool) -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True)
    dy = torch.randn(5, 64)
    dy[2, 3] = poison
    fp8(x, weight, power_of_two=power_of_two).backward(dy)
    assert x.grad.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert (~weight.grad.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    with torch.no_grad():
        x[1, 1] = poison
    assert fp8(x, weight, power_of_two=power_of_two).isfinite().all(1).tolist() == [True, False, True, True, True]


def test_misfitting_shapes_are_refused_with_both() -> None:
    ends = torch.tensor([128], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got \[3, 64\] and \[5, 65\]"):
        linear(torch.zeros(3, 64), torch.zeros(5, 65))
    with pytest.raises(ValueError, match=r"must be \[..., in\] and \[out, in\], got \[3, 64\] and \[1, 5, 64\]"):
        fp8(torch.zeros(3, 64), torch.zeros(1, 5, 64), power_of_two=False)
    with pytest.raises(ValueError, match=r"must be \[rows, in\] and \[groups, out, in\]"):
        grouped_linear(torch.zeros(2, 64, 8), torch.zeros(1, 5, 8), ends)
    with pytest.raises(ValueError, match="group_ends must be 2"):
        grouped_fp8_linear(torch.zeros(128, 64), torch.zeros(2, 5, 64), ends, power_of_two=False)
    with pytest.raises(ValueError, match="group_ends must be 2"):
        grouped_linear(torch.zeros(128, 64), torch.zeros(2, 5, 64), ends)


@pytest.mark.parametrize("inter", [256, 72])
@pytest.mark.parametrize("rows", [384, 37])
def test_a_dense_ffn_gives_the_same_bits_and_gradients_of_fp8_accuracy(rows: int, inter: int) -> None:
    gate_up, dy = torch.randn(rows, 2 * inter), torch.randn(rows, 96)
    weight = weight_of(96, inter)
    leaf = gate_up.clone().requires_grad_()
    y = fp8_swiglu_linear(leaf, weight, power_of_two=True)
    assert torch.equal(y, fp8(swiglu(gate_up), weight.detach(), power_of_two=True))
    y.backward(dy)
    exact, exact_weight = gate_up.double().requires_grad_(), weight.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    ((F.silu(gate) * up) @ exact_weight.t()).backward(dy.double())
    assert 0.02 < relative_error(leaf.grad, exact.grad) < LIMIT
    assert 0.02 < relative_error(main_grad(weight), exact_weight.grad) < LIMIT


@pytest.mark.parametrize(("inter", "power_of_two"), [(256, True), (72, False)])
def test_a_dense_ffn_hands_its_inner_gradient_on_in_tiles_to_the_same_bits(inter: int, power_of_two: bool) -> None:
    """It is quantised where it is made, once; a probe sees the same. A second reader of it is an error."""
    x, dy = torch.randn(129, 192).bfloat16(), torch.randn(129, 64).bfloat16()
    results, counts = [], []
    for gradient in (GradientTiles(), None):
        weights, leaf, shown = (weight_of(2 * inter, 192), weight_of(64, inter)), x.clone().requires_grad_(), Shown()
        options = {"power_of_two": power_of_two, "gradient": gradient}
        with probe.watching(shown), OperatorCalls() as calls:
            gate_up = fp8(leaf, weights[0], **options)
            y = fp8_swiglu_linear(gate_up, weights[1], **options)
            y.backward(dy)
        results.append((y.detach(), leaf.grad, *map(main_grad, weights), shown.seen))
        counts.append(list(calls.of("quantize_tiles_both", "swiglu_backward_quantize_both").values()))
    (*found, found_seen), (*expected, expected_seen) = results
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert found_seen == expected_seen
    assert counts == [[1, 1], [2, 0]]
    options["gradient"] = GradientTiles()
    gate_up = fp8(leaf, weights[0], **options)
    with pytest.raises(AssertionError, match="something else reads the output of this linear"):
        (fp8_swiglu_linear(gate_up, weights[1], **options).sum() + gate_up.sum()).backward()


def test_experts_give_the_same_bits_and_gradients_of_fp8_accuracy_an_empty_one_included() -> None:
    rows, inter = 640, 256
    gate_up, gates, dy = torch.randn(rows, 2 * inter), torch.rand(rows), torch.randn(rows, 96)
    for tensor in (gate_up, gates, dy):
        tensor[500:] = 0
    weight = weight_of(3, 96, inter)
    leaf, own_gates = gate_up.clone().requires_grad_(), gates.clone().requires_grad_()
    y = grouped_fp8_swiglu_linear(leaf, own_gates, weight, ENDS, power_of_two=True)
    expected = grouped_fp8_linear(gated_swiglu(gate_up, gates), weight.detach(), ENDS, power_of_two=True)
    assert torch.equal(y, expected)
    y.backward(dy)
    exact, exact_gates = gate_up.double().requires_grad_(), gates.double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    h = F.silu(gate) * up * exact_gates[:, None]
    torch.cat((h[:128] @ exact_weight[0].t(), h[128:512] @ exact_weight[2].t())).backward(dy[:512].double())
    assert 0.02 < relative_error(leaf.grad, exact.grad) < LIMIT
    assert 0.02 < relative_error(own_gates.grad, exact_gates.grad) < LIMIT
    assert 0.02 < relative_error(main_grad(weight), exact_weight.grad) < LIMIT
    assert not main_grad(weight)[1].any(), "an expert without tokens"


def test_only_the_input_of_swiglu_is_kept_in_one_byte_an_element() -> None:
    rows, inter = 512, 256
    gate_up = torch.randn(rows, 2 * inter, dtype=torch.bfloat16, requires_grad=True)
    gates = torch.rand(rows, requires_grad=True)
    dense, experts = weight_of(96, inter), weight_of(3, 96, inter)
    payload_and_scales = rows * 2 * inter + rows * 4 * 4
    assert kept_bytes(lambda: fp8_swiglu_linear(gate_up, dense, power_of_two=True)) == payload_and_scales
    grouped = kept_bytes(lambda: grouped_fp8_swiglu_linear(gate_up, gates, experts, ENDS, power_of_two=True))
    assert grouped == payload_and_scales + rows * 4 + 3 * 4
    two_calls = kept_bytes(lambda: fp8(swiglu(gate_up), dense, power_of_two=True))
    assert two_calls == rows * 2 * inter * 2 + rows * inter + rows * 2 * 4


class Shown:
    """A probe that remembers the bytes of all that it is shown."""

    num_blocks = 2

    def __init__(self) -> None:
        self.seen: dict[str, bytes] = {}

    def watch(self, weight: Tensor) -> Shown:
        self.name = f"{weight.shape[1]}"
        return self

    def rows(self, operand: str, sample: Any, quantized: Any) -> None:
        tensors = (sample.values, sample.rows, quantized.payload, quantized.scale)
        key = f"{operand} {quantized.payload.shape[-1]}"
        self.seen[key] = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)

    def columns(self, operand: str, sample: Any, quantized: Any) -> None:
        self.rows(f"{operand} {len(quantized.payload)}", sample, quantized)

    def weight(self, operand: str, weight: Tensor, quantized: Any) -> None:
        pass


def separate_experts(dispatched: Dispatched, gate_up: Tensor, down: Tensor, power_of_two: bool) -> Tensor:
    grouping = dispatched.grouping
    rows = group_tokens(dispatched.tokens, grouping)
    rows = grouped_fp8_linear(rows, gate_up, grouping.group_ends, power_of_two=power_of_two)
    ends, gates = grouping.group_ends, dispatched.gates
    return combine_tokens(grouped_fp8_swiglu_linear(rows, gates, down, ends, power_of_two=power_of_two), grouping)


@pytest.mark.parametrize("arrives", ["numbers", "tiles"])
@pytest.mark.parametrize(("which", "power_of_two"), [("whole", True), ("whole", False), ("partial", True)])
def test_experts_have_the_bits_of_separate_linears_on_copied_tokens(
    which: str, power_of_two: bool, arrives: str
) -> None:
    """Outputs, gradients, and what a probe is shown; the gradient as it is, or in tiles over the wire."""
    tokens, hidden, inter = 129, 320, 128
    _, layout = layout_of(choices("random", tokens, 3), which)
    x, dy, gates = torch.randn(tokens, hidden).bfloat16(), torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, 3)
    tiles = quantize_tiles(dy, power_of_two=power_of_two)
    # What a wire rounds to. Of FP32 scales the rows by column alone would differ: they are not rounded to BF16 between.
    arrived = dy if arrives == "numbers" else dequantize_tiles(tiles, out_dtype=torch.bfloat16)
    results = []
    for fused in (True, False):
        leaf, own_gates, shown = x.clone().requires_grad_(), gates.clone().requires_grad_(), Shown()
        weights = [weight_of(len(layout.group_ends), *shape) for shape in ((2 * inter, hidden), (hidden, inter))]
        gradient = GradientTiles() if fused and arrives == "tiles" else None
        dispatched = Dispatched(leaf, group_gates(own_gates, layout), layout, gradient, None)
        with probe.watching(shown):
            run = fp8_experts if fused else separate_experts
            y = run(dispatched, *weights, power_of_two=power_of_two)
        if gradient is None:
            y.backward(arrived)
        else:
            gradient.put(tiles)
            y.backward(torch.full((1, 1), float("nan"), dtype=torch.bfloat16).expand(y.shape))
        results.append((y.detach(), leaf.grad, own_gates.grad, *map(main_grad, weights), shown.seen))
    (*fused_results, fused_seen), (*expected, expected_seen) = results
    exact = arrives == "numbers" or power_of_two
    for index, (found, wanted) in enumerate(zip(fused_results, expected, strict=True)):
        if exact or index != 4:
            assert torch.equal(found, wanted), index
        else:
            # One BF16 rounding of an operand fewer: 2^-10 of a number in the mean, which tips one of 2^6 over an edge
            # of E4M3, by a step of 2^-3.5: sqrt(2^-6) 2^-3.5 = 1.1 %. Measured: 1.1 %.
            assert 0 < relative_error(found, wanted.double()) < 0.015
    assert len(expected_seen) == 8
    different = {key for key in expected_seen if fused_seen[key] != expected_seen[key]}
    assert different <= (
        set() if arrives == "numbers" else {f"dy.dgrad {hidden}", f"dy.wgrad {hidden} {layout.num_rows}"}
    )


def test_experts_keep_the_tokens_once_in_one_byte_an_element() -> None:
    """Not their copies; of tiles that the operation before shares, nothing is added."""
    tokens, hidden, inter, topk = 129, 320, 128, 3
    _, layout = layout_of(choices("random", tokens, topk), "whole")
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    weights = [weight_of(8, *shape) for shape in ((2 * inter, hidden), (hidden, inter))]
    gates = torch.rand(layout.num_rows)
    dispatched = Dispatched(carried(x, power_of_two=True), gates, layout, None, None)
    rows = layout.num_rows
    of_tokens = tokens * (hidden + 3 * 4)
    of_rows = rows * (2 * inter + 2 * 4) + rows * 4
    of_layout = rows * 8 + tokens * topk * 8 + 8 * 4
    kept = kept_bytes(lambda: fp8_experts(dispatched, *weights, power_of_two=True))
    assert kept == of_tokens + of_rows + of_layout
    # The shared expert reads the same tiles.
    shared = weight_of(hidden, hidden)
    both = kept_bytes(
        lambda: (
            fp8_experts(dispatched, *weights, power_of_two=True)
            + fp8(replace(dispatched.tokens, carrier=x), shared, power_of_two=True)
        )
    )
    assert both == kept


def test_an_input_that_is_kept_anyway_is_not_kept_twice() -> None:
    x, dy = torch.randn(384, 256), torch.randn(384, 96)
    weight, other = weight_of(96, 256), weight_of(96, 256)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert kept_bytes(lambda: fp8_linear_of_kept(leaf, weight, power_of_two=True)) == x.nbytes
    y, plain = fp8_linear_of_kept(leaf, weight, power_of_two=True), fp8(twin, other, power_of_two=True)
    assert torch.equal(y, plain)
    y.backward(dy)
    plain.backward(dy)
    assert torch.equal(leaf.grad, twin.grad)
    exact = dy.double().t() @ x.double()
    # Power-of-two scales: rounding once or twice is the same outside underflow.
    error, expected = (relative_error(main_grad(each), exact) for each in (weight, other))
    assert error == pytest.approx(expected, rel=1e-3)


def test_weight_gradients_wait_in_the_queue_and_are_the_same_bits() -> None:
    gate_up, gates = torch.randn(512, 512, requires_grad=True), torch.rand(512, requires_grad=True)
    dy = torch.randn(512, 96)
    runs: list[tuple[nn.Parameter, Callable[[nn.Parameter], Tensor]]] = [
        (weight_of(96, 256), lambda w: fp8_swiglu_linear(gate_up, w, power_of_two=True)),
        (weight_of(3, 96, 256), lambda w: grouped_fp8_swiglu_linear(gate_up, gates, w, ENDS, power_of_two=True)),
        (weight_of(96, 512), lambda w: fp8_linear_of_kept(gate_up, w, power_of_two=True)),
    ]
    for weight, run in runs:
        run(weight).backward(dy)
        at_once = main_grad(weight).clone()
        main_grad(weight).zero_()
        with deferred.deferred():
            run(weight).backward(dy)
            assert not main_grad(weight).any()
            assert deferred.pending() == 1
            deferred.take()()
        assert torch.equal(main_grad(weight), at_once)
