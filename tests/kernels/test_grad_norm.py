"""Sums of squares are FP64's, part by part, in the reference and in the device code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.grad_norm import PART, sums_of_squares_reference


def on_device_code(x: Tensor) -> Tensor:
    pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this test")
    from kernels.gpu import grad_norm as gpu

    return gpu.sums_of_squares(x)


@pytest.mark.parametrize(("sums", "bound"), [(sums_of_squares_reference, 1e-6), (on_device_code, 1e-14)])
@pytest.mark.parametrize("tiles", [0, 1, 63, 128, 129, 257])
def test_each_part_is_the_sum_of_its_squares(tiles: int, sums: Callable[[Tensor], Tensor], bound: float) -> None:
    """Gradients of 1e-12 to 1e12: their squares leave FP32's range, and a NaN stays in its part."""
    x = torch.randn(tiles * 128) * torch.logspace(-12, 12, tiles).repeat_interleave(128)
    expected = torch.stack([part.double().square().sum() for part in x.split(PART)]) if tiles else torch.empty(0)
    # FP32 norms of 128 elements: 127 additions and a root, 2^-24 each, of which their squares err twice. FP64: exact
    # products, 16,384 additions of one sign in tree order: 2^-53 x 20 at most.
    torch.testing.assert_close(sums(x), expected.double(), rtol=bound, atol=0.0)
    if tiles == 257:
        x[-1] = torch.nan
        assert sums(x).isnan().tolist() == [False, False, True]
