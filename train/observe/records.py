"""What a step leaves in the log: tensors of the step made plain numbers, under the names of `train/observe/metrics.py`.

Model FLOPs utilisation is told as DeepSeek and most others tell it: FLOPs of the main model's GEMMs and causal
attention, without MTP and router (arXiv:2412.19437 §4.2, arXiv:2505.09343 table 4), over the *BF16* dense peak of the
devices, although most of the GEMMs are FP8. So it can be compared with their 38.9 %.

Reading a tensor waits for the device: all of this happens after the step. Not here: which step is due for what
(`ObserveConfig.due`), files (`train/observe/sinks.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from train.observe.metrics import Record
from train.optim.balance import max_violation
from train.schedules import Now
from train.state import TrainState

# Dense BF16 peak of the SXM parts, FLOP/s, from their data sheets; PCIe and NVL parts of the same name have another.
BF16_PEAKS = {"H100": 989.4e12, "H800": 989.4e12, "H200": 989.4e12}
OTHER_PARTS = ("PCIe", "NVL")


def dense_bf16_peak(device_name: str) -> float | None:
    """FLOP/s of a device by the name that CUDA gives it; None for one that is not in the table."""
    if any(part in device_name for part in OTHER_PARTS):
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if name in device_name.split()), None)


def step_record(state: TrainState, now: Now, losses: Mapping[str, Tensor], counts: Mapping[int, Tensor]) -> Record:
    """The part of a step's record that every step has.

    Args:
        state: after the step.
        now: schedule values of the step.
        losses: metric -> 0-d tensor.
        counts: layer id -> [experts] int64, tokens over the whole step; empty without MoE layers.
    Returns:
        The record, without speed and evaluation.
    """
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


def dead_experts(counts: Mapping[int, Tensor]) -> list[tuple[int, int]]:
    """(layer id, expert) of each expert without a token.

    Args:
        counts: layer id -> [experts] int64.
    """
    if not counts:
        return []
    layer_ids = sorted(counts)
    idle = (torch.stack([counts[i] for i in layer_ids]) == 0).nonzero().tolist()
    return [(layer_ids[row], expert) for row, expert in idle]
