"""What the GPU tests compare, tried without a GPU: each launcher has a case, arguments fit, a wrong result is seen.

The tests themselves are in `tests/gpu/` and need a GPU; here both sides are the reference.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from kernels.operators import LAUNCHERS
from parallel.mesh import init_processes, shutdown
from tests.gpu.launcher_cases import CASES, WIDTHS, Results, distance, run
from tests.gpu.one_rank import average_beside_the_step, collectives, state_right_after_a_step

CPU = torch.device("cpu")


def results(name: str, rows: int) -> Results:
    torch.manual_seed(rows)
    return run(name, CASES[name].make(rows, WIDTHS[1]), CPU)


def test_every_launcher_has_a_case() -> None:
    assert set(CASES) == set(LAUNCHERS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 129])
def test_the_arguments_fit_the_operator_and_results_repeat(name: str, rows: int) -> None:
    first, second = (results(name, rows) for _ in range(2))
    assert first
    assert all(mine.numel() for mine in first)
    assert [distance(mine, theirs) for mine, theirs in zip(first, second, strict=True)] == [0.0] * len(first)


@pytest.mark.parametrize("name", CASES)
def test_one_wrong_row_is_further_away_than_the_tolerance(name: str) -> None:
    """The smallest defect that a GPU test must see: one row of one result is another one's."""
    for index, expected in enumerate(results(name, 129)):
        if expected.dim() == 0 or len(expected) < 2:
            continue
        rows = expected.reshape(len(expected), -1).float()
        # Two neighbours that differ: padding rows are alike.
        (places,) = torch.where((rows[1:] != rows[:-1]).any(dim=1))
        actual = expected.clone()
        actual[places[0]] = expected[places[0] + 1]
        tolerance = CASES[name].tolerance if actual.is_floating_point() else 0.0
        assert distance(actual, expected) > tolerance, index


def test_a_nan_or_another_dtype_is_infinitely_far() -> None:
    x = torch.ones(3)
    assert distance(x.clone().fill_(float("nan")), x) == float("inf")
    assert distance(x.double(), x) == float("inf")
    assert distance(x[:2], x) == float("inf")


def test_collectives_of_one_rank_give_back_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that `make gpu` runs on NCCL, on gloo."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    init_processes(rank=0, world=1, backend="gloo", store=dist.HashStore(), timeout_s=60)
    found = collectives(CPU)
    shutdown()
    assert len(found) == 8
    assert all(found.values())


def test_the_average_beside_the_step_is_the_closed_form() -> None:
    average, expected = average_beside_the_step(CPU)
    assert expected.item() == 3.5
    assert bool((average.double() == expected).all())


def test_an_offloaded_state_is_updated_bit_for_bit() -> None:
    expected, found = (state_right_after_a_step(CPU, place) for place in ("none", "cpu"))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert len(expected) == len(found) == 7
