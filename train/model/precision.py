"""The three precisions a run can have, as the two linear maps they stand for (arXiv:2412.19437 §3.3).

fp32   everything FP32: for oracles and proofs.
bf16   parameters and activations BF16, FP32 masters and gradient sums.
fp8    as bf16, and every linear of attention, FFN and experts computes fprop, dgrad and wgrad on E4M3 operands.

Embedding, output head, router, norms, attention core and `eh_proj` never come here for FP8: they call
`Precision.high` whatever the recipe (§3.3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.fp8_linear import fp8_linear, grouped_fp8_linear, grouped_linear, linear


@dataclass(frozen=True)
class Precision:
    """Which arithmetic the linears use.

    `power_of_two_scales` rounds every FP8 scale up to a power of two (§3.3.3 states it for the inputs of o_proj and
    of the expert up-projection; we use it everywhere: then 1x128 -> 128x1 re-quantisation is exact).
    """

    name: Literal["fp32", "bf16", "fp8"]
    power_of_two_scales: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of parameters and activations."""
        return torch.float32 if self.name == "fp32" else torch.bfloat16

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T` by the recipe: [..., in] x [out, in] -> [..., out]."""
        if self.name == "fp8":
            return fp8_linear(x, weight, power_of_two=self.power_of_two_scales)
        return linear(x, weight)

    def grouped_linear(self, x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """One linear per expert: [rows, in] x [experts, out, in] -> [rows, out]; rows grouped by expert."""
        if self.name == "fp8":
            return grouped_fp8_linear(x, weight, group_ends, power_of_two=self.power_of_two_scales)
        return grouped_linear(x, weight, group_ends)

    def high(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear that stays in the dtype of `x`: head, `eh_proj`."""
        return linear(x, weight)

    def fp32(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear that is FP32 whatever `x` is: the router."""
        return linear(x, weight, dtype=torch.float32)
