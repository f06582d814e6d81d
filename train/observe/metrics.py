"""The step metrics that a training record may carry: declared once, collected after a step, written as one line.

A record is a flat dict of plain Python numbers, one per optimizer step. Its names are `area/name_unit`; the three
that place it in the run (`step`, `tokens_seen`, `time_unix_s`) have no area.

MaxVio is that of arXiv:2408.15664 section 4.1; arXiv:2412.19437 section 4.5.3 plots the expert load. MFU counts the
main model's GEMMs and causal attention, without MTP and router (arXiv:2412.19437 §4.2, arXiv:2505.09343 table 4),
over the *BF16* dense peak of the devices, although most of the GEMMs are FP8: DeepSeek's 38.9 % is counted so too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    # The dashboard reads names only: it needs no torch.
    from torch import Tensor

    from kernels.probe import Operand
    from train.schedules import ScheduledValues
    from train.state import TrainState

# A record, or an event: one line of metrics.jsonl.
Record = dict[str, Any]
# Of a step, in the order of `BusyTime.end_phase`.
PHASES = ("data", "gradients", "update")


@dataclass(frozen=True)
class Metric:
    """What one name means; `unit` "1" is a ratio."""

    unit: str
    # How one value is made from the step's micro-batches, layers and ranks.
    reduction: Literal["none", "mean", "sum", "min", "max", "l2"]
    description: str
    # A table is a list of lists of floats.
    kind: Literal["int", "float", "table"] = "float"
    # A resumed run must give the same bits.
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
    "step/busy_ms": Metric("ms", "none", "[pipeline][data ranks] work without waiting in the step before", "table"),
    "step/data_ms": Metric("ms", "none", "of it, taking the batch", "table"),
    "step/gradients_ms": Metric("ms", "none", "of it, forward, backward and the reduction", "table"),
    "step/update_ms": Metric("ms", "none", "of it, optimizer and biases", "table"),
    "moe/max_violation_ratio": Metric("1", "max", "MaxVio = (max load - mean) / mean, worst layer"),
    "moe/expert_load": Metric("1", "sum", "[layers][experts] load over the layer's mean load", "table"),
    "moe/dead_experts": Metric("experts", "sum", "(layer, expert) pairs without a token in this step", "int"),
    "moe/expert_bias": Metric("1", "none", "[layers][experts] selection bias after the step, on some steps", "table"),
    "attention/max_logit": Metric("1", "max", "largest logit of attention, worst head; with optim.qk_clip"),
    "attention/head_max_logit": Metric("1", "max", "[layers][heads] the same by head, MTP layers last", "table"),
    "guard/skipped_steps": Metric("steps", "sum", "steps skipped so far: not finite, or a spike", "int"),
    "eval/bits_per_byte": Metric("bits/byte", "mean", "held-out loss per byte of text, in events `evaluation`"),
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
    "resume": "a new process continued from a checkpoint; `deterministic`: false where that is not bit for bit",
    "checkpoint": "the checkpoint of this step was published, during the steps just logged",
    "save_failed": "a checkpoint could not be written; older ones are untouched; says why",
    "evaluation": "the held-out store was scored after this step; holds `eval/bits_per_byte`",
    "skip": "a step was skipped: loss or gradient not finite; names ranks and tensors of such gradients",
    "spike": "a step was skipped: its loss left the band; holds the scores and the positions of its batch",
    "rollback": "the run went back to the checkpoint of this step, and drops positions; steps after it are void",
    "quarantine": "samples of the coming step are damaged and dropped; names positions, files and blocks",
    "dead_experts": "experts got no token for observe.dead_expert_steps steps in a row; names layers and experts",
    "straggler": "a rank was slow for observe.straggler_steps steps in a row; names it, both times and the phase",
    "low_speed": "the speed stayed below a quarter of the run's best; holds both",
    "stale_checkpoint": "no checkpoint was published for observe.stale_checkpoint_s; says for how long",
    "records_dropped": "the disk was full for so long that lines of this file were lost; says how many",
    "stop": "the process ended its training loop; says why, and its exit code where that is not 0",
    "replay_differs": "a step repeated after a resume did not give the logged numbers",
}

# Dense BF16 peak of the SXM parts, FLOP/s, from their data sheets; PCIe and NVL parts of the same name have another.
BF16_PEAKS = {"H100": 989.4e12, "H800": 989.4e12, "H200": 989.4e12}
OTHER_PARTS = ("PCIe", "NVL")


def dense_bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a device by the name that CUDA gives it; None for one that is not in the table."""
    if any(part in device_name for part in OTHER_PARTS):
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if name in device_name.split()), None)


