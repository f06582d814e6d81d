"""The linear maps of the four precisions that a run can have (arXiv:2412.19437 §3.3); `precision_config.py` says which.

Embedding, output head, router, norms, attention core and `eh_proj` are never FP8 (§3.3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.experts_in_chunks import fp8_experts_in_chunks
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
from kernels.permute import Dispatched, Grouping, combine_tokens, group_tokens
from kernels.quantize import dequantize_carried, dequantize_gradient
from kernels.rmsnorm import KeptNorm
from kernels.router_linear import router_linear
from kernels.swiglu import gated_swiglu, swiglu
from train.model.precision_config import PrecisionConfig
from train.model.te_linear import te_grouped_linear, te_linear


class Precision(PrecisionConfig):
    """The arithmetic of a precision."""

    @classmethod
    def of(cls, config: PrecisionConfig) -> Precision:
        """What a configuration asks for; arithmetic itself may stand in a configuration, and is left as it is."""
        return config if isinstance(config, Precision) else cls(**vars(config))

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

    def experts(self, dispatched: Dispatched, gate_up: Tensor, down: Tensor, *, max_rows: int | None = None) -> Tensor:
        """Each token's g_i FFN_i, summed over its experts here: -> [tokens, hidden].

        With more than `max_rows` rows only the tokens are kept for backward, which makes the rest again; the same bits.
        """
        grouping, power_of_two = dispatched.grouping, self.power_of_two_scales
        beyond = max_rows is not None and grouping.num_rows > max_rows
        if self.reads_tiles and self.cache_swiglu_input:
            if max_rows is not None and beyond:
                return fp8_experts_in_chunks(dispatched, gate_up, down, max_rows=max_rows, power_of_two=power_of_two)
            return fp8_experts(dispatched, gate_up, down, power_of_two=power_of_two)
        tokens = dispatched.tokens
        tokens = tokens if isinstance(tokens, Tensor) else dequantize_carried(tokens)
        parts = (tokens, dispatched.gates, grouping, gate_up, down)
        if beyond and torch.is_grad_enabled():
            # Whole: a product of other sizes may sum in another order where it is not ours.
            sums: Tensor = checkpoint(self._experts_apart, *parts, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = self._experts_apart(*parts)
        return sums if dispatched.gradient is None else dequantize_gradient(sums, dispatched.gradient)

    def _experts_apart(
        self, tokens: Tensor, gates: Tensor, grouping: Grouping, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """The steps of `experts` as operations of their own."""
        rows = self.grouped_linear(group_tokens(tokens, grouping), gate_up, grouping.group_ends)
        rows = self.grouped_swiglu_linear(rows, gates, down, grouping.group_ends)
        return combine_tokens(rows, grouping)

    def high(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear that stays in the dtype of `x`: head, `eh_proj`."""
        return linear(x, weight)

    def fp32(self, x: Tensor, weight: Tensor, norm: KeptNorm | None = None) -> Tensor:
        """A linear that is FP32 whatever `x` is, the router; `norm` makes x again in backward."""
        return router_linear(x, weight, norm)
