"""What a configuration says of the kernels: who computes on a GPU, and how far YaRN stretches RoPE.

A file of its own: the configuration of a run is read without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# gluon: FP8 products in Gluon on Hopper, all else in Triton. portable: those in Triton too. reference: plain torch.
# deepgemm: as gluon, but the products that `kernels.deepgemm.choose` found to be faster there.
Backend = Literal["gluon", "portable", "reference", "deepgemm"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's parameters under their Hugging Face names."""

    factor: float  # how many times longer the context becomes
    original_max_position_embeddings: int  # context length before stretching, tokens
    beta_fast: float  # pairs that turn at least this often within the original context keep their frequency
    beta_slow: float  # pairs that turn at most this often are slowed by `factor`
    mscale: float  # weight of ln(factor) in the numerator of the cos/sin factor
    mscale_all_dim: float  # the same in its denominator and in the softmax factor; 0 leaves the softmax alone
