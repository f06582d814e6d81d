"""The bench of `make gpu` on a GPU, at small sizes: every case of every kind is captured, replayed and green."""

from __future__ import annotations

import pytest
import torch

from train.studies.bench import peers as bench_peers
from train.studies.bench import table as bench_table

pytestmark = pytest.mark.gpu


def test_graphs_of_every_kind_are_measured(device: torch.device) -> None:
    found = bench_table.run(bench_peers.cases(small=True), device, clock=bench_peers.SMALL_CLOCK, budget_s=60.0)
    assert {row.status for row in found if row.candidate == bench_table.OURS} == {"measured"}
