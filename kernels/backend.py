"""Which implementation of an operator runs: Triton, Gluon for Hopper, DeepGEMM, or the reference in plain torch.

A tensor on a CPU always takes the reference. On a GPU the kernels of `kernels/gpu/` run, unless `use_backend` says
otherwise for this process (`kernels.backend` of the configuration), to find out whether a kernel is to blame. Nothing
is tuned at run time: a configuration is a function of shapes, and two runs of one program launch the same code. Only
`deepgemm` measures, once, at the start (`kernels/deepgemm.py`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.config import Backend

_OF_PROCESS: dict[str, Backend] = {"backend": "gluon"}

# FP8 tensor cores exist from compute capability 8.9 on; the Gluon GEMMs are written for 9.0 alone.
FIRST_WITH_FP8 = (8, 9)
HOPPER = (9, 0)

_capability = functools.cache(torch.cuda.get_device_capability)
_properties = functools.cache(torch.cuda.get_device_properties)


def use_backend(name: Backend) -> None:
    """Choose for every call that this process makes from now on."""
    _OF_PROCESS["backend"] = name


def use_triton(x: Tensor) -> bool:
    """Whether the kernels of `kernels/gpu/` may run on this tensor's device."""
    return x.is_cuda and _OF_PROCESS["backend"] != "reference" and _capability(x.get_device()) >= FIRST_WITH_FP8


def use_gluon(x: Tensor) -> bool:
    """Whether the Gluon products may: on compute capability 9.0 (H100, H200, H800, GH200)."""
    return x.is_cuda and _OF_PROCESS["backend"] in ("gluon", "deepgemm") and _capability(x.get_device()) == HOPPER


def use_deepgemm() -> bool:
    """Whether this process asked for DeepGEMM."""
    return _OF_PROCESS["backend"] == "deepgemm"


def multiprocessors(x: Tensor) -> int:
    """How many programs a persistent kernel starts: one per multiprocessor; 132, an H100's, for a CPU tensor."""
    return _properties(x.get_device()).multi_processor_count if x.is_cuda else 132


def shared_memory_bytes(x: Tensor) -> int:
    """Most shared memory of a program on this tensor's device; an H100's for a CPU tensor."""
    # torch's stub does not know this property.
    return _properties(x.get_device()).shared_memory_per_block_optin if x.is_cuda else 232448  # type: ignore[attr-defined]
