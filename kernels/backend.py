"""Which implementation of an operator runs: Triton, Gluon for Hopper, or the reference in plain torch.

A tensor on a CPU always takes the reference. On a GPU the kernels of `kernels/gpu/` run, unless the environment says
`V3FP8_REFERENCE=1`, to find out whether a kernel is to blame. Nothing is tuned at run time: a configuration is a
function of shapes, and two runs of one program launch the same code.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

# Set to 1: every operator computes by its reference on every device.
REFERENCE_VARIABLE = "V3FP8_REFERENCE"

# FP8 tensor cores exist from compute capability 8.9 on; the Gluon GEMMs are written for 9.0 alone.
FIRST_WITH_FP8 = (8, 9)
HOPPER = (9, 0)


def use_triton(x: Tensor) -> bool:
    """Whether the kernels of `kernels/gpu/` may run on this tensor's device."""
    return x.is_cuda and not _reference_only() and _capability(x.get_device()) >= FIRST_WITH_FP8


def is_hopper(x: Tensor) -> bool:
    """Whether this tensor lives on a GPU of compute capability 9.0 (H100, H200, H800, GH200)."""
    return x.is_cuda and _capability(x.get_device()) == HOPPER


def multiprocessors(x: Tensor) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor; 132, an H100's, for a CPU tensor."""
    return _multiprocessors(x.get_device()) if x.is_cuda else 132


def shared_memory_bytes(x: Tensor) -> int:
    """Most shared memory of a program on this tensor's device; an H100's for a CPU tensor."""
    return _shared_memory_bytes(x.get_device()) if x.is_cuda else 232448


def _reference_only() -> bool:
    return os.environ.get(REFERENCE_VARIABLE) == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _shared_memory_bytes(index: int) -> int:
    # torch's stub does not know this property.
    properties: Any = torch.cuda.get_device_properties(index)
    return int(properties.shared_memory_per_block_optin)
