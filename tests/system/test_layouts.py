"""A run does not belong to its layout: saved on one, it resumes on another, and ends and refuses as one.

Each layout is real ranks over gloo (`lives.py`), a small model of five layers, eight sequences a step. In FP8 the state
is compared, because there masters are tensors of their own; in FP32 the losses, because only there two layouts may be
compared over several free steps: with BF16 or FP8 one rounding can turn a choice of experts.

Bound on losses, 1e-5 relative: the issue's, for free FP32 runs. FP32 sums regrouped over ranks differ by 1e-7 (they are
measured at each step in tests/parity/test_layouts.py); AdamW carries that on for the five steps after the change.
Held-out bits per byte of one state, 1e-6: each token's loss differs by FP32 rounding alone, and their sum is FP64.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.mesh import Layout
from tests.ranks import run_ranks
from tests.system.lives import Life, Look, Plan, live, trainer_on, whole
from train.checkpoint.publish import step_name
from train.config import PretrainConfig, compose
from train.observe.sinks import NoSinks, read_events, read_run

LOSS_BOUND, SCORE_BOUND = 1e-5, 1e-6
SAVED_AT, STEPS, SEQUENCES, LENGTH = 5, 10, 8, 32
ONE = Layout()
PP2_EP2 = Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble")
# What a run of PP2_EP2 resumes on, and the last one: a run of one process does.
TARGETS = {
    "one process": ONE,
    "dp2 without ZeRO": Layout(dp=2, zero=False),
    "dp4 x ep4": Layout(dp=4, ep=4),
    "pp2 1F1B": Layout(pp=2),
    "the same": PP2_EP2,
}
SMALL = [
    "model.num_hidden_layers=5",
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.moe_intermediate_size=32",
    "model.num_attention_heads=2",
    "model.q_lora_rank=32",
    "model.kv_lora_rank=32",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=16",
    "optim.ema_decay=0.9",
    f"schedule.total_tokens={STEPS * SEQUENCES * LENGTH}",
    f"schedule.batch_start_sequences={SEQUENCES}",
    f"schedule.batch_full_sequences={SEQUENCES}",
    # A save happens because somebody asks the run to stop, and at its end.
    "checkpoint.every_steps=1000",
]
PRECISIONS = ("fp32", "fp8")


@pytest.fixture(scope="module")
def base(small_run: list[str]) -> dict[str, PretrainConfig]:
    """Precision -> configuration, for one process; its directory is filled in later."""
    replaced = {item.split("=")[0] for item in SMALL}
    kept = [item for item in small_run if item.split("=")[0] not in replaced]
    return {name: compose([*kept, *SMALL, f"precision={name}", f"run.name={name}"]) for name in PRECISIONS}


def on(config: PretrainConfig, layout: Layout, directory: Path, **run: Any) -> PretrainConfig:
    """The same run on a layout, in a directory; the batch ramp moves in whole micro-batches of every data rank."""
    multiple = layout.dp * config.run.micro_batch_sequences
    return replace(
        config,
        layout=layout,
        schedule=replace(config.schedule, batch_multiple_sequences=multiple),
        run=replace(config.run, directory=str(directory), **run),
    )


def lives(layout: Layout, plans: Sequence[Plan]) -> list[list[Life]]:
    """For each plan the lives of all ranks."""
    by_rank = run_ranks(layout.world, live, list(plans))
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def losses(run: Path) -> dict[int, list[float]]:
    """Of each logged step; the log holds each step once, in order."""
    records = read_run(run)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1)), "every step once, in order"
    return {r["step"]: [r["loss/total"], r["loss/main"], r["loss/mtp"], r["grad/norm"]] for r in records}


def assert_same_state(saved: list[Look], resumed: list[Look]) -> None:
    """Counters and every bit of every tensor."""
    assert {json.dumps(seen.counters) for seen in (*saved, *resumed)} == {json.dumps(saved[0].counters)}
    expected, actual = whole(saved), whole(resumed)
    assert actual.keys() == expected.keys()
    different = [
        name
        for name, (dtype, bits) in expected.items()
        if actual[name][0] != dtype or not (actual[name][1] == bits).all()
    ]
    assert not different


class Saved:
    """Runs of both precisions that were stopped after SAVED_AT steps on one layout."""

    def __init__(self, layout: Layout, folder: Path, found: list[list[Life]]) -> None:
        self.layout, self.folder = layout, folder
        self.lives = dict(zip(PRECISIONS, found, strict=True))

    def taken_up_on(self, layout: Layout, base: dict[str, PretrainConfig], place: Path) -> dict[str, list[Life]]:
        """Copies of the runs resumed on a layout: FP32 to the end of the budget, FP8 only loaded."""
        shutil.copytree(self.folder, place, dirs_exist_ok=True)
        plans = [Plan(on(base[name], layout, place), look=True, train=name == "fp32") for name in PRECISIONS]
        return dict(zip(PRECISIONS, lives(layout, plans), strict=True))


def stopped_on(layout: Layout, base: dict[str, PretrainConfig], folder: Path) -> Saved:
    """Both runs, each stopped by a SIGTERM to one rank."""
    plans = [Plan(on(base[name], layout, folder), stop_after=SAVED_AT, look=True) for name in PRECISIONS]
    return Saved(layout, folder, lives(layout, plans))


@pytest.fixture(scope="module")
def saved_on_four(base: dict[str, PretrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return stopped_on(PP2_EP2, base, tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def unbroken(base: dict[str, PretrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, FP32, from the first step to the last."""
    directory = tmp_path_factory.mktemp("unbroken")
    lives(ONE, [Plan(on(base["fp32"], ONE, directory))])
    return directory / "fp32"


