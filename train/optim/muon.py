"""Muon: the momentum of a matrix, orthogonalised, is its update (arXiv:2502.16982 §2; arXiv:2507.20534 §2.1).

    M <- mu M + g                              momentum, elementwise on the shard of each rank
    U  = g + mu M                              Nesterov's look ahead, in the gradient's place
    O  = NewtonSchulz(U)                       about U V^T of the singular value decomposition; a whole matrix
    W <- W - lr (0.2 sqrt(max(rows, cols)) O + weight_decay W)

An element of O has a root mean square of about 1 / sqrt(max(rows, cols)), AdamW's update one of 0.2 to 0.4: with the
factor, AdamW's learning rate and decay carry over. Which parameters: the linears and experts, `eh_proj` of MTP
included. Embedding, head, router and norms stay with AdamW. A matrix is one tensor of the released checkpoint, not our
fused ones: q_a | kv_a (latent and rope key together, as released), gate | up, each expert alone. q_b and kv_b are taken
whole, as the reports have it, and not head by head.

Under ZeRO-1: `parallel/matrices.py`. Shapes: matrices [rows, cols].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from parallel.matrices import Matrix, MatrixExchange
from parallel.shards import Shard
from parallel.zero import GradientBuckets
from train.model.config import ModelConfig
from train.model.layers import Linear
from train.model.moe import Experts
from train.model.transformer import Transformer
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig
from train.optim.newton_schulz import COEFFICIENTS, STEPS, orthogonalize_flops
from train.optim.offload import Segment

# Root mean square of an update's elements, as AdamW's: arXiv:2502.16982 §2.2.
UPDATE_RMS = 0.2
_NORM_EPS = 1e-7


def orthogonalize(matrix: Tensor) -> Tensor:
    """[rows, cols] fp32 -> the same singular vectors with singular values near 1, fp32; zeros stay zeros.

    In BF16 on a GPU: the values are only near 1 in any case. In FP32 on a CPU, which is no faster in BF16 unless it
    has instructions for it, and where tests ask for bits.
    """
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if matrix.is_cuda else torch.float32
    tall = matrix.shape[0] > matrix.shape[1]
    # So that products of rows with rows are the small ones.
    wide = matrix.mT if tall else matrix
    # Frobenius: no singular value is larger.
    x = (wide / (wide.norm() + _NORM_EPS)).to(dtype).contiguous()
    for _ in range(STEPS):
        gram = x @ x.mT  # [smaller, smaller]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    orthogonal: Tensor = x.mT if tall else x
    return orthogonal.float()


def rms_matched(matrix: Tensor) -> Tensor:
    """The update of a matrix in units of the learning rate, [rows, cols] fp32."""
    return orthogonalize(matrix).mul_(UPDATE_RMS * math.sqrt(max(matrix.shape)))


def matrices_of(name: str, shape: Sequence[int], config: ModelConfig) -> tuple[Matrix, ...]:
    """The matrices that a linear [out, in], or this rank's stack of experts [experts, out, in], is made of."""
    *stack, rows, cols = shape
    cuts: list[int] = []
    if "q_kv_a_proj" in name:
        cuts = [config.q_width]
    elif "gate_up_proj" in name:
        cuts = [rows // 2]
    ends = [0, *cuts, rows]
    return tuple(
        Matrix(name, (index * rows + start) * cols, stop - start, cols, orthogonalize_flops(stop - start, cols))
        for index in range(math.prod(stack))
        for start, stop in pairwise(ends)
    )


def muon_matrices(model: Transformer) -> dict[str, tuple[Matrix, ...]]:
    """Parameter name -> its matrices, of the parameters that Muon moves."""
    return {
        f"{module_name}.{leaf}": matrices_of(f"{module_name}.{leaf}", parameter.shape, model.config)
        for module_name, module in model.named_modules()
        if isinstance(module, Linear | Experts) and module_name != "lm_head"
        for leaf, parameter in module.named_parameters(recurse=False)
    }


class Muon(AdamW):
    """Muon for matrices, AdamW for the other parameters; owns masters and moments.

    Args:
        buckets, config, flat_shards: as `AdamW`.
        matrices: by parameter; its name may be missing on this rank.
    """

    def __init__(
        self,
        buckets: Sequence[GradientBuckets],
        config: OptimConfig,
        flat_shards: Mapping[str, Shard] | None = None,
        *,
        matrices: Mapping[str, Sequence[Matrix]],
    ) -> None:
        self._matrices = matrices
        super().__init__(buckets, config, flat_shards)
        self.exchanges = [
            MatrixExchange(bucket, [each for name in bucket.parameters for each in matrices.get(name, ())])
            for bucket in self.buckets
        ]

    def moments_of(self, name: str) -> tuple[str, ...]:
        """The moments that a parameter has."""
        return ("momentum",) if name in self._matrices else super().moments_of(name)

    @torch.no_grad()
    def step(self, *, lr: float, step: int, row_factors: Mapping[str, Tensor] | None = None) -> None:
        """As AdamW's; afterwards the gradients of matrices are their updates."""
        mu = self.config.momentum
        for state in self._states.values():
            if (momentum := state.moments.get("momentum")) is not None:
                moved = momentum.float().mul_(mu).add_(state.held.grad)
                state.held.grad.add_(moved, alpha=mu)
                momentum.copy_(moved)
        for exchange in self.exchanges:
            exchange.apply(rms_matched)
        super().step(lr=lr, step=step, row_factors=row_factors)

    def _move(self, segment: Segment, grad: Tensor, weight: Tensor, *, lr: float, step: int) -> None:
        if segment.name not in self._matrices:
            super()._move(segment, grad, weight, lr=lr, step=step)
            return
        master = segment.tensors[0]
        master.mul_(1 - lr * self.config.weight_decay).add_(grad, alpha=-lr)
        weight.copy_(master)
