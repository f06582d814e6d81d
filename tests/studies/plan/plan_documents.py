"""A plan document of realistic size and figures, for tests of what is drawn from it: DualPipeV, 16 ranks x 120.

The timeline is a simulation: a step of a rank starts once its inputs are there, one action or an overlapped pair at a
time. Every other figure is made up, in the neighbourhood of DeepSeek-V3's.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict, deque
from typing import Any

Action = tuple[str, int, int]
GB = 1e9
SECONDS = {"F": 0.022, "I": 0.026, "W": 0.018, "B": 0.044}
PAIR_S = 0.061
BIAS = 1.24
COMPONENTS = {
    "weights": 3.3, "fp8_copies": 3.3, "gradients": 6.6, "masters": 1.0, "moments": 1.0, "activations": 40.0,
    "messages": 0.9, "temporaries": 2.5, "dispatch": 1.6, "reserved": 4.0,
}  # fmt: skip
SCHEDULES = ("DualPipeV", "ZBVZeroBubble", "1F1B", "Interleaved1F1B")


def order(rank: int, ranks: int, micro_batches: int) -> list[tuple[Action, ...]]:
    """DualPipeV on one rank, with a stage on the way out (0) and one on the way back (1)."""
    behind, main = ranks - rank - 1, ["F0 B1", "F1 B0"] * (micro_batches - 2 * ranks + rank + 1)
    script = ["F0"] * (2 * behind) + ["F0", "F1"] * (rank + 1) + ["I1", "W", "F1"] * behind
    script += (main if behind else ["F0", "B1", *main[1:]]) + ["B1", "F1 B0"] * behind
    script += [("B" if k <= rank else "I") + "10"[k % 2] for k in range(2 * rank + 2)]
    script += ["W", "I0"] * behind + ["W"] * (rank + 1)
    waiting: deque[Action] = deque()
    seen: dict[str, int] = defaultdict(int)
    steps = []
    for step in script:
        actions = []
        for kind, *way in step.split():
            if kind == "W":
                actions.append(waiting.popleft())
                continue
            counted = ("F" if kind == "F" else "B") + way[0]
            actions.append((kind, rank if way == ["0"] else 2 * ranks - 1 - rank, seen[counted]))
            seen[counted] += 1
            if kind == "I":
                waiting.append(("W", *actions[-1][1:]))
        steps.append(tuple(actions))
    assert not waiting
    return steps


def needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    kind, stage, index = action
    if kind == "F":
        return [("F", stage - 1, index)] if stage else []
    if kind == "W":
        return [("B", stage, index)]
    return [("F", stage, index)] + ([("B", stage + 1, index)] if stage < last else [])


def simulate(ranks: int, micro_batches: int) -> list[list[list[Any]]]:
    """Spans of each rank: start, end, actions."""
    todo = [deque(order(rank, ranks, micro_batches)) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}
    free, spans = [0.0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    while any(todo):
        moved = False
        for rank, queue in enumerate(todo):
            while queue and all(need in done for action in queue[0] for need in needs(action, 2 * ranks - 1)):
                actions = queue.popleft()
                start = max([free[rank], *(done[n] for action in actions for n in needs(action, 2 * ranks - 1))])
                # The last stage has heads and MTP in place of a layer, the first one a dense layer.
                factor = {0: 0.8, 2 * ranks - 1: 1.1}.get(actions[0][1], 1.0)
                free[rank] = start + factor * (PAIR_S if len(actions) == 2 else SECONDS[actions[0][0]])
                for kind, stage, index in actions:
                    done[("B" if kind in "BI" else kind, stage, index)] = free[rank]
                spans[rank].append([start, free[rank], [list(action) for action in actions]])
                moved = True
        assert moved, "deadlock"
    return spans


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
    spans = simulate(ranks, micro_batches)
    step_s = max(row[-1][1] for row in spans)
    phases: dict[str, float] = {"1F": 0.0, "1B": 0.0, "1W": 0.0, "1F1B": 0.0}
    for start, end, actions in itertools.chain(*spans):
        name = "1F1B" if len(actions) == 2 else {"F": "1F", "W": "1W"}.get(actions[0][0], "1B")
        phases[name] += (end - start) / ranks
    phases |= {"bubble": step_s - sum(phases.values()), "update": 0.28}
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
        "memory": memory(ranks), "cost": cost(), "changes": changes(),
        "bound": {"what": "GEMMs and attention alone", "modelled": 87e3},
        "search": {"tried": len(rows), "fit": sum(row["fits"] for row in rows), "seconds": 4.1, "rows": rows},
        "timeline": {"step_s": step_s, "ranks": spans}, "sources": sources(),
    }  # fmt: skip
