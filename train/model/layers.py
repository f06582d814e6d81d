"""The modules that every room of the model shares: a bias-free linear, RMSNorm, embedding, SwiGLU FFN.

Shapes: `x` is [..., hidden]. Each module owns its parameters and hands the arithmetic to `kernels`.
Initial values are set afterwards, by parameter name (`init.py`); construction only allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.embedding import embedding
from kernels.formats import GradientTiles
from kernels.fp8_linear import Fp8Gradient, LinearInput
from kernels.rmsnorm import KeptNorm, add_rmsnorm
from train.model.config import ModelConfig
from train.model.precision import Precision


class Linear(nn.Module):
    """`y = x W^T` by the run's recipe. W is [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=precision.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.precision.linear(x, self.weight)


class NormedLinear(Linear):
    """A linear right after a norm, which may have quantised for it; with `gradient` that of its output comes there."""

    def forward(self, x: LinearInput, gradient: GradientTiles[Fp8Gradient] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.precision.linear(x, self.weight, gradient=gradient)


class KeptLinear(Linear):
    """A linear of an input that the operation before it needs in backward, too: `o_proj`, of attention's output."""

    def forward(self, x: Tensor, give_back: Callable[[Tensor], object] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]; with `give_back` it keeps x for both, and gives it back."""
        return self.precision.linear_of_kept(x, self.weight, give_back)


class SwigluLinear(Linear):
    """`y = swiglu(gate_up) W^T`, a down-projection; fused, because FP8 may keep `gate_up` alone for backward."""

    def forward(self, gate_up: Tensor, gradient: GradientTiles[Fp8Gradient] | None = None) -> Tensor:
        """[..., 2 * in_features] -> [..., out_features]; with `gradient` that of gate_up is left there."""
        return self.precision.swiglu_linear(gate_up, self.weight, gradient=gradient)


class HighLinear(Linear):
    """A linear that is never FP8: output head and `eh_proj` (§3.3.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.precision.high(x, self.weight)


class Embedding(nn.Module):
    """Token embedding; the gradient is summed over tokens in FP32."""

    def __init__(self, vocab_size: int, hidden_size: int, precision: Precision) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=precision.dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[sequences, tokens] int64 -> [sequences, tokens, hidden]."""
        return embedding(input_ids, self.weight)


@dataclass(frozen=True)
class Normed:
    """What a norm of the residual stream hands on; each entry is for one reader."""

    residual: Tensor  # [..., dim], the sum that was normalised
    plain: tuple[Tensor, ...]  # [..., dim]
    linears: tuple[LinearInput, ...]  # [..., dim], in FP8 tiles where the recipe's linears read them
    kept: KeptNorm | None  # with tiles: what makes the norm again in backward


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, FP32 inside."""

    def __init__(self, dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.eps, self.precision = eps, precision
        self.weight = nn.Parameter(torch.empty(dim, dtype=precision.dtype))

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """[..., dim] (plus delta) -> [..., dim]."""
        return self.of_sum(x, delta, plain=1).plain[0]

    def for_linear(self, x: Tensor) -> LinearInput:
        """[..., dim] -> the same, for one linear."""
        return self.of_sum(x, None, linears=1).linears[0]

    def of_sum(self, residual: Tensor, delta: Tensor | None, *, plain: int = 0, linears: int = 0) -> Normed:
        """Add and normalise for so many readers; those of plain numbers run before the linears."""
        tiles = linears if self.precision.reads_tiles else 0
        total, numbers, carried = add_rmsnorm(
            residual, delta, self.weight, self.eps, plain=plain + linears - tiles, tiles=tiles,
            power_of_two=self.precision.power_of_two_scales,
        )  # fmt: skip
        kept = carried[0].norm if carried else None
        return Normed(total, numbers[:plain], (*numbers[plain:], *carried), kept)


class FeedForward(nn.Module):
    """SwiGLU FFN with gate and up projection fused: W_down(silu(W_gate x) * W_up x).

    `gate_up_proj` is [2 * intermediate, hidden]: gate rows first.
    """

    def __init__(self, config: ModelConfig, intermediate_size: int, precision: Precision) -> None:
        super().__init__()
        self.gate_up_proj = NormedLinear(config.hidden_size, 2 * intermediate_size, precision)
        self.down_proj = SwigluLinear(intermediate_size, config.hidden_size, precision)

    def forward(self, x: LinearInput) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        gradient = self.down_proj.precision.gradient_in_tiles()
        down: Tensor = self.down_proj(self.gate_up_proj(x, gradient), gradient)
        return down
