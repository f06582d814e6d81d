"""`optim.backend=deepspeed` is the native optimizer bit for bit: runs, checkpoints that cross, skips; its two traps.

Everything is real training on two gloo ranks, all of it in one pair of processes, which import DeepSpeed once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from kernels.fp8_linear import weight_fp8
from kernels.quantize import quantize_blocks
from parallel.mesh import group_of_one
from tests.golden.runs import COMMON, SMALL, standing_in, write_golden_store
from tests.ranks import run_ranks
from tests.system.conftest import composed
from tests.system.lives import Look, look, trainer_on, whole
from train.config import ConfigError, compose
from train.observe.sinks import read_events, read_run
from train.optim import deepspeed_backend
from train.trainer import Trainer

BACKENDS = ("native", "deepspeed")
SHORT = ["schedule.total_tokens=512", "checkpoint.every_steps=2", "schedule.lr_peak=0.02", "schedule.warmup_steps=0"]
DP2, EP2 = "layout.dp=2", "layout.ep=2"
CLIP_NORM, LOGIT = 0.5, 0.03
TWO_STEPS, THREE_STEPS = "schedule.total_tokens=256", "schedule.total_tokens=384"
# Of the four sequences of a step: one micro-batch on a data rank, two in a pipeline.
PAIRS = "run.micro_batch_sequences=2"
PP2 = ["layout.pp=2", TWO_STEPS, PAIRS]
ROWS = {
    # Four steps of two micro-batches, whose gradients are added.
    "dp2 FP8, clipped": ["precision=fp8", DP2, f"optim.clip_norm={CLIP_NORM}"],
    "ep2 BF16, logits clipped": ["precision=bf16", DP2, EP2, TWO_STEPS, PAIRS, f"optim.qk_clip={LOGIT}"],
    "pp2 1F1B BF16, tied embedding": ["precision=bf16", "layout.schedule=1F1B", *PP2],
    "pp2 ZBVZeroBubble FP8": ["precision=fp8", "layout.schedule=ZBVZeroBubble", "model.num_hidden_layers=4", *PP2],
    # The first step and the third are those of any BF16 run.
    "dp2 BF16, a gradient not finite": ["precision=bf16", DP2, THREE_STEPS, PAIRS],
}
CLIPPED, OF_LOGITS, *_, POISONED = ROWS
NUM_STEPS = {CLIPPED: 4, POISONED: 3}
# What resumes from step 2 of the clipped FP8 row: (backend that saved, backend that resumes, layout).
WAYS = [("native", "deepspeed"), ("deepspeed", "native")]
CROSSINGS = [(*way, [DP2]) for way in WAYS]
OTHER_LAYOUT = [(*way, [DP2, EP2]) for way in [("native", "native"), *WAYS]]
STEP_2 = "checkpoints/step_00000002"


def run_name(*words: str) -> str:
    return re.sub(r"\W+", "-", " ".join(words))


def trainer_for(name: str, backend: str, overrides: list[str]) -> Trainer:
    config = composed(*{text.split("=")[0]: text for text in [*COMMON, *SMALL, *SHORT, *overrides]}.values())
    run, optim = replace(config.run, name=name), replace(config.optim, backend=backend)
    return trainer_on(replace(config, run=run, optim=optim), world=2)


def poison(trainer: Trainer, *, rank: int) -> None:
    """A NaN in one gradient of the second rank, in the second step, before anybody sums it."""
    weight: Any = trainer.engine.models[0].norm.weight
    listener = weight.main_grad_listener

    def poisoned() -> None:
        if trainer.state.step == 1 and rank == 1:
            weight.main_grad[3] = math.nan
        listener()

    weight.main_grad_listener = poisoned


def crossed(rank: int, world: int, folder: Path, crossings: list[tuple[str, str, list[str]]]) -> dict[str, Look]:
    """Name -> final look of what resumes from the clipped FP8 row."""
    seen = {}
    with standing_in(folder):
        for saved_by, backend, layout in crossings:
            name = run_name(saved_by, backend, *layout)
            if rank == 0:
                shutil.copytree(folder / "runs" / run_name(CLIPPED, saved_by) / STEP_2, folder / "runs" / name / STEP_2)
            dist.barrier()
            trainer = trainer_for(name, backend, ROWS[CLIPPED] + layout)
            trainer.resume()
            trainer.fit()
            seen[name] = look(trainer, score=False)
    return seen


def stale_copies(trainer: Trainer) -> int:
    """FP8 copies that would be taken for those of the weights of now, and are not."""
    count = 0
    for parameter in (each for model in trainer.engine.models for each in model.parameters()):
        if hasattr(parameter, "_fp8_copy"):
            kept = weight_fp8(parameter, power_of_two=True).payload
            fresh = quantize_blocks(parameter, power_of_two=True).payload
            count += not torch.equal(kept.view(torch.uint8), fresh.view(torch.uint8))
    return count


def gathered(rank: int, group: dist.ProcessGroup | None) -> set[float]:
    """What stands in a rank's own expert, filled with the rank's number, after DeepSpeed's gather over a group."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    expert, settings = nn.Parameter(torch.full((512,), rank).bfloat16()), SimpleNamespace(enabled=True)
    settings.immediate_grad_update = False
    inner = torch.optim.Optimizer([{"params": [expert]}], {})
    options = {"dp_process_group": group, "grad_acc_dtype": torch.float32}
    BF16_Optimizer(inner, {expert: "expert"}, settings, **options).update_lp_params()
    return set(expert.tolist())


