"""`precision.keep_bf16_weights=false`: weights of FP8 linears are sharded FP32 masters and E4M3, nothing between.

GEMMs read E4M3 in 128x128 blocks and the same transposed (arXiv:2412.19437 §3.3.2); the update writes both. Of each
bucket, on rank r of the axis (`kernels.block_ranges`; the cut into shards is that of BF16 weights):

    update       masters of shard r, and these rounded to BF16            2 bytes an element of the shard, for a moment
    maxima       largest magnitude of each block's part in shard r        all-reduce, maximum: 4 bytes a block
    quantise     E4M3 of shard r with the blocks' scales
    gather       all-gather of bytes                                      half of BF16's
    transpose    the copy for dgrad

Every bit is that of a BF16 weight quantised before its first use. A parameter stays what autograd, hooks and buckets
know it by; its own numbers are NaN (`kernels.fp8_linear.keep_only_fp8`). For a checkpoint `restore` gives it values.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.block_ranges import block_scales, blocks_shape, quantize_range, range_amax, transpose_blocks
from kernels.formats import Quantized, ceil_div
from kernels.fp8_linear import keep_only_fp8
from kernels.quantize import quantize_blocks
from parallel.buckets import BucketRange
from parallel.mesh import Axis
from parallel.shards import Shard
from parallel.waiting import waiting
from parallel.zero import GATHERS_IN_FLIGHT, Bucket, GradientBuckets, WeightUpdate, all_gather

# Scales of a weight begin at a multiple: 128 bytes.
_SCALES_ALIGNMENT = 32


@dataclass(frozen=True, eq=False)
class _Flat:
    """What FP8 a bucket has on all ranks: payload [elements] uint8, cut as the gradients are; scales [blocks] fp32."""

    bucket: Bucket
    payload: Tensor
    scales: Tensor
    views: dict[str, Quantized]  # of each parameter
    first_block: dict[str, int]


@dataclass(frozen=True, eq=False)
class _Updated:
    """A bucket whose shard has new weights, [elements] bf16, and whose maxima are on their way."""

    flat: _Flat
    weights: Tensor
    maxima: Tensor
    work: dist.Work


class Fp8Buckets(GradientBuckets):
    """`GradientBuckets` of FP8 linears whose weights are kept in FP8 only, from `release` on.

    Args:
        named_params, axis, sharded: as `GradientBuckets`; weights [..., rows, cols] in BF16.
        power_of_two: of the scales.
    """

    def __init__(
        self, named_params: Iterable[tuple[str, nn.Parameter]], *, axis: Axis, sharded: bool, power_of_two: bool
    ) -> None:
        super().__init__(named_params, axis=axis, sharded=sharded)
        self._power_of_two = power_of_two
        # Without an axis, or without ZeRO, each rank makes all weights itself, and nothing is flat.
        self._flats = [_flat(bucket) for bucket in self._buckets] if sharded and axis.size > 1 else []
        self._views = {name: view for flat in self._flats for name, view in flat.views.items()}
        self._bytes_on_the_way: deque[tuple[_Flat, dist.Work]] = deque()

    @torch.no_grad()
    def release(self) -> None:
        """Quantise every weight and free its values, once masters hold them."""
        for name, parameter in self.parameters.items():
            self._keep(name, parameter, parameter)

    @torch.no_grad()
    def restore(self, masters: WeightUpdate) -> None:
        """Until `release`, give every weight values: in BF16, gathered from masters; `masters` as `gather`'s update."""
        self.arrive()
        for parameter in self.parameters.values():
            parameter.data = parameter.new_empty(parameter.shape)
        super().gather(masters)
        super().arrive()

    @torch.no_grad()
    def gather(self, update: WeightUpdate) -> None:
        """As `GradientBuckets`: the new weights arrive in FP8, and in both layouts."""
        self.arrive()
        if not self._flats:
            for name, held in self._shards.items():
                weights = held.parameter.new_empty(held.parameter.shape)
                update(name, weights.view(-1))
                self._keep(name, held.parameter, weights)
        # One bucket is updated while the maxima of the one before and the bytes of those before that are on their way.
        before: _Updated | None = None
        self._arrived = 0
        for flat in self._flats:
            updated = self._update(flat, update)
            self._send_before(before)
            before = updated
        self._send_before(before)
        if not self._later:
            self.arrive()
        # Graphs of the step before must not read the new weights.
        torch.autograd.graph.increment_version(self.parameters.values())

    @torch.no_grad()
    def arrive(self, parameter: nn.Parameter | None = None) -> None:
        """As `GradientBuckets`. Bytes arrive where they stay, so any number of buckets may be under way."""
        last = len(self._flats) if parameter is None else self._place[parameter]
        while self._bytes_on_the_way and self._arrived <= last:
            self._take_bytes_in()

    def _awaited(self) -> set[nn.Parameter]:
        return {parameter for flat, _ in self._bytes_on_the_way for parameter in flat.bucket.parameters}

    def _take_bytes_in(self) -> None:
        _finish(*self._bytes_on_the_way.popleft())
        self._arrived += 1

    def _send_before(self, updated: _Updated | None) -> None:
        if updated is not None:
            self._bytes_on_the_way.append(self._send(updated))
        if len(self._bytes_on_the_way) == GATHERS_IN_FLIGHT and not self._later:
            self._take_bytes_in()

    def _keep(self, name: str, parameter: nn.Parameter, weights: Tensor) -> None:
        copy = quantize_blocks(weights, power_of_two=self._power_of_two)
        if view := self._views.get(name):
            view.payload.copy_(copy.payload)
            view.scale.copy_(copy.scale)
            copy = replace(view, payload_t=copy.payload_t)
        keep_only_fp8(parameter, copy)

    def _own(self, flat: _Flat) -> Iterator[tuple[BucketRange, Shard, int]]:
        """What this rank updates of a bucket's parameters, and where in its shard of the bucket that begins."""
        for each in flat.bucket.plan.ranges:
            if each.name in self._shards:
                shard = self._shards[each.name].shard
                yield each, shard, each.start + shard.offsets[0] - flat.bucket.shard_start

    def _update(self, flat: _Flat, update: WeightUpdate) -> _Updated:
        bucket = flat.bucket
        weights = torch.empty(bucket.shard.numel(), dtype=bucket.plan.dtype, device=bucket.shard.device)
        maxima = torch.zeros_like(flat.scales, dtype=torch.int32)
        for each, shard, first in self._own(flat):
            values = weights[first : first + shard.numel]
            update(each.name, values)
            amax = range_amax(values, self.parameters[each.name].shape, shard.offsets[0])
            begin = flat.first_block[each.name]
            maxima[begin : begin + amax.numel()] = amax.flatten()
        # As integers a NaN is the largest: a maximum of floats may lose it.
        work = dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.axis.group, async_op=True)
        assert work is not None, "this rank is not in the group of its axis"
        return _Updated(flat, weights, maxima, work)

    def _send(self, updated: _Updated) -> tuple[_Flat, dist.Work]:
        """Quantise this rank's shard with the scales of whole blocks, and start its way to the other ranks."""
        flat, bucket = updated.flat, updated.flat.bucket
        with waiting():
            updated.work.wait()
        flat.scales.copy_(block_scales(updated.maxima, power_of_two=self._power_of_two))
        own = flat.payload[bucket.shard_start : bucket.shard_start + bucket.shard.numel()]
        for each, shard, first in self._own(flat):
            part = slice(first, first + shard.numel)
            scale, shape = flat.views[each.name].scale, self.parameters[each.name].shape
            payload = quantize_range(updated.weights[part], scale, shape, shard.offsets[0])
            own[part] = payload.view(torch.uint8)
        return flat, all_gather(flat.payload, own, group=self.axis.group, async_op=True)


