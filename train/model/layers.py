"""The modules that every room of the model shares: a bias-free linear, RMSNorm, embedding, SwiGLU FFN.

Shapes: `x` is [..., hidden]. Each module owns its parameters and hands the arithmetic to `kernels`.
Initial values are set afterwards, by parameter name (`init.py`); construction only allocates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.embedding import embedding
from kernels.rmsnorm import rmsnorm
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


class KeptLinear(Linear):
    """A linear of an input that another operation keeps for backward in full: `o_proj`, of attention's output."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.precision.linear_of_kept(x, self.weight)


class SwigluLinear(Linear):
    """`y = swiglu(gate_up) W^T`, a down-projection; fused, because FP8 may keep `gate_up` alone for backward."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 * in_features] -> [..., out_features]."""
        return self.precision.swiglu_linear(gate_up, self.weight)


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


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, FP32 inside."""

    def __init__(self, dim: int, eps: float, precision: Precision) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=precision.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rmsnorm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU FFN with gate and up projection fused: W_down(silu(W_gate x) * W_up x).

    `gate_up_proj` is [2 * intermediate, hidden]: gate rows first.
    """

    def __init__(self, config: ModelConfig, intermediate_size: int, precision: Precision) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * intermediate_size, precision)
        self.down_proj = SwigluLinear(intermediate_size, config.hidden_size, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        down: Tensor = self.down_proj(self.gate_up_proj(x))
        return down
