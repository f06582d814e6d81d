"""The plan of a configuration as one JSON document, which `page.py` shows and to which `judged.py` holds a run.

    as configured    memory of every pipeline rank, a simulated step, cost of the whole run
    changes          the same step with one crossing per node, overlap, another split, other kernels: together and alone
    search           layouts that fit, within what the trainer runs today and beyond

Costs are always two: as modelled, and times DeepSeek's published step over the modelled one, beside the errors on
trainers that no input was chosen for.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from train.model.sizes import Held, flops_per_token, weights
from train.studies.plan import judge, recipe
from train.studies.plan.candidate import Candidate, Dispatch, candidate_of, run_of
from train.studies.plan.costs import StageCosts, layer_parts
from train.studies.plan.footprint import IMBALANCES, Footprint, breaking_imbalance, footprint
from train.studies.plan.loads import ExpertLoads, in_memory, in_time
from train.studies.plan.moments import Moment, moments_of
from train.studies.plan.orders import refusal, stages_of_rank
from train.studies.plan.predict import Prediction, predict
from train.studies.plan.products import Implementation, Machine, Setup, mean_octaves
from train.studies.plan.search import (
    ALL,
    TODAY,
    Found,
    Scope,
    crosses,
    flips,
    runs_today,
    search,
    setup_for,
    split_by_time,
)
from train.studies.plan.tables import Figure
from train.studies.plan.timeline import seconds_by_class
from train.studies.plan.words import words

if TYPE_CHECKING:
    from train.config import PretrainConfig
    from train.model.config import ModelConfig
    from train.studies.plan.judged import Correction

VERSION = 1
# What the layers of today are made of, and what they were before they were fused.
OURS = Implementation("as written")
BEFORE = Implementation("before the fusions", memory="before fusions", router="fp32", head="apart")
# Layouts that the document lists at least, and those of which the best are asked under other links and kernels.
LISTED, ASKED = 200, 12
FASTER_EXCHANGES: dict[Dispatch, str] = {
    "node": "+ one crossing of InfiniBand per node, in two hops",
    "deepep": "+ both hops at once, at DeepEP's rates",
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted beside the configuration.

    Args:
        memory_bytes: of a GPU, of which `footprint.RESERVED_BYTES` are not ours.
        v3: the model of the published runs that the planner is held against.
        correction: of a run on such a GPU, if one was calibrated.
        loads: of experts, if a run has shown how uneven they are; None: even.
    """

    machine: Machine
    memory_bytes: float
    dollars_per_gpu_hour: float
    v3: ModelConfig
    correction: Correction | None = None
    loads: ExpertLoads | None = None


