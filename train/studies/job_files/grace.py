"""How long a stop takes: two steps and two saves, from SIGTERM to the last byte.

A run that is asked to stop finishes the step under way and one more, on which the ranks agree; a save may be under way
then, and the last one follows. Steps are the planner's, times its error on DeepSeek's own (`docs/planner.md`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from train.model.sizes import BF16_BYTES, FP32_BYTES, parameter_counts
from train.studies.plan.document import Assumptions, Planner
from train.studies.plan.products import MachineName, machine

if TYPE_CHECKING:
    from train.config import PretrainConfig
    from train.model.config import ModelConfig

STEPS = SAVES = 2
# The planner knows the kernels of these.
PRECISIONS = ("bf16", "fp8")


class Grace(NamedTuple):
    """Seconds; a save of None: nobody knows how fast the storage is."""

    step_s: float
    save_s: float | None
    checkpoint_bytes: int

    @property
    def least_s(self) -> float:
        """What a stop takes at most, as far as it is known."""
        return STEPS * self.step_s + SAVES * (self.save_s or 0.0)

    def __str__(self) -> str:
        steps = f"{STEPS} steps of {self.step_s:.1f} s (modelled)"
        size = f"{self.checkpoint_bytes / 1e9:,.1f} GB"
        if self.save_s is None:
            return f"{steps}; saves of {size} not counted, since job.storage_gb_per_s is not set"
        return f"{steps} and {SAVES} saves of {size} in {self.save_s:.0f} s"


def checkpoint_bytes(config: PretrainConfig) -> int:
    """Of one checkpoint of all ranks: weights, FP32 masters and moments; norms and routers have no second copy.

    Muon's one moment counts for all: embedding, head and norms, which have two, are left out.
    """
    counts = parameter_counts(config.model)
    moment = BF16_BYTES if config.optim.moments_dtype == "bf16" else FP32_BYTES
    weights = 0 if config.precision.name == "fp32" else BF16_BYTES
    return (counts["total"] + counts["mtp"]) * (weights + FP32_BYTES + config.optim.moments_of_matrices * moment)


def grace_of(config: PretrainConfig, v3: ModelConfig) -> Grace | None:
    """What a stop takes; None where no speed is known.

    Args:
        v3: the model of DeepSeek's published step, by whose error a step is corrected.
    """
    if config.run.device == "cpu" or config.precision.name not in PRECISIONS:
        return None
    named: MachineName = "H800" if config.job.gpu == "H800" else "H100"
    # Neither memory nor price decides a step.
    planner = Planner(config, Assumptions(machine(named), memory_bytes=0, dollars_per_gpu_hour=0, v3=v3))
    step_s = planner.predicted(planner.candidate).step_s * planner.bias
    size, rate = checkpoint_bytes(config), config.job.storage_gb_per_s
    return Grace(step_s, None if rate is None else size / rate / 1e9, size)
