"""The names a training record may carry, each declared once with its unit, reduction and meaning.

A record is a flat dict of plain Python numbers, one per optimizer step. Its names are `area/name_unit`; the
three that place a record in the run (`step`, `tokens_seen`, `time_unix_s`) have no area. `encode` writes a
record as one line of JSON that reads back bit for bit: Python prints a float as the shortest decimal that
parses to the same double. A number that is not finite is written as the literal `NaN` or `Infinity`, which
Python's json module reads back.

Source: MaxVio is that of arXiv:2408.15664 section 4.1; arXiv:2412.19437 section 4.5.3 plots the expert load.

This file measures nothing: the trainer collects the numbers, `train/observe/sinks.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kernels.probe import Operand

# A record, or an event, as it stands in metrics.jsonl.
Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """What one name means.

    unit: of the value; "1" for a ratio.
    reduction: how one value is made from the step's micro-batches, layers and ranks.
    description: for a reader of the dashboard.
    kind: "table" is a list of lists of floats.
    replayed: a resumed run must give the same bits.
    """

    unit: str
    reduction: Literal["none", "mean", "sum", "min", "max", "l2"]
    description: str
    kind: Literal["int", "float", "table"] = "float"
    replayed: bool = False


METRICS: dict[str, Metric] = {
    "step": Metric("steps", "none", "optimizer steps taken, skipped ones included", "int"),
    "tokens_seen": Metric("tokens", "sum", "input tokens consumed since the run began", "int", replayed=True),
    "time_unix_s": Metric("s", "none", "wall clock when the step ended"),
    "loss/main": Metric("nats/token", "mean", "next-token cross entropy", replayed=True),
    "loss/mtp": Metric("nats/token", "mean", "multi-token prediction loss, mean over depths", replayed=True),
    "loss/balance": Metric("1", "mean", "sequence-wise balance loss, without alpha", replayed=True),
    "loss/total": Metric("nats/token", "mean", "what backward ran on, divided by the targets", replayed=True),
    "grad/norm": Metric("1", "l2", "global gradient norm before clipping", replayed=True),
    "optim/lr": Metric("1", "none", "learning rate of this step", replayed=True),
    "schedule/batch_sequences": Metric("sequences", "sum", "sequences in this step's batch", "int"),
    "schedule/bias_speed": Metric("1", "none", "gamma, the step of the routing bias"),
    "schedule/mtp_weight": Metric("1", "none", "lambda, the weight of the MTP loss"),
    "speed/tokens_per_s": Metric("tokens/s", "sum", "input tokens of the step over its wall time"),
    "speed/mfu_ratio": Metric("1", "mean", "model FLOPs over the devices' dense BF16 peak, without MTP and router"),
    "moe/max_violation_ratio": Metric("1", "max", "MaxVio = (max load - mean) / mean, worst layer"),
    "moe/expert_load": Metric("1", "sum", "[layers][experts] load over the layer's mean load", "table"),
    "moe/dead_experts": Metric("experts", "sum", "(layer, expert) pairs without a token in this step", "int"),
    "moe/expert_bias": Metric("1", "none", "[layers][experts] selection bias after the step, on some steps", "table"),
    "guard/skipped_steps": Metric("steps", "sum", "steps skipped so far, loss or gradient not finite", "int"),
    "eval/bits_per_byte": Metric("bits/byte", "mean", "held-out loss per byte of text, on evaluation steps"),
    "fp8/amax": Metric("1", "max", "[layers][operands] largest magnitude before quantisation", "table"),
    "fp8/scale_spread_ratio": Metric("1", "max", "[layers][operands] largest scale over smallest", "table"),
    "fp8/saturated_ratio": Metric("1", "max", "[layers][operands] share at +-448, one a tile apart", "table"),
    "fp8/underflow_ratio": Metric("1", "max", "[layers][operands] share of non-zeros made 0", "table"),
    "fp8/snr_db": Metric("dB", "min", "[layers][operands] signal over quantisation noise", "table"),
}

# Columns of the tables `fp8/*`: operand and GEMM (`kernels/probe.py`).
FP8_OPERANDS: tuple[Operand, ...] = ("x.fprop", "w.fprop", "dy.dgrad", "w.dgrad", "dy.wgrad", "x.wgrad")

REQUIRED = ("step", "tokens_seen", "time_unix_s")

EVENTS: dict[str, str] = {
    "start": "the run began at step 0",
    "resume": "a new process continued from a checkpoint",
    "checkpoint": "a checkpoint was published",
    "skip": "a step was skipped: its loss or gradient was not finite",
    "dead_experts": "experts got no token for observe.dead_expert_steps steps in a row; names layers and experts",
    "stop": "the process ended its training loop",
    "replay_differs": "a step repeated after a resume did not give the logged numbers",
}


def check_record(record: Mapping[str, Any]) -> None:
    """Assert that `record` holds the required names and declared names only, each of its declared kind."""
    for name in REQUIRED:
        assert name in record, f"record without {name}: {sorted(record)}"
    for name, value in record.items():
        assert name in METRICS, f"undeclared metric {name!r}: declare it in train/observe/metrics.py"
        kind = METRICS[name].kind
        assert _is_kind(value, kind), f"metric {name}: {value!r} is not a plain Python {kind}"


def encode(record: Mapping[str, Any]) -> str:
    """One line of JSON, without its newline, that `json.loads` turns back into the same bits."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def same_bits(left: object, right: object) -> bool:
    """Whether two logged numbers are the same double; NaN equals NaN, and 0.0 differs from -0.0."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        return repr(float(left)) == repr(float(right))
    return left == right


def _is_kind(value: object, kind: str) -> bool:
    """Exact types only: a bool is an int, and numpy's float64 a float, but json writes neither alike."""
    if kind == "int":
        return type(value) is int
    if kind == "float":
        return type(value) in (int, float)
    return type(value) is list and all(
        type(row) is list and all(type(cell) in (int, float) for cell in row) for row in value
    )
