"""The plan document of one GPU: whole, its totals add up, and its words fit where there is nothing to compare."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest

from train.config import compose
from train.studies.amounts import amount
from train.studies.plan import document as documents
from train.studies.plan.document import Assumptions, plan
from train.studies.plan.products import machine
from train.studies.plan.schema import check
from train.studies.plan.search import ALL, TODAY
from train.studies.plan.words import short, tables, words


@functools.cache
def document(memory_bytes: float = 80e9) -> dict[str, Any]:
    v3 = compose(["+cluster=h800_2048"]).model
    assumed = Assumptions(machine("H100"), memory_bytes, 2.0, v3)
    return plan(compose(["+cluster=h100_1"]), assumed, date="2026-11-30")


def test_a_document_is_whole_and_survives_json() -> None:
    found = json.loads(json.dumps(document()))
    check(found)
    assert words(found) == document()["words"]
    assert tables(found) == tables(document())


def test_its_totals_add_up() -> None:
    found = document()
    step, cost, run = found["step"], found["cost"], found["run"]
    # Relative 1e-9: sums of a few floats.
    assert sum(step["phases_s"].values()) == pytest.approx(step["time_s"], rel=1e-9)
    tokens = run["batch_sequences"] * run["sequence_length"]
    assert step["tokens_per_s"] * step["time_s"] == pytest.approx(tokens, rel=1e-9)
    assert sum(part["tokens"] for part in cost["parts"]) == run["total_tokens"]
    training = sum(part["modelled_gpu_hours"] for part in cost["parts"])
    modelled, corrected = cost["modelled"], cost["corrected"]
    assert modelled["gpu_hours"] * cost["effective_training_time"] == pytest.approx(training, rel=1e-9)
    assert modelled["gpu_hours"] == pytest.approx(24 * modelled["days"] * run["world"], rel=1e-9)
    assert modelled["dollars"] == pytest.approx(2 * modelled["gpu_hours"], rel=1e-9)
    for name, value in modelled.items():
        assert corrected[name] == pytest.approx(cost["bias"] * value, rel=1e-9)
    per_trillion = step["time_s"] * run["world"] / 3600 / tokens * 1e12
    assert modelled["gpu_hours_per_trillion"] == pytest.approx(per_trillion, rel=1e-9)
    # Nothing goes below products and attention alone.
    assert found["bound"]["modelled"] < min(row["modelled"] for row in (*found["search"]["rows"], *found["changes"]))


def test_a_layout_counts_once_in_both_searches() -> None:
    """One rank has one stage: micro-batches of 1 and 2, in FP8 and BF16."""
    search = document()["search"]
    kinds = {(row["precision"], row["micro_batch_sequences"]) for row in search["rows"]}
    assert search["tried"] == len(search["rows"]) == len(kinds) == 4
    assert search["fit"] == 4


def test_one_gpu_has_no_pipeline_and_no_group() -> None:
    said = " ".join(document()["words"])
    assert "on 1 GPU: " in said
    assert "idle" not in said
    assert "all tokens of their group" not in said
    assert "as fast as this configuration" in said
    # Every rank has all experts.
    memory = document()["memory"]
    assert memory["breaks_at"] is None
    assert len({(row["fullest_bytes"], row["step_s"]) for row in memory["imbalance"]}) == 1


def test_where_nothing_fits_the_plan_says_so() -> None:
    found = document(10e9)
    check(found)
    said = found["words"]
    assert "does not fit: 35.4 GB too much." in said[0]
    for scope in (TODAY, ALL):
        assert f"Of {scope.name}, no layout of these GPUs fits." in said
    assert found["search"]["fit"] == 0
    assert found["search"]["rows"]
    assert len(said) == 5


@pytest.mark.parametrize("precision", ["fp32", "fp8_te"])
def test_a_precision_of_unknown_speed_is_refused(precision: str) -> None:
    config = compose(["+cluster=h100_1"])
    config = replace(config, precision=replace(config.precision, name=precision, cache_swiglu_input=False))
    assumed = Assumptions(machine("H100"), 80e9, 2.0, config.model)
    with pytest.raises(ValueError, match=f"precision={precision}: speeds of bf16 and fp8 are known; plan with"):
        plan(config, assumed, date="2026-11-30")


def test_the_best_of_today_is_listed_however_many_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = documents.Planner(compose(["+cluster=h100_1"]), Assumptions(machine("H100"), 80e9, 2.0, None))  # type: ignore[arg-type]
    planner.__dict__["residuals"] = {"step": documents.judge.Residual("step", "s", 1.0, 1.0)}
    slow, *_ = planner.search(TODAY)
    fast = replace(slow, candidate=replace(slow.candidate, dispatch="deepep"), step=slow.step._replace(step_s=1e-3))
    others = [replace(fast, micro_batches=each) for each in range(1, 300)]
    monkeypatch.setattr(planner, "search", lambda scope: [slow] if scope is TODAY else others)
    found, _ = documents._search(planner)
    assert (found["tried"], found["fit"]) == (300, 300)
    assert [row["runs_today"] for row in found["rows"]] == [False] * 200 + [True]


def test_small_numbers_are_not_shown_as_nothing() -> None:
    assert [short(each) for each in (0.000259, 4.7, 1234.5)] == ["0.000259", "4.7", "1,234"]
    assert [amount(each) for each in (70.4, 11600.0, 158000.0)] == ["70.4", "11.6 k", "158 k"]