def assert_goes_on(run: Path, unbroken: Path) -> None:
    """The log ends with the last step, close to the run that was never moved."""
    ours, theirs = losses(run), losses(unbroken)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, expected in theirs.items():
        assert ours[step] == pytest.approx(expected, rel=LOSS_BOUND), step


def test_sigterm_to_one_rank_stops_all_after_the_same_step_with_one_checkpoint(saved_on_four: Saved) -> None:
    for name, ranks in saved_on_four.lives.items():
        assert [rank.after.counters["step"] for rank in ranks] == [SAVED_AT] * PP2_EP2.world
        assert all(rank.checkpoints == [step_name(SAVED_AT)] for rank in ranks)
        events = read_events(saved_on_four.folder / name)
        assert [event["event"] for event in events] == ["start", "checkpoint", "stop"]
        assert "asked to stop" in events[-1]["reason"]
        assert len(losses(saved_on_four.folder / name)) == SAVED_AT


def test_what_is_saved_is_all_of_the_state(saved_on_four: Saved) -> None:
    """The comparisons below are over these tensors, so none of them may be missing."""
    for name, ranks in saved_on_four.lives.items():
        tensors = whole([rank.after for rank in ranks])
        kinds = {"model", "optim.exp_avg", "optim.exp_avg_sq", "ema", "rng.cpu"}
        kinds |= {"optim.master"} if name == "fp8" else set()
        assert all(any(tensor.startswith(kind) for tensor in tensors) for kind in kinds), kinds
        biases = [tensors[tensor][1] for tensor in tensors if tensor.endswith("e_score_correction_bias")]
        assert len(biases) == 5, "four layers with experts and one MTP layer"
        moved = [tensor for tensor, (_, bits) in tensors.items() if not tensor.startswith("optim.exp") and bits.any()]
        assert len(moved) == len([tensor for tensor in tensors if not tensor.startswith("optim.exp")])


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_of_four_ranks_resumes_on_another_layout(
    target: str, saved_on_four: Saved, base: dict[str, PretrainConfig], unbroken: Path, tmp_path: Path
) -> None:
    found = saved_on_four.taken_up_on(TARGETS[target], base, tmp_path)
    for name in PRECISIONS:
        before = [rank.before for rank in found[name]]
        assert_same_state([rank.after for rank in saved_on_four.lives[name]], before)
        if name == "fp32":
            scores = {seen.bits_per_byte for seen in before}
            (expected,) = {rank.after.bits_per_byte for rank in saved_on_four.lives[name]}
            assert len(scores) == 1, "every rank knows the same score"
            assert scores.pop() == pytest.approx(expected, rel=SCORE_BOUND)
    assert_goes_on(tmp_path / "fp32", unbroken)
