"""Which implementation of an operator runs: Triton, Gluon for Hopper, or the reference in plain torch.

A tensor on a CPU always takes the reference. On a GPU the kernels of `kernels/gpu/` run, unless the environment says
`V3FP8_REFERENCE=1`, to find out whether a kernel is to blame. Nothing is tuned at run time: a configuration is a
function of shapes, and two runs of one program launch the same code.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

# Set to 1: every operator computes by its reference on every device.
REFERENCE_VARIABLE = "V3FP8_REFERENCE"

# FP8 tensor cores exist from compute capability 8.9 on; the Gluon GEMMs are written for 9.0 alone.
FIRST_WITH_FP8 = (8, 9)
HOPPER = (9, 0)

_capability = functools.cache(torch.cuda.get_device_capability)
_properties = functools.cache(torch.cuda.get_device_properties)


def use_triton(x: Tensor) -> bool:
    """Whether the kernels of `kernels/gpu/` may run on this tensor's device."""
    wanted = x.is_cuda and os.environ.get(REFERENCE_VARIABLE) != "1"
    return wanted and _capability(x.get_device()) >= FIRST_WITH_FP8


def is_hopper(x: Tensor) -> bool:
    """Whether this tensor lives on a GPU of compute capability 9.0 (H100, H200, H800, GH200)."""
    return x.is_cuda and _capability(x.get_device()) == HOPPER


def multiprocessors(x: Tensor) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor; 132, an H100's, for a CPU tensor."""
    return _properties(x.get_device()).multi_processor_count if x.is_cuda else 132


def shared_memory_bytes(x: Tensor) -> int:
    """Most shared memory of a program on this tensor's device; an H100's for a CPU tensor."""
    # torch's stub does not know this property.
    return _properties(x.get_device()).shared_memory_per_block_optin if x.is_cuda else 232448  # type: ignore[attr-defined]