def not_rounded_from_deepspeeds_masters(trainer: Trainer) -> set[str]:
    """Parameters that are not the FP32 ones that DeepSpeed gives, rounded."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = [each for model in trainer.engine.models for each in model.named_parameters() if each[1].requires_grad]
    assert {parameter.dtype for _, parameter in named} == {torch.bfloat16, torch.float32}
    return {name for name, each in named if not torch.equal(safe_get_full_fp32_param(each).to(each.dtype), each)}


def on_two_ranks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Final look of each row and crossing, what was printed, and what comes of each trap."""
    seen: dict[str, Any] = {}
    printed: dict[tuple[str, str], io.StringIO] = {}
    with standing_in(folder):
        for row, overrides in ROWS.items():
            for backend in BACKENDS:
                printed[row, backend] = text = io.StringIO()
                with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                    trainer = trainer_for(run_name(row, backend), backend, overrides)
                    if row == POISONED:
                        poison(trainer, rank=rank)
                    trainer.fit()
                seen[row, backend] = look(trainer, score=False)
                if row == CLIPPED:
                    assert stale_copies(trainer) == 0
                    if backend == "deepspeed":
                        seen["not DeepSpeed's"] = not_rounded_from_deepspeeds_masters(trainer)
        # At the end: what DeepSpeed logs goes to the stream that it found when it was imported.
        seen["printed"] = {each: text.getvalue() for each, text in printed.items()}
        seen |= crossed(rank, world, folder, CROSSINGS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd.graph, "increment_version", lambda _: None)
            trainer = trainer_for("stale", "deepspeed", ROWS[CLIPPED])
            trainer.fit()
            seen["stale"] = stale_copies(trainer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed_backend, "group_of_one", lambda: None)
            with pytest.raises(AssertionError) as refused:
                trainer_for("mixed", "deepspeed", ROWS[OF_LOGITS])
            seen["refused"] = str(refused.value)
        seen["of all"], seen["of one"] = (gathered(rank, each) for each in (None, group_of_one()))
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    write_golden_store(folder / "store")
    return folder / "runs", run_ranks(2, on_two_ranks, folder)


def logged(run: Path) -> dict[int, tuple[float, ...]]:
    """Step -> losses and gradient norm."""
    names = ("loss/total", "loss/main", "loss/mtp", "loss/balance", "grad/norm")
    return {record["step"]: tuple(record[name] for name in names) for record in read_run(run)}


def assert_same_state(ours: list[Look], theirs: list[Look]) -> None:
    """Every bit: weights, masters, moments, moving average, biases."""
    found, expected = whole(ours), whole(theirs)
    assert found.keys() == expected.keys()
    assert [look.counters for look in ours] == [look.counters for look in theirs]
    assert not [name for name in expected if not np.array_equal(found[name][1], expected[name][1])]


@pytest.mark.parametrize("row", ROWS)
def test_losses_norms_and_state_are_those_of_the_native_optimizer(
    ranks: tuple[Path, list[dict[str, Any]]], row: str
) -> None:
    runs, seen = ranks
    ours, theirs = (logged(runs / run_name(row, backend)) for backend in reversed(BACKENDS))
    assert len(theirs) == NUM_STEPS.get(row, 2)
    assert {step: values for step, values in ours.items() if row != POISONED or step != 2} == {
        step: values for step, values in theirs.items() if row != POISONED or step != 2
    }
    assert_same_state([rank[row, "deepspeed"] for rank in seen], [rank[row, "native"] for rank in seen])
    if row == CLIPPED:
        assert min(values[-1] for values in theirs.values()) > CLIP_NORM
    if row == OF_LOGITS:
        # Of every head of some layer in every step: all of its rows are scaled.
        tables = [record["attention/head_max_logit"] for record in read_run(runs / run_name(row, "deepspeed"))]
        assert all(any(min(heads) > LOGIT for heads in table) for table in tables), tables
    if row == POISONED:
        skips = [
            [event["nonfinite"] for event in read_events(runs / run_name(row, each)) if event["event"] == "skip"]
            for each in BACKENDS
        ]
        assert skips[0] == skips[1]
        assert (skips[0][0][0]["rank"], skips[0][0][0]["tensor"]) == (1, "norm.weight")


