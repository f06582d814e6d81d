"""What each rank does for `test_overlap.py`: the same steps in pairs, phase by phase, and as torch runs them itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.hops
import parallel.overlap
import parallel.pipeline
import train.stage
from kernels import deferred
from parallel.expert import ExpertParallelDispatcher
from parallel.layout import Layout
from parallel.overlap import PhasedStage
from parallel.phases import Slot
from tests.parity import layout_theorem
from tests.parity.layout_theorem import NOW, SEQUENCES, batch_of, engine_on, gradient_pieces
from train.model.transformer import recompute_up_projections
from train.step import Engine, StepGradients, apply_update, compute_gradients

PP2 = Layout(pp=2, schedule="DualPipeV", stage_layers=(2, 1, 1, 1))
PP2_EP2 = Layout(pp=2, dp=2, ep=2, schedule="DualPipeV", stage_layers=(1, 2, 1, 1))
# Four micro-batches on each of two data ranks, the fewest of two pipeline ranks; eight on one.
MICRO_BATCH = 2


class Nothing:
    """No stage is one, so that none has phases."""


@dataclass
class Steps:
    """Of one run: SHA-256 of every gradient and of the counts, by name, and losses with the norm; one entry a step."""

    digests: list[dict[str, str]]
    losses: list[list[float]]


def take(engine: Engine, step: int) -> StepGradients:
    dp = engine.mesh.dp
    share = batch_of(step).share(dp.rank, dp.size)
    return compute_gradients(engine, share, num_micro_batches=SEQUENCES // dp.size // MICRO_BATCH, now=NOW)


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: piece.tensor.clone() for name, piece in gradient_pieces(engine).items()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def losses_of(result: StepGradients) -> list[float]:
    losses = result.loss_total, result.loss_main, result.loss_mtp, result.loss_balance, result.grad_norm
    return [float(loss) for loss in losses]


@contextmanager
def torchs_own() -> Iterator[None]:
    """Chunks as torch runs them: whole, a pair's backward behind its forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.pipeline, "Phases", Nothing)
        yield


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    """Write down what pairs issue, what is issued outside of them, and when counts leave and the host reads them."""
    turns, one = parallel.overlap.take_turns, parallel.overlap._issue
    begin, read = ExpertParallelDispatcher.begin, parallel.hops._read_counts

    def watched(*sides: Generator[str, None, None]) -> Generator[tuple[str, str], None, None]:
        events.append("pair")
        for side, phase in turns(*sides):
            events.append(f"{side} {phase}".strip())
            yield side, phase

    def alone(phases: Generator[str, None, None]) -> None:
        events.append("alone")
        one(phases)

    def begins(self: ExpertParallelDispatcher, routing: Any) -> Any:
        events.append("counts leave")
        return begin(self, routing)

    def reads(*args: Any) -> Any:
        events.append("host reads")
        return read(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertParallelDispatcher, "begin", begins)
        patch.setattr(parallel.hops, "_read_counts", reads)
        patch.setattr(parallel.overlap, "take_turns", watched)
        patch.setattr(parallel.overlap, "_issue", alone)
        yield


def engine_of(layout: Layout | None, precision: str, *, expert_ranks: int = 1) -> Engine:
    """A low precision makes queries, keys and values again in backward."""
    engine = engine_on(layout, precision, expert_ranks=expert_ranks)
    for model in engine.models if precision != "fp32" else ():
        recompute_up_projections(model)
    return engine


def run_steps(layout: Layout, precision: str, steps: int) -> Steps:
    engine, found = engine_of(layout, precision), Steps([], [])
    for step in range(steps):
        result = take(engine, step)
        assert deferred.pending() == 0
        counts = {f"counts {layer}": digest(count) for layer, count in result.counts.items()}
        found.digests.append({name: digest(grad) for name, grad in gradients(engine).items()} | counts)
        found.losses.append(losses_of(result))
        apply_update(engine, result, now=NOW, update=step + 1)
    phased = [isinstance(stage, PhasedStage) for stage in engine.pipeline._running]
    assert phased == [parallel.pipeline.Phases is not Nothing] * 2
    return found


def both(rank: int, world: int, layout: Layout, precisions: list[str], steps: int) -> dict[str, Any]:
    """Precision -> (as torch runs it, in pairs); and the pairs' events of the first one."""
    events: list[str] = []
    found: dict[str, Any] = {}
    for precision in precisions:
        with torchs_own():
            plain = run_steps(layout, precision, steps)
        with recorded([] if found else events):
            found[precision] = plain, run_steps(layout, precision, steps)
    return found | {"events": events}


def to_one_process(rank: int, world: int, layout: Layout) -> tuple[float, float, str]:
    """Of one FP32 step: the losses' largest relative difference, that of a parameter's gradient, and the parameter."""
    engine, alone = engine_of(layout, "fp32"), engine_of(None, "fp32")
    ours, truth = losses_of(take(engine, 0)), losses_of(take(alone, 0))
    loss = max(abs(a - b) / abs(b) for a, b in zip(ours, truth, strict=True))
    whole, worst = gradients(alone), (0.0, "")
    for name, piece in gradient_pieces(engine).items():
        start = piece.shard.offsets[0]
        error = (piece.tensor.double() - whole[name][start : start + len(piece.tensor)].double()).norm()
        worst = max(worst, (float(error / whole[name].double().norm()), name))
    return loss, *worst


def in_small_micro_batches(rank: int, world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function of the layout theorem, with as many micro-batches as a pair needs, on engines of ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_theorem, "MICRO_BATCH", MICRO_BATCH)
        patch.setattr(layout_theorem, "engine_on", engine_of)
        return function(rank, world, *arguments)


def last_wins(self: Slot, grad: Tensor) -> None:
    self._grad = grad


BALANCE = train.stage.balance_sum
# What each replaces, and by what.
DEFECTS: dict[str, tuple[Any, str, Any]] = {
    "the last gradient wins": (Slot, "add", last_wins),
    "the balance loss has no gradient": (
        train.stage,
        "balance_sum",
        lambda output, weights: None if (loss := BALANCE(output, weights)) is None else loss.detach(),
    ),
}


def with_defects(rank: int, world: int, layout: Layout) -> dict[str, int]:
    """Defect -> gradients that differ from torch's own in one BF16 step; "none" of the code as it is."""
    with torchs_own():
        (truth,) = run_steps(layout, "bf16", 1).digests
    found = {}
    for name, patched in {"none": None, **DEFECTS}.items():
        with pytest.MonkeyPatch.context() as patch:
            if patched is not None:
                patch.setattr(*patched)
            (digests,) = run_steps(layout, "bf16", 1).digests
        found[name] = sum(digests[key] != value for key, value in truth.items())
    return found
