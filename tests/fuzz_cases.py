"""What `fuzz_layouts.py` draws: a run on a layout, as a short text of its settings; and what a legal one is.

    pp=2 dp=4 ep=2 schedule=ZBVZeroBubble layers=5 stages=2,1,1,1 precision=fp8 seed=17

A text names what differs from `Case()`. `Case.config` hands all of it to the product's own checks; `why_illegal` says
the same from first principles, by listing ranks and stages, so a refusal can be wrong in both directions.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from parallel.layout import Layout
from parallel.schedules import SCHEDULES
from tests.parity.layout_theorem import MODEL
from train.config import PretrainConfig, compose
from train.data.batch import IGNORE_INDEX, Batch
from train.model.config import ModelConfig
from train.model.precision_config import PrecisionConfig
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues

# The tokens of the step from which docs/numerics.md, "Layouts", derives its bounds: no case has more.
MOST_TOKENS = 384
# A step's micro-batches over all ranks, about: what a case costs.
MOST_MICRO_BATCHES = 8


@dataclass(frozen=True)
class Case:
    """One run: layout, model, batch, recipe and optimizer, each by a field; texts and numbers only."""

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "1F1B"
    chunks: int = 0  # stages of a rank; 0: the schedule's
    stages: str = ""  # layers of each stage, "3,2"; empty: balanced by cost
    wgrads: int = -1  # weight gradients that may wait; -1: any number
    node: int = 8  # ranks of a node
    dispatch: str = "direct"
    zero: int = 1
    layers: int = 3
    dense: int = 1  # of the layers, the first ones
    experts: int = 8
    groups: int = 4
    shared: int = 1
    mtp: int = 1
    sequences: int = 8  # of a step over all ranks
    micro: int = 1  # sequences of a micro-batch
    tokens: int = 12
    steps: int = 1  # each followed by an update
    mask: int = 0
    alpha: int = 1  # whether the balance loss has a weight
    precision: str = "fp32"
    swiglu: int = 1  # whether FP8 keeps SwiGLU's input
    attention: str = "bf16"  # how attention's output is kept
    bf16_weights: int = 1
    recompute: int = 0
    backend: str = "native"
    moments: str = "bf16"
    offload: str = "none"
    seed: int = 1

    def __str__(self) -> str:
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)

    @classmethod
    def parse(cls, text: str) -> Case:
        """Inverse of `str`."""
        kinds = {f.name: type(f.default) for f in fields(cls)}
        pairs = [each.split("=", 1) for each in text.split()]
        return cls(**{name: kinds[name](value) for name, value in pairs})

    @property
    def world(self) -> int:
        """Ranks."""
        return self.pp * self.dp

    @property
    def micro_batches(self) -> int:
        """Of each data rank."""
        return self.sequences // (self.dp * self.micro)

    @property
    def is_v(self) -> bool:
        """Whether the first and the last stage share a rank."""
        return self.schedule in ("ZBVZeroBubble", "DualPipeV")

    @property
    def layout(self) -> Layout:
        """Refused with a ValueError where no model could run it."""
        return Layout(
            pp=self.pp,
            dp=self.dp,
            ep=self.ep,
            schedule=self.schedule,
            stages_per_rank=self.chunks or None,
            zero=bool(self.zero),
            ranks_per_node=self.node,
            dispatch=self.dispatch,  # type: ignore[arg-type]
            stage_layers=self.stage_layers,
            max_waiting_wgrads=None if self.wgrads < 0 else self.wgrads,
        )

    @property
    def hops(self) -> int:
        """Of a token to its experts: two where its group of ranks has several nodes of several ranks."""
        return 2 if self.dispatch == "node" and 1 < self.node < self.ep else 1

    @property
    def stage_layers(self) -> tuple[int, ...] | None:
        """Of `stages`."""
        return tuple(map(int, self.stages.split(","))) if self.stages else None

    @property
    def model(self) -> ModelConfig:
        """That of the theorem with other numbers of parts."""
        return replace(
            MODEL,
            num_hidden_layers=self.layers,
            first_k_dense_replace=self.dense,
            n_routed_experts=self.experts,
            n_group=self.groups,
            topk_group=min(2, self.groups),
            n_shared_experts=self.shared,
            num_nextn_predict_layers=self.mtp,
        )

    @property
    def precision_config(self) -> PrecisionConfig:
        """Refused where two of its fields contradict each other."""
        return PrecisionConfig(
            self.precision,  # type: ignore[arg-type]
            cache_swiglu_input=bool(self.swiglu),
            keep_bf16_weights=bool(self.bf16_weights),
            attention_output=self.attention,  # type: ignore[arg-type]
        )

    @property
    def optim(self) -> OptimConfig:
        """No clipping: gradients are compared as they come."""
        return OptimConfig(
            clip_norm=1e9,
            moments_dtype=self.moments,
            backend=self.backend,  # type: ignore[arg-type]
            offload=self.offload,  # type: ignore[arg-type]
        )

    @property
    def now(self) -> ScheduledValues:
        """Scheduled values of every step."""
        alpha = 0.01 * self.alpha
        return ScheduledValues(
            lr=2.2e-4, batch_sequences=self.sequences, bias_speed=1e-3, mtp_weight=0.3, balance_alpha=alpha
        )

    @property
    def config(self) -> PretrainConfig:
        """The whole configuration, as a user would write it; a ValueError where it is refused."""
        base = _base()
        schedule = replace(
            base.schedule,
            batch_start_sequences=self.sequences,
            batch_full_sequences=self.sequences,
            batch_multiple_sequences=self.sequences,
        )
        return replace(
            base,
            model=self.model,
            precision=self.precision_config,
            layout=self.layout,
            data=replace(base.data, sequence_length=self.tokens, mask_documents=bool(self.mask)),
            schedule=schedule,
            optim=self.optim,
            run=replace(base.run, micro_batch_sequences=self.micro, recompute=bool(self.recompute)),
        )

    def batch(self, step: int) -> Batch:
        """Sequences with different numbers of targets; one micro-batch has none, where there are several."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        shape = (self.sequences, self.tokens + 1)
        tokens = torch.randint(0, MODEL.vocab_size, shape, generator=generator)
        labels, documents = tokens[:, 1:].clone(), None
        for row in range(1, self.sequences):
            labels[row, : (5 * row + self.seed) % self.tokens] = IGNORE_INDEX
        if self.sequences > self.micro:
            start = self.micro * (1 + (self.seed + step) % (self.sequences // self.micro - 1))
            labels[start : start + self.micro] = IGNORE_INDEX
        if self.mask:
            starts = torch.rand(self.sequences, self.tokens, generator=generator) < 0.25
            documents = starts.long().cumsum(1) - starts[:, :1].long()
        return Batch(tokens[:, :-1].contiguous(), labels, documents)


@cache
def _base() -> PretrainConfig:
    return compose(["experiment=tiny", "run.device=cpu"])


def _stages(case: Case) -> int:
    return case.pp * (case.chunks or (1 if case.schedule == "1F1B" else 2)) if case.pp > 1 else 1


def _too_few(case: Case) -> bool:
    """Micro-batches of a pipeline: a micro-batch for each stage, or whole rounds of one for about each rank."""
    count, rounds = case.micro_batches, max(1, case.micro_batches // case.pp)
    if "Interleaved" in case.schedule:
        return count % rounds > 0
    return count < {"1F1B": case.pp, "DualPipeV": 2 * case.pp}.get(case.schedule, 1)


def _nodes_of_groups(case: Case) -> list[tuple[bool, set[int]]]:
    """The nodes that each routing group of each expert group lies on, and of each whole expert group (True)."""
    found = []
    for first in range(0, case.world, case.ep):
        home = [(first + e * case.ep // case.experts) // case.node for e in range(case.experts)]
        size = case.experts // case.groups
        found += [(False, {*home[g * size : (g + 1) * size]}) for g in range(case.groups)]
        found.append((True, {*home}))
    return found


ILLEGAL: dict[str, Callable[[Case], bool]] = {
    "schedule": lambda c: c.schedule not in SCHEDULES,
    "more dense layers than layers": lambda c: c.dense > c.layers,
    "ep does not divide dp": lambda c: c.dp % c.ep > 0,
    "ep does not divide experts": lambda c: c.experts % c.ep > 0,
    "stages of a rank": lambda c: (
        c.chunks < 0 or (c.chunks > 0 and "Interleaved" not in c.schedule and c.chunks != (2 if c.is_v else 1))
    ),
    "fewer layers than stages": lambda c: c.stage_layers is None and _stages(c) > c.layers,
    "stage_layers": lambda c: (
        (c.stage_layers is not None and (len(c.stage_layers), sum(c.stage_layers)) != (_stages(c), c.layers))
        or min(c.stage_layers or (1,)) < 0
        or 0 in (c.stage_layers or ())[1:-1]
    ),
    "a group on two nodes": lambda c: any(
        len(nodes) > 1 and (c.ep <= c.node if whole else c.groups > 1) for whole, nodes in _nodes_of_groups(c)
    ),
    "part of a node": lambda c: (
        c.hops == 2
        and any(
            len({rank // c.node for rank in range(first, first + c.ep)}) * c.node != c.ep
            for first in range(0, c.world, c.ep)
        )
    ),
    "a step is not whole micro-batches": lambda c: c.sequences % (c.dp * c.micro) > 0,
    "micro-batches that the schedule does not take": lambda c: c.pp > 1 and _too_few(c),
    "backend": lambda c: (
        c.backend == "deepspeed" and (not c.zero or c.world == 1 or not c.bf16_weights or c.offload != "none")
    ),
    "precision": lambda c: c.precision != "fp8" and not (c.bf16_weights and c.attention == "bf16"),
}


def why_illegal(case: Case) -> str | None:
    """The first of `ILLEGAL` that holds; None for a case that must run."""
    return next((name for name, holds in ILLEGAL.items() if holds(case)), None)


def refusal(case: Case) -> str | None:
    """What the product says against a case; None where it accepts it."""
    try:
        _ = case.config
    except ValueError as error:
        return str(error)
    return None


def draw(chance: random.Random, *, world: int | None = None) -> Case:
    """Any case, legal in most draws; what it costs is bounded."""
    world = world or chance.choice((2, 2, 2, 3, 4, 4, 4, 4, 5, 6, 6, 7, 8, 8))
    pp = chance.choice([n for n in range(1, world + 1) if world % n == 0])
    dp = world // pp
    ep = chance.choice([n for n in range(1, dp + 1) if dp % n == 0 or chance.random() < 0.15])
    schedule = chance.choice(tuple(SCHEDULES))
    chunks = chance.choice((0, 0, 1, 3 if pp <= 2 else 0)) if "Interleaved" in schedule or chance.random() < 0.04 else 0
    stages = _stages(Case(pp=pp, schedule=schedule, chunks=chunks))
    layers = chance.randint(max(2, stages), max(3, stages + 1)) - (chance.random() < 0.04)
    micro = chance.choice((1, 1, 2))
    most = max(1, MOST_MICRO_BATCHES // dp) + (chance.random() < 0.2)
    if schedule == "DualPipeV" and pp <= 4:
        most = max(most, 2 * pp)
    fewest = 1 if chance.random() < 0.15 else min(2 * pp if schedule == "DualPipeV" else pp, most)
    sequences = dp * micro * chance.randint(fewest, most) + (chance.random() < 0.04)
    fp8 = (precision := chance.choice(("fp32", "bf16", "fp8"))) == "fp8"
    return Case(
        pp=pp,
        dp=dp,
        ep=ep,
        schedule=schedule,
        chunks=chunks,
        stages=_drawn_stages(chance, layers, stages) if pp > 1 and chance.random() < 0.6 else "",
        wgrads=chance.choice((-1, -1, 0, 1, 3)),
        # Two hops need nodes smaller than the group of experts.
        node=chance.choice((8, 3, 2, 2, 2, 2) if ep > 2 else (8, 8, 8, 4, 3, 2)),
        zero=int(chance.random() < 0.7),
        layers=layers,
        dense=chance.choice((0, 1, 1, 2)),
        experts=chance.choice((8, 12)),
        groups=chance.choice((1, 2, 4, 4)),
        shared=chance.choice((0, 1, 1, 2)),
        mtp=chance.choice((0, 1, 1, 2)),
        sequences=sequences,
        micro=micro,
        tokens=chance.randint(6, max(6, min(24, MOST_TOKENS // sequences))),
        steps=chance.choice((1, 1, 2)),
        mask=chance.randint(0, 1),
        alpha=int(chance.random() < 0.7),
        precision=precision,
        swiglu=int(not fp8 or chance.random() < 0.7),
        attention="e5m6" if chance.random() < (0.3 if fp8 else 0.03) else "bf16",
        bf16_weights=int(chance.random() < (0.5 if fp8 else 0.95)),
        recompute=chance.randint(0, 1),
        backend="deepspeed" if chance.random() < 0.25 else "native",
        moments=chance.choice(("bf16", "bf16", "fp32", "fp8")),
        offload="cpu" if chance.random() < 0.15 else "none",
        seed=chance.randint(1, 9999),
        dispatch=chance.choice(("direct", "node", "node")),
    )


def _drawn_stages(chance: random.Random, layers: int, stages: int) -> str:
    """Layers of each stage, each at least one; now and then an end without any, or a sum that is wrong."""
    cuts = sorted(chance.sample(range(1, layers), stages - 1)) if layers >= stages else [1] * (stages - 1)
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    for end, inner in ((-1, -2), (0, 1)):
        if chance.random() < 0.15:
            parts[inner] += parts[end]
            parts[end] = 0
    parts[-1] += chance.random() < 0.04
    return ",".join(map(str, parts))


def simpler(case: Case) -> list[Case]:
    """The legal cases that differ in one setting less, or with fewer sequences."""
    changed: list[dict[str, Any]] = [
        {f.name: f.default} for f in fields(case) if getattr(case, f.name) != f.default and f.name != "sequences"
    ]
    fewer = case.sequences - case.dp * case.micro
    changed += [{"sequences": fewer}] if fewer else []
    return [each for each in (replace(case, **change) for change in changed) if why_illegal(each) is None]