class Planner:
    """Answers for one configuration on one machine; figures that several parts of the document need are kept."""

    def __init__(self, config: PretrainConfig, assumed: Assumptions) -> None:
        self.config, self.assumed = config, assumed
        self.candidate = candidate_of(config)
        # cuDNN's attention is not deterministic and takes no documents (`kernels/attention.py`).
        attention: Literal["flash", "cudnn"] = (
            "flash" if config.run.deterministic or config.data.mask_documents else "cudnn"
        )
        imbalance = assumed.loads or 1.0
        self.ours, self.before = (replace(how, attention=attention, imbalance=imbalance) for how in (OURS, BEFORE))
        self.tokens = config.schedule.batch_full_sequences * config.data.sequence_length
        self.predicted = functools.cache(self._predicted)
        self._fullest_bytes = functools.cache(self._closed_form_bytes)

    def setup(self, candidate: Candidate, implementation: Implementation | None = None) -> Setup:
        """What decides the time of a layout."""
        return setup_for(self.config, implementation or self.ours, self.assumed.machine, candidate)

    def micro_batches(self, candidate: Candidate, batch: int | None = None) -> int:
        """Of one pipeline and step of so many sequences; None: of the full batch."""
        batch = self.config.schedule.batch_full_sequences if batch is None else batch
        return batch // candidate.dp // candidate.micro_batch_sequences

    def _predicted(self, candidate: Candidate, implementation: Implementation | None = None) -> Prediction:
        return predict(self.setup(candidate, implementation), micro_batches=self.micro_batches(candidate))

    def hours(self, step_s: float) -> float:
        """GPU-hours per trillion tokens of a step of the full batch, as modelled."""
        return recipe.gpu_hours_per_trillion(step_s, world=self.candidate.world, tokens=self.tokens)

    @functools.cached_property
    def residuals(self) -> dict[str, judge.Residual]:
        """DeepSeek's published step against the one that is modelled for it, by class."""
        return {
            each.what: each
            for each in judge.step_of_deepseek(judge.deepseek(self.assumed.v3, judge.BENCH, judge.FASTEST))
        }

    @property
    def bias(self) -> float:
        """Published over modelled seconds of DeepSeek's own step."""
        step = self.residuals["step"]
        return step.published / step.modelled

    # ---- memory

    def moments(self, candidate: Candidate) -> Sequence[Sequence[Moment]]:
        """What each pipeline rank holds during a step of the full batch, or of the ramp before it."""
        first = self.micro_batches(candidate, self.config.schedule.batch_start_sequences)
        return moments_of(candidate, self.micro_batches(candidate), at_first=first)

    def footprints(self, candidate: Candidate, imbalance: float | None = None) -> list[Footprint]:
        """Of every pipeline rank; with no imbalance given, that of the loads."""
        if imbalance is None:
            imbalance = in_memory(self.assumed.loads, candidate.ep) if self.assumed.loads else 1.0
        return footprint(self.config, candidate, self.moments(candidate), imbalance=imbalance)

    def fullest_bytes(self, candidate: Candidate) -> float:
        """Of the fullest rank; DeepEP's buffers are taken as those of one hop."""
        kept = candidate.two_hops or candidate.dispatch == "deepep"
        return self._fullest_bytes(candidate if kept else replace(candidate, dispatch="direct"))

    def _closed_form_bytes(self, candidate: Candidate) -> float:
        return max(each.total for each in self.footprints(candidate))

    # ---- search

    def search(self, scope: Scope) -> list[Found]:
        """All layouts of a scope, best first."""
        return search(
            self.config, scope, implementation=self.ours, machine=self.assumed.machine, memory_of=self.fullest_bytes,
            limit_bytes=self.assumed.memory_bytes,
        )  # fmt: skip


def plan(config: PretrainConfig, assumed: Assumptions, *, date: str) -> dict[str, Any]:
    """The whole document.

    Raises:
        ValueError: a precision of which no speed is known, or layers that run again.
    """
    if config.run.recompute == "layers":
        raise ValueError(
            "run.recompute=layers: its time is not modelled; plan with true, or ask dry_run=true for memory"
        )
    if config.precision.name not in ("bf16", "fp8"):
        raise ValueError(
            f"precision={config.precision.name}: speeds of bf16 and fp8 are known; plan with precision=fp8"
        )
    planner = Planner(config, assumed)
    predicted = planner.predicted(planner.candidate)
    document: dict[str, Any] = {
        "version": VERSION,
        "date": date,
        "name": config.run.name,
        "run": {
            **run_of(config),
            "micro_batches": planner.micro_batches(planner.candidate),
            "total_tokens": config.schedule.total_tokens,
        },
        "gpu": {"name": assumed.machine.name, "memory_bytes": assumed.memory_bytes},
        "candidate": asdict(planner.candidate),
        "runs_today": True,
        "why_not": None,
        "step": _step(planner, predicted),
        "ramp": _ramp(planner),
        "memory": _memory(planner),
        "loads": _loads(planner),
        "cost": _cost(planner),
        "changes": _changes(planner),
        "bound": _bound(planner),
    }
    document["gpu"]["reserved_bytes"] = document["memory"]["ranks"][0]["components"]["reserved"]
    document["search"], document["flips"] = _search(planner)
    document["timeline"] = _timeline(predicted)
    document["sources"] = [_source(row) for row in assumed.machine.tables.rows.values()]
    document["words"] = words(document)
    return document


def _source(row: Figure) -> dict[str, Any]:
    value = row.value
    return asdict(row) | {"value": ", ".join(f"{each:g}" for each in value) if isinstance(value, tuple) else value}


