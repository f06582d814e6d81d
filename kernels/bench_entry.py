"""One row of the kernel table: an operation, its peer, and what parity between them means.

A kernel file ends with `BENCH: tuple[Bench, ...]`; `train.studies.bench.table` gathers them, checks parity, then
times both sides on the same inputs. The dataclass lives apart from the table so that kernel files can import
it without a cycle. It holds no measuring code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bench:
    """One operation to compare with a peer on the same inputs.

    Args:
        name: row title, unique in the table, e.g. "rmsnorm".
        make_inputs: builds the positional inputs of `run` and `peer` on a device, seeded.
        run: our function; returns one tensor.
        peer: the function we compare with; returns a tensor of the same shape.
        peer_name: what the peer is, e.g. "torch.nn.functional.rms_norm".
        tolerance: relative Frobenius error of run against peer that still counts as parity.
        flops: floating point operations of one call of `run`; 0 where the bound is memory.
        bytes: bytes read and written by one ideal call of `run`.
    """

    name: str
    make_inputs: Callable[[torch.device], tuple[Any, ...]]
    run: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    peer_name: str
    tolerance: float
    flops: float
    bytes: float
