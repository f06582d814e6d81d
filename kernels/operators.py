"""Kernels as named operators of torch, `v3fp8::<kernel>`: one call for everything that watches torch.

- `FakeTensorMode` runs the *fake* version, which only allocates the outputs: one rank of 2,048 can be planned on a
  laptop, without the FP32 temporaries of the reference. What the host reads (group ends) only the real version reads.
- `FlopCounterMode(custom_mapping=FLOP_FORMULAS)` counts a kernel's FLOPs from its shapes.
- torch chooses by device: the reference everywhere, and on CUDA the launcher of the same name in `kernels/gpu/`,
  imported at its first call, unless `kernels.backend` sends the call back to the reference.

No operator is differentiable: all are called inside `autograd.Function` or on detached tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from kernels.backend import use_triton

NAMESPACE = "v3fp8"
# Operator -> FLOPs from its arguments, with every tensor replaced by its shape, and `out_shape`.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {}
# Operator's name -> the module of `kernels/gpu/` that holds its launcher.
LAUNCHERS: dict[str, str] = {}

# `torch.library.custom_op` does the same but imports torch's compiler at the first call, 1.4 s in every process, and
# costs 7 us a call where this costs 1.5 (measured, torch 2.13, one core of an AMD EPYC).
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Params = ParamSpec("Params")
Result = TypeVar("Result")


def operator(
    name: str,
    function: Callable[Params, Result],
    *,
    fake: Callable[Params, Result],
    flops: Callable[..., int] | None = None,
    gpu: str | None = None,
    mutates: Iterable[str] = (),
) -> Callable[Params, Result]:
    """Register a function of tensors as `v3fp8::<name>`.

    Args:
        name: unique; the kernel's public name.
        function: annotated with Tensor, int, float, bool, torch.dtype; its outputs are new tensors, no views of inputs.
        fake: same arguments; allocates outputs of the same shapes, dtypes and strides, and reads no values.
        flops: FLOPs of one call from (*arguments as shapes, out_shape=...); None where it multiplies no matrices.
        gpu: the module of `kernels/gpu/` whose function `name` computes the same on a GPU; None: the reference does.
        mutates: names of the arguments that it changes in place.
    Returns:
        The operator, to be called as `function`. Call it on detached tensors.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=tuple(mutates)))
    # One implementation for every device that has no kernel of its own.
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    if gpu is not None:
        LAUNCHERS[name] = f"kernels.gpu.{gpu}"
        _LIBRARY.impl(name, _on_gpu(name, function), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None:
        FLOP_FORMULAS[packet] = flops
    return cast(Callable[Params, Result], packet.default)


def _on_gpu(name: str, reference: Callable[Params, Result]) -> Callable[Params, Result]:
    """The launcher, found at its first call; the reference where `kernels.backend` says so, and for FP64."""
    launcher: Callable[Params, Result] | None = None

    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        nonlocal launcher
        if not use_triton(cast(torch.Tensor, args[0])) or _asks_for_fp64(args):
            return reference(*args, **kwargs)
        if launcher is None:
            launcher = getattr(importlib.import_module(LAUNCHERS[name]), name)
        return launcher(*args, **kwargs)

    return run


def _asks_for_fp64(args: tuple[object, ...]) -> bool:
    """Whether a tensor is FP64, or a result shall be."""
    dtypes = (each.dtype if isinstance(each, torch.Tensor) else each for each in args)
    return any(dtype is torch.float64 for dtype in dtypes)
