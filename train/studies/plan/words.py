"""A plan in sentences and tables for a terminal: what the document's figures mean, and what would change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from train.studies.amounts import amount
from train.studies.plan.judge import Residual

GB = 1e9
EXCHANGES = {"direct": "", "node": ", two hops", "deepep": ", DeepEP's exchange"}


def words(document: Mapping[str, Any]) -> list[str]:
    """Whether it fits, what it costs, which layout is faster and why, one sentence each."""
    return [
        *_loads(document), *_fit(document), _cost(document), *_calibrated(document), *_doubts(document),
        *_winners(document), *_flips(document),
    ]  # fmt: skip


def _loads(document: Mapping[str, Any]) -> list[str]:
    return [
        f"Experts are taken to be as uneven as in {found['run']}, steps {found['first_step']} to {found['last_step']}: "
        f"of layout.ep={document['candidate']['ep']} ranks the fullest has {found['in_time']:.2f} times the mean in a "
        f"layer, {found['in_memory']:.2f} times over all its layers. In a micro-batch they are more uneven than that."
        for found in document["loads"]
    ]


def _fit(document: Mapping[str, Any]) -> list[str]:
    memory, gpu = document["memory"], document["gpu"]
    fullest = max(memory["ranks"], key=lambda row: row["total_bytes"])
    left = (gpu["memory_bytes"] - fullest["total_bytes"]) / GB
    reserve = f"{gpu['reserved_bytes'] / GB:.0f} GB for CUDA and NCCL included"
    fits = f"fits, {left:.1f} GB left" if left >= 0 else f"does not fit: {-left:.1f} GB too much"
    needs = (
        f"The fullest rank, {fullest['rank']} ({fullest['holds']}), needs {fullest['total_bytes'] / GB:.1f} of "
        f"{gpu['memory_bytes'] / GB:.0f} GB on {gpu['name']}, {reserve}: {fits}."
    )
    sentences = [needs]
    # Without the axis every rank has all experts.
    if left >= 0 and document["candidate"]["ep"] > 1:
        breaks = memory["breaks_at"]
        sentences.append(
            "It fits even if the experts of one rank get all tokens of their group."
            if breaks is None
            else f"It no longer fits where the fullest rank's experts get {breaks:.2f} times the mean."
        )
    return sentences


def _cost(document: Mapping[str, Any]) -> str:
    step, cost, run = document["step"], document["cost"], document["run"]
    errors = ", ".join(f"{each['error']:+.0%}" for each in cost["held_out"])
    idle = f" ({step['bubble']:.0%} of the pipeline's time idle)" if document["candidate"]["pp"] > 1 else ""
    return (
        f"A step of {amount(run['batch_sequences'] * run['sequence_length'])} tokens takes {step['time_s']:.3g} s on "
        f"{run['world']:,} GPU{'s' if run['world'] > 1 else ''}{idle}: "
        f"{hours(cost['modelled'])} GPU-hours per trillion tokens as modelled, {hours(cost['corrected'])} corrected by "
        f"x {cost['bias']:.2f}, {cost['bias_source']}; throughputs of trainers that nothing was fitted to come out at "
        f"{errors}."
    )


def hours(cost: Mapping[str, float]) -> str:
    """GPU-hours per trillion tokens."""
    return amount(cost["gpu_hours_per_trillion"])


def _calibrated(document: Mapping[str, Any]) -> list[str]:
    found = document["cost"]["calibrated"]
    return [f"By a run on such a GPU it is {hours(found)} GPU-hours: {found['source']}."] if found else []


def _doubts(document: Mapping[str, Any]) -> list[str]:
    octaves = document["step"]["octaves"]
    if octaves < 1:
        return []
    doubt = (
        f"Its products are {octaves:.1f} doublings of a side away from those whose speed is known, on average: times "
        "are rough, and better for comparing layouts than for predicting one."
    )
    return [doubt]


def short(value: float) -> str:
    """Three digits, and all of a larger number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _against(ratio: float) -> str:
    change = f"{ratio - 1:+.0%}"
    return "as fast as this configuration" if change in ("+0%", "-0%") else f"{change} against this configuration"


def _winners(document: Mapping[str, Any]) -> list[str]:
    rows = [row for row in document["search"]["rows"] if row["fits"]]
    today = [row for row in rows if row["runs_today"]]
    own = document["cost"]["modelled"]["gpu_hours_per_trillion"]
    found = []
    # Where nothing that the trainer lacks is faster, once.
    scopes = (today,) if today and rows[0] == today[0] else (today, rows)
    for name, scoped in zip(document["flips"], scopes, strict=False):
        if not scoped:
            found.append(f"Of {name}, no layout of these GPUs fits.")
            continue
        best, *others = scoped
        other = next((row for row in others if layout(row) != layout(best)), None)
        runner_up = f"; next is {layout(other)}, {other['modelled'] / best['modelled'] - 1:+.1%}" if other else ""
        found.append(
            f"Of {name}, the fastest that fits is {layout(best)}: {amount(best['modelled'])}, "
            f"{_against(best['modelled'] / own)}, {best['memory_bytes'] / GB:.1f} GB"
            f"{runner_up}."
        )
        if scoped is today and best["modelled"] < 0.99 * own:
            found.append(f"To take it: {overrides(best)}")
    return found


def layout(row: Mapping[str, Any]) -> str:
    """A layout in a few words."""
    exchange = EXCHANGES[row["dispatch"]] if row["ep"] > 1 else ""
    chunks = f" x {row['chunks']}" if row["schedule"] == "Interleaved1F1B" else ""
    schedule = f", {row['schedule']}{chunks}" if row["pp"] > 1 else ""
    micro = f", micro-batches of {row['micro_batch_sequences']}" if row["micro_batch_sequences"] > 1 else ""
    precision = "" if row["precision"] == "fp8" else f", {row['precision']}"
    return f"pp {row['pp']} x dp {row['dp']}, ep {row['ep']}{schedule}{exchange}{micro}{precision}{_keeping(row)}"


