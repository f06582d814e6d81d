"""The four precisions that a run can have (arXiv:2412.19437 §3.3), with the checks of what goes together.

fp32     everything FP32: for oracles and proofs.
bf16     parameters and activations BF16, FP32 masters and gradient sums.
fp8      as bf16, and every linear of attention, FFN and experts computes fprop, dgrad and wgrad on E4M3 operands.
fp8_te   as fp8, and NVIDIA's Transformer Engine computes these linears (`te_linear.py`): a second opinion.

A file of its own: the configuration of a run is read without torch. `precision.py` is the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Rows and features of Transformer Engine's FP8 products are multiples of it.
TE_MULTIPLE = 16
OURS = "use precision=fp8, whose kernels are our own"


@dataclass(frozen=True)
class PrecisionConfig:
    """Which arithmetic the linears use; field `precision` of the configuration."""

    name: Literal["fp32", "bf16", "fp8", "fp8_te"]
    # Round every FP8 scale up to a power of two: 1x128 -> 128x1 re-quantisation is then exact. §3.3.3 states it for the
    # inputs of o_proj and of the expert up-projection only.
    power_of_two_scales: bool = True
    # FP8: keep SwiGLU's input as E4M3 for backward and make its output again (§3.3.3), instead of the input in BF16 and
    # the output in E4M3. Forward is the same bits; gradients see one more rounding.
    cache_swiglu_input: bool = True
    # FP8: keep weights of FP8 linears on the device in BF16 too; false: as sharded FP32 masters and E4M3 only, which
    # travels instead of BF16 (`parallel/fp8_weights.py`). Same bits either way; docs/parallelism.md has the bytes.
    keep_bf16_weights: bool = True
    # FP8: how attention's output is kept for the backward of attention and of the linear after it; e5m6: in 12 bits and
    # with power-of-two scales (§3.3.3). Forward is the same bits; both backwards see a rounding to 7 significant bits.
    attention_output: Literal["bf16", "e5m6"] = "bf16"

    def __post_init__(self) -> None:
        if self.name != "fp8" and self.attention_output != "bf16":
            raise ValueError(
                f"precision.attention_output={self.attention_output} goes with precision=fp8 only, and this is "
                f"{self.name}: set precision.attention_output=bf16"
            )
        if self.name == "fp8_te" and self.cache_swiglu_input:
            raise ValueError(
                "precision.cache_swiglu_input=true does not go with precision=fp8_te: Transformer Engine keeps its own "
                "operands for backward; set precision.cache_swiglu_input=false"
            )
        if not (self.keep_bf16_weights or self.name == "fp8"):
            raise ValueError(
                f"precision.keep_bf16_weights=false needs FP8 copies that the update writes, and precision={self.name} "
                "has none: use precision=fp8, or precision.keep_bf16_weights=true"
            )

    @property
    def wire(self) -> Literal["fp32", "bf16", "fp8"]:
        """How tokens travel to experts; Transformer Engine quantises an expert's input itself, from BF16."""
        return "bf16" if self.name == "fp8_te" else self.name
