"""Rows by uneven all-to-all: the right ones arrive, in order of source, for every dtype; bytes are counted as sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import Traffic, all_to_all_rows, sum_over
from parallel.mesh import Axis
from tests.ranks import run_ranks

WORLD = 3
DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)
# SPLITS[source][destination], rows. Rank 1 receives nothing from others, rank 2 sends nothing at all.
SPLITS = {
    "uneven": [[2, 0, 3], [1, 4, 0], [0, 0, 0]],
    "nothing arrives at rank 1": [[1, 0, 2], [3, 0, 1], [0, 0, 5]],
    "nothing at all": [[0, 0, 0]] * 3,
}
WIDTH = 5


def exchange(rank: int, world: int) -> dict[str, object]:
    axis = Axis("ep", world, rank, dist.group.WORLD)
    wrong: list[object] = []
    traffic = Traffic()
    for name, splits in SPLITS.items():
        for dtype in DTYPES:
            # A row says where it comes from, where it goes, and which of the rows for that rank it is.
            sent = [[rank * 100 + to * 10 + n] * WIDTH for to in range(world) for n in range(splits[rank][to])]
            rows = torch.tensor(sent, dtype=dtype).view(-1, WIDTH)
            expected = [
                [source * 100 + rank * 10 + n] * WIDTH for source in range(world) for n in range(splits[source][rank])
            ]
            columns = [splits[source][rank] for source in range(world)]
            got = all_to_all_rows(rows, splits[rank], columns, axis, kind=str(dtype), traffic=traffic).buffer
            if not torch.equal(got, torch.tensor(expected, dtype=dtype).view(-1, WIDTH)):
                wrong.append((name, dtype))
    # Rows may be strided and have more dims than two.
    strided = torch.arange(2 * world, dtype=torch.float32).view(2, world).t()[..., None] + 100 * rank  # [world, 2, 1]
    ones = [1] * world
    got = all_to_all_rows(strided, ones, ones, axis).buffer
    expected_rows = [[[100.0 * source + rank], [100.0 * source + world + rank]] for source in range(world)]
    if got.tolist() != expected_rows:
        wrong.append(("strided", got.tolist()))
    counts = torch.tensor([rank, 2**40, -rank])
    return {
        "wrong": wrong,
        "sent": dict(traffic.sent),
        "to_others": dict(traffic.to_others),
        "rows": dict(traffic.rows),
        "sum": sum_over(counts.clone(), axis).tolist(),
    }


def test_rows_arrive_in_order_of_source_and_bytes_are_counted_as_sent() -> None:
    results = run_ranks(WORLD, exchange)
    for rank, result in enumerate(results):
        assert result["wrong"] == []
        # Sums of integers beyond FP32's 24 bits stay exact.
        assert result["sum"] == [3, 3 * 2**40, -3]
        total = sum(sum(splits[rank]) for splits in SPLITS.values())
        kept = sum(splits[rank][rank] for splits in SPLITS.values())
        for dtype in DTYPES:
            row_bytes = WIDTH * dtype.itemsize
            assert result["rows"][str(dtype)] == total
            assert result["sent"][str(dtype)] == total * row_bytes
            assert result["to_others"][str(dtype)] == (total - kept) * row_bytes


def test_an_axis_of_one_rank_is_the_identity_and_needs_no_group() -> None:
    assert not dist.is_initialized()
    axis = Axis("ep", 1, 0, None)
    rows, traffic = torch.randn(7, 3), Traffic()
    assert all_to_all_rows(rows, [7], [7], axis, kind="dispatch", traffic=traffic).buffer is rows
    assert sum_over(rows, axis) is rows
    assert traffic.sent["dispatch"] == 7 * 3 * 4
    assert traffic.to_others["dispatch"] == 0


def test_splits_that_do_not_cover_the_rows_are_refused() -> None:
    with pytest.raises(AssertionError):
        all_to_all_rows(torch.zeros(7, 3), [6], [6], Axis("ep", 1, 0, None))
