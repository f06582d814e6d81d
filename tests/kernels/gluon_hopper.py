"""The Hopper operations of an emulated Gluon kernel: TMA copies, mbarriers, the proxy fence, asynchronous wgmma.

A TMA load fills its destination with NaN bytes when it is issued and delivers when it lands: both ends of the time in
which the memory has no valid contents are adversarial at once. A wgmma keeps its result back until a
`warpgroup_mma_wait` retires it, in the order of issue. What the kernel source promises is checked on the way: that
descriptor and buffer agree in shape, type and swizzle, that coordinates are aligned, that `mbarrier.init` is fenced,
and that an unfinished accumulator is not used.

Not emulated: multicast and clusters, descriptors made inside a kernel, gather and scatter, cp.async, padding other
than zero; the 14-bit accumulation of FP8 wgmma (sums here are fp32, so a tolerance measured here is too tight for a
GPU). Stricter than the hardware: byte counts, unseen phases and missing fences are errors at once. Looser: one fence
of a partition counts for all buffers, a copy lands as a whole, and `store_wait` also completes the global write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon.language.nvidia.hopper.mbarrier import MBarrierLayout

from tests.kernels.gluon_machine import Barrier, now
from tests.kernels.gluon_shared import POISON, Access, Shared
from tests.kernels.gluon_values import Misuse, Race, Tensor, where

TMA_ALIGNMENT_BYTES = 16
WGMMA_ROWS = 64


class _Box:
    """The part of a host tensor that a TMA copy meets, and the same part of its shared memory.

    Args:
        descriptor: the host's TensorDescriptor.
        coordinates: of the box's first element; may lie outside the tensor.
        shared: the memory of the whole box.
    """

    def __init__(self, descriptor: Any, coordinates: Sequence[int], *, shared: Shared) -> None:
        block, base = list(descriptor.block_shape), descriptor.base.detach()
        if block != shared.shape or base.dtype != shared.data.dtype or descriptor.layout != shared.layout:
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
        whole = base.as_strided(list(descriptor.shape), list(descriptor.strides))
        low = [min(max(start, 0), extent) for start, extent in zip(first, whole.shape, strict=True)]
        ends = [min(start + length, extent) for start, length, extent in zip(first, block, whole.shape, strict=True)]
        high = [max(start, end) for start, end in zip(low, ends, strict=True)]
        spans = list(zip(low, high, first, strict=True))
        self.outside = whole[tuple(slice(start, end) for start, end, _ in spans)]
        self.inside = self.outside
        if self.outside.numel():
            self.inside = shared.data[tuple(slice(start - origin, end - origin) for start, end, origin in spans)]


class TmaLoad:
    """A copy into shared memory, announced by a barrier; outside the tensor it delivers zeros."""

    def __init__(self, box: _Box, barrier: Barrier, *, shared: Shared) -> None:
        partition = now()
        if partition.machine.options.races and barrier.maker.fences <= barrier.fences_before:
            raise Race(f"{barrier.name}: no fence_async_shared between mbarrier.init and the TMA load at {where()}")
        self.landed = False
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
        self.landed = True
        self._machine.loads_in_flight.remove(self)
        self._shared.data.zero_()
        self._box.inside.copy_(self._box.outside)
        self._barrier.copies_in_flight -= 1
        self._barrier.update(self._clock, expected_bytes=-self._shared.size_bytes)

    def retire(self, time: int) -> None:
        """Nothing: a load is waited for through its barrier."""


class TmaStore:
    """A copy from shared memory, which it reads until `store_wait`."""

    def __init__(self, box: _Box, *, shared: Shared) -> None:
        partition = now()
        self.landed = False
        self._box = box
        clock = partition.release()
        self._access = shared.allocation.access(Access(shared.box, partition, clock, f"TMA store at {where()}"))

    def land(self) -> None:
        self.landed = True
        self._box.outside.copy_(self._box.inside)

    def retire(self, time: int) -> None:
        """The read of shared memory is over, and so is the write."""
        if not self.landed:
            self.land()
        self._access.time = time


def async_copy_global_to_shared(
    tensor_desc: Any, coord: Sequence[int], barrier: Shared, result: Shared, pred: Any = True, multicast: Any = False
) -> None:
    partition = now()
    partition.step()
    if multicast:
        raise NotImplementedError("TMA multicast is not emulated")
    if pred:
        load = TmaLoad(_Box(tensor_desc, coord, shared=result), barrier.barrier, shared=result)
        if partition.machine.options.tma == "early":
            load.land()


def async_copy_shared_to_global(tensor_desc: Any, coord: Sequence[int], src: Shared) -> None:
    partition = now()
    partition.step()
    store = TmaStore(_Box(tensor_desc, coord, shared=src), shared=src)
    partition.unfinished_stores.append(store)
    if partition.machine.options.tma == "early":
        store.land()


def store_wait(pendings: int) -> None:
    partition = now()
    while len(partition.unfinished_stores) > pendings:
        partition.unfinished_stores.pop(0).retire(partition.clock[partition])
    partition.step()


def init(mbarrier: Shared, count: int) -> None:
    if mbarrier.data.numel() != 1:
        raise Misuse(f"{mbarrier.allocation.name}: a barrier is one int64, this is {mbarrier.shape}, at {where()}")
    mbarrier.allocation.barriers[mbarrier.box] = Barrier(mbarrier.place, count, maker=now())


def invalidate(mbarrier: Shared) -> None:
    _ = mbarrier.barrier
    del mbarrier.allocation.barriers[mbarrier.box]


def expect(mbarrier: Shared, bytes_per_cta: int | None = None, pred: Any = True, *, bytes: int | None = None) -> None:
    """`mbarrier.expect`, which also arrives once; Triton 3.6 calls the count `bytes`."""
    partition = now()
    partition.step()
    expected_bytes = bytes if bytes_per_cta is None else bytes_per_cta
    if expected_bytes is None:
        raise Misuse(f"mbarrier.expect needs a byte count, at {where()}")
    if pred:
        mbarrier.barrier.update(partition.release(), arrivals=1, expected_bytes=expected_bytes)


def arrive(mbarrier: Shared, *, count: int = 1, pred: Any = True) -> None:
    partition = now()
    partition.step()
    if pred:
        mbarrier.barrier.update(partition.release(), arrivals=count)
    partition.step()


def wait(mbarrier: Shared, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    partition = now()
    barrier = mbarrier.barrier
    partition.step()
    if pred:
        partition.wait(barrier, int(phase))


def fence_async_shared(cluster: Any = False) -> None:
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


def warpgroup_mma(
    a: Tensor | Shared,
    b: Any,
    acc: Tensor,
    *,
    use_acc: Any = True,
    precision: Any = None,
    max_num_imprecise_acc: Any = None,
    is_async: bool = False,
) -> Tensor:
    """`warpgroup_mma`: a @ b, plus acc if `use_acc`."""
    partition = now()
    partition.step()
    options = partition.machine.options
    if options.lazy_loads != "use":
        # What was loaded before a wgmma is in registers once the wgmma is issued.
        partition.take_loads()
    acc, use_acc = _unwrapped(acc), bool(use_acc)
    is_unfinished = acc.pending is _refuse_unfinished
    if (
        not isinstance(b, Shared)
        or a.shape[1] != b.shape[0]
        or a.shape[0] % WGMMA_ROWS
        or (not is_unfinished and acc.shape != [a.shape[0], b.shape[1]])
    ):
        raise Misuse(f"wgmma of {a.shape} and {b.shape}, at {where()}")
    text = f"wgmma at {where()}"
    accesses = [
        operand.allocation.access(Access(operand.box, partition, partition.clock, text))
        for operand in (a, b)
        if isinstance(operand, Shared)
    ]
    is_late = is_async and options.mma == "late"
    left, right = _mma_operand(a, is_late=is_late), _mma_operand(b, is_late=is_late)
    result = Tensor(pending=_refuse_unfinished)

    def finish() -> None:
        for access in accesses:
            access.time = partition.clock[partition]
        product = left.float() @ right.float()
        result.settle(product + acc.value if use_acc else product)

    partition.unfinished_mmas.append(finish)
    return Accumulator(result) if is_async else warpgroup_mma_wait(0, deps=(result,))


def _mma_operand(operand: Tensor | Shared, *, is_late: bool) -> torch.Tensor:
    """The operand's values; a late wgmma sees what its shared memory holds when it is retired."""
    if isinstance(operand, Tensor):
        return operand.value
    return operand.data if is_late else operand.data.clone()


def warpgroup_mma_init(value: Tensor) -> Tensor:
    """`warpgroup_mma_init`: a register tensor as the accumulator of a first wgmma."""
    return value


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Tensor] | None = None) -> Any:
    """`warpgroup_mma_wait`: retire all wgmma but the last `num_outstanding`; the deps as register tensors."""
    partition = now()
    partition.step()
    if not deps:
        raise Misuse(f"warpgroup_mma_wait needs deps, at {where()}")
    while len(partition.unfinished_mmas) > num_outstanding:
        partition.unfinished_mmas.pop(0)()
    results = tuple(_unwrapped(dep) for dep in deps)
    return results[0] if len(results) == 1 else results


def _by_name(*functions: Any) -> dict[str, Any]:
    return {function.__name__: function for function in functions}


TMA_OPERATIONS = _by_name(async_copy_global_to_shared, async_copy_shared_to_global, store_wait)
MBARRIER_OPERATIONS = _by_name(MBarrierLayout, init, invalidate, expect, arrive, wait)
HOPPER_OPERATIONS = _by_name(fence_async_shared, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait)
