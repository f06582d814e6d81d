"""A plan document of realistic size and figures, for tests of what is drawn from it: DualPipeV, 16 ranks x 120.

The timeline is simulated with made-up seconds, and every other figure is made up in the neighbourhood of DeepSeek-V3's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

from train.studies.plan.orders import Step, orders
from train.studies.plan.timeline import Timeline, link, seconds_by_class, simulate

GB = 1e9
SECONDS = {"F": 0.022, "I": 0.026, "W": 0.018, "B": 0.044}
PAIR_S = 0.061
BIAS = 1.24
COMPONENTS = {
    "weights": 3.3, "fp8_copies": 3.3, "gradients": 6.6, "masters": 1.0, "moments": 1.0, "activations": 40.0,
    "messages": 0.9, "temporaries": 2.5, "dispatch": 1.6, "in_flight": 0.0, "reserved": 4.0,
}  # fmt: skip
SCHEDULES = ("DualPipeV", "ZBVZeroBubble", "1F1B", "Interleaved1F1B")
LOADS = {"run": "runs/before", "first_step": 901, "last_step": 1000, "in_time": 1.3, "in_memory": 1.1}


def simulated(ranks: int, micro_batches: int) -> Timeline:
    """The last stage has heads and MTP in place of a layer, the first one a dense layer."""

    def time(_: int, step: Step) -> float:
        factor = {0: 0.8, 2 * ranks - 1: 1.1}.get(step[0].stage, 1.0)
        return factor * (PAIR_S if len(step) == 2 else SECONDS[step[0].kind])

    return simulate(link(orders("DualPipeV", ranks, 2, micro_batches), 2 * ranks), time=time)


def totals(gpu_hours_per_trillion: float, whole_run: float) -> dict[str, float]:
    hours = whole_run / 0.97
    return {
        "gpu_hours_per_trillion": gpu_hours_per_trillion, "gpu_hours": hours, "days": hours / 2048 / 24,
        "dollars": 2 * hours,
    }  # fmt: skip


def memory(ranks: int) -> dict[str, Any]:
    rows = []
    for rank in range(ranks):
        components = {name: size * GB for name, size in COMPONENTS.items()}
        components["activations"] *= 1.12 - 0.012 * rank
        if rank == 0:
            components |= {name: components[name] * 1.25 for name in ("weights", "gradients", "temporaries")}
        ends = "embedding, layers 0-1; stage 31: head and MTP" if rank == 0 else f"layers {rank + 1}; {60 - rank}"
        rows.append({
            "pp_rank": rank, "rank": 128 * rank, "holds": f"stage {rank}: {ends}", "components": components,
            "total_bytes": sum(components.values()),
        })  # fmt: skip
    fullest = max(row["total_bytes"] for row in rows)
    imbalance = [
        {"imbalance": x, "fullest_bytes": fullest + (x - 1) * 14 * GB, "fullest_rank": 0, "step_s": 16 + 1.3 * x}
        for x in (1.0, 1.2, 1.5, 2.0)
    ]  # fmt: skip
    return {"ranks": rows, "imbalance": imbalance, "breaks_at": 1 + (80 * GB - fullest) / (14 * GB)}


def found() -> list[dict[str, Any]]:
    """Layouts of a search, in no order."""
    chance, rows = random.Random(1), []
    for pp, ep, schedule, recompute, dispatch in itertools.product(
        (4, 8, 16, 32), (8, 16, 32, 64), SCHEDULES, (True, False), ("direct", "node")
    ):
        overlap = schedule == "DualPipeV"
        cost = 150e3 * chance.uniform(1.0, 1.1) * (1 if overlap else 1.15) * (1 if dispatch == "node" else 1.25)
        cost *= 1 + 0.3 * abs(pp - 16) / 16 + 0.1 * (64 - ep) / 64 - 0.03 * (not recompute)
        size = (30 + 640 / pp + 260 / ep + (0 if recompute else 14) + (6 if overlap else 0)) * chance.uniform(
            0.97, 1.03
        )
        rows.append({
            "pp": pp, "ep": ep, "dp": 2048 // pp, "schedule": schedule, "chunks": 1 if schedule == "1F1B" else 2,
            "micro_batch_sequences": 1, "recompute": recompute, "dispatch": dispatch, "overlap": overlap,
            "step_s": cost / 9050, "modelled": cost, "corrected": BIAS * cost, "memory_bytes": size * GB,
            "bubble": chance.uniform(0.05, 0.25), "fits": size <= 80,
            "runs_today": not overlap and dispatch == "direct",
        })  # fmt: skip
    return rows


def changes() -> list[dict[str, Any]]:
    rows = [
        ("as configured: ZBV, today's kernels", 31.7, 286e3, 0.09),
        ("+ tokens cross InfiniBand once a node", 24.1, 218e3, 0.09),
    ]
    rows += [("+ overlap (DualPipeV)", 21.6, 195e3, 0.23), ("+ layers split by time", 19.0, 172e3, 0.09)]
    rows += [("+ fusions", 17.5, 158e3, 0.10), ("+ kernels at DeepGEMM's speed", 16.8, 152e3, 0.13)]
    return [{"what": w, "step_s": s, "modelled": m, "corrected": BIAS * m, "bubble": b} for w, s, m, b in rows]


def cost() -> dict[str, Any]:
    held = [("Megatron-Bridge BF16, 1,024 H100", 1061, 1220), ("Megatron-Bridge FP8, 1,024 H100", 1297, 1517)]
    held.append(("Automodel BF16, 256 H100", 1002, 1152))
    parts = [
        ("batch ramp", 0.469e12, 220e3),
        ("full batch, 4K", 14.331e12, 152e3),
        ("context extension to 128K", 0.1e12, 410e3),
    ]
    hours = sum(tokens / 1e12 * per_trillion for _, tokens, per_trillion in parts)
    return {
        "modelled": totals(152e3, hours), "corrected": totals(BIAS * 152e3, BIAS * hours), "bias": BIAS,
        "bias_source": "DeepSeek's published step of 19.93 s over the model's 16.06 s", "dollars_per_gpu_hour": 2.0,
        "held_out": [
            {"name": n, "published": p, "modelled": m, "error": m / p - 1, "source": "published tokens/s/GPU"}
            for n, p, m in held
        ],
        "parts": [
            {"what": w, "tokens": t, "modelled_gpu_hours": t / 1e12 * c, "corrected_gpu_hours": t / 1e12 * c * BIAS}
            for w, t, c in parts
        ],
        "effective_training_time": 0.97,
    }  # fmt: skip


def sources() -> list[dict[str, Any]]:
    rows = [("GEMM 4096 x 7168 x 2048, grouped", 1.39, "PFLOP/s", "measured", "bench of one H100", "2026-11-23")]
    rows += [("InfiniBand a GPU", 45.0, "GB/s", "published", "DeepEP, README", "2025-03-05")]
    rows += [("router GEMM, FP32", 50.0, "TFLOP/s", "modelled", "no measurement: half of the FP32 peak", "2026-11-30")]
    rows += [("bytes of a MoE layer, forward", 7.9, "GB", "counted", "ledger of the code that runs", "2026-11-30")]
    rows += [("attention, forward, 4096 tokens", 1.24, "ms", "published", "DeepSeek's profile, H800", "2025-02-27")]
    return [dict(zip(("what", "value", "unit", "label", "source", "date"), row, strict=True)) for row in rows]


def plan_document(ranks: int = 16, micro_batches: int = 120) -> dict[str, Any]:
    """A whole document; its values are new objects each time."""
    timeline = simulated(ranks, micro_batches)
    step_s = timeline.step_s
    spans = [[[start, end, [list(action) for action in step]] for start, end, step in ran] for ran in timeline.spans]
    phases = seconds_by_class(timeline) | {"update": 0.28}
    rows = found()
    layout = {
        "pp": ranks,
        "dp": 128,
        "ep": 64,
        "schedule": "DualPipeV",
        "chunks": 2,
        "dispatch": "node",
        "overlap": True,
    }
    layout |= {"stage_layers": [1, *[2] * (2 * ranks - 2), 0], "precision": "fp8", "recompute": True, "zero": True}
    return {
        "version": 1, "date": "2026-11-30", "name": "h800_2048",
        "run": {
            "world": 2048, "sequence_length": 4096, "batch_sequences": 15360, "micro_batches": micro_batches,
            "precision": "fp8", "parameters": {"total": 671e9, "activated": 37e9},
        },
        "gpu": {"name": "H800", "memory_bytes": 80 * GB, "reserved_bytes": 4 * GB},
        "candidate": layout | {"micro_batch_sequences": 1, "comm_sms": 20, "max_waiting_wgrads": None},
        "runs_today": False, "why_not": "layout.schedule=DualPipeV is no schedule of this trainer yet",
        "words": [
            "DualPipeV on 16 pipeline ranks with 64 expert ranks costs least: 152 K modelled, 188 K corrected.",
            "The runner-up, the same with 32 expert ranks, is 2 % dearer and leaves 4.2 GB less.",
            "Above twice today's InfiniBand rate ZBV without overlap would win: it keeps all 132 SMs.",
            "At an imbalance of 1.5 the order stays; memory runs out first.",
        ],
        "step": {
            "time_s": step_s + 0.28, "tokens_per_s": 15360 * 4096 / (step_s + 0.28), "tflop_per_s": 452.0,
            "tokens_per_s_per_gpu": 15360 * 4096 / (step_s + 0.28) / 2048, "phases_s": phases,
        },
        "memory": memory(ranks), "loads": [LOADS], "cost": cost(), "changes": changes(),
        "bound": {"what": "GEMMs and attention alone", "modelled": 87e3},
        "search": {"tried": len(rows), "fit": sum(row["fits"] for row in rows), "seconds": 4.1, "rows": rows},
        "timeline": {"step_s": step_s, "ranks": spans}, "sources": sources(),
    }  # fmt: skip


# ---- what a run is compared with: round numbers

BY_HAND = {
    "weights": 1000, "fp8_copies": 500, "gradients": 2000, "masters": 1600, "moments": 1200, "activations": 700,
    "messages": 100, "temporaries": 150, "dispatch": 50, "reserved": 400,
}  # fmt: skip


def plan_by_hand(run: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A step of 2 s: 1.5 s of chunks, 0.3 s of bubble, 0.2 s of update; in the ramp one of half the batch, 1.25 s."""
    phases = {"1F": 0.25, "1B": 0.5, "1W": 0.25, "1F1B": 0.5, "bubble": 0.3, "update": 0.2}
    early = phases | {"1F1B": 0.0, "bubble": 0.05}
    return {
        "version": 1,
        "date": "2026-11-30",
        "name": "by hand",
        "run": dict(run),
        # A run of one rank does not say what it has no use for.
        "candidate": {"schedule": "1F1B", "comm_sms": 20, **candidate},
        "step": {"time_s": 2.0, "phases_s": phases},
        "ramp": [{"batch_sequences": run["batch_sequences"] // 2, "time_s": 1.25, "phases_s": early}],
        "loads": [],
        "memory": {"ranks": [{"pp_rank": 0, "rank": 0, "components": BY_HAND, "total_bytes": sum(BY_HAND.values())}]},
    }