def step_record(
    state: TrainState, now: ScheduledValues, losses: Mapping[str, Tensor], counts: Mapping[int, Tensor]
) -> Record:
    """The step metrics that every step has; reading them waits for the device.

    Args:
        state: after the step.
        now: scheduled values of the step.
        losses: metric -> 0-d tensor.
        counts: layer id -> [experts] int64, tokens over the whole step; empty without MoE layers.
    """
    import torch

    from train.optim.balance import max_violation

    values = torch.stack(list(losses.values())).tolist()
    record: Record = {
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "time_unix_s": time.time(),
        **dict(zip(losses, values, strict=True)),
        "optim/lr": now.lr,
        "schedule/batch_sequences": now.batch_sequences,
        "schedule/bias_speed": now.bias_speed,
        "schedule/mtp_weight": now.mtp_weight,
        "guard/skipped_steps": state.skipped_steps,
    }
    if counts:
        loads = torch.stack([counts[i] for i in sorted(counts)])  # [layers, experts]
        record["moe/max_violation_ratio"] = float(max_violation(loads).max())
        load = loads.double() / loads.double().mean(dim=-1, keepdim=True)
        # Significant digits: a load rounded to zero would read as an expert without a token.
        record["moe/expert_load"] = [[float(f"{x:.4g}") for x in layer] for layer in load.tolist()]
        record["moe/dead_experts"] = int((loads == 0).sum())
    return record


@dataclass(frozen=True)
class Speed:
    """Throughput, and its share of the devices' peak where that is known."""

    flops_per_token: int
    peak_flops: float | None  # of one device, FLOP/s
    num_devices: int

    def record(self, tokens_per_s: float) -> Record:
        """The part of a step's record about speed."""
        record: Record = {"speed/tokens_per_s": tokens_per_s}
        if self.peak_flops is not None:
            record["speed/mfu_ratio"] = tokens_per_s * self.flops_per_token / (self.peak_flops * self.num_devices)
        return record


def logit_table(logits: Tensor | None) -> Record:
    """The largest logits of a step, [layers, heads], as metrics; nothing where they are not watched."""
    if logits is None:
        return {}
    table = [[float(f"{x:.4g}") for x in layer] for layer in logits.tolist()]
    return {"attention/max_logit": max(map(max, table)), "attention/head_max_logit": table}


def bias_table(biases: Tensor) -> Record:
    """The routers' biases, [layers, experts], as a table; nothing without MoE layers."""
    return {"moe/expert_bias": [[float(f"{x:.6g}") for x in layer] for layer in biases.tolist()]} if len(biases) else {}


def busy_tables(busy_us: Tensor, *, data_ranks: int) -> Record:
    """Each rank's work in a step, [ranks, phases] in us, as tables; nothing for one rank or while unmeasured."""
    ranks = busy_us.tolist()
    if len(ranks) == 1 or not any(map(any, ranks)):
        return {}
    columns = {"busy": map(sum, ranks)} | dict(zip(PHASES, zip(*ranks, strict=True), strict=True))
    tables = {}
    for name, column in columns.items():
        ms = [us / 1e3 for us in column]
        tables[f"step/{name}_ms"] = [ms[first : first + data_ranks] for first in range(0, len(ms), data_ranks)]
    return tables


def dead_experts(counts: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """(layer id, expert) of each expert without a token; `counts` as for `step_record`."""
    import torch

    layer_ids = sorted(counts)
    idle = (torch.stack([counts[i] for i in layer_ids]) == 0).nonzero().tolist() if counts else []
    return [(layer_ids[row], expert) for row, expert in idle]


def check_record(record: Mapping[str, Any]) -> None:
    """Assert that `record` holds the required names and declared names only, each of its declared kind."""
    for name in REQUIRED:
        assert name in record, f"record without {name}: {sorted(record)}"
    for name, value in record.items():
        assert name in METRICS, f"undeclared metric {name!r}: declare it in train/observe/metrics.py"
        kind = METRICS[name].kind
        assert _is_kind(value, kind), f"metric {name}: {value!r} is not a plain Python {kind}"


def _is_kind(value: object, kind: str) -> bool:
    # Exact types only: a bool is an int, and numpy's float64 a float, but json writes neither alike.
    if kind == "int":
        return type(value) is int
    if kind == "float":
        return type(value) in (int, float)
    return type(value) is list and all(type(row) is list and all(_is_kind(x, "float") for x in row) for row in value)


def encode(record: Mapping[str, Any]) -> str:
    """One line of JSON, without its newline, that `json.loads` turns back into the same bits."""
    # Python prints a float as the shortest decimal that parses to the same double, else as NaN or Infinity.
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def same_bits(left: object, right: object) -> bool:
    """Whether two logged numbers are the same double; NaN equals NaN, and 0.0 differs from -0.0."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        return repr(float(left)) == repr(float(right))
    return left == right
