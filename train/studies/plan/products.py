"""What the planner's layers run on, how they are written, and the seconds of their products.

    Setup       model, candidate, implementation and machine: all that the time of a layer depends on
    products    2 m n k over the measured speed of that shape, else over that of the nearest three in log shape

Seconds are of all multiprocessors of the GPU; who lends some to an exchange divides (`Setup.sms_share`). A product of
the fullest rank's experts takes `imbalance` times as long.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from train.model.config import ModelConfig
from train.model.sizes import Held, Weight, weights
from train.studies.plan.candidate import Candidate
from train.studies.plan.loads import ExpertLoads, in_time
from train.studies.plan.tables import Column, Kind, Tables, read_tables

MachineName = Literal["H800", "H100"]
# (groups, m, n, k) of a product [m, k] x [n, k] of all groups together.
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Machine:
    """A node of eight GPUs and its network, bytes a second; `tables` has the speeds of its kernels."""

    name: MachineName
    tables: Tables
    sms: int
    memory: float
    memory_under_exchange: float
    nvlink: float
    infiniband: float
    infiniband_nccl: float


def machine(name: MachineName, *, report: Path | None = None) -> Machine:
    """A machine of the tables; a report of `make gpu` replaces what it has measured.

    Raises:
        ValueError: the report is none.
    """
    tables = read_tables(report)
    rows = ("memory", "memory under exchange", f"NVLink {name}", "InfiniBand", "InfiniBand NCCL")
    rates = [tables.value(row) * 1e9 for row in rows]
    return Machine(name, tables, int(tables.value("multiprocessors")), *rates)


@dataclass(frozen=True)
class Implementation:
    """How layers are written, beside what a candidate says.

    Args:
        products: whose FP8 GEMMs; a candidate in BF16 has cuBLAS's.
        memory: counted from today's code, what it was before the fusions, what full fusion would need, or the
            milliseconds of DeepSeek's profile.
        attention: cuDNN; flash with v padded, which can be deterministic; or the profile's.
        router: where its products run, and for FP32 sums on tensor cores in how many BF16 products each.
        head: all three products in forward, as this project's fused loss has them, or each in its own slot.
        imbalance: rows of the fullest rank's experts over the mean, or the loads of a run, from which it follows.
    """

    name: str
    products: Literal["deepgemm", "deepgemm 2025-02", "ours"] = "ours"
    memory: Literal["counted", "before fusions", "fused", "profile"] = "counted"
    attention: Literal["cudnn", "flash", "profile"] = "cudnn"
    router: Literal["split", "bf16", "fp32"] = "split"
    head: Literal["in forward", "apart"] = "in forward"
    imbalance: float | ExpertLoads = 1.0


@dataclass(frozen=True)
class Setup:
    """What decides the time of a layer."""

    model: ModelConfig
    candidate: Candidate
    implementation: Implementation
    machine: Machine
    sequence_length: int
    muon: bool = False  # whether matrices are moved by it

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.candidate.micro_batch_sequences * self.sequence_length

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank's experts over the mean: at most as uneven as routing can be on so many ranks."""
        model, ep, imbalance = self.model, self.candidate.ep, self.implementation.imbalance
        if isinstance(imbalance, ExpertLoads):
            return in_time(imbalance, ep)
        local = model.n_routed_experts // ep
        return min(imbalance, ep * min(local / model.num_experts_per_tok, 1.0))

    @property
    def column(self) -> Column:
        """Whose products."""
        return "bf16" if self.candidate.precision == "bf16" else self.implementation.products

    def sms_share(self, *, beside_exchange: bool) -> float:
        """Multiprocessors that compute, of all."""
        lent = self.candidate.comm_sms if beside_exchange else 0
        return (self.machine.sms - lent) / self.machine.sms


class ProductSpeed(NamedTuple):
    """FLOP/s of a product, and how many octaves of its dims away the nearest row is; 0: measured."""

    flop_per_s: float
    octaves: float


