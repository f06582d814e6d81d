"""Seconds of what a rank computes and exchanges: the phases of a layer, a head, whole stages.

arXiv:2412.19437 §3.2. Every input is a row of `tables.py`; nothing is fitted here. Of one layer and micro-batch, alone
on the machine or beside the exchange of another chunk, which borrows multiprocessors and memory rate:

    products     at measured speeds (`products.py`)
    attention    the measured core, times tokens x sequence x heads x widths over those of the measurement
    memory       counted bytes over the memory's rate, or the milliseconds of DeepSeek's profile
    router       its products on tensor cores, or in FP32 outside of them
    exchange     expected copies of a token over the links (`exchange_s`)

Left out, each under 0.1 ms: the embedding, norms of heads and MTP, launches. Time that the host loses was not measured.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from train.model.config import ModelConfig
from train.model.sizes import BF16_BYTES, Held, Weight
from train.studies.plan.lanes import Phase, in_line, overlapped
from train.studies.plan.orders import Step, num_stages
from train.studies.plan.products import Passes, Setup, layer_weights, passes, router_s, total, up_projections_s
from train.studies.plan.tables import Tables
from train.studies.plan.traffic import dispatch_bytes, hidden_bytes

# What the tables were measured or counted on: V3's layer, one sequence.
TOKENS, HIDDEN, HEADS, HEAD_WIDTHS, TOPK, SHARED, INTER, DENSE_INTER, EP = 4096, 7168, 128, 320, 8, 1, 2048, 18432, 64
EXPERTS = 256
PARTS = (
    "attend forward", "experts forward", "attend backward", "experts backward", "attend weights", "experts weights",
)  # fmt: skip


# ---- a layer


class Part(NamedTuple):
    """What a phase of a layer computes, seconds on all multiprocessors; memory as it is at the rate of its moment."""

    products: float
    router: float
    attention: float
    memory: float


def layer_parts(setup: Setup, *, moe: bool, beside_exchange: bool) -> dict[str, Part]:
    """The phases of `PARTS`, each by what it does."""
    table = layer_weights(setup, moe=moe)
    attend = total(passes(setup, weight) for weight in table if weight.part == "attention")
    ffn = ("shared_experts", "routed_experts") if moe else ("dense_ffn",)
    experts = total(passes(setup, weight) for weight in table if weight.part in ffn)
    again = up_projections_s(setup) if setup.candidate.recompute else 0.0
    router = sum(router_s(setup, weight) for weight in table if weight.part == "router")
    core = _attention(setup)
    products = {
        "attend forward": (attend.forward, router, core.forward),
        "experts forward": (experts.forward, 0.0, 0.0),
        "attend backward": (attend.backward + again, router, core.backward),
        "experts backward": (experts.backward, 0.0, 0.0),
        "attend weights": (attend.weights, router, 0.0),
        "experts weights": (experts.weights, 0.0, 0.0),
    }
    return {
        part: Part(*values, _memory(setup, part, moe=moe, beside_exchange=beside_exchange))
        for part, values in products.items()
    }


def _attention(setup: Setup) -> Passes:
    """The core on all multiprocessors; its weight part is nothing."""
    model, how, tables = setup.model, setup.implementation.attention, setup.machine.tables
    work = setup.tokens * setup.sequence_length * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    scale = work / (TOKENS * TOKENS * HEADS * HEAD_WIDTHS) * 1e-3
    row = "profile attend {} attention" if how == "profile" else f"attention {how} {{}}"
    if how == "profile":
        # Timed beside the exchange, with 20 multiprocessors less.
        scale *= (setup.machine.sms - 20) / setup.machine.sms
    return Passes(scale * tables.value(row.format("forward")), scale * tables.value(row.format("backward")), 0.0)


def _memory(setup: Setup, part: str, *, moe: bool, beside_exchange: bool) -> float:
    """Seconds of what is neither a product nor attention."""
    how, the = setup.implementation.memory, setup.machine
    rate = the.memory_under_exchange if beside_exchange else the.memory
    if how == "counted":
        return _counted_bytes(setup, part, moe=moe) / rate
    model, tables = setup.model, the.tables
    by_width = (model.hidden_size / HIDDEN + model.num_attention_heads / HEADS) / 2
    if part.startswith("experts"):
        by_width = model.hidden_size * model.num_experts_per_tok / (HIDDEN * TOPK) * setup.imbalance
        by_width *= 1.0 if moe else tables.value("dense share")
    scale = by_width * setup.tokens / TOKENS
    if how == "profile":
        return scale * _profile_memory_s(tables, part) * (the.memory_under_exchange / rate)
    if how == "fused":
        return scale * tables.value(f"fused {part}") * 1e3 * TOKENS / rate
    way = part.split()[1]
    attend = tables.value(f"before fusions {way} attend")
    share = attend if part.startswith("attend") else 1 - attend
    return scale * share * tables.value(f"before fusions {way}") / rate


def _profile_memory_s(tables: Tables, part: str) -> float:
    """Of DeepSeek's profile, beside the exchange; its copies around the exchange's backward precede the experts'."""
    rows = [f"profile {part} memory"] + (["profile combine backward memory"] if part == "experts backward" else [])
    return sum(tables.value(row) for row in rows if row in tables.rows) * 1e-3