def _step(planner: Planner, predicted: Prediction) -> dict[str, Any]:
    config, world, step_s = planner.config, planner.candidate.world, predicted.step_s
    held = Held((*config.model.layer_ids, *config.model.mtp_layer_ids), embedding=True, head=True)
    table = weights(config.model, held, ep=1)
    flops = sum(flops_per_token(config.model, table, held, sequence_length=config.data.sequence_length).values())
    return {
        "time_s": step_s,
        "tokens_per_s": planner.tokens / step_s,
        "tokens_per_s_per_gpu": planner.tokens / step_s / world,
        "tflop_per_s": flops * planner.tokens / step_s / world / 1e12,
        "bubble": predicted.bubble,
        "octaves": mean_octaves(planner.setup(planner.candidate)),
        "phases_s": _phases(predicted),
        "update_s": dict(predicted.update_s),
    }


def _ramp(planner: Planner) -> list[dict[str, Any]]:
    """The first step, whose batch is the smallest: what a run is held to after ten steps."""
    batch = planner.config.schedule.batch_start_sequences
    setup = planner.setup(planner.candidate)
    first = predict(setup, micro_batches=planner.micro_batches(planner.candidate, batch))
    return [{"batch_sequences": batch, "time_s": first.step_s, "phases_s": _phases(first)}]


def _phases(predicted: Prediction) -> dict[str, float]:
    return {**seconds_by_class(predicted.timeline), "update": sum(predicted.update_s.values())}


def _memory(planner: Planner) -> dict[str, Any]:
    candidate, limit = planner.candidate, planner.assumed.memory_bytes
    costs = StageCosts(planner.setup(candidate))
    stages_of = functools.partial(stages_of_rank, candidate.schedule, candidate.pp, candidate.chunks)
    ranks = [
        {
            "pp_rank": pp_rank,
            "rank": pp_rank * candidate.dp,
            "holds": "; ".join(_holds(costs, stage) for stage in stages_of(pp_rank)),
            "components": asdict(found),
            "total_bytes": found.total,
        }
        for pp_rank, found in enumerate(planner.footprints(candidate))
    ]
    imbalance = []
    for each in IMBALANCES:
        totals = [found.total for found in planner.footprints(candidate, each)]
        step = planner.predicted(candidate, replace(planner.ours, imbalance=each))
        fullest = totals.index(max(totals))
        imbalance.append(
            {"imbalance": each, "fullest_bytes": max(totals), "fullest_rank": fullest, "step_s": step.step_s}
        )
    breaks_at = breaking_imbalance(
        planner.config,
        candidate,
        lambda each: max(found.total for found in planner.footprints(candidate, each)),
        limit=limit,
    )
    return {"ranks": ranks, "imbalance": imbalance, "breaks_at": breaks_at}


def _loads(planner: Planner) -> list[dict[str, Any]]:
    """The loads that all figures stand on, if they are a run's."""
    loads, ep = planner.assumed.loads, planner.candidate.ep
    if loads is None:
        return []
    steps = {"first_step": loads.first_step, "last_step": loads.last_step}
    return [{"run": loads.run, **steps, "in_time": in_time(loads, ep), "in_memory": in_memory(loads, ep)}]


def _holds(costs: StageCosts, stage: int) -> str:
    layers = costs.layer_ids(stage)
    parts = [f"layers {layers.start}-{layers.stop - 1}" if len(layers) else "no layer"]
    if stage == 0:
        parts.insert(0, "embedding")
    if stage == costs.stages - 1:
        parts.append("head and MTP" if costs.setup.model.num_nextn_predict_layers else "head")
    return f"stage {stage}: {', '.join(parts)}"


# ---- cost