@functools.cache
def speed(tables: Tables, column: Column, kind: Kind, shape: Shape) -> ProductSpeed:
    """How fast a product [m, k] x [n, k] of so many groups is: shape is (groups, m, n, k)."""
    rows = [row for row in tables.products(column) if row.kind == kind]
    near = sorted(
        (sum(abs(math.log2(a / b)) for a, b in zip(shape, (r.groups, r.m, r.n, r.k), strict=True)), r.flop_per_s)
        for r in rows
    )[:3]
    octaves, nearest = near[0]
    if octaves == 0:
        return ProductSpeed(nearest, 0.0)
    shares = [1 / distance for distance, _ in near]
    mean = sum(share * value for share, (_, value) in zip(shares, near, strict=True)) / sum(shares)
    return ProductSpeed(mean, octaves)


def product_s(setup: Setup, kind: Kind, shape: Shape, *, column: Column | None = None) -> float:
    """Seconds of a product on all multiprocessors."""
    _, m, n, k = shape
    return 2.0 * m * n * k / speed(setup.machine.tables, column or setup.column, kind, shape).flop_per_s


class Passes(NamedTuple):
    """Seconds in forward, in the input part of backward and in its weight part."""

    forward: float
    backward: float
    weights: float


def _shapes(setup: Setup, weight: Weight) -> tuple[tuple[Kind, Shape], ...]:
    """The three products of a weight."""
    out, width, tokens = weight.rows, weight.cols, setup.tokens
    if weight.expert:
        groups, tokens = weight.copies, weight.uses * tokens
        return (
            ("grouped fprop", (groups, tokens, out, width)),
            ("grouped dgrad", (groups, tokens, width, out)),
            ("grouped wgrad", (groups, out, width, tokens)),
        )
    return (("fprop", (1, tokens, out, width)), ("dgrad", (1, tokens, width, out)), ("wgrad", (1, out, width, tokens)))


def passes(setup: Setup, weight: Weight, *, column: Column | None = None) -> Passes:
    """The three products of a weight; of experts on the fullest rank."""
    skew = setup.imbalance if weight.expert else 1.0
    return Passes(*(skew * product_s(setup, kind, shape, column=column) for kind, shape in _shapes(setup, weight)))


def mean_octaves(setup: Setup) -> float:
    """How far the products of a layer are from rows of the tables, by their FLOPs: doublings of a side."""
    last = setup.model.num_hidden_layers - 1
    distances, works = [], []
    for weight in layer_weights(setup, moe=setup.model.is_moe(last)):
        for kind, shape in _shapes(setup, weight) if weight.fp8 else ():
            distances.append(speed(setup.machine.tables, setup.column, kind, shape).octaves)
            works.append(math.prod(shape[1:]))
    return sum(distance * work for distance, work in zip(distances, works, strict=True)) / sum(works)


def total(passes: Iterable[Passes]) -> Passes:
    """Of several weights."""
    return Passes(*(sum(column) for column in zip(Passes(0.0, 0.0, 0.0), *passes, strict=True)))


def layer_weights(setup: Setup, *, moe: bool) -> list[Weight]:
    """What a rank holds of one layer."""
    layer_id = setup.model.num_hidden_layers - 1 if moe else 0
    assert setup.model.is_moe(layer_id) == moe, (layer_id, moe)
    return weights(setup.model, Held((layer_id,), embedding=False, head=False), ep=setup.candidate.ep)


def up_projections_s(setup: Setup) -> float:
    """Forward of queries, keys and values from their latents once more, which recomputation adds to backward."""
    ranks = (setup.model.q_lora_rank, setup.model.kv_lora_rank)
    return sum(
        passes(setup, weight).forward
        for weight in layer_weights(setup, moe=setup.model.is_moe(0))
        if weight.part == "attention" and weight.cols in ranks
    )


def router_s(setup: Setup, weight: Weight) -> float:
    """Seconds of one of its three products."""
    how, tables = setup.implementation.router, setup.machine.tables
    times = tables.value("router split") if how == "split" else 1.0
    rate = tables.value("router fp32" if how == "fp32" else "router bf16")
    return times * 2.0 * setup.tokens * weight.rows * weight.cols / (rate * 1e12)
