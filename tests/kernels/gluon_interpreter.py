"""Runs Gluon kernels for Hopper on the CPU, to check warp-specialised TMA and wgmma kernels without a GPU.

    with interpret():                                   # the numbers, and the order of shared-memory accesses
        kernel[grid](*cpu_arguments, **constexprs)
    with interpret(**ADVERSARIAL, seed=3):              # the same, with everything asynchronous as late as it may be
        kernel[grid](*cpu_arguments, **constexprs)

Inside the context a launch executes the Python function behind `@gluon.jit`, unchanged, with the names it uses (`gl`,
`tma`, `mbarrier`, wgmma, `range`, other `@gluon.jit` functions, in its own module or another) replaced by the emulation
in the `gluon_*.py` files beside this one; the launcher around it needs no change. Two nets catch a broken hand-over of
shared memory: bad numbers, since whatever may be overwritten is NaN by then, and a happens-before check, which does not
need the bad schedule to occur. What went wrong is one of the errors named below, with the kernel's function and line.

Not emulated: what the compiler does with the source. Layouts, swizzling, registers and warp counts are not checked,
and Python accepts what the compiler refuses: compile the kernel as well. Precision is that of fp32 sums. Only what
kernels of ours call is emulated; another operation raises NotImplementedError when called, another argument TypeError.
A kernel that passes here is right in its logic; how fast it is, and what the hardware does beyond the rules, only a
GPU can tell.

The kernel's tensors are CPU tensors and its descriptors `TensorDescriptor`s of them. The interpreter patches the
launch of every Gluon kernel in the process, so two threads must not interpret at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.runtime.jit import KernelInterface

from tests.kernels.gluon_hopper import HOPPER_OPERATIONS, MBARRIER_OPERATIONS, TMA_OPERATIONS
from tests.kernels.gluon_machine import Machine, Options, Program
from tests.kernels.gluon_operations import OPERATIONS, kernel_range
from tests.kernels.gluon_values import KERNEL_MARK, Int, Pointer, width

# Everything as late as the rules allow, in an order that the seed decides.
ADVERSARIAL: dict[str, Any] = {"tma": "late", "mma": "late", "lazy_loads": "wgmma", "switch": 0.3}
# A Gluon function, however it was imported -> its emulation.
STAND_INS = {
    id(getattr(module, name)): operation
    for module, operations in (
        (gl, OPERATIONS),
        (hopper, HOPPER_OPERATIONS),
        (tma, TMA_OPERATIONS),
        (mbarrier, MBARRIER_OPERATIONS),
    )
    for name, operation in operations.items()
}


@contextlib.contextmanager
def interpret(**options: Any) -> Iterator[None]:
    """Within this context, launching a Gluon kernel runs it here, on CPU tensors.

    Args:
        **options: fields of `Options` in `tests/kernels/gluon_machine.py`, which explains them: seed, tma, mma,
            lazy_loads, switch, races, programs.
    """
    chosen = Options(**options)
    compile_and_launch = GluonJITFunction.run

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], **named: Any) -> None:
        _launch(kernel, grid, arguments=_arguments(kernel, args, named), options=chosen)

    GluonJITFunction.run = run
    try:
        yield
    finally:
        GluonJITFunction.run = compile_and_launch


def _launch(kernel: Any, grid: tuple[int, ...], *, arguments: dict[str, Any], options: Options) -> None:
    body = functools.partial(_Names().function(kernel.fn), **arguments)
    extents = (*grid, 1, 1)[:3]
    # x varies fastest.
    places = [place[::-1] for place in itertools.product(*map(range, extents[::-1]))]
    chosen = range(len(places)) if options.programs is None else options.programs
    Machine(options).run([Program(places[position], grid=extents, body=body) for position in chosen])


def _arguments(kernel: Any, args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Each parameter's value as the kernel sees it; options of the launch (`num_warps`) are dropped."""
    own = {name: value for name, value in named.items() if name in kernel.arg_names}
    bound = kernel.signature.bind(*args, **own)
    bound.apply_defaults()
    return {
        parameter.name: _argument(bound.arguments[parameter.name], is_constexpr=parameter.is_constexpr)
        for parameter in kernel.params
    }


def _argument(value: Any, *, is_constexpr: bool) -> Any:
    if is_constexpr:
        return value
    if isinstance(value, torch.Tensor):
        return Pointer.to_first_element(value)
    if hasattr(value, "block_shape"):
        if value.padding != "zero":
            raise NotImplementedError(f"TMA padding {value.padding!r} is not emulated")
        return value
    if isinstance(value, int):
        return Int(value, width(value))
    raise NotImplementedError(f"an argument {value!r} is not emulated")


class _Module:
    """A module as a kernel sees it, everything that it holds translated."""

    def __init__(self, module: types.ModuleType, names: _Names) -> None:
        self._module, self._names = module, names

    def __getattr__(self, name: str) -> Any:
        return self._names.translated(getattr(self._module, name))


class _Names:
    """What the global names of a kernel and of the functions it calls stand for, module by module."""

    def __init__(self) -> None:
        self._globals: dict[int, dict[str, Any]] = {}

    def function(self, function: types.FunctionType) -> types.FunctionType:
        """The Python function behind a `@gluon.jit` function, over the emulated globals of its own module."""
        emulated = self._translated_globals(function.__globals__)
        return types.FunctionType(function.__code__, emulated, function.__name__, function.__defaults__)

    def _translated_globals(self, originals: dict[str, Any]) -> dict[str, Any]:
        if id(originals) not in self._globals:
            names = self._globals[id(originals)] = {**originals, "range": kernel_range, KERNEL_MARK: True}
            names.update({name: self.translated(value) for name, value in originals.items()})
        return self._globals[id(originals)]

    def translated(self, value: Any) -> Any:
        """What a kernel sees for a global."""
        if isinstance(value, gl.constexpr):
            return value.value
        if isinstance(value, types.ModuleType):
            return _Module(value, self)
        if id(value) in STAND_INS:
            return STAND_INS[id(value)]
        if isinstance(value, GluonJITFunction) and not value.fn.__module__.startswith("triton."):
            return self.function(value.fn)
        if isinstance(value, KernelInterface) or getattr(value, "__triton_builtin__", False):
            return _refusal(getattr(value, "__name__", repr(value)))
        return value


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is not emulated")

    return refuse