def _cost(planner: Planner) -> dict[str, Any]:
    config, assumed, candidate = planner.config, planner.assumed, planner.candidate
    tables, world = assumed.machine.tables, candidate.world
    step = planner.predicted(candidate)
    step_of = functools.cache(
        lambda batch: predict(planner.setup(candidate), micro_batches=planner.micro_batches(candidate, batch)).step_s
    )
    length = config.data.sequence_length
    parts = recipe.pretraining(config.schedule, sequence_length=length, world=world, step_s=step_of)
    core = _attention_s(planner) / (candidate.micro_batch_sequences * length)
    parts += recipe.extension(
        config.schedule,
        sequence_length=length,
        gpu_s_per_token=step.step_s * world / planner.tokens,
        attention_gpu_s_per_token=core,
    )
    saved = max(each.masters + each.moments + each.weights for each in planner.footprints(candidate))
    reliability = recipe.Reliability(
        tables.value("failures"), tables.value("restart"), saved / (tables.value("copy to host") * 1e9)
    )
    share = recipe.effective_share(reliability, world=world, save_every_s=config.checkpoint.every_steps * step.step_s)

    def total(factor: float) -> dict[str, float]:
        hours = factor * sum(part.gpu_hours for part in parts) / share
        return {
            "gpu_hours_per_trillion": factor * planner.hours(step.step_s),
            "gpu_hours": hours,
            "days": hours / world / 24,
            "dollars": hours * assumed.dollars_per_gpu_hour,
        }

    return {
        "modelled": total(1.0),
        "corrected": total(planner.bias),
        "calibrated": _calibrated(planner, step.step_s),
        "bias": planner.bias,
        "bias_source": f"DeepSeek's published step, {planner.residuals['step'].published:.2f} s, over the one that is "
        f"modelled for its layout, {planner.residuals['step'].modelled:.2f} s",
        "dollars_per_gpu_hour": assumed.dollars_per_gpu_hour,
        "held_out": [_residual(judge.peer_residual(assumed.v3, peer), tables) for peer in judge.PEERS],
        "parts": [
            {
                "what": part.what,
                "tokens": part.tokens,
                "modelled_gpu_hours": part.gpu_hours,
                "corrected_gpu_hours": planner.bias * part.gpu_hours,
            }
            for part in parts
        ],
        "effective_training_time": share,
    }


def _calibrated(planner: Planner, step_s: float) -> dict[str, Any] | None:
    found = planner.assumed.correction
    if found is None:
        return None
    return {"ratio": found.ratio, "gpu_hours_per_trillion": found.ratio * planner.hours(step_s), "source": str(found)}


def _attention_s(planner: Planner) -> float:
    """Seconds of the attention cores of all layers on one micro-batch."""
    model, setup = planner.config.model, planner.setup(planner.candidate)
    ids = (*model.layer_ids, *model.mtp_layer_ids)
    parts = functools.cache(lambda moe: layer_parts(setup, moe=moe, beside_exchange=False))
    return sum(part.attention for layer_id in ids for part in parts(model.is_moe(layer_id)).values())


def _residual(found: judge.Residual, tables: Any) -> dict[str, Any]:
    return {
        "name": found.what,
        "unit": found.unit,
        "published": found.published,
        "modelled": found.modelled,
        "error": found.error,
        "source": tables.rows[found.what].source,
    }


def split_lines(planner: Planner) -> list[str]:
    """Layers of each stage by simulated time as an override, then what they change.

    Raises:
        ValueError: the layout has one stage.
    """
    now = planner.candidate
    if now.pp == 1:
        raise ValueError(
            "layout.pp=1 has one stage, which nothing can split: plan a pipeline, with layout.pp=2 or more"
        )
    found = replace(now, stage_layers=split_by_time(planner.setup(now), micro_batches=planner.micro_batches(now)))
    lines = [f"layout.stage_layers={str(list(found.stage_layers)).replace(' ', '')}"]
    for what, each in (("with it", found), ("as configured", now)):
        step_s, held_gb = planner.predicted(each).step_s, planner.fullest_bytes(each) / 1e9
        lines.append(f"{what}: a step of {step_s:.2f} s, {held_gb:.1f} GB on the fullest rank, both modelled")
    return lines


# ---- changes, bound, search


