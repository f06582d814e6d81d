"""Which collective carries what: one step of the whole model on dp2 x ep2, every call recorded with its dtype.

Dispatch follows the precision, combine is BF16 (FP32 in fp32); gradients are reduce-scattered in FP32 bucket by bucket;
weights are all-gathered in their own dtype. Nothing is sent wider than promised.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist

import parallel.zero
from parallel.layout import Layout
from parallel.mesh import Mesh
from tests.parity.layout_theorem import MODEL, NOW, engine_on, take_step
from tests.ranks import run_ranks
from train.model.precision import Precision
from train.stage import build_stages
from train.step import apply_update

PRECISIONS = ("fp32", "bf16", "fp8")
HIDDEN_BYTES = {"fp32": MODEL.hidden_size * 4, "bf16": MODEL.hidden_size * 2}
# 160 payload bytes and two FP32 scales.
FP8_ROW = MODEL.hidden_size + 2 * 4


def record(precision: str) -> dict[str, Any]:
    """Dtypes and widths of what one step and update hand to collectives."""
    seen: Counter[tuple[str, str, int]] = Counter()

    def counted(name: str, call: Any, which: int) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            rows = args[which]
            width = rows.shape[1:].numel() * rows.element_size() if name == "all_to_all" else 0
            seen[name, str(rows.dtype), width] += 1
            return call(*args, **kwargs)

        return counting

    engine = engine_on(Layout(dp=4, ep=2), precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted("all_to_all", dist.all_to_all_single, 1))
        for name in ("_reduce_scatter", "all_gather"):
            patch.setattr(parallel.zero, name, counted(name.lstrip("_"), getattr(parallel.zero, name), 1))
        result = take_step(engine, 0)
        apply_update(engine, result, now=NOW, update=1)
    buckets = Counter(str(b.plan.dtype) for bucket in engine.optimizer.buckets for b in bucket._buckets)
    return {"seen": dict(seen), "buckets": dict(buckets), "scales": scales_of_dispatcher(engine.mesh)}


def scales_of_dispatcher(mesh: Mesh) -> list[bool]:
    """The kind of scales that the dispatcher of a built model uses."""
    kinds = []
    for power_of_two in (True, False):
        stages = build_stages(MODEL, Precision("fp8", power_of_two_scales=power_of_two), mesh)
        dispatcher: Any = next(m.dispatcher for m in stages[0].modules() if hasattr(m, "dispatcher"))
        kinds.append(dispatcher.power_of_two)
    return kinds


def record_all(rank: int, world: int) -> dict[str, dict[str, Any]]:
    return {precision: record(precision) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(4, record_all)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_collective_has_the_promised_dtype(recorded: list[dict[str, dict[str, Any]]], precision: str) -> None:
    for found in (rank[precision] for rank in recorded):
        seen, buckets = found["seen"], found["buckets"]
        rows = {(dtype, width) for name, dtype, width in seen if name == "all_to_all" and width > 100}
        if precision == "fp8":
            assert rows == {("torch.uint8", FP8_ROW), ("torch.bfloat16", HIDDEN_BYTES["bf16"])}
        else:
            assert rows == {("torch.float32" if precision == "fp32" else "torch.bfloat16", HIDDEN_BYTES[precision])}
        assert seen["reduce_scatter", "torch.float32", 0] == sum(buckets.values())
        assert {dtype for name, dtype, _ in seen if name == "reduce_scatter"} == {"torch.float32"}
        gathered = {dtype: count for (name, dtype, _), count in seen.items() if name == "all_gather"}
        assert gathered == buckets, "each bucket once, in its weights' own dtype; the router's is FP32"
        assert ("torch.bfloat16" in buckets) == (precision != "fp32")


def test_the_wire_has_the_scales_of_the_run(recorded: list[dict[str, dict[str, Any]]]) -> None:
    assert [rank["fp8"]["scales"] for rank in recorded] == [[True, False]] * 4
