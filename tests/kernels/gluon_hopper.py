"""The Hopper operations of an emulated Gluon kernel: TMA copies, mbarriers, the proxy fence, asynchronous wgmma.

A TMA load fills its destination with NaN bytes when it is issued and delivers when it lands: both ends of the time in
which the memory has no valid contents are adversarial at once. A wgmma keeps its result back until a
`warpgroup_mma_wait` retires it, in the order of issue. What the kernel source promises is checked on the way: that
descriptor and buffer agree in shape, type and swizzle, that coordinates are aligned, that `mbarrier.init` is fenced,
and that an unfinished accumulator is not used.

Not emulated: multicast and clusters, predicates, descriptors made inside a kernel, gather and scatter, cp.async,
padding other than zero, wgmma with an operand in registers; the 14-bit accumulation of FP8 wgmma (sums here are fp32,
so a tolerance measured here is too tight for a GPU). Stricter than the hardware: byte counts, unseen phases and missing
fences are errors at once. Looser: one fence of a partition counts for all buffers, a copy lands as a whole, and
`store_wait` also completes the global write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.kernels.gluon_machine import Barrier, now
from tests.kernels.gluon_shared import POISON, Access, Shared
from tests.kernels.gluon_values import Misuse, Race, Tensor, by_name, where

TMA_ALIGNMENT_BYTES = 16
WGMMA_ROWS = 64


def _box(descriptor: Any, coordinates: Sequence[int], shared: Shared) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of a host tensor that a TMA copy meets, and the same part of its shared memory.

    Args:
        descriptor: the host's TensorDescriptor.
        coordinates: of the box's first element; may lie outside the tensor.
        shared: the memory of the whole box.
    """
    block, base = list(descriptor.block_shape), descriptor.base.detach()
    if block != shared.shape or base.dtype != shared.data.dtype or descriptor.layout != shared.allocation.layout:
        raise Misuse(
            f"TMA of a {base.dtype}{block} box, shared memory is {shared.data.dtype}{shared.shape}, "
            f"or the layouts differ, at {where()}"
        )
    first = [int(coordinate) for coordinate in coordinates]
    if len(first) != len(block):
        raise Misuse(f"{len(first)} TMA coordinates for {len(block)} dims, at {where()}")
    if first[-1] * base.element_size() % TMA_ALIGNMENT_BYTES:
        raise Misuse(
            f"TMA innermost coordinate {first[-1]} is not a multiple of {TMA_ALIGNMENT_BYTES} bytes, at {where()}"
        )
    outside = base.as_strided(list(descriptor.shape), list(descriptor.strides))
    inside = shared.data
    for dim, (start, length, extent) in enumerate(zip(first, block, descriptor.shape, strict=True)):
        low = min(max(start, 0), extent)
        length = max(min(start + length, extent) - low, 0)
        outside = outside.narrow(dim, low, length)
        inside = inside.narrow(dim, low - start if length else 0, length)
    return outside, inside


class TmaLoad:
    """A copy into shared memory, announced by a barrier; outside the tensor it delivers zeros."""

    def __init__(self, box: tuple[torch.Tensor, torch.Tensor], barrier: Barrier, *, shared: Shared) -> None:
        partition = now()
        if partition.machine.options.races and barrier.maker.fences <= barrier.fences_before:
            raise Race(f"{barrier.name}: no fence_async_shared between mbarrier.init and the TMA load at {where()}")
        self._box, self._barrier, self._shared = box, barrier, shared
        self._machine, self._clock = partition.machine, partition.release()
        text = f"TMA load at {where()}"
        shared.allocation.access(Access(shared.box, barrier, self._clock, text, writes=True, time=barrier.phase + 1))
        # From now on the old contents may be gone.
        shared.data.view(torch.uint8).fill_(POISON)
        barrier.copies_in_flight += 1
        partition.program.loads[barrier] = barrier.phase + 1
        self._machine.loads_in_flight.append(self)

    def land(self) -> None:
        self._machine.loads_in_flight.remove(self)
        self._shared.data.zero_()
        outside, inside = self._box
        inside.copy_(outside)
        self._barrier.copies_in_flight -= 1
        self._barrier.update(self._clock, expected_bytes=-self._shared.size_bytes)


class TmaStore:
    """A copy from shared memory, which it reads until `store_wait`."""

    def __init__(self, box: tuple[torch.Tensor, torch.Tensor], *, shared: Shared) -> None:
        partition = now()
        self._box, self.landed = box, False
        clock = partition.release()
        self.access = shared.allocation.access(Access(shared.box, partition, clock, f"TMA store at {where()}"))

    def land(self) -> None:
        outside, inside = self._box
        outside.copy_(inside)
        self.landed = True


