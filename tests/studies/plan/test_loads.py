"""Loads of a run's experts as the planner's imbalance: by hand, over another order of sums, and through the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launch import plan
from train.config import compose
from train.studies.plan.candidate import candidate_of
from train.studies.plan.document import OURS, Assumptions, Planner
from train.studies.plan.loads import ExpertLoads, in_memory, in_time
from train.studies.plan.products import machine
from train.studies.plan.read_loads import STEPS, TABLE, read_loads

CLUSTER = "+cluster=h100_8"


def write_run(folder: Path, loads: np.ndarray) -> Path:
    """A run that logged such loads [steps, layers, experts], and after each step an event."""
    folder.mkdir()
    lines = [{"step": step, TABLE: of_step.tolist()} for step, of_step in enumerate(loads)]
    events = [{"step": step, "event": "saved"} for step in range(len(loads))]
    both = [line for pair in zip(lines, events, strict=True) for line in pair]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in both))
    return folder


def test_two_ranks_of_four_experts_by_hand(tmp_path: Path) -> None:
    # Ranks hold experts 0-1 and 2-3. Their loads: (1.5, 0.5), (0.5, 1.5); then (1, 1), (1.25, 0.75).
    loads = np.array([[[2.0, 1, 1, 0], [0, 1, 1, 2]], [[1, 1, 0, 2], [2, 0.5, 0.5, 1]]])
    found = read_loads(write_run(tmp_path / "run", loads), experts=4)
    assert (found.first_step, found.last_step) == (0, 1)
    assert in_time(found, 2) == (1.5 + 1.5 + 1 + 1.25) / 4
    # A rank that is full in one layer is empty in the other.
    assert in_memory(found, 2) == max(1.0, (1 + 1.25) / 2)
    assert in_time(found, 1) == in_memory(found, 1) == 1.0
    assert in_time(found, 4) == (2 + 2 + 2 + 2) / 4


@pytest.mark.parametrize("ep", [1, 2, 8, 64])
def test_loads_of_many_ranks_are_numpys(ep: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loads = rng.gamma(4.0, size=(STEPS + 7, 3, 64))
    loads /= loads.mean(-1, keepdims=True)
    found = read_loads(write_run(tmp_path / "run", loads), experts=64)
    ranks = loads[-STEPS:].reshape(STEPS, 3, ep, -1).mean(-1)
    # Other orders of some 10^4 double additions.
    assert in_time(found, ep) == pytest.approx(ranks.max(-1).mean(), rel=1e-12)
    assert in_memory(found, ep) == pytest.approx(ranks.mean(1).max(), rel=1e-12)


def test_a_plan_with_loads_is_the_plan_with_their_imbalance() -> None:
    """Of every layout its own: on more ranks fewer experts even each other out."""
    config = compose([CLUSTER])
    experts = config.model.n_routed_experts
    loads = ExpertLoads("run", 0, 0, [[[2.0] * (experts // 4) + [2 / 3] * (experts - experts // 4)]])
    even = Assumptions(machine("H100"), 80e9, 2.0, config.model)
    with_loads, without = Planner(config, replace(even, loads=loads)), Planner(config, even)
    ours = candidate_of(config)
    for ep, imbalance in ((1, 1.0), (2, 4 / 3), (4, 2.0), (8, 2.0)):
        candidate = replace(ours, ep=ep)
        step = without.predicted(candidate, replace(without.ours, imbalance=imbalance)).step_s
        assert with_loads.predicted(candidate).step_s == pytest.approx(step, rel=1e-12), ep
        found = [each.total for each in with_loads.footprints(candidate)]
        assert found == pytest.approx([each.total for each in without.footprints(candidate, imbalance)]), ep
    assert with_loads.predicted(replace(ours, ep=8)).step_s > without.predicted(replace(ours, ep=8)).step_s
    assert OURS.imbalance == 1.0


@pytest.mark.parametrize(
    ("loads", "says"),
    [
        (np.ones((2, 3, 4)), "trained 4 experts a layer, this plan has"),
        (np.ones((0, 3, 4)), "has no moe/expert_load in its metrics.jsonl: name a run of a model with experts"),
        (np.ones((2, 3)), "has a damaged moe/expert_load in its metrics.jsonl: its rows are no lists of numbers"),
        (np.ones((2, 3, 0)), "has a damaged moe/expert_load"),
    ],
)
def test_a_run_without_loads_of_such_a_model_is_a_sentence(
    loads: np.ndarray, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", loads)
    assert plan.main([CLUSTER, "--loads", str(run), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"plan: {run} ")
    assert says in said
    assert said.count("\n") == 1
    assert plan.main([CLUSTER, "--loads", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
