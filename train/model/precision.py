"""The four precisions a run can have, as the two linear maps they stand for (arXiv:2412.19437 §3.3).

fp32     everything FP32: for oracles and proofs.
bf16     parameters and activations BF16, FP32 masters and gradient sums.
fp8      as bf16, and every linear of attention, FFN and experts computes fprop, dgrad and wgrad on E4M3 operands.
fp8_te   as fp8, and NVIDIA's Transformer Engine computes these linears (`te_linear.py`): a second opinion.

Embedding, output head, router, norms, attention core and `eh_proj` are never FP8 (§3.3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kernels.formats import GradientTiles
from kernels.fp8_linear import (
    Fp8Gradient,
    LinearInput,
    fp8_experts,
    fp8_linear,
    fp8_linear_e5m6,
    fp8_linear_of_kept,
    fp8_swiglu_linear,
    grouped_fp8_linear,
    grouped_fp8_swiglu_linear,
    grouped_linear,
    linear,
)
from kernels.permute import Dispatched, combine_tokens, group_tokens
from kernels.quantize import dequantize_carried, dequantize_gradient
from kernels.rmsnorm import KeptNorm
from kernels.router_linear import router_linear
from kernels.swiglu import gated_swiglu, swiglu
from train.model.te_linear import te_grouped_linear, te_linear


@dataclass(frozen=True)
class Precision:
    """Which arithmetic the linears use."""

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

    def on_our_kernels(self) -> Precision:
        """The same recipe where Transformer Engine is not wanted: to read a run on any machine."""
        return replace(self, name="fp8") if self.name == "fp8_te" else self

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of parameters and activations."""
        return torch.float32 if self.name == "fp32" else torch.bfloat16

    @property
    def reads_tiles(self) -> bool:
        """Whether `linear` takes what a norm has quantised; Transformer Engine quantises by itself."""
        return self.name == "fp8"

    def gradient_in_tiles(self) -> GradientTiles[Fp8Gradient] | None:
        """Where a `swiglu_linear` leaves the gradient of its input for the `linear` before it; None: with autograd."""
        return GradientTiles() if self.reads_tiles and self.cache_swiglu_input else None

    def linear(self, x: LinearInput, weight: Tensor, *, gradient: GradientTiles[Fp8Gradient] | None = None) -> Tensor:
        """`x @ weight.T` by the recipe: [..., in] x [out, in] -> [..., out]."""
        if self.name == "fp8":
            return fp8_linear(x, weight, power_of_two=self.power_of_two_scales, gradient=gradient)
        assert isinstance(x, Tensor), "only an FP8 linear reads tiles"
        if self.name == "fp8_te":
            return te_linear(x, weight)
        return linear(x, weight)

    def linear_of_kept(self, x: Tensor, weight: Tensor, give_back: Callable[[Tensor], object] | None = None) -> Tensor:
        """`linear` of an input that the operation before it needs in backward, too: attention's output.

        That operation keeps it in full, or else takes it from `give_back` as this linear has kept it, in E5M6.
        """
        if give_back is not None:
            return fp8_linear_e5m6(x, weight, power_of_two=self.power_of_two_scales, give_back=give_back)
        if self.name == "fp8":
            return fp8_linear_of_kept(x, weight, power_of_two=self.power_of_two_scales)
        if self.name == "fp8_te":
            return te_linear(x, weight, keep_input=True)
        return self.linear(x, weight)

    def grouped_linear(self, x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """One linear per expert: [rows, in] x [experts, out, in] -> [rows, out]; rows grouped by expert."""
        if self.name == "fp8":
            return grouped_fp8_linear(x, weight, group_ends, power_of_two=self.power_of_two_scales)
        if self.name == "fp8_te":
            return te_grouped_linear(x, weight, group_ends)
        return grouped_linear(x, weight, group_ends)

    def swiglu_linear(
        self, gate_up: Tensor, weight: Tensor, *, gradient: GradientTiles[Fp8Gradient] | None = None
    ) -> Tensor:
        """Down-projection of a dense FFN: [..., 2 * inter] x [out, inter] -> [..., out]."""
        if self.name == "fp8" and self.cache_swiglu_input:
            return fp8_swiglu_linear(gate_up, weight, power_of_two=self.power_of_two_scales, gradient=gradient)
        return self.linear(swiglu(gate_up), weight)

    def grouped_swiglu_linear(self, gate_up: Tensor, gates: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """Down-projections of the experts: [rows, 2 * inter], [rows] x [experts, out, inter] -> [rows, out]."""
        if self.name == "fp8" and self.cache_swiglu_input:
            power_of_two = self.power_of_two_scales
            return grouped_fp8_swiglu_linear(gate_up, gates, weight, group_ends, power_of_two=power_of_two)
        return self.grouped_linear(gated_swiglu(gate_up, gates), weight, group_ends)

    def experts(self, dispatched: Dispatched, gate_up: Tensor, down: Tensor) -> Tensor:
        """Each token's g_i FFN_i, summed over its experts here: -> [tokens, hidden]."""
        if self.reads_tiles and self.cache_swiglu_input:
            return fp8_experts(dispatched, gate_up, down, power_of_two=self.power_of_two_scales)
        tokens, grouping = dispatched.tokens, dispatched.grouping
        tokens = tokens if isinstance(tokens, Tensor) else dequantize_carried(tokens)
        rows = self.grouped_linear(group_tokens(tokens, grouping), gate_up, grouping.group_ends)
        rows = self.grouped_swiglu_linear(rows, dispatched.gates, down, grouping.group_ends)
        sums = combine_tokens(rows, grouping)
        return sums if dispatched.gradient is None else dequantize_gradient(sums, dispatched.gradient)

    def high(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear that stays in the dtype of `x`: head, `eh_proj`."""
        return linear(x, weight)

    def fp32(self, x: Tensor, weight: Tensor, norm: KeptNorm | None = None) -> Tensor:
        """A linear that is FP32 whatever `x` is, the router; `norm` makes x again in backward."""
        return router_linear(x, weight, norm)
