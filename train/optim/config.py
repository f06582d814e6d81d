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
    """Hyperparameters of the update and of the clipping (arXiv:2412.19437 §4.2); field `optim` of the configuration.

    With `name=muon` betas and eps are those of the parameters that stay with AdamW; learning rate, weight_decay and
    clip_norm are both's, and moments_dtype is also the momentum's (`train/optim/muon.py`).
    """

    name: Literal["adamw", "muon"] = "adamw"  # what moves matrices
    momentum: float = 0.95  # Muon's mu; AdamW has none
    betas: tuple[float, float] = (0.9, 0.95)  # decay rates of the two moments
    eps: float = 1e-8  # added to the root of the second moment; the report does not give it
    weight_decay: float = 0.1  # decoupled decay per step, times the learning rate
    clip_norm: float = 1.0  # the global gradient norm is clipped to this
    moments_dtype: str = "bf16"  # storage of both moments (§3.3.3); a key of `MOMENT_BYTES`, docs/numerics.md
    qk_clip: float | None = None  # the largest logit that a head of attention may have (`train/optim/qk_clip.py`)
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
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"optim.momentum = {self.momentum} must be in [0, 1); Muon's report uses 0.95")
        if self.qk_clip is not None and not self.qk_clip > 0.0:
            raise ValueError(f"optim.qk_clip = {self.qk_clip} must be above 0; Kimi-K2's report uses 100, null is none")
        self._check_muon()
        if self.moments_dtype not in MOMENT_BYTES:
            raise ValueError(
                f"optim.moments_dtype = {self.moments_dtype!r} is unknown; use one of {sorted(MOMENT_BYTES)}"
            )

    @property
    def moments_of_matrices(self) -> int:
        """Moments of a linear's weight or an expert's; other parameters have AdamW's two."""
        return 1 if self.name == "muon" else 2

    def _check_muon(self) -> None:
        """What does not go with whole matrices."""
        reasons = {
            "backend": ("native", "DeepSpeed updates a flat partition, and Muon whole matrices"),
            "offload": ("none", "a state in host memory passes in segments, and Muon needs whole matrices"),
            "moments_dtype": ("bf16", "FP8 moments are an ablation of AdamW"),
        }
        given = {"backend": "deepspeed", "offload": "cpu", "moments_dtype": "fp8"}
        for key, (cure, why) in reasons.items():
            if self.name == "muon" and getattr(self, key) == given[key]:
                raise ValueError(
                    f"optim=muon does not go with optim.{key}={given[key]} ({why}): use optim.{key}={cure}, "
                    "or optim=adamw"
                )