def _changes(planner: Planner) -> list[dict[str, Any]]:
    """From before the fusions over the configured run to everything at once; each change also alone on the latter."""
    configured = planner.candidate
    rows = [
        _row(planner, "before the fused kernels", configured, planner.before),
        _row(planner, "as configured", configured, planner.ours),
    ]
    base, now, how = configured, configured, planner.ours
    alone = rows[-1]["modelled"]

    def add(
        what: str, candidate: Candidate, implementation: Implementation, only: tuple[Candidate, Implementation]
    ) -> None:
        row = _row(planner, what, candidate, implementation)
        row["alone"] = planner.hours(planner.predicted(*only).step_s) / alone - 1
        rows.append(row)

    for dispatch, what in FASTER_EXCHANGES.items():
        if dispatch != configured.dispatch and crosses(dispatch, configured.ep, configured.ranks_per_node):
            now = replace(now, dispatch=dispatch)
            add(what, now, how, (replace(base, dispatch=dispatch), planner.ours))
    if now.chunks == 2 and not refusal("DualPipeV", now.pp, 2, planner.micro_batches(now)):
        now = replace(now, schedule="DualPipeV", overlap=True)
        add("+ overlap, DualPipeV", now, how, (replace(base, schedule="DualPipeV", overlap=True), planner.ours))
    if now.pp > 1:
        split = split_by_time(planner.setup(now, how), micro_batches=planner.micro_batches(now))
        own = split_by_time(planner.setup(base), micro_batches=planner.micro_batches(base))
        now = replace(now, stage_layers=split)
        add("+ layers split by time", now, how, (replace(base, stage_layers=own), planner.ours))
    if configured.precision == "fp8":
        how = replace(planner.ours, name="DeepGEMM's products", products="deepgemm")
        add("+ products at DeepGEMM's speed", now, how, (base, how))
    return rows


def _row(planner: Planner, what: str, candidate: Candidate, implementation: Implementation) -> dict[str, Any]:
    predicted = planner.predicted(candidate, implementation)
    hours = planner.hours(predicted.step_s)
    return {
        "what": what,
        "step_s": predicted.step_s,
        "modelled": hours,
        "corrected": planner.bias * hours,
        "bubble": predicted.bubble,
        "memory_bytes": planner.fullest_bytes(candidate),
        "stage_layers": list(candidate.stage_layers),
    }


def _bound(planner: Planner) -> dict[str, Any]:
    candidate = replace(planner.candidate, recompute=False)
    fastest = replace(OURS, products="deepgemm") if candidate.precision == "fp8" else OURS
    seconds = StageCosts(planner.setup(candidate, fastest)).bound_s()
    tokens = candidate.micro_batch_sequences * planner.config.data.sequence_length
    return {
        "what": "products and attention alone, all GPUs busy",
        "modelled": recipe.gpu_hours_per_trillion(seconds, world=1, tokens=tokens),
    }


def _search(planner: Planner) -> tuple[dict[str, Any], dict[str, Any]]:
    began = time.perf_counter()
    today = planner.search(TODAY)
    # What runs today is a part of all, also where other layouts were asked for a better split.
    every = sorted(dict.fromkeys([*today, *planner.search(ALL)]), key=lambda each: each.rank)
    found = {TODAY.name: today, ALL.name: every}
    listed = dict.fromkeys([*every[:LISTED], *today[:ASKED]])
    changed = {
        name: {
            what: candidate and _layout(candidate)
            for what, candidate in flips(
                planner.config, scoped[:ASKED], implementation=planner.ours, machine=planner.assumed.machine
            ).items()
        }
        for name, scoped in found.items()
    }
    rows = []
    for each in sorted(listed, key=lambda each: each.rank):
        modelled = planner.hours(each.step.step_s)
        rows.append(
            {
                **_layout(each.candidate),
                "micro_batches": each.micro_batches,
                "step_s": each.step.step_s,
                "modelled": modelled,
                "corrected": planner.bias * modelled,
                "bubble": each.step.bubble,
                "memory_bytes": each.memory_bytes,
                "fits": each.fits,
                "runs_today": runs_today(each.candidate) is None,
            }
        )
    fit = sum(each.fits for each in every)
    seconds = time.perf_counter() - began
    return {"tried": len(every), "fit": fit, "seconds": seconds, "rows": rows}, changed


def _layout(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "stage_layers": list(candidate.stage_layers)}


def _timeline(predicted: Prediction) -> dict[str, Any]:
    return {
        "step_s": predicted.timeline.step_s,
        "ranks": [
            [[span.start_s, span.end_s, [list(action) for action in span.step]] for span in spans]
            for spans in predicted.timeline.spans
        ],
    }