def async_copy_global_to_shared(
    tensor_desc: Any, coord: Sequence[int], barrier: Shared, result: Shared, *, multicast: bool = False
) -> None:
    partition = now()
    partition.step()
    if multicast:
        raise NotImplementedError("TMA multicast is not emulated")
    load = TmaLoad(_box(tensor_desc, coord, result), barrier.barrier, shared=result)
    if partition.machine.options.tma == "early":
        load.land()


def async_copy_shared_to_global(tensor_desc: Any, coord: Sequence[int], src: Shared) -> None:
    partition = now()
    partition.step()
    store = TmaStore(_box(tensor_desc, coord, src), shared=src)
    partition.unfinished_stores.append(store)
    if partition.machine.options.tma == "early":
        store.land()


def store_wait(pendings: int) -> None:
    """`tma.store_wait`: the oldest stores have read shared memory, and written."""
    partition = now()
    while len(partition.unfinished_stores) > pendings:
        store = partition.unfinished_stores.pop(0)
        if not store.landed:
            store.land()
        store.access.time = partition.clock[partition]
    partition.step()


def init(mbarrier: Shared, count: int) -> None:
    if mbarrier.data.numel() != 1:
        raise Misuse(f"{mbarrier.allocation.name}: a barrier is one int64, this is {mbarrier.shape}, at {where()}")
    mbarrier.allocation.barriers[mbarrier.box] = Barrier(mbarrier.place, count, maker=now())


def expect(mbarrier: Shared, bytes_per_cta: int) -> None:
    """`mbarrier.expect`, which also arrives once."""
    partition = now()
    partition.step()
    mbarrier.barrier.update(partition.release(), arrivals=1, expected_bytes=bytes_per_cta)


def arrive(mbarrier: Shared, *, count: int) -> None:
    partition = now()
    partition.step()
    mbarrier.barrier.update(partition.release(), arrivals=count)
    partition.step()


def wait(mbarrier: Shared, phase: int) -> None:
    partition = now()
    barrier = mbarrier.barrier
    partition.step()
    partition.wait(barrier, int(phase))


def fence_async_shared() -> None:
    """`fence_async_shared`: what this partition wrote to shared memory is now visible to TMA and wgmma."""
    now().fences += 1


def _refuse_unfinished() -> torch.Tensor:
    raise Misuse(f"accumulator of an unfinished wgmma used, at {where()}")


class Accumulator(Tensor):
    """What an asynchronous wgmma returns: only another wgmma or a wait may take it."""

    def __init__(self, result: Tensor) -> None:
        super().__init__(pending=_refuse_unfinished)
        self.result = result


def _unwrapped(value: Any) -> Any:
    return value.result if isinstance(value, Accumulator) else value


def warpgroup_mma(a: Shared, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool = False) -> Tensor:
    """`warpgroup_mma`: a @ b, plus acc if `use_acc`."""
    partition = now()
    partition.step()
    options = partition.machine.options
    if options.lazy_loads != "use":
        # What was loaded before a wgmma is in registers once the wgmma is issued.
        partition.take_loads()
    acc = _unwrapped(acc)
    is_unfinished = acc.pending is _refuse_unfinished
    if (
        a.shape[1] != b.shape[0]
        or a.shape[0] % WGMMA_ROWS
        or (not is_unfinished and acc.shape != [a.shape[0], b.shape[1]])
    ):
        raise Misuse(f"wgmma of {a.shape} and {b.shape}, at {where()}")
    text = f"wgmma at {where()}"
    accesses = [operand.allocation.access(Access(operand.box, partition, partition.clock, text)) for operand in (a, b)]
    # A late wgmma sees what its shared memory holds when it is retired.
    left, right = (operand.data if options.mma == "late" else operand.data.clone() for operand in (a, b))
    result = Tensor(pending=_refuse_unfinished)

    def finish() -> None:
        for access in accesses:
            access.time = partition.clock[partition]
        product = left.float() @ right.float()
        result.settle(product + acc.value if use_acc else product)

    partition.unfinished_mmas.append(finish)
    return Accumulator(result) if is_async else warpgroup_mma_wait(0, deps=(result,))


def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Tensor] = ()) -> Any:
    """`warpgroup_mma_wait`: retire all wgmma but the last `num_outstanding`; the deps as register tensors."""
    partition = now()
    partition.step()
    if not deps:
        raise Misuse(f"warpgroup_mma_wait needs deps, at {where()}")
    while len(partition.unfinished_mmas) > num_outstanding:
        partition.unfinished_mmas.pop(0)()
    results = tuple(_unwrapped(dep) for dep in deps)
    return results[0] if len(results) == 1 else results


TMA_OPERATIONS = by_name(async_copy_global_to_shared, async_copy_shared_to_global, store_wait)
MBARRIER_OPERATIONS = by_name(init, expect, arrive, wait)
HOPPER_OPERATIONS = by_name(fence_async_shared, warpgroup_mma, warpgroup_mma_wait)