def _keeping(row: Mapping[str, Any]) -> str:
    kept = [] if row["recompute"] else ["nothing made again"]
    kept += [] if row["keep_bf16_weights"] else ["no BF16 weights"]
    kept += ["attention's output in E5M6"] if row["attention_output"] == "e5m6" else []
    return f" ({', '.join(kept)})" if kept else ""


def overrides(row: Mapping[str, Any]) -> str:
    """The command line's overrides that make a configuration this layout."""
    given = {f"layout.{name}": row[name] for name in ("pp", "dp", "ep", "dispatch", "schedule")}
    given["layout.stages_per_rank"] = row["chunks"] if row["pp"] > 1 and "Interleaved" in row["schedule"] else "null"
    # The configuration may have a split of its own.
    given["layout.stage_layers"] = str(list(row["stage_layers"])).replace(" ", "") if row["pp"] > 1 else "null"
    given["layout.max_expert_rows"] = "null" if row["max_expert_rows"] is None else row["max_expert_rows"]
    given |= {
        "run.micro_batch_sequences": row["micro_batch_sequences"],
        "run.recompute": str(row["recompute"]).lower(),
        "schedule.batch_multiple_sequences": row["dp"] * row["micro_batch_sequences"],
    }
    given["precision"] = row["precision"]
    if row["precision"] == "fp8":
        given["precision.keep_bf16_weights"] = str(row["keep_bf16_weights"]).lower()
        given["precision.attention_output"] = row["attention_output"]
    return " ".join(f"{name}={value}" for name, value in given.items())


def _flips(document: Mapping[str, Any]) -> list[str]:
    """Of each search, under what its answer stays and under what another layout wins."""
    found: list[str] = []
    for name, changes in document["flips"].items():
        others: dict[str, list[str]] = {}
        for what, winner in changes.items():
            others.setdefault("" if winner is None else layout(winner), []).append(what)
        same = others.pop("", [])
        clauses = [f"with {_listed(whats)} the fastest would be {winner}" for winner, whats in others.items()]
        clauses += [f"with {_listed(same)} it stays the same"] if same else []
        sentence = "; ".join(clauses)
        if clauses and not any(sentence in each for each in found):
            found.append(f"Of {name}, {sentence}.")
    return found


def _listed(words: Sequence[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


# ---- tables for the terminal


def residuals(found: Mapping[str, Sequence[Residual]]) -> list[str]:
    """What `judge.residuals` has found, as lines of text."""
    lines: list[str] = []
    for title, rows in found.items():
        cells = [
            [row.what, f"{row.published:,.4g} {row.unit}", f"{row.modelled:,.4g}", f"{row.error:+.1%}"] for row in rows
        ]
        lines += ["", f"{title}:", *_aligned([["", "published", "modelled", "error"], *cells])]
    return lines[1:]


def tables(document: Mapping[str, Any]) -> list[str]:
    """Memory, changes, imbalance, parts of the run and the best layouts, as lines of text."""
    lines: list[str] = []
    for title, heads, rows in (_memory_table(document), _changes_table(document), _run_table(document)):
        lines += ["", title, *_aligned([heads, *rows])]
    return lines


def _memory_table(document: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    ranks = document["memory"]["ranks"]
    shown = sorted({0, len(ranks) // 2, len(ranks) - 1, ranks.index(max(ranks, key=lambda row: row["total_bytes"]))})
    names = list(ranks[0]["components"])
    rows = [[name.replace("_", " "), *(f"{ranks[at]['components'][name] / GB:.2f}" for at in shown)] for name in names]
    rows.append(["total", *(f"{ranks[at]['total_bytes'] / GB:.2f}" for at in shown)])
    heads = ["GB", *(f"rank {ranks[at]['rank']}" for at in shown)]
    return "Memory (in closed form; `dry_run=true` runs the rank on fake tensors):", heads, rows


def _changes_table(document: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for row in document["changes"]:
        alone = f"{row['alone']:+.0%}" if "alone" in row else ""
        rows.append(
            [
                row["what"],
                short(row["step_s"]),
                short(row["modelled"] / 1e3),
                short(row["corrected"] / 1e3),
                f"{row['bubble']:.0%}",
                alone,
            ]
        )
    bound = document["bound"]
    rows.append([bound["what"], "", short(bound["modelled"] / 1e3), "", "", ""])
    heads = ["K GPU-hours per trillion tokens", "step, s", "modelled", "corrected", "bubble", "alone"]
    return "What changes would give, each on top of the ones before:", heads, rows


def _run_table(document: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    cost = document["cost"]
    rows = [
        [part["what"], short(part["modelled_gpu_hours"] / 1e3), short(part["corrected_gpu_hours"] / 1e3)]
        for part in cost["parts"]
    ]
    both = [cost["modelled"], cost["corrected"]]
    rows += [
        [
            f"all, training {cost['effective_training_time']:.1%} of the time",
            *(short(x["gpu_hours"] / 1e3) for x in both),
        ],
        ["days", *(short(x["days"]) for x in both)],
        [f"M dollars at {cost['dollars_per_gpu_hour']:g} a GPU-hour", *(short(x["dollars"] / 1e6) for x in both)],
    ]
    return "The whole run:", ["K GPU-hours", "modelled", "corrected"], rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *others = widths
    return [
        f"  {row[0]:<{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], others, strict=True))
        for row in rows
    ]