def _counted_bytes(setup: Setup, part: str, *, moe: bool) -> float:
    """Of this project's layer, by its widths; see `train/studies/bench/counted.py`."""
    model, candidate = setup.model, setup.candidate
    again = "recompute" if candidate.recompute else "keep"
    kept = candidate.attention_output if candidate.precision == "fp8" else "bf16"
    variant = f"{'moe' if moe else 'dense'} {candidate.precision} {again} {kept}"
    hidden, imbalance = model.hidden_size / HIDDEN, setup.imbalance

    def moved(phase: str, *, rows: float, others: float, state: float) -> float:
        values = setup.machine.tables.rows.get(f"{variant}, {phase}")
        if values is None:
            return 0.0
        assert isinstance(values.value, tuple), phase
        by_hidden, by_others, fixed, _ = values.value
        return setup.tokens * rows * (by_hidden * hidden + by_others * others) + fixed * state

    if part.startswith("experts"):
        if not moe:
            return moved(part, rows=1.0, others=model.intermediate_size / DENSE_INTER, state=hidden)
        # A token passes its chosen experts and the shared ones.
        rows = (model.num_experts_per_tok * imbalance + model.n_shared_experts) / (TOPK + SHARED)
        others = model.moe_intermediate_size / INTER
        local = (model.n_routed_experts / candidate.ep) / (EXPERTS / EP)
        return moved(part, rows=rows, others=others, state=hidden * others * local)
    found = moved(part, rows=1.0, others=model.num_attention_heads / HEADS, state=hidden)
    if moe and candidate.ep > 1 and candidate.dispatch != "deepep":
        # Counted with a copy for each of the chosen experts.
        rows = expected_shares(model, shares=candidate.ep) / TOPK * imbalance
        phase = part.replace("attend", "exchange by node" if candidate.two_hops else "exchange")
        found += moved(phase, rows=rows, others=1.0, state=1.0)
    return found


# ---- exchange


# Of the choices that are drawn: the mean of nodes or ranks is then known to 0.3 %.
_DRAWN, _SEED = 1000, 0


@functools.cache
def _choices(model: ModelConfig) -> list[list[int]]:
    """Experts of drawn tokens by the router's rule (§2.1.2), groups by their two best, on independent scores."""
    generator, size = random.Random(_SEED), model.experts_per_group
    found = []
    for _ in range(_DRAWN):
        scores = [generator.random() for _ in range(model.n_routed_experts)]
        groups = range(model.n_group)
        best = [sum(sorted(scores[group * size : (group + 1) * size])[-2:]) for group in groups]
        chosen = sorted(groups, key=best.__getitem__)[-model.topk_group :]
        experts = [expert for group in chosen for expert in range(group * size, (group + 1) * size)]
        found.append(sorted(experts, key=scores.__getitem__)[-model.num_experts_per_tok :])
    return found