def _finish(flat: _Flat, work: dist.Work) -> None:
    with waiting():
        work.wait()
    for each, parameter in zip(flat.bucket.plan.ranges, flat.bucket.parameters, strict=True):
        view = flat.views[each.name]
        keep_only_fp8(parameter, replace(view, payload_t=transpose_blocks(view.payload)))


def _flat(bucket: Bucket) -> _Flat:
    """Room for the FP8 copies of a bucket."""
    device = bucket.shard.device
    first_block, blocks = dict[str, int](), 0
    for each, parameter in zip(bucket.plan.ranges, bucket.parameters, strict=True):
        first_block[each.name] = blocks
        blocks += ceil_div(prod(blocks_shape(parameter.shape)), _SCALES_ALIGNMENT) * _SCALES_ALIGNMENT
    # gloo refuses FP8, so bytes travel.
    payload = torch.zeros(bucket.plan.numel, dtype=torch.uint8, device=device)
    scales = torch.zeros(blocks, dtype=torch.float32, device=device)
    views = dict[str, Quantized]()
    for each, parameter in zip(bucket.plan.ranges, bucket.parameters, strict=True):
        shape, first = blocks_shape(parameter.shape), first_block[each.name]
        numbers = payload[each.start : each.start + each.numel].view(torch.float8_e4m3fn).view(parameter.shape)
        views[each.name] = Quantized(numbers, scales[first : first + prod(shape)].view(shape))
    return _Flat(bucket, payload, scales, views, first_block)
