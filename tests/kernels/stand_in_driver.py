"""A stand-in for the GPU driver: launchers run on CPU tensors up to the launch, and what they launch is kept.

Triton asks its active driver for the device, the loader and the launcher. This one says "compute capability 9.0, 132
multiprocessors" (or another capability), so that every kernel is specialised and compiled for sm_90a as on an H100; at
the place of the launch it checks what the real driver would refuse, and writes the launch down. `torch.empty` tensors
of full size cost nothing, for they are not touched.

It loads nothing and runs nothing. Install it in a process of its own, before the first launch: a driver is global, and
a process with TRITON_INTERPRET=1 has no kernels to compile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MULTIPROCESSORS = 132
SHARED_BYTES_MAX = 232448
# Limits of cuTensorMapEncodeTiled (CUDA driver API, "Tensor Map Object Management").
BOX_DIM_MAX, STRIDE_BYTES_MAX, DIM_MAX = 256, 2**40, 2**32
# Swizzle modes as Triton numbers them: none, 32, 64, 128 bytes; the innermost box dim may not be wider.
SWIZZLE_BYTES = (None, 32, 64, 128)


@dataclass
class Launch:
    """One kernel launch: what was compiled for it (known when the launch returns), and over which grid."""

    kernel: Any
    grid: tuple[int, int, int]


class StandInDriver:
    """What Triton's runtime asks of a driver. `launches` holds every launch since it was last emptied."""

    def __init__(self, capability: int, shared_bytes: int) -> None:
        self.capability, self.shared_bytes = capability, shared_bytes
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes, "multiprocessor_count": MULTIPROCESSORS}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """A module, a function, registers, spills, threads: stand-ins but for the last, the hardware's most."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls in place of cuLaunchKernelEx."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
            for axis, extent, end in (("x", grid_x, 2**31), ("y", grid_y, 2**16), ("z", grid_z, 2**16)):
                assert 1 <= extent < end, f"grid {axis} is {extent}; the hardware takes {end - 1}"
            descriptors = [argument for argument in rest if hasattr(argument, "block_shape")]
            for descriptor, box in zip(descriptors, getattr(metadata, "tensordesc_meta", None) or (), strict=True):
                check_descriptor(descriptor, box)
            self.launches.append(Launch(None, (grid_x, grid_y, grid_z)))

        return launch


def install(capability: int = 90, shared_bytes: int = SHARED_BYTES_MAX) -> StandInDriver:
    """Make a stand-in for a GPU of this compute capability (times ten) the active driver of this process."""
    stand_in = StandInDriver(capability, shared_bytes)
    driver.set_active(stand_in)
    original = triton.runtime.jit.JITFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = original(self, *args, **kwargs)
        stand_in.launches[-1].kernel = kernel
        return kernel

    triton.runtime.jit.JITFunction.run = run
    return stand_in


def check_descriptor(descriptor: Any, box: dict[str, Any]) -> None:
    """What cuTensorMapEncodeTiled refuses.

    Args:
        descriptor: Triton's host-side TensorDescriptor.
        box: what the compiler made of it: block_size, swizzle, elem_size.
    Raises:
        AssertionError: with the rule that is broken.
    """
    size = descriptor.base.element_size()
    address = descriptor.base.data_ptr()
    assert address % 16 == 0, f"global address {address:#x} is not a multiple of 16"
    assert all(0 < dim <= DIM_MAX for dim in descriptor.shape), f"dims {list(descriptor.shape)}"
    for stride in descriptor.strides[:-1]:
        in_bytes = stride * size
        assert in_bytes % 16 == 0, f"a stride of {in_bytes} bytes is not a multiple of 16"
        assert in_bytes < STRIDE_BYTES_MAX, f"a stride of {in_bytes} bytes"
    extent = 1 + sum((dim - 1) * stride for dim, stride in zip(descriptor.shape, descriptor.strides, strict=True))
    held = descriptor.base.untyped_storage().nbytes() // size - descriptor.base.storage_offset()
    assert extent <= held, f"the descriptor reaches {extent} elements, the tensor holds {held}"
    block = list(box["block_size"])
    assert all(0 < dim <= BOX_DIM_MAX for dim in block), f"box {block}"
    inner = block[-1] * size
    assert inner % 16 == 0, f"the innermost box dim is {inner} bytes, no multiple of 16"
    span = SWIZZLE_BYTES[box["swizzle"]]
    assert span is None or inner <= span, f"the innermost box dim is {inner} bytes, the swizzle {span}"
    assert math.prod(block) <= math.prod(descriptor.block_shape), (block, descriptor.block_shape)
