"""Runs that a test writes: records with every metric of the dashboard, values in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from train.observe.metrics import FP8_OPERANDS, Record, encode

LAYERS, EXPERTS = 3, 4


def record(step: int, *, factor: float = 1.0) -> Record:
    """One step; losses are scaled by `factor`."""
    return {
        "step": step,
        "tokens_seen": 512 * step,
        "time_unix_s": 1000.0 + 3.0 * step,
        "loss/main": factor * (2.0 + 1 / step + 0.1 * math.sin(step)),
        "loss/mtp": factor * (3.0 + 1 / step),
        "grad/norm": 1.0 + 1 / step,
        "optim/lr": 1e-3 / step,
        "schedule/batch_sequences": 2,
        "schedule/bias_speed": 1e-3,
        "schedule/mtp_weight": 0.3,
        "speed/tokens_per_s": 1000.0 + step,
        "speed/mfu_ratio": 0.25,
        "moe/max_violation_ratio": 1 / step,
        "moe/expert_load": [[1.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.25, 1.75], [1.0] * EXPERTS],
        "moe/dead_experts": 0,
        "guard/skipped_steps": 0,
    }


def with_tables(line: Record, *, dead: bool = False) -> Record:
    """The record with tables of biases, FP8 and ranks; with `dead`, expert 2 of MoE layer 1 got no token."""
    step = line["step"]
    names = ("fp8/amax", "fp8/scale_spread_ratio", "fp8/saturated_ratio", "fp8/underflow_ratio", "fp8/snr_db")
    columns = range(len(FP8_OPERANDS))
    tables = {
        name: [[(at + 1) * (layer + 1) * (column + 1) / 8 for column in columns] for layer in range(LAYERS)]
        for at, name in enumerate(names)
    }
    tables["moe/expert_bias"] = [[0.001 * step * (expert - 1.5) for expert in range(EXPERTS)] for _ in range(LAYERS)]
    tables["attention/head_max_logit"] = [[10.0 * (layer + 1) + head for head in range(5)] for layer in range(LAYERS)]
    # Rank 1 of four is three times slower than its stage; the other stage has less to do.
    tables["step/busy_ms"] = [[100.0, 300.0], [50.0, 50.0]]
    tables["step/data_ms"] = [[10.0, 210.0], [10.0, 10.0]]
    tables["step/gradients_ms"] = [[80.0, 80.0], [30.0, 30.0]]
    tables["step/update_ms"] = [[10.0, 10.0], [10.0, 10.0]]
    line = line | tables
    if dead:
        line |= {"moe/dead_experts": 1, "moe/expert_load": [[1.0] * 4, [1.5, 1.5, 0.0, 1.0], [1.0] * 4]}
    return line


def append(run_dir: Path, lines: Sequence[Record], torn: str = "") -> None:
    """Log more lines; `torn` is the beginning of one that is still being written."""
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(encode(line) + "\n" for line in lines) + torn)


def write_run(run_dir: Path, lines: Sequence[Record], **card: object) -> Path:
    """A run directory with these lines and, if any field is given, a run card."""
    run_dir.mkdir(parents=True)
    append(run_dir, lines)
    if card:
        (run_dir / "run_card.json").write_text(json.dumps(card))
    return run_dir
