"""Muon against AdamW: tuned alike, up to a best peak with neighbours; other seeds; runs that differ in nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.config import compose
from train.studies import optimizers
from train.studies.optimizers import GRID, GRID_SEED, OPTIMIZERS, SMOKE, WHOLE, configuration, study, tables, tune

TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"
STORES: Any = SimpleNamespace(train=SimpleNamespace(path="train"), heldout=SimpleNamespace(path="heldout"))


def bowl(best: float, lr: float) -> float:
    """Octaves from the best peak."""
    return abs(math.log2(lr / best))


@pytest.mark.parametrize(
    ("best", "tried"),
    [(2e-3, [1e-3, 2e-3, 4e-3]), (1e-3, [5e-4, 1e-3, 2e-3, 4e-3]), (1.6e-2, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])],
)
def test_the_grid_grows_until_the_best_peak_has_neighbours(best: float, tried: list[float]) -> None:
    asked: list[float] = []

    def score(lr: float) -> float:
        asked.append(lr)
        return bowl(best, lr)

    found = tune(score)
    assert list(found) == sorted(asked) == tried
    assert min(found, key=found.__getitem__) == best


def test_both_are_scored_on_other_seeds_at_their_own_best_and_compared_in_pairs() -> None:
    asked: list[tuple[str, float, int]] = []
    best = {"adamw": 2e-3, "muon": 1e-3}

    def score(optimizer: str, lr: float, seed: int) -> float:
        asked.append((optimizer, lr, seed))
        # Seeds differ more than optimizers.
        return 1.5 + bowl(best[optimizer], lr) + seed - 0.01 * (optimizer == "muon") * seed

    found = study(score, (1, 2, 3))
    of_seeds = [each for each in asked if each[2] != GRID_SEED]
    assert of_seeds == [(name, best[name], seed) for name in OPTIMIZERS for seed in (1, 2, 3)]
    assert found["differences"] == pytest.approx([-0.01, -0.02, -0.03])
    shown = tables(found | {"size": asdict(WHOLE)})
    assert "| seed 0, peak of | 0.0005 | 0.001 | 0.002 | 0.004 |" in shown
    # AdamW was not tried at the first.
    assert "| adamw |  | 2.5000 | 1.5000 | 2.5000 |" in shown
    assert "| muon | 0.001 | 2.4900 | 3.4800 | 4.4700 | **3.4800** (2.4900 to 4.4700) |" in shown
    assert "| muon - adamw |  | -0.0100 | -0.0200 | -0.0300 | **-0.0200** (-0.0300 to -0.0100) |" in shown
    # By hand: t of two degrees 4.303, times 0.01 / sqrt(3).
    assert "95 % interval of the mean difference: -0.0448 to +0.0048" in shown


def test_runs_differ_in_optimizer_and_peak_alone_and_take_the_demos_late_shares() -> None:
    runs = {name: configuration(STORES, Path("out"), WHOLE, [], optimizer=name, lr=2e-3, seed=5) for name in OPTIMIZERS}
    muon, adamw = runs["muon"], runs["adamw"]
    assert replace(adamw, optim=muon.optim, run=muon.run) == muon
    assert replace(adamw.run, name=muon.run.name) == muon.run
    assert (muon.run.name, muon.run.seed, muon.schedule.total_tokens) == ("muon-0.002-5", 5, 102_400)
    assert {key for key, value in asdict(muon.optim).items() if asdict(adamw.optim)[key] != value} == {"name"}
    demo = compose(["experiment=tiny"]).schedule
    assert muon.schedule.lr_after_decay == pytest.approx(demo.lr_after_decay)
    # The file rounds it.
    assert muon.schedule.lr_final == pytest.approx(demo.lr_final, rel=0.01)
    assert GRID[1] == demo.lr_peak


def test_a_run_that_diverged_is_the_worst() -> None:
    records = [{"step": 1}, {"step": 2, "eval/bits_per_byte": 3.0}]
    with pytest.MonkeyPatch.context() as patch:
        for stopped, bits in ((None, 3.0), ("40 steps were not finite", math.inf)):
            patch.setattr(optimizers, "train_or_read", lambda _, said=stopped: {"records": records, "stopped": said})
            assert optimizers.heldout_bits(compose(["experiment=tiny"])) == bits


@pytest.mark.long
def test_the_study_runs_and_finished_runs_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    monkeypatch.setattr(optimizers, "SMOKE", replace(SMOKE, steps=1, sequences=1, seeds=(1, 2)))
    # One step does not say which peak is best; each is trained all the same.
    trained = optimizers.heldout_bits
    monkeypatch.setattr(
        optimizers, "heldout_bits", lambda config: trained(config) + bowl(2e-3, config.schedule.lr_peak)
    )
    arguments = ["--smoke", "--text", str(text), "--stores", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    arguments += [f"model.{width}=128" for width in ("hidden_size", "moe_intermediate_size", "intermediate_size")]
    assert optimizers.main(arguments) == 0
    written = json.loads((tmp_path / "out/result.json").read_text())
    assert all(len(written[name]["bits_per_byte"]) == 2 and len(written[name]["grid"]) == 3 for name in OPTIMIZERS)
    monkeypatch.setattr("train.trainer.Trainer.take_step", lambda *_: pytest.fail("trained again"))
    assert optimizers.main(arguments) == 0
    assert json.loads((tmp_path / "out/result.json").read_text()) == written
    assert optimizers.main([*arguments, "optim.weight_decay=0.2"]) == 2
    assert (
        "holds a run with optim.weight_decay=0.1, and 0.2 is asked for; give --out another folder"
        in capsys.readouterr().err
    )
