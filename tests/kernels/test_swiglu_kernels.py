"""The Triton kernels of `kernels/gpu/swiglu.py`, interpreted, against the references and against FP64.

Two statements carry the rest. (1) A kernel that reads or writes FP8 gives bit for bit what the separate kernels give
one after the other, and what it keeps of gate_up has the reference's bits. (2) Activations differ from the reference's
only by the exponential's last place (NumPy's here, a GPU's there, torch's in the reference). An error of 4 * 2^-24
moves a BF16 number to its neighbour if a tie is within it. Ties are at least 2^-8 of the number apart, so each
rounding moves 2 * 4 * 2^-24 * 2^8 = 1.2e-4 of the elements. The largest of a tile, moved, may shift all its 128 codes.

Sizes are those where something ends: one row, an odd one, a whole tile, one more, many programs and one row; inter 256,
and 192, where a tile of gate_up holds gates and ups. Outputs are NaN before they are written (tests/conftest.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import quantize, swiglu
from kernels.gpu import quantize as gpu_quantize
from kernels.gpu import swiglu as gpu
from tests.kernels.gemm_inputs import assert_same_bits

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(1, 256), (63, 192), (128, 256), (129, 192), (129, 256), (4097, 128)]
# Of the elements of a BF16 activation: what the docstring derives, for plain SwiGLU twice, which rounds twice.
MOVED_SHARE = 2 * 1.2e-4

gated = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
sizes = pytest.mark.parametrize(("rows", "inter"), SHAPES)
scales = pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", "FP32 scales"])
# Scales do not depend on gates and sizes: every pair of them occurs, and each size with either scale.
gated_and_scales = pytest.mark.parametrize(
    ("rows", "inter", "gated", "power_of_two"),
    [(rows, inter, gated, gated == (rows % 4 == 1)) for rows, inter in SHAPES for gated in (True, False)],
)


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    rows = getattr(request.node, "callspec", None) and request.node.callspec.params.get("rows", 0)
    if rows and rows > 1000:
        monkeypatch.setattr(gpu, "ROWS", 512)
        monkeypatch.setattr(gpu_quantize, "ROWS", 512)
        monkeypatch.setattr(gpu_quantize, "TILES", 1)


def example(
    rows: int, inter: int, *, gated: bool = True, dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor | None, Tensor]:
    """gate_up with rows of different size, one of zeros and one past the exponential's range; gates; a gradient."""
    gate_up = torch.randn(rows, 2 * inter) * torch.randn(rows, 1).exp()
    if rows > 2:
        gate_up[1] = 0
        gate_up[2, :5] = torch.tensor([-1e4, -100.0, -87.0, 100.0, 1e4])
    gates = torch.rand(rows)
    gates[rows // 2 :: 3] = 0
    return gate_up.to(dtype), gates if gated else None, torch.randn(rows, inter).to(dtype)


def activation(gate_up: Tensor, gates: Tensor | None) -> Tensor:
    return gpu.swiglu(gate_up) if gates is None else gpu.gated_swiglu(gate_up, gates)


def backward(gate_up: Tensor, gates: Tensor | None, dh: Tensor) -> tuple[Tensor, ...]:
    """The gradient of gate_up, and of the gates where there are any."""
    return (gpu.swiglu_backward(gate_up, dh),) if gates is None else gpu.gated_swiglu_backward(gate_up, gates, dh)


def backward_kept(payload: Tensor, scale: Tensor, gates: Tensor | None, dh: Tensor) -> tuple[Tensor, ...]:
    """The same at an input that is kept in FP8."""
    if gates is None:
        return (gpu.swiglu_backward_kept(payload, scale, dh),)
    return gpu.gated_swiglu_backward_kept(payload, scale, gates, dh)


@gated
@sizes
def test_an_activation_is_the_references_but_for_the_last_place_of_the_exponential(
    rows: int, inter: int, gated: bool
) -> None:
    dtype = FP32 if rows == 63 else BF16
    gate_up, gates, _ = example(rows, inter, gated=gated, dtype=dtype)
    h = activation(gate_up, gates)
    expected = swiglu.swiglu_reference(gate_up) if gates is None else swiglu.gated_swiglu_reference(gate_up, gates)
    assert (h.shape, h.dtype) == (expected.shape, dtype)
    # FP32: exp within two units, the sum, the quotient and two products; BF16: one place of 2^-7, for each rounding.
    step = 2**-20 if dtype == FP32 else 2**-7
    assert bool(((h.double() - expected.double()).abs() <= step * expected.double().abs() + 1e-38).all())
    if dtype == BF16:
        assert int((h != expected).sum()) <= max(2, MOVED_SHARE * h.numel())


@gated_and_scales
def test_one_read_of_the_input_gives_what_separate_kernels_give(
    rows: int, inter: int, gated: bool, power_of_two: bool
) -> None:
    gate_up, gates, _ = example(rows, inter, gated=gated, dtype=FP32 if rows == 128 else BF16)
    found = gpu.swiglu_quantize(gate_up, gates, power_of_two)
    assert_same_bits(found[:2], quantize.quantize_tiles_reference(gate_up, power_of_two))
    assert_same_bits(found[2:], quantize.quantize_tiles_reference(activation(gate_up, gates), power_of_two))


@gated_and_scales
def test_the_operand_of_wgrad_is_what_separate_kernels_give(
    rows: int, inter: int, gated: bool, power_of_two: bool
) -> None:
    gate_up, gates, _ = example(rows, inter, gated=gated)
    dtype = FP32 if rows == 128 else BF16
    kept = quantize.quantize_tiles_reference(gate_up, power_of_two)
    found = gpu.swiglu_quantize_transposed(*kept, gates, dtype, power_of_two)
    h = activation(quantize.dequantize_tiles_reference(*kept, dtype), gates)
    assert_same_bits(found, quantize.quantize_tiles_transposed_reference(h, power_of_two))


@pytest.mark.parametrize(
    ("rows", "inter", "gated"),
    [(1, 256, True), (63, 192, False), (128, 256, True), (129, 192, True), (129, 256, False), (4097, 128, True)],
)
def test_gradients_quantised_both_ways_are_what_separate_kernels_give(
    rows: int, inter: int, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROWS_BOTH", 64)
    monkeypatch.setattr(gpu, "COLUMNS_BOTH", 64)
    gate_up, gates, dh = example(rows, inter, gated=gated, dtype=FP32 if rows == 128 else BF16)
    power_of_two = rows not in (63, 128)
    kept = quantize.quantize_tiles_reference(gate_up, power_of_two)
    d_gate_up, *d_gates = backward_kept(*kept, gates, dh)
    *found, found_d_gates = gpu.swiglu_backward_quantize_both(*kept, gates, dh, power_of_two)
    assert_same_bits(found, quantize.quantize_tiles_both_reference(d_gate_up, power_of_two))
    if gates is None:
        assert found_d_gates.isnan().tolist() == [True]
    else:
        # The same FP32 terms in another order: eight roundings of 2^-24 in each of two trees of at most 256 terms.
        h = activation(quantize.dequantize_tiles_reference(*kept, FP32), None).double()
        bound = 2 * 8 * 2**-24 * (h * dh.double()).abs().sum(1)
        assert bool(((found_d_gates.double() - d_gates[0].double()).abs() <= bound + 1e-38).all())


@gated
@scales
def test_quantised_activations_are_within_one_step_of_the_references(gated: bool, power_of_two: bool) -> None:
    gate_up, gates, _ = example(129, 256, gated=gated)
    by_row = gate_up, gates, power_of_two
    by_column = *quantize.quantize_tiles_reference(gate_up, power_of_two), gates, BF16, power_of_two
    for found, wanted in (
        (gpu.swiglu_quantize(*by_row)[2:], swiglu.swiglu_quantize_reference(*by_row)[2:]),
        (gpu.swiglu_quantize_transposed(*by_column), swiglu.swiglu_quantize_transposed_reference(*by_column)),
    ):
        values = quantize.dequantize_tiles_reference(*found, FP32)
        expected = quantize.dequantize_tiles_reference(*wanted, FP32)
        largest = wanted[1].repeat_interleave(128, 0)[: expected.shape[1]].t()
        # One step of E4M3: 2^-3 of a normal number, 2^-9 of the scale below; the scale itself may move by 2^-8.
        assert bool(((values - expected).abs() <= 0.13 * expected.abs() + 2**-9 * 1.01 * largest).all())
        moved = int((found[0].view(torch.uint8) != wanted[0].view(torch.uint8)).sum())
        assert moved <= max(2, MOVED_SHARE * values.numel()) + 128 * int((found[1] != wanted[1]).sum())


def assert_gradients_near_fp64(found: tuple[Tensor, ...], gate_up: Tensor, gates: Tensor | None, dh: Tensor) -> None:
    """Each gradient within its roundings of the exact one, and FP32 arithmetic of its largest intermediate."""
    exact = gate_up.double().requires_grad_()
    exact_gates = torch.ones(len(dh), dtype=torch.float64) if gates is None else gates.double()
    exact_gates.requires_grad_()
    wide = dh.double()
    h = swiglu.gated_swiglu_reference(exact, exact_gates)
    expected, expected_gates = torch.autograd.grad(h, (exact, exact_gates), wide)
    gate, up = gate_up.double().chunk(2, -1)
    scaled = (wide * exact_gates.detach()[:, None]).abs()
    # silu' = s + x s (1 - s): its FP32 error is that of its terms, a few 2^-24 of 1 + |x|, whatever they cancel to; the
    # exponent's own rounding adds |x| 2^-24 to them. So is silu's.
    slack = 2**-20 * torch.cat((scaled * up.abs(), scaled), -1) * (1 + gate.abs().repeat(1, 2))
    # Plain SwiGLU rounds a product to the dtype on the way, the gated one its result alone.
    rounding = (2 if gates is None else 1) * (2**-8 if dh.dtype == BF16 else 2**-24)
    assert found[0].dtype == dh.dtype
    assert bool(((found[0].double() - expected).abs() <= 1.01 * rounding * expected.abs() + slack + 1e-38).all())
    if gates is not None:
        terms = (wide * torch.nn.functional.silu(gate) * up).abs()
        # inter / 128 terms are added one after the other, then 128 sums in pairs; a term has some 16 errors of 2^-24 of
        # its own, and those of the exponent.
        depth = dh.shape[1] // 128 + 7 + 16
        limit = 2**-24 * (terms * (depth + gate.abs())).sum(-1)
        assert found[1].dtype == FP32
        assert bool(((found[1].double() - expected_gates).abs() <= limit + 1e-38).all())


@gated
@sizes
def test_gradients_are_within_their_roundings_of_fp64(rows: int, inter: int, gated: bool) -> None:
    inputs = example(rows, inter, gated=gated, dtype=FP32 if rows == 63 else BF16)
    assert_gradients_near_fp64(backward(*inputs), *inputs)


@gated
def test_gradients_are_rounded_where_the_references_are(gated: bool) -> None:
    gate_up, gates, dh = example(129, 256, gated=gated)
    found = backward(gate_up, gates, dh)[0]
    if gates is None:
        expected = swiglu.swiglu_backward_reference(gate_up, dh)
    else:
        expected, _ = swiglu.gated_swiglu_backward_reference(gate_up, gates, dh)
    # Twice the share of an activation, for silu' has twice the terms; another rounding would move a quarter of them.
    assert int((found != expected).sum()) <= 2 * MOVED_SHARE * found.numel()


@gated
@sizes
def test_gradients_at_the_kept_input_are_those_at_its_values(rows: int, inter: int, gated: bool) -> None:
    gate_up, gates, dh = example(rows, inter, gated=gated, dtype=FP32 if rows == 128 else BF16)
    kept = quantize.quantize_tiles_reference(gate_up, rows % 2 == 1)
    values = quantize.dequantize_tiles_reference(*kept, dh.dtype)
    found = backward_kept(*kept, gates, dh)
    assert_same_bits(found, backward(values, gates, dh))
    assert_gradients_near_fp64(found, values, gates, dh)


def test_the_gradient_of_a_gate_does_not_depend_on_the_rows_beside_it() -> None:
    inputs = example(40, 384)
    _, whole = gpu.gated_swiglu_backward(*inputs)
    _, part = gpu.gated_swiglu_backward(*(each[7:] for each in inputs))
    assert_same_bits(part, whole[7:])


def test_a_plain_activation_takes_leading_dims_and_strides() -> None:
    gate_up, _, dh = example(30, 96)
    h, grad = gpu.swiglu(gate_up), gpu.swiglu_backward(gate_up, dh)
    assert_same_bits(gpu.swiglu(gate_up.view(2, 15, 192)), h.view(2, 15, 96))
    strided = gate_up.t().contiguous().t().unflatten(0, (2, 15))
    assert_same_bits(gpu.swiglu_backward(strided, dh.view(2, 15, 96)), grad.view(2, 15, 192))


@pytest.mark.parametrize(
    ("bad", "power_of_two", "gated"),
    [(math.nan, True, True), (math.inf, False, True), (math.nan, False, False), (math.inf, True, False)],
)
def test_a_bad_number_makes_its_tiles_bad_and_no_others(bad: float, power_of_two: bool, gated: bool) -> None:
    gate_up = torch.randn(130, 512).bfloat16()
    gates = torch.rand(130) + 0.5 if gated else None
    gate_up[3, 256 + 5] = bad
    kept, kept_scale, payload, scale = gpu.swiglu_quantize(gate_up, gates, power_of_two)
    values = quantize.dequantize_tiles_reference(kept, kept_scale, FP32)
    h = quantize.dequantize_tiles_reference(payload, scale, FP32)
    assert bool(values[3, 256:384].isnan().all())
    assert bool(h[3, :128].isnan().all())
    assert (int(values.isnan().sum()), int(h.isnan().sum())) == (128, 128)
    # The kept tile makes 128 numbers of row 3 bad, each of them the 128 tokens of its channel.
    h_t = quantize.dequantize_tiles_reference(
        *gpu.swiglu_quantize_transposed(kept, kept_scale, gates, BF16, power_of_two), FP32
    )
    assert bool(h_t[:128, :128].isnan().all())
    assert int(h_t.isnan().sum()) == 128 * 128
    # The tile held ups: of them d_gate is made, d_up is not.
    grad = backward_kept(kept, kept_scale, gates, torch.ones(130, 256, dtype=BF16))[0]
    assert bool(grad[3, :128].isnan().all())
    assert int(grad.isnan().sum()) == 128


def test_matrices_without_rows() -> None:
    gate_up, gates, dh = torch.empty(0, 512, dtype=BF16), torch.empty(0), torch.empty(0, 256, dtype=BF16)
    kept = gpu.swiglu_quantize(gate_up, gates, True)
    assert [tuple(t.shape) for t in kept] == [(0, 512), (4, 0), (0, 256), (2, 0)]
    transposed = gpu.swiglu_quantize_transposed(*kept[:2], None, BF16, True)
    assert [tuple(t.shape) for t in transposed] == [(256, 0), (0, 256)]
    assert gpu.swiglu_backward_kept(*kept[:2], dh).shape == (0, 512)
    assert [t.shape[0] for t in gpu.gated_swiglu_backward_kept(*kept[:2], gates, dh)] == [0, 0]
    both = gpu.swiglu_backward_quantize_both(*kept[:2], gates, dh, True)
    assert [tuple(t.shape) for t in both] == [(0, 512), (4, 0), (512, 0), (0, 512), (0,)]
    assert gpu.swiglu(gate_up).shape == (0, 256)
