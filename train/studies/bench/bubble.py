"""Step time and bubble of a pipeline whose stages only sleep, under each schedule, beside the planner's simulation.

    python -m train.studies.bench.bubble [--ranks 4] [--micro-batches 16] [--ms 60] [--repeats 5]

A rank's forward of a micro-batch sleeps `--ms` milliseconds over all its stages, its input and its weight gradients as
long each: equal stages, and sleeping ranks need no cores of their own. The pipeline, its messages over gloo and the
queue of weight gradients are those of training (arXiv:2412.19437 §3.2.1); the simulation (`plan/timeline.py`) has no
costs but the sleeps. An overlapped pair sleeps as long as its two chunks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from kernels import deferred
from parallel.layout import Layout
from parallel.mesh import init_processes, make_mesh, shutdown
from parallel.pipeline import Pipeline
from parallel.schedules import SCHEDULES
from train.studies.plan.orders import Step, num_stages, orders
from train.studies.plan.timeline import link, simulate

HIDDEN = 8
# Of an action, in forwards of its stage.
SLEEPS = {"F": 1, "I": 1, "W": 1, "B": 2}


class SleepTime:
    """Seconds that this process has slept, as the clock saw them."""

    total_s = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep and add what it took."""
        start = time.monotonic()
        time.sleep(seconds)
        self.total_s += time.monotonic() - start


SLEPT = SleepTime()


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inbound: Tensor, _: Tensor, seconds: float, is_last: bool) -> Tensor:
        ctx.inbound, ctx.seconds = inbound, seconds
        SLEPT.sleep(seconds)
        return torch.zeros(()) if is_last else torch.zeros(*inbound.shape[:2], HIDDEN)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        inbound, seconds = ctx.inbound, ctx.seconds
        SLEPT.sleep(seconds)
        deferred.push(lambda: SLEPT.sleep(seconds))
        return torch.zeros_like(inbound) if inbound.requires_grad else None, None, None, None


class SleepingStage(nn.Module):
    """A pipeline stage that sleeps in forward, in backward and for its weight gradients, `seconds` each."""

    def __init__(self, seconds: float, *, is_last: bool) -> None:
        super().__init__()
        self.seconds, self.is_last = seconds, is_last
        # Without a parameter the first stage's output would need no backward.
        self.anchor = nn.Parameter(torch.empty(0))

    def forward(self, inbound: Tensor, **_: Tensor) -> Tensor:
        """Sleep; [sequences, tokens, hidden], or a scalar where the pipeline ends."""
        output: Tensor = _Sleep.apply(inbound, self.anchor, self.seconds, self.is_last)  # type: ignore[no-untyped-call]
        return output


@dataclass(frozen=True)
class SleepSizes:
    """What is measured; forward_s of a rank and micro-batch, over all its stages."""

    ranks: int
    micro_batches: int
    forward_s: float
    repeats: int


class Ran(NamedTuple):
    """A step of one rank on the machine's monotonic clock, and how long of it the rank slept."""

    start_s: float
    end_s: float
    slept_s: float


def on_rank(rank: int, sizes: SleepSizes, store: str) -> dict[str, list[Ran]]:
    """The steps of one rank under each schedule, the first one of each left out."""
    torch.set_num_threads(1)
    shared, _, _ = next(rendezvous(f"file://{store}", rank, sizes.ranks))
    init_processes(rank=rank, world=sizes.ranks, backend="gloo", store=shared)
    found = {name: _steps(Layout(pp=sizes.ranks, schedule=name), rank, sizes) for name in SCHEDULES}
    shutdown()
    return found


def _steps(layout: Layout, rank: int, sizes: SleepSizes) -> list[Ran]:
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=False)
    seconds, last = sizes.forward_s / layout.chunks, layout.num_stages - 1
    stages = {index: SleepingStage(seconds, is_last=index == last) for index in layout.stages_of_rank(rank)}
    pipeline = Pipeline(stages, mesh=mesh, hidden_size=HIDDEN, dtype=torch.float32)
    ids = torch.zeros(sizes.micro_batches, 1, dtype=torch.int64)
    ran = []
    for _ in range(1 + sizes.repeats):
        dist.barrier()
        start, before = time.monotonic(), SLEPT.total_s
        pipeline.run({"input_ids": ids, "labels": ids}, num_micro_batches=sizes.micro_batches)
        ran.append(Ran(start, time.monotonic(), SLEPT.total_s - before))
    return ran[1:]


class BubbleRow(NamedTuple):
    """A schedule: simulated step and bubble, then each measured one."""

    schedule: str
    simulated_s: float
    simulated_bubble: float
    steps_s: list[float]
    bubbles: list[float]

    def __str__(self) -> str:
        median, bubble = statistics.median(self.steps_s), statistics.median(self.bubbles)
        return (
            f"| `{self.schedule}` | {self.simulated_s:.2f} s | {self.simulated_bubble:.1%} "
            f"| {median:.2f} s ({min(self.steps_s):.2f} to {max(self.steps_s):.2f}) | {bubble:.1%} "
            f"| {median / self.simulated_s - 1:+.1%} |"
        )


HEAD = "| schedule | step, simulated | bubble | step, measured: median (range) | bubble | measured against simulated |"


def simulated(name: str, sizes: SleepSizes) -> tuple[float, float]:
    """Seconds of the planner's step, and the idle share of its ranks."""
    chunks = Layout(pp=sizes.ranks, schedule=name).chunks
    linked = link(orders(name, sizes.ranks, chunks, sizes.micro_batches), num_stages(name, sizes.ranks, chunks))

    def seconds(_: int, step: Step) -> float:
        return sizes.forward_s / chunks * sum(SLEEPS[action.kind] for action in step)

    found = simulate(linked, time=seconds)
    return found.step_s, sum(found.bubble_s) / sizes.ranks / found.step_s


def measure_bubbles(sizes: SleepSizes) -> list[BubbleRow]:
    """Each schedule in turn, on processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        with ProcessPoolExecutor(sizes.ranks, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(on_rank, rank, sizes, store) for rank in range(sizes.ranks)]
            by_rank = [future.result() for future in futures]
    rows = []
    for name in SCHEDULES:
        steps, bubbles = [], []
        for ranks in zip(*(found[name] for found in by_rank), strict=True):
            step_s = max(ran.end_s for ran in ranks) - min(ran.start_s for ran in ranks)
            steps.append(step_s)
            bubbles.append(1 - sum(ran.slept_s for ran in ranks) / sizes.ranks / step_s)
        rows.append(BubbleRow(name, *simulated(name, sizes), steps, bubbles))
    return rows


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Step time and bubble of each pipeline schedule on sleeping stages.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--ms", type=float, default=60.0, help="forward of a rank and micro-batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    sizes = SleepSizes(options.ranks, options.micro_batches, options.ms / 1e3, options.repeats)
    if refused := [name for name, facts in SCHEDULES.items() if not facts.takes(sizes.ranks, sizes.micro_batches)]:
        wanted = SCHEDULES[refused[0]].wanted(sizes.ranks, sizes.micro_batches)
        print(f"bubble: --micro-batches {sizes.micro_batches}: {refused[0]} takes {wanted}", file=sys.stderr)
        return 2
    rows = measure_bubbles(sizes)
    print(HEAD, "|---" * 6 + "|", *rows, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
