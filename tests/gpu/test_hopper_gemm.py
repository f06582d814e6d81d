"""The Gluon GEMM on a GPU, each shipped configuration by name, against FP64 and against itself.

The dispatcher gives a shape one configuration; here each meets odd sizes, so that none is right only where it is used.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.formats import Quantized
from tests.gpu.launcher_cases import FP8_SUM, FP8_SUM_BF16
from tests.kernels import gemm_inputs
from tests.kernels.gemm_inputs import Problem, relative_error

pytestmark = pytest.mark.gpu
# 256x128, 128x128 and 128x192 tiles; 256x128 and 256x64 in one launch, of one product only.
CONFIGS = ("TWO_WAVES", "TWO_BLOCKS", "WIDE")
SHAPES = [(1, 576, 128), (63, 2112, 576), (129, 576, 2112), (4097, 2112, 144), (1000, 320, 1536)]
# No row, one tile, a ragged last tile of 256 rows, and padding rows behind.
ENDS, ROWS = [384, 384, 512, 1024], 1152


def multiply(problem: Problem, out: Tensor, device: torch.device, *, config: str, accumulate: bool = False) -> Tensor:
    """Twice on the device, from the same `out`; the same bits both times."""
    from kernels.gpu import gemm_fp8, gemm_hopper

    a, b = (Quantized(q.payload.to(device), q.scale.to(device)) for q in problem.quantized)
    ends = None if problem.group_ends is None else problem.group_ends.to(device)
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    how = {"config": getattr(gemm_fp8, config), "programs": programs, "group_ends": ends, "accumulate": accumulate}
    results = [out.to(device, copy=True) for _ in range(2)]
    for result in results:
        gemm_hopper.gemm(a, b, result, **how)
    assert torch.equal(results[0], results[1]), "two runs differ"
    return results[0].cpu()


@pytest.mark.parametrize(
    ("name", "m", "n", "k", "ends"),
    [
        *((name, *shape, None) for name in (*CONFIGS, "HALVES") for shape in SHAPES),
        *((name, ROWS, 576, 704, ENDS) for name in CONFIGS),
    ],
)
def test_fprop_and_dgrad(name: str, m: int, n: int, k: int, ends: list[int] | None, hopper: torch.device) -> None:
    problem = gemm_inputs.tile_block(m, n, k, ends)
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    actual = multiply(problem, out, hopper, config=name)
    assert relative_error(actual, problem.expected) < FP8_SUM_BF16
    if ends is not None:
        assert not actual[ends[-1] :].any(), "padding rows are zero"


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "ends"),
    [(1, 576, 128, None), (2112, 63, 144, None), (576, 129, 4096, None), (320, 129, ROWS, ENDS)],
)
def test_wgrad(m: int, n: int, k: int, ends: list[int] | None, accumulate: bool, hopper: torch.device) -> None:
    problem = gemm_inputs.tile_tile(m, n, k, ends)
    shape = problem.expected.shape
    before = torch.randn(shape) if accumulate else torch.full(shape, float("nan"))
    actual = multiply(problem, before, hopper, config="TWO_WAVES", accumulate=accumulate)
    assert relative_error(actual, problem.expected + (before.double() if accumulate else 0)) < FP8_SUM
    if ends is not None and not accumulate:
        assert not actual[1].any(), "an empty group contracts nothing"
