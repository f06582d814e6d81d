"""Every layout of so many GPUs: which fit their memory, how fast they are, and what would change the answer.

    shells      pp, ep, dp, schedule, chunks, micro-batch, exchange and precision that the model and the batch allow;
                ZeRO-1 as configured: without it a rank holds more and sends more
    memory      of each the first way to keep activations and weights that fits, the fastest first (`footprint.py`)
    time        with layers dealt evenly by their seconds; the best few again with a split by simulated time
    flips       the best few once more with another link, kernel or routing

`Scope` says what the search may assume: what the trainer runs today, or also what `parallel/` has no code for yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from parallel.layout import Layout, check_layout
from parallel.schedules import SCHEDULES as RUNNABLE
from train.studies.plan.candidate import Candidate, Dispatch
from train.studies.plan.costs import StageCosts
from train.studies.plan.orders import SCHEDULES, fallback, num_stages, rank_of_stage, refusal
from train.studies.plan.predict import Quick, quick
from train.studies.plan.products import Implementation, Machine, Setup
from train.studies.plan.split import Split, best_split, deals
from train.studies.plan.tables import Tables

if TYPE_CHECKING:
    from train.config import PretrainConfig
    from train.schedules import ScheduleConfig

# Stages a rank for schedules that take any number.
INTERLEAVED = (2, 4)
MICRO_BATCHES = (1, 2)
PRECISIONS: tuple[Literal["fp8", "bf16"], ...] = ("fp8", "bf16")
# How many of the best get a split by simulated time, and changes of it that are tried.
FINALISTS, TRIES = 6, 40


@dataclass(frozen=True)
class Scope:
    """What a search may use: exchanges, and overlapped pairs of chunks."""

    name: str
    dispatches: tuple[Dispatch, ...]
    overlaps: bool


# Of the trainer's. Its pairs have exchanges in flight, but start them later than `lanes.py` does (decision 0015).
# InterleavedZeroBubble takes the micro-batches of Interleaved1F1B, and keeps weight parts longer.
SEARCHED = tuple(name for name in RUNNABLE if name != "InterleavedZeroBubble")
TODAY = Scope("what the trainer runs today", ("direct", "node"), overlaps=False)
ALL = Scope("all that is modelled (with overlap and DeepEP's exchange)", ("direct", "node", "deepep"), overlaps=True)


@dataclass(frozen=True)
class Found:
    """A layout, its step, and bytes of its fullest rank; one that does not fit is timed as if it did."""

    candidate: Candidate
    micro_batches: int
    step: Quick
    memory_bytes: float
    fits: bool

    @property
    def rank(self) -> tuple[bool, float]:
        """What a list is sorted by: those that fit first, the fastest first."""
        return not self.fits, self.step.step_s


# Bytes of the fullest rank, what the device itself takes included.
MemoryOf = Callable[[Candidate], float]


def runs_today(candidate: Candidate) -> str | None:
    """None if the trainer runs it; else what it lacks."""
    if candidate.schedule not in RUNNABLE:
        return f"layout.schedule={candidate.schedule} is not in the trainer yet"
    if candidate.overlap:
        return "exchanges of a pair start behind what was launched before them, later than is modelled"
    if candidate.dispatch == "deepep":
        return "layout.dispatch=deepep has not run yet"
    return None


def search(
    config: PretrainConfig,
    scope: Scope,
    *,
    implementation: Implementation,
    machine: Machine,
    memory_of: MemoryOf,
    limit_bytes: float,
) -> list[Found]:
    """All layouts of `config.layout.world` GPUs, the fastest first, then those that do not fit."""
    setup_of = functools.partial(setup_for, config, implementation, machine)
    found = [
        _timed(shell, setup_of, scope, config.schedule.batch_full_sequences, memory_of, limit_bytes)
        for shell in shells(config, scope)
    ]
    found.sort(key=lambda each: each.rank)
    finals = [
        _with_split(each, setup_of, scope, memory_of=memory_of, limit_bytes=limit_bytes)
        for each in found[:FINALISTS]
        if each.fits
    ]
    return sorted([*finals, *found[len(finals) :]], key=lambda each: each.rank)


def _timed(
    shell: Candidate,
    setup_of: Callable[[Candidate], Setup],
    scope: Scope,
    batch: int,
    memory_of: MemoryOf,
    limit_bytes: float,
) -> Found:
    """A layout with the fastest way to keep activations and weights that fits, and the fastest of a few even deals."""
    count = batch // shell.dp // shell.micro_batch_sequences
    splits = first_splits(setup_of(shell))

    def seconds(candidate: Candidate) -> float:
        return quick(setup_of(candidate), micro_batches=count).step_s

    *others, least = ways(shell.precision)
    for recompute in (False, True):
        # With the way that needs least memory first: what it cannot fit, none can.
        dealt = [replace(shell, stage_layers=split, recompute=recompute, **least) for split in splits]
        if fitting := [each for each in dealt if memory_of(each) <= limit_bytes]:
            split = min(fitting, key=seconds)
            every = [
                split,
                *(replace(shell, stage_layers=split.stage_layers, recompute=recompute, **w) for w in others),
            ]
            best = min((each for each in every if memory_of(each) <= limit_bytes), key=seconds)
            return Found(best, count, quick(setup_of(best), micro_batches=count), memory_of(best), fits=True)
    smallest = min(dealt, key=memory_of)
    return Found(smallest, count, quick(setup_of(smallest), micro_batches=count), memory_of(smallest), fits=False)


def setup_for(config: PretrainConfig, implementation: Implementation, machine: Machine, candidate: Candidate) -> Setup:
    """What decides the time of a layout."""
    muon = config.optim.name == "muon"
    return Setup(config.model, candidate, implementation, machine, config.data.sequence_length, muon=muon)


def shells(config: PretrainConfig, scope: Scope) -> Iterator[Candidate]:
    """Layouts that the model and every batch of the ramp allow; `stage_layers` are a placeholder."""
    model, schedule, world = config.model, config.schedule, config.layout.world
    for pp in _divisors(world, model.num_hidden_layers):
        dp = world // pp
        for ep in _divisors(math.gcd(dp, model.n_routed_experts), dp):
            for micro in MICRO_BATCHES:
                if not _allowed(config, dp=dp, ep=ep, micro=micro):
                    continue
                for precision, (name, chunks) in product(PRECISIONS, _schedules(pp)):
                    # The last stage may have none.
                    if num_stages(name, pp, chunks) > model.num_hidden_layers + 1:
                        continue
                    if not _takes_the_ramp(schedule, name, pp, chunks, unit=dp * micro):
                        continue
                    for dispatch in scope.dispatches:
                        if not crosses(dispatch, ep, config.layout.ranks_per_node):
                            continue
                        yield Candidate(
                            pp=pp,
                            dp=dp,
                            ep=ep,
                            schedule=name,
                            chunks=chunks,
                            stage_layers=(0,) * (pp * chunks),
                            micro_batch_sequences=micro,
                            precision=precision,
                            zero=config.layout.zero,
                            max_waiting_wgrads=config.layout.max_waiting_wgrads,
                            max_expert_rows=_expert_rows(config, micro),
                            dispatch=dispatch,
                            overlap=scope.overlaps and SCHEDULES[name].pairs,
                            ranks_per_node=config.layout.ranks_per_node,
                        )


def _expert_rows(config: PretrainConfig, micro: int) -> int | None:
    """The configured limit at another micro-batch, whose rows are so many times more."""
    limit = config.layout.max_expert_rows
    return limit and limit * micro // config.run.micro_batch_sequences


def crosses(dispatch: Dispatch, ep: int, per_node: int) -> bool:
    """Whether a way of tokens is another than `direct`, and possible."""
    if dispatch == "node":
        return 1 < per_node < ep and ep % per_node == 0
    return dispatch == "direct" or ep > per_node


def _takes_the_ramp(schedule: ScheduleConfig, name: str, pp: int, chunks: int, *, unit: int) -> bool:
    """Whether every step can run, of any number of micro-batches of `unit` sequences, the last under this schedule."""
    start, full = schedule.batch_start_sequences // unit, schedule.batch_full_sequences // unit
    return not refusal(name, pp, chunks, full) and all(fallback(name, pp, chunks, m) for m in range(start, full))


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def _allowed(config: PretrainConfig, *, dp: int, ep: int, micro: int) -> bool:
    """Whether batches split evenly, and experts over nodes as the router wants them.

    The steps of the ramp (`schedule.batch_multiple_sequences`) are taken as free.
    """
    schedule = config.schedule
    unit = dp * micro
    if schedule.batch_start_sequences % unit or schedule.batch_full_sequences % unit:
        return False
    layout = Layout(pp=1, dp=dp, ep=ep, ranks_per_node=config.layout.ranks_per_node)
    workload = replace(config.workload, micro_batch_sequences=micro, batch_multiple_sequences=unit)
    try:
        check_layout(layout, workload)
    except ValueError:
        return False
    return True


def _schedules(pp: int) -> Iterator[tuple[str, int]]:
    """(name, stages a rank); one rank has one stage, whatever the schedule."""
    if pp == 1:
        yield "1F1B", 1
        return
    for name in SEARCHED:
        chunks = SCHEDULES[name].chunks
        yield from ((name, each) for each in ((chunks,) if chunks else INTERLEAVED))


def ways(precision: str) -> list[dict[str, Any]]:
    """Ways to keep weights and attention's output, each with less memory than the one before."""
    if precision != "fp8":
        return [{}]
    return [{}, {"keep_bf16_weights": False}, {"keep_bf16_weights": False, "attention_output": "e5m6"}]


