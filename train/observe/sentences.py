"""What a run says to its user: at its start, at events that ask for attention, at its end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.observe.metrics import Record

# Dead experts that are named; metrics.jsonl names all.
_NAMED = 4

_INEXACT = "not bit for bit, since run.deterministic is false"
_ANNOUNCED = {
    "resume": "resumed at step {step}{inexact}",
    "skip": "step {step} skipped: loss or gradient not finite{where}",
    "spike": "step {step} skipped: loss {loss:.3f} is out of the band ({loss_z:.1f} deviations)",
    "rollback": "back from step {left_at_step} to step {step}; the data around the spikes is left out",
    "quarantine": "after step {step}: samples left out: {windows[0][error]}",
    "dead_experts": "step {step}: no token for {steps} steps: {names}",
    "straggler": "step {step}: rank {rank} (pipeline rank {pipeline_rank}, data rank {data_rank}) is slow: it works "
    "{busy_ms:.0f} ms a step for what takes {usual_ms:.0f} ms, {steps} steps in a row (longest phase: {phase})",
    "low_speed": "step {step}: {speed} tok/s, where it was {best}. Is this machine busy with other work? On a CPU it "
    "helps to stop that, or to start again with OMP_WAIT_POLICY=passive in the environment or with fewer threads "
    "(run.threads)",
    "stale_checkpoint": "step {step}: no checkpoint was published for {age_s:.0f} s; so much work would be lost now",
    "records_dropped": "step {step}: {lines} lines of the log are lost: the disk was full for too long",
    "stop": "ended after step {step}: {reason}",
    "save_failed": "step {step}: {error}",
    "evaluation": "step {step}: held-out {eval/bits_per_byte:.4f} bits per byte",
    "replay_differs": "step {step} repeated after the resume does not give the logged numbers",
}


def announcement(event: Record) -> str | None:
    """One sentence; None for an event that is routine."""
    if event["event"] not in _ANNOUNCED:
        return None
    experts = event.get("experts", ())
    names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in experts[:_NAMED])
    if len(experts) > _NAMED:
        names += f" and {len(experts) - _NAMED} more"
    first = next(iter(event.get("nonfinite", ())), None)
    who = "" if first is None or first["rank"] is None else f"rank {first['rank']}, "
    where = f": {who}{first['tensor']}" if first else ""
    speed, best = (short(event.get(name, 0.0)) for name in ("tokens_per_s", "best_tokens_per_s"))
    inexact = "" if event.get("deterministic", True) else f"; {_INEXACT}"
    words = {"names": names, "where": where, "speed": speed, "best": best, "inexact": inexact}
    return _ANNOUNCED[event["event"]].format(**event | words)


def opening(card: Mapping[str, Any], *, directory: Path, num_steps: int, step: int, every_steps: int) -> list[str]:
    """What runs: device, precision, model, budget, layout and folder; `card` is the run card."""
    layout, sizes = card["layout"], card["parameters"]
    processes = layout["pp"] * layout["dp"]
    threads = f" (threads: {card['threads']})" if card["device"] == "cpu" else ""
    several = "1 process" if processes == 1 else f"{processes} processes (pp {layout['pp']}, dp {layout['dp']}, "
    several += f"ep {layout['ep']}, {layout['schedule']})" if processes > 1 else ""
    total, active, mtp = (short(sizes[name]).replace("G", "B") for name in ("total", "active", "mtp"))
    apart = f", and {mtp} in MTP layers" if sizes["mtp"] else ""
    budget = f"{card['tokens_total']:,} tokens in {num_steps:,} steps, sequences of {card['sequence_length']}"
    inexact = [] if card["deterministic"] else [f"a resume goes on {_INEXACT}"]
    first = card.get("at_first")
    few = [few_micro_batches(first, layout["schedule"])] if first and step < first["until_step"] else []
    began = [began_from(card["began_from"])] if card.get("began_from") else []
    return [
        f"{card['precision']} on {card['device']}{threads}, {several}, torch {card['torch']}",
        f"model: {total} parameters, {active} active per token{apart}",
        f"budget: {budget}; {num_steps - step:,} steps to go",
        *began,
        f"folder: {directory}, a checkpoint every {every_steps} steps; SIGTERM or Ctrl-C saves and stops",
        *few,
        *inexact,
    ]


def began_from(record: Mapping[str, Any]) -> str:
    """Whose weights a run began with, and whose those did."""
    seen = f" ({record['tokens_seen']:,} tokens of {record['store']})" if "tokens_seen" in record else ""
    before = record.get("began_from")
    return f"began from {record['path']}{seen}" + (f", which {began_from(before)}" if before else "")


def few_micro_batches(first: Mapping[str, Any], schedule: str) -> str:
    """That another pipeline schedule runs at first, and until when; `first` is the run card's `at_first`."""
    return (
        f"pipeline: {first['schedule']} until step {first['until_step']:,}, on the same stages: the batch ramp gives "
        f"fewer than the {first['micro_batches']} micro-batches of {schedule}"
    )


def closing(
    directory: Path, *, last: Record, scores: Mapping[int, float], tokens_per_s: float | None, heldout: str | None
) -> list[str]:
    """The best figures and the next commands; nothing before the first step.

    Args:
        directory: of the run.
        last: its last step record, of this process or an earlier one.
        scores: step -> held-out bits per byte.
        tokens_per_s: median of this process.
        heldout: the store that they are of.
    """
    figures = [f"loss {last['loss/main']:.3f}"] if "loss/main" in last else []
    if scores:
        best = min(scores, key=lambda step: scores[step])
        newest = max(scores)
        figures.append(f"held-out {scores[newest]:.4f} bits per byte at step {newest}")
        figures += [f"the best {scores[best]:.4f} at step {best}"] if best != newest else []
    figures += [f"{short(tokens_per_s)} tok/s (median)"] if tokens_per_s is not None else []
    run, page = (shlex.quote(str(path)) for path in (directory, directory.with_name(f"{directory.name}.html")))
    commands = [
        f"python launch/score.py {run} --store {shlex.quote(heldout)}" if heldout else "",
        f'python launch/generate.py {run} --prompt "Once"',
        f"python launch/dashboard.py {run} --out {page}",
    ]
    return [", ".join(figures), *(f"next: {command}" for command in commands if command)] if figures else []


def short(value: float) -> str:
    """12345.6 -> '12.3k'."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.1f}{letter}"
    return f"{value:.0f}"
