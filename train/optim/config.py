"""Hyperparameters of the optimizer, with their checks (arXiv:2412.19437 §4.2).

A file of its own: the configuration of a run is read without torch and the machinery of masters, moments and
process groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.model.sizes import BF16_BYTES, FP32_BYTES

# Of an element of a moment, by `moments_dtype`; `MOMENT_DTYPES` of adamw.py has the types. fp8 is an ablation: FP32
# tensors that hold what E4M3 with a scale per 128 elements can hold. It saves no memory.
MOMENT_BYTES = {"bf16": BF16_BYTES, "fp32": FP32_BYTES, "fp8": FP32_BYTES}


@dataclass(frozen=True)
class OptimConfig:
    """Hyperparameters of AdamW and of the clipping (arXiv:2412.19437 §4.2); field `optim` of the configuration."""

    betas: tuple[float, float] = (0.9, 0.95)  # decay rates of the two moments
    eps: float = 1e-8  # added to the root of the second moment; the report does not give it
    weight_decay: float = 0.1  # decoupled decay per step, times the learning rate
    clip_norm: float = 1.0  # the global gradient norm is clipped to this
    moments_dtype: str = "bf16"  # storage of both moments (§3.3.3); a key of `MOMENT_BYTES`, docs/numerics.md
    ema_decay: float | None = None  # moving average of the weights in CPU memory (`train/optim/ema.py`); None for none
    backend: Literal["native", "deepspeed"] = "native"  # who keeps weights, gradients and masters in flat memory
    offload: Literal["none", "cpu"] = "none"  # cpu: masters and moments in host memory (`train/optim/offload.py`)

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas} must be two numbers in [0, 1); the report uses (0.9, 0.95)")
        if not self.eps > 0.0:
            raise ValueError(f"optim.eps = {self.eps} must be above 0; use 1e-8")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"optim.weight_decay = {self.weight_decay} must not be negative; give 0 for none")
        if not self.clip_norm > 0.0:
            raise ValueError(f"optim.clip_norm = {self.clip_norm} must be above 0; the report uses 1.0")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"optim.ema_decay = {self.ema_decay} must be in [0, 1); use 0.999, or null for none")
        if self.offload == "cpu" and (self.backend, self.ema_decay) != ("native", None):
            key, cure = ("backend", "native") if self.backend != "native" else ("ema_decay", "null")
            why = "DeepSpeed keeps its masters on the device" if key == "backend" else "the average follows those there"
            raise ValueError(
                f"optim.offload=cpu takes masters off the device, but optim.{key} = {getattr(self, key)} needs them "
                f"({why}): use optim.offload=none, or optim.{key}={cure}"
            )
        if self.moments_dtype not in MOMENT_BYTES:
            raise ValueError(
                f"optim.moments_dtype = {self.moments_dtype!r} is unknown; use one of {sorted(MOMENT_BYTES)}"
            )