def first_splits(setup: Setup) -> list[Split]:
    """Deals of all layers over the stages of a candidate, whatever its own split is."""
    candidate, model = setup.candidate, setup.model
    stages = num_stages(candidate.schedule, candidate.pp, candidate.chunks)
    if stages == 1:
        return [(model.num_hidden_layers,)]
    # A stage with one layer, and a last one with none.
    sample = (model.num_hidden_layers, *(0,) * (stages - 1))
    costs = StageCosts(replace(setup, candidate=replace(candidate, stage_layers=sample)))

    def seconds(stage: int) -> float:
        chunks = (costs.phases(kind, stage, beside_exchange=False) for kind in "FB")
        return sum(phase.seconds + phase.weight_s for chunk in chunks for phase in chunk)

    layer_s = seconds(0) / model.num_hidden_layers
    owners = [rank_of_stage(candidate.schedule, candidate.pp, candidate.chunks, stage) for stage in range(stages)]
    return deals(model.num_hidden_layers, owners, last_stage_layers=seconds(stages - 1) / layer_s)


def split_by_time(setup: Setup, *, micro_batches: int, tries: int = TRIES) -> Split:
    """The fastest split found, the candidate's own among the first."""

    def seconds(split: Split) -> float:
        candidate = replace(setup.candidate, stage_layers=split)
        return quick(replace(setup, candidate=candidate), micro_batches=micro_batches).step_s

    first = [setup.candidate.stage_layers, *first_splits(setup)]
    return best_split(first, seconds, tries=tries)