def assert_crossed(
    runs: Path, name: str, truth: str, seen: list[dict[str, Look]], expected: list[Look], changed: object
) -> None:
    steps = logged(runs / truth)
    assert logged(runs / name) == {step: steps[step] for step in (3, 4)}, name
    assert_same_state([rank[name] for rank in seen], expected)
    (resumed,) = (event for event in read_events(runs / name) if event["event"] == "resume")
    assert (resumed["step"], resumed["changed"].get("optim.backend")) == (2, changed)


@pytest.mark.parametrize("way", WAYS, ids=" to ".join)
def test_a_checkpoint_crosses_to_the_other_backend(
    ranks: tuple[Path, list[dict[str, Any]]], way: tuple[str, str]
) -> None:
    runs, seen = ranks
    unbroken = [rank[CLIPPED, "native"] for rank in seen]
    assert_crossed(runs, run_name(*way, DP2), run_name(CLIPPED, "native"), seen, unbroken, list(way))


@pytest.mark.long
def test_a_checkpoint_crosses_to_the_other_backend_on_another_layout(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """dp2 to ep2; the truth is the native run that makes the same change."""
    runs, seen = ranks[0], run_ranks(2, crossed, ranks[0].parent, OTHER_LAYOUT)
    truth = run_name("native", "native", DP2, EP2)
    for way in WAYS:
        assert_crossed(runs, run_name(*way, DP2, EP2), truth, seen, [rank[truth] for rank in seen], list(way))


def test_deepspeed_prints_nothing(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Neither on stdout nor on stderr, warnings included: a run prints what its native twin prints."""
    for row in ROWS:
        for rank, seen in enumerate(ranks[1]):
            ours, theirs = (
                re.sub(r"\d[\d.,:]*\w*", "N", seen["printed"][row, backend].replace(run_name(row, backend), "RUN"))
                for backend in reversed(BACKENDS)
            )
            assert ours.splitlines() == theirs.splitlines(), (row, rank)
            assert bool(theirs) == (rank == 0)


def test_deepspeed_gives_the_masters_of_now(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Through its own `safe_get_full_fp32_param`, of FP32 parameters too."""
    assert [rank["not DeepSpeed's"] for rank in ranks[1]] == [set(), set()]


def test_weights_written_without_a_new_version_leave_stale_fp8_copies(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    """Trap 1, the cure taken away: the first step is right, the later ones use the weights from before it."""
    truth, stale = (logged(ranks[0] / name) for name in (run_name(CLIPPED, "native"), "stale"))
    assert stale[1] == truth[1]
    # Measured 2.0e-2; the BF16 weights (embedding, head, norms, router) are new.
    assert abs(stale[4][0] - truth[4][0]) > 1e-2
    assert all(rank["stale"] > 0 for rank in ranks[1])


def test_an_axis_of_one_rank_without_a_group_is_not_taken_for_the_world(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Trap 2, the cure taken away: DeepSpeed mixes two ranks' different experts; the adapter refuses its partition."""
    for rank, seen in enumerate(ranks[1]):
        assert (seen["of all"], seen["of one"]) == ({0.0, 1.0}, {float(rank)})
        assert "cut for another number of ranks" in seen["refused"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "layout.pp=1 and layout.dp=1 make one: use layout.dp=2, or"),
        ([DP2, "layout.zero=false"], "layout.zero=false: use layout.zero=true, or"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(overrides: list[str], said: str) -> None:
    needs = "optim.backend=deepspeed needs two processes or more and layout.zero=true, but"
    with pytest.raises(ConfigError, match=f"{needs} {said} optim.backend=native"):
        compose([*COMMON, "optim.backend=deepspeed", *overrides])


@pytest.mark.parametrize("found", [None, "0.18.1", "0.19.7", "0.20.0", "0.190.8"])
def test_without_a_deepspeed_that_is_known_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = re.escape(
        f">= 0.19.8 of 0.19, but {found or 'none'} is installed: run pip install deepspeed==0.19.8, or use"
    )
    with pytest.raises(ValueError, match=said):
        deepspeed_backend.check_installed()