@functools.cache
def expected_shares(model: ModelConfig, *, shares: int) -> float:
    """How many of so many equal shares of the experts a token goes to: V3 on 64 ranks 7.49, on their 8 nodes 3.95.

    The router spreads a token more evenly than a choice of groups by chance (`traffic.expected_destinations`).
    """
    local = model.n_routed_experts // shares
    return sum(len({expert // local for expert in chosen}) for chosen in _choices(model)) / _DRAWN


def exchange_s(setup: Setup) -> tuple[float, float]:
    """Seconds of one dispatch and of one combine on idle links; backward has the same two, in the other order.

    "direct" sends a copy to each rank, over NVLink and InfiniBand side by side, at NCCL's effective rate. "node" sends
    one to each node at that rate, and then from there to each rank over NVLink. "deepep" does both at once, at its
    published rates, which count each node once, a token's own too.
    """
    model, candidate, the = setup.model, setup.candidate, setup.machine
    if candidate.ep == 1:
        return 0.0, 0.0
    ep, per_node = candidate.ep, candidate.ranks_per_node
    sizes = (
        dispatch_bytes(model.hidden_size, precision=candidate.precision),
        hidden_bytes(model.hidden_size, precision=candidate.precision),
    )
    if candidate.two_hops:
        # At each hop a share stays where it is.
        crossing = expected_shares(model, shares=ep // per_node) * (1 - per_node / ep) / the.infiniband_nccl
        passed = expected_shares(model, shares=ep) * (1 - 1 / per_node) / the.nvlink
        seconds = setup.tokens * setup.imbalance * (crossing + passed)
        return seconds * sizes[0], seconds * sizes[1]
    copies = setup.tokens * setup.imbalance * expected_shares(model, shares=ep)
    if candidate.dispatch != "deepep":
        # Of the copies that the group's ranks get, those of this node's ranks.
        inside = min(1.0, per_node / ep)
        a_byte = max((1 - inside) / the.infiniband_nccl, inside / the.nvlink)
        return copies * sizes[0] * a_byte, copies * sizes[1] * a_byte
    known = min((8, 16, 32, 64), key=lambda ranks: abs(math.log2(ranks / ep)))
    rates = [rate * 1e9 for rate in the.tables.values(f"DeepEP {known}")]
    if ep > per_node:
        copies = setup.tokens * setup.imbalance * expected_shares(model, shares=ep // per_node)
    else:
        rates = [rate * the.nvlink / (the.tables.value("NVLink H800") * 1e9) for rate in rates]
    return copies * sizes[0] / rates[0], copies * sizes[1] / rates[1]


# ---- phases of layers, heads and stages


class LayerPhases(NamedTuple):
    """Seconds of a layer's phases; `dispatch` and `combine` are those of forward, which backward runs in reverse."""

    attend: Passes
    experts: Passes
    dispatch: float
    combine: float

    def forward(self) -> list[Phase]:
        """In order."""
        if not self.dispatch:
            return [Phase("attend", self.attend.forward), Phase("experts", self.experts.forward)]
        return [
            Phase("attend", self.attend.forward), Phase("dispatch", self.dispatch),
            Phase("experts", self.experts.forward), Phase("combine", self.combine),
        ]  # fmt: skip

    def backward(self) -> list[Phase]:
        """In order; the gradient of what was combined is dispatched, and that of what was dispatched combined."""
        experts = Phase("experts", self.experts.backward, self.experts.weights)
        attend = Phase("attend", self.attend.backward, self.attend.weights)
        if not self.dispatch:
            return [experts, attend]
        return [Phase("combine", self.dispatch), experts, Phase("dispatch", self.combine), attend]


def layer_phases(setup: Setup, *, moe: bool, beside_exchange: bool) -> LayerPhases:
    """A layer and one micro-batch, alone or in an overlapped pair."""
    share = setup.sms_share(beside_exchange=beside_exchange)
    parts = layer_parts(setup, moe=moe, beside_exchange=beside_exchange)
    seconds = {
        name: (part.products + part.router + part.attention) / share + part.memory for name, part in parts.items()
    }
    attend, experts = (
        Passes(*(seconds[f"{name} {way}"] for way in ("forward", "backward", "weights")))
        for name in ("attend", "experts")
    )
    return LayerPhases(attend, experts, *(exchange_s(setup) if moe else (0.0, 0.0)))


def head_passes(setup: Setup, *, beside_exchange: bool) -> Passes:
    """The BF16 head and its cross-entropy, which reads a chunk's logits and writes their gradient."""
    model, the = setup.model, setup.machine
    head = _bf16_passes(setup, model.vocab_size, model.hidden_size, beside_exchange=beside_exchange)
    rate = the.memory_under_exchange if beside_exchange else the.memory
    logits = 2 * setup.tokens * model.vocab_size * BF16_BYTES / rate
    if setup.implementation.head == "in forward":
        return Passes(sum(head) + logits, 0.0, 0.0)
    return Passes(head.forward + logits / 2, head.backward + logits / 2, head.weights)


def projection_passes(setup: Setup, *, beside_exchange: bool) -> Passes:
    """An MTP depth's own projection of two hidden states to one, in BF16 (§2.2)."""
    hidden = setup.model.hidden_size
    return _bf16_passes(setup, hidden, 2 * hidden, beside_exchange=beside_exchange)


def _bf16_passes(setup: Setup, rows: int, cols: int, *, beside_exchange: bool) -> Passes:
    alone = passes(setup, Weight("bf16", rows, cols, uses=1), column="bf16")
    share = setup.sms_share(beside_exchange=beside_exchange)
    return Passes(*(seconds / share for seconds in alone))


class StageCosts:
    """Seconds of the steps of a candidate's stages (`orders.py`), for `timeline.simulate`."""

    def __init__(self, setup: Setup) -> None:
        candidate = setup.candidate
        self.setup, self.stages = setup, num_stages(candidate.schedule, candidate.pp, candidate.chunks)
        self._known: dict[tuple[tuple[str, int], ...], float] = {}
        # Of stages that hold the same the first.
        held = [self.held((stage,)) for stage in range(self.stages)]
        self._sample = [held.index(each) for each in held]
        self._layers = functools.cache(functools.partial(layer_phases, setup))

    def layer_ids(self, stage: int) -> range:
        """Main layers of a stage; the copies of bidirectional schedules are numbered on."""
        counts = self.setup.candidate.stage_layers[: self.stages]
        first = sum(counts[: stage % self.stages])
        return range(first, first + counts[stage % self.stages])

    def held(self, stages: Sequence[int]) -> Held:
        """What a rank with these stages holds; layers of a kind go under one id, so that equal ranks compare equal."""
        model, last_id = self.setup.model, self.setup.model.num_hidden_layers - 1
        last = any(stage % self.stages == self.stages - 1 for stage in stages)
        first = any(stage % self.stages == 0 for stage in stages)
        layers = (layer_id for stage in stages for layer_id in self.layer_ids(stage))
        ids = sorted(last_id if model.is_moe(layer_id) else 0 for layer_id in layers)
        mtp = tuple(model.mtp_layer_ids) if last else ()
        return Held((*ids, *mtp), embedding=first or bool(mtp), head=last)

    def phases(self, kind: str, stage: int, *, beside_exchange: bool) -> list[Phase]:
        """Of a forward chunk ("F") or of a backward one, in order."""
        model, forward = self.setup.model, kind == "F"

        def block(layer_id: int) -> list[Phase]:
            layer = self._layers(moe=model.is_moe(layer_id), beside_exchange=beside_exchange)
            return layer.forward() if forward else layer.backward()

        blocks = [block(layer_id) for layer_id in self.layer_ids(stage)]
        if stage % self.stages == self.stages - 1:
            head = _phase("head", head_passes(self.setup, beside_exchange=beside_exchange), forward=forward)
            passes = projection_passes(self.setup, beside_exchange=beside_exchange)
            projection = _phase("projection", passes, forward=forward)
            blocks.append([head])
            for layer_id in model.mtp_layer_ids:
                blocks += [[projection], block(layer_id), [head]]
        return [phase for block in (blocks if forward else blocks[::-1]) for phase in block]

    def time(self, step: Step) -> float:
        """Seconds of one action, or of a forward and a whole backward chunk together."""
        key = tuple((action.kind, self._sample[action.stage % self.stages]) for action in step)
        if key not in self._known:
            self._known[key] = self._time(key)
        return self._known[key]

    def _time(self, step: tuple[tuple[str, int], ...]) -> float:
        overlap = len(step) == 2 and self.setup.candidate.overlap
        chunks = [(kind, self.phases(kind, stage, beside_exchange=overlap)) for kind, stage in step]
        if not overlap:
            return sum(in_line(kind, chunk) for kind, chunk in chunks)
        (_, forward), (_, backward) = sorted(chunks, key=lambda chunk: chunk[0] != "F")
        return overlapped(forward, backward).seconds

    def bound_s(self) -> float:
        """Products and attention alone, of one micro-batch on all stages: what nothing else can go below."""
        parts = functools.cache(functools.partial(layer_parts, self.setup, beside_exchange=False))
        model = self.setup.model
        layers = sum(
            part.products + part.attention
            for layer_id in (*model.layer_ids, *model.mtp_layer_ids)
            for part in parts(moe=model.is_moe(layer_id)).values()
        )
        depths = model.num_nextn_predict_layers
        heads = sum(_bf16_passes(self.setup, model.vocab_size, model.hidden_size, beside_exchange=False))
        return layers + (1 + depths) * heads + depths * sum(projection_passes(self.setup, beside_exchange=False))


def _phase(name: str, passes: Passes, *, forward: bool) -> Phase:
    return Phase(name, passes.forward) if forward else Phase(name, passes.backward, passes.weights)


def p2p_s(setup: Setup) -> float:
    """A hidden state, or its gradient, to a neighbour, on another node if there is one."""
    alone = setup.candidate.world <= setup.candidate.ranks_per_node
    rate = setup.machine.nvlink if alone else setup.machine.infiniband
    return setup.tokens * setup.model.hidden_size * BF16_BYTES / rate