def _with_split(
    found: Found, setup_of: Callable[[Candidate], Setup], scope: Scope, *, memory_of: MemoryOf, limit_bytes: float
) -> Found:
    """The same layout with a split by simulated time, if that fits too."""
    setup = setup_of(found.candidate)
    split = split_by_time(setup, micro_batches=found.micro_batches)
    candidate = replace(found.candidate, stage_layers=split)
    if (num_bytes := memory_of(candidate)) > limit_bytes:
        return found
    step = quick(setup_of(candidate), micro_batches=found.micro_batches)
    return replace(found, candidate=candidate, step=step, memory_bytes=num_bytes)


# ---- what would change the answer


@dataclass(frozen=True)
class Change:
    """Another machine, kernel or routing: words, and what becomes of the three."""

    words: str
    of_machine: Callable[[Machine], Machine] = lambda machine: machine
    of_implementation: Callable[[Implementation], Implementation] = lambda implementation: implementation
    of_candidate: Callable[[Candidate], Candidate] = lambda candidate: candidate


def slower_links(machine: Machine, factor: float) -> Machine:
    """A machine whose network between nodes has another rate, DeepEP's included."""
    rows = dict(machine.tables.rows)
    for what, row in rows.items():
        if what.startswith("DeepEP ") and what != "DeepEP 8":
            assert isinstance(row.value, tuple), what
            rows[what] = replace(row, value=tuple(factor * rate for rate in row.value))
    ours, nccl = factor * machine.infiniband, factor * machine.infiniband_nccl
    return replace(machine, tables=Tables(rows), infiniband=ours, infiniband_nccl=nccl)


CHANGES = (
    Change("half of InfiniBand's rate", lambda machine: slower_links(machine, 0.5)),
    Change("twice InfiniBand's rate", lambda machine: slower_links(machine, 2.0)),
    Change("twice NVLink's rate", lambda machine: replace(machine, nvlink=2 * machine.nvlink)),
    Change("DeepGEMM's products", of_implementation=lambda how: replace(how, products="deepgemm")),
    Change("an exchange on 6 multiprocessors", of_candidate=lambda candidate: replace(candidate, comm_sms=6)),
    Change("1.5 times the mean on the fullest rank", of_implementation=lambda how: replace(how, imbalance=1.5)),
)


def flips(
    config: PretrainConfig, best: Iterable[Found], *, implementation: Implementation, machine: Machine
) -> Mapping[str, Candidate | None]:
    """Change -> the layout that wins under it, or None where it is still the first."""
    best = [each for each in best if each.fits]
    if not best:
        return {}
    winners: dict[str, Candidate | None] = {}
    for change in CHANGES:
        changed = functools.partial(
            setup_for, config, change.of_implementation(implementation), change.of_machine(machine)
        )

        def seconds(found: Found, change: Change = change, changed: Callable[[Candidate], Setup] = changed) -> float:
            return quick(changed(change.of_candidate(found.candidate)), micro_batches=found.micro_batches).step_s

        winner = min(best, key=seconds)
        winners[change.words] = None if winner is best[0] else winner.candidate
    return winners
