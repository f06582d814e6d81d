"""Runs under `optim=muon`: whole steps on a layout, checkpoints across layouts, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.layout import Layout
from tests.golden.runs import COMMON, SMALL, standing_in, write_golden_store
from tests.parity import layout_theorem
from tests.parity.layout_theorem import compare, verdict, write_reference
from tests.parity.test_layouts import FREE_BOUND, GRADIENT_BOUND, LOSS_BOUND
from tests.ranks import run_ranks
from tests.system.lives import Look, look, trainer_on, whole
from train.config import compose
from train.trainer import Trainer

FREE_STEPS = 4


def under_muon(rank: int, world: int, function: Callable[..., Any], *arguments: object, **named: object) -> Any:
    """A function of the layout theorem, with its model moved by Muon."""
    layout_theorem.OPTIM = replace(layout_theorem.OPTIM, name="muon")
    return function(rank, world, *arguments, **named)


@pytest.mark.long
def test_whole_steps_of_a_layout_are_those_of_one_process(tmp_path: Path) -> None:
    """Losses, norm and gradients of steps 0 and 3 from the reference's state, then a free run."""
    reference = run_ranks(1, under_muon, write_reference, tmp_path, "fp32", steps=FREE_STEPS)[0]
    layout = Layout(dp=2, ep=2)
    found = run_ranks(layout.world, under_muon, compare, layout, "fp32", tmp_path, steps=(0, 3), free=FREE_STEPS)
    result = verdict(found)
    assert max(result.losses) <= LOSS_BOUND
    assert result.norm <= LOSS_BOUND
    assert result.gradient[0] <= GRADIENT_BOUND, result.gradient
    assert result.counts_equal
    # Newton-Schulz makes roundings of small singular values up to 485 times larger; what moves by them are directions
    # that hardly move the loss: measured 1.1e-7 after eight steps.
    for ours, theirs in zip(found[0].free_losses, reference.losses, strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=FREE_BOUND)


def life(name: str, *overrides: str) -> Trainer:
    """Four steps of FP8 under Muon or what is left of them, saved after the second."""
    changes = [*COMMON, *SMALL, "optim=muon", "precision=fp8", "optim.ema_decay=null", "schedule.total_tokens=512"]
    changes += ["checkpoint.every_steps=2", "schedule.warmup_steps=0", "schedule.lr_peak=0.02", f"run.name={name}"]
    unique = {text.split("=")[0]: text for text in [*changes, *overrides]}
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return trainer_on(compose(list(unique.values())), world)


def taken_up(rank: int, world: int, folder: Path) -> tuple[Look, list[Look]]:
    """The state of one process's run taken up on two ranks; and its ends, with BF16 weights and without."""
    with standing_in(folder):
        ends = []
        for name, keep in (("kept", "true"), ("without", "false")):
            trainer = life(name, "layout.dp=2", f"layout.ep={world}", f"precision.keep_bf16_weights={keep}")
            trainer.resume()
            with trainer.engine.optimizer.whole_weights():
                start = look(trainer, score=False)
            trainer.fit()
            with trainer.engine.optimizer.whole_weights():
                ends.append(look(trainer, score=False))
        return start, ends


@pytest.mark.long
def test_a_checkpoint_goes_on_on_another_layout_and_not_under_another_optimizer(tmp_path: Path) -> None:
    write_golden_store(tmp_path / "store")
    with standing_in(tmp_path):
        one = life("one", "schedule.total_tokens=256")
        one.fit()
        for name in ("kept", "without", "switched"):
            shutil.copytree("runs/one/checkpoints", f"runs/{name}/checkpoints")
        with pytest.raises(ValueError, match="saved with another optimizer: was muon, now adamw"):
            life("switched", "optim=adamw").resume()
    expected = whole([look(one, score=False)])
    assert "optim.momentum.layers.1.mlp.experts.down_proj" in expected
    assert "optim.exp_avg.layers.1.mlp.experts.down_proj" not in expected
    ranks = run_ranks(2, taken_up, tmp_path)
    found = whole([start for start, _ in ranks])
    assert found.keys() == expected.keys()
    assert not [name for name, (_, bits) in expected.items() if not np.array_equal(found[name][1], bits)]
    kept, without = (whole([ends[index] for _, ends in ranks]) for index in range(2))
    assert not [name for name, (_, bits) in kept.items() if not np.array_equal(without[name][1], bits)]
    assert not np.array_equal(kept["model.norm.weight"][1], expected["model.norm.weight"][1]), "two steps were taken"
