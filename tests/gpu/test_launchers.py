"""Every launcher of `kernels/gpu/` against its reference at odd sizes, and against itself: twice the same bits."""

from __future__ import annotations

import sys

import pytest
import torch

from kernels.operators import LAUNCHERS
from tests.gpu.launcher_cases import CASES, ROWS, WHOLE_TILES, WIDTHS, WITHOUT_WIDTH, bits, distance, run

pytestmark = pytest.mark.gpu
SIZES = [
    (name, rows, width)
    for name in CASES
    for rows in ROWS
    for width in (
        WIDTHS[:1] if name in WITHOUT_WIDTH else (*WIDTHS, *([WHOLE_TILES[name]] if name in WHOLE_TILES else []))
    )
]


@pytest.mark.parametrize(("name", "rows", "width"), SIZES)
def test_a_launcher_computes_what_its_reference_does_twice_alike(
    name: str, rows: int, width: int, device: torch.device
) -> None:
    case = CASES[name]
    arguments = case.make(rows, width)
    expected = run(name, arguments, torch.device("cpu"))
    actual, again = (run(name, arguments, device) for _ in range(2))
    assert LAUNCHERS[name] in sys.modules, "the reference ran in its place"
    for index, (mine, repeated, theirs) in enumerate(zip(actual, again, expected, strict=True)):
        assert torch.equal(bits(mine), bits(repeated)), f"result {index} differs between two runs"
        # Integers are choices and places: never nearly right.
        tolerance = case.tolerance if mine.is_floating_point() else 0.0
        assert distance(mine, theirs) <= tolerance, f"result {index}"
