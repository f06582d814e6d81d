"""The bits of a run stay what they were: logged losses of golden runs, and a checkpoint that an older commit wrote.

`runs.py` has the runs and the command that records them anew. On the processor and torch that recorded them every bit
must be equal. On others the last bits may differ (libraries choose their kernels by instruction set): then the figures
are compared within BOUND, and the test is skipped aloud with what differed.

BOUND, 5 % of a loss or norm: a smoke bound only. One BF16 rounding can turn a choice of experts, and from then on two
runs are two samples (docs/numerics.md, noise floor). The bit-exact promise is kept by machines like the recording one.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.golden import runs
from train.checkpoint import identity
from train.model.config import ModelConfig
from train.trainer import Trainer

GOLDEN: dict[str, Any] = json.loads(runs.LOSSES.read_text())
BOUND = 0.05


def assert_same(actual: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    assert len(actual) == len(expected)
    different = [
        (step, name, float.fromhex(now[name]), float.fromhex(then[name]))
        for step, (now, then) in enumerate(zip(actual, expected, strict=True), start=1)
        for name in runs.METRICS
        if now[name] != then[name]
    ]
    if not different:
        return
    step, name, now, then = different[0]
    first = f"first difference: step {step}, {name} is {now!r}, was {then!r}"
    here = runs.machine()
    assert here != GOLDEN["recorded_on"], first
    outside = [item for item in different if abs(item[2] - item[3]) > BOUND * abs(item[3])]
    assert not outside, f"beyond {BOUND}: {outside[0]}"
    pytest.skip(
        f"bits not compared: recorded on {GOLDEN['recorded_on']}, this is {here}; within {BOUND}; {first}. A machine "
        "like the first compares them; at a commit known to be right, `python -m tests.golden.runs` records this one's"
    )


# BF16's first steps in `make test`, through warmup and past it; all runs, whole, in `make test-long`.
@pytest.mark.parametrize(
    ("name", "steps"), [("bf16", 7), *(pytest.param(name, runs.STEPS, marks=pytest.mark.long) for name in runs.RUNS)]
)
def test_every_logged_loss_and_norm_keeps_its_bits(
    tmp_path: Path, name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if steps < runs.STEPS:
        monkeypatch.setattr(Trainer, "budget_is_spent", lambda trainer: trainer.state.step == steps)
    assert_same(runs.run_in(tmp_path, name), GOLDEN["runs"][name][:steps])


def test_a_checkpoint_of_an_older_commit_resumes(tmp_path: Path) -> None:
    """Identity, tensors and counters of the stored checkpoint are accepted, and the run goes on as the unbroken one."""
    runs.write_golden_store(tmp_path / "store")
    shutil.copytree(runs.CHECKPOINT, tmp_path / f"runs/golden/checkpoints/step_{runs.SAVED_AT:08d}")
    runs.train(0, 1, str(tmp_path), runs.SMALL, resume=True)
    assert_same(runs.logged(tmp_path), GOLDEN["runs"]["small"][runs.SAVED_AT :])


def test_another_bit_is_seen() -> None:
    expected = GOLDEN["runs"]["small"]
    changed = [dict(step) for step in expected]
    loss = float.fromhex(changed[7]["loss/main"])
    changed[7]["loss/main"] = (loss * (1 + 2**-50)).hex()
    if runs.machine() == GOLDEN["recorded_on"]:
        with pytest.raises(AssertionError, match="step 8, loss/main"):
            assert_same(changed, expected)
    changed[7]["loss/main"] = (loss * 1.1).hex()
    with pytest.raises(AssertionError):
        assert_same(changed, expected)


def test_an_identity_stored_today_is_accepted_by_a_version_with_a_new_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored checkpoint names every field; tomorrow's configuration has one more, at its default or not."""
    state = json.loads((runs.CHECKPOINT / "state.json").read_text())
    assert set(state["identity"]["model"]) > {"norm_topk_prob", "rope_scaling"}, "written before defaults were left out"
    later = make_dataclass("later", [("new_field", float, field(default=0.5))], bases=(ModelConfig,), frozen=True)
    monkeypatch.setitem(identity.IDENTITY_SECTIONS, "model", later)
    for value in (0.5, 0.75):
        current = state["identity"] | {"model": asdict(later(**state["config"]["model"], new_field=value))}
        refused = pytest.raises(ValueError, match=r"model: new_field was 0\.5, now 0\.75")
        with nullcontext() if value == 0.5 else refused:
            identity.check_same_identity(runs.CHECKPOINT, state["identity"], current)
