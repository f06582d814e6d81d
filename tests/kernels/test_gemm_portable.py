"""The plain Triton GEMMs, interpreted, against FP64: ragged sizes, groups without rows, NaN-poisoned outputs."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from kernels.gpu import gemm_fp8, gemm_portable
from tests.kernels import gemm_inputs
from tests.kernels.gemm_inputs import BF16_TOLERANCE, FP32_TOLERANCE, relative_error, slices

ENDS, ROWS = [128, 128, 384], 512


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 7, 128), (63, 129, 576), (129, 128, 16), (4097, 64, 128)])
def test_fprop_and_dgrad(m: int, n: int, k: int, out_dtype: torch.dtype) -> None:
    problem = gemm_inputs.tile_block(m, n, k)
    out = gemm_fp8.gemm_tile_block(*problem.operands, out_dtype)
    assert out.dtype == out_dtype
    tolerance = BF16_TOLERANCE if out_dtype == torch.bfloat16 else FP32_TOLERANCE
    assert relative_error(out, problem.expected) < tolerance


@pytest.mark.parametrize("ends", [ENDS, [0, 512], [0, 0, 0]])
def test_groups_of_rows(ends: list[int]) -> None:
    problem = gemm_inputs.tile_block(ROWS, 192, 320, ends)
    out = gemm_fp8.grouped_gemm_tile_block(*problem.operands, problem.group_ends, torch.float32)
    if ends[-1]:
        assert relative_error(out, problem.expected) < FP32_TOLERANCE
    assert out[ends[-1] :].count_nonzero() == 0


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("ends", [None, ENDS, [0, 0, 512]])
def test_wgrad(ends: list[int] | None, accumulate: bool) -> None:
    problem = gemm_inputs.tile_tile(63, 200, ROWS, ends)
    before = torch.randn(problem.expected.shape)
    out = before.clone() if accumulate else torch.full_like(before, float("nan"))
    if problem.group_ends is None:
        gemm_fp8.gemm_tile_tile(*problem.operands, out, accumulate)
    else:
        gemm_fp8.grouped_gemm_tile_tile(*problem.operands, problem.group_ends, out, accumulate)
    assert relative_error(out, problem.expected + (before.double() if accumulate else 0)) < FP32_TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "hopper", "tolerance"),
    [
        (torch.bfloat16, False, BF16_TOLERANCE),
        (torch.bfloat16, True, BF16_TOLERANCE),
        (torch.float32, True, FP32_TOLERANCE),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_bf16_and_fp32(
    transposed: bool, dtype: torch.dtype, hopper: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fprop (weights seen transposed) and as dgrad; padding rows become zeros, however many; torch's on Hopper."""
    called = Mock(wraps=F.grouped_mm)
    monkeypatch.setattr(F, "grouped_mm", called)
    monkeypatch.setattr(gemm_portable, "use_gluon", lambda _: hopper)
    monkeypatch.setattr(gemm_portable, "multiprocessors", lambda _: 3)
    for ends in (ENDS, [0, 0, 0]):
        x = torch.randn(ROWS, 72).to(dtype)
        weight = torch.randn(3, 136, 72).to(dtype).mT if transposed else torch.randn(3, 72, 136).to(dtype)
        out = gemm_portable.grouped_matmul(x, weight, torch.tensor(ends, dtype=torch.int32))
        expected = torch.zeros(ROWS, 136, dtype=torch.float64)
        for rows, expert in zip(slices(ends), weight.double(), strict=True):
            expected[rows] = x[rows].double() @ expert
        assert out[ends[-1] :].count_nonzero() == 0
        assert out.isfinite().all()
        assert ends[-1] == 0 or relative_error(out, expected) < tolerance
    assert called.call_count == (2 if hopper and dtype == torch.bfloat16 else 0)


def test_grouped_weight_gradients_of_bf16_are_fp32() -> None:
    dy, x = torch.randn(ROWS, 136).bfloat16(), torch.randn(ROWS, 72).bfloat16()
    dw = gemm_portable.grouped_wgrad(dy, x, torch.tensor(ENDS, dtype=torch.int32))
    assert dw.dtype == torch.float32
    expected = torch.stack([dy[part].double().T @ x[part].double() for part in slices(ENDS)])
    assert relative_error(dw, expected) < FP32_TOLERANCE
