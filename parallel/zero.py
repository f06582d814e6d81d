"""ZeRO-1 (arXiv:1910.02054 §5.1): FP32 gradient buckets, and the shard of them that each rank owns.

arXiv:2412.19437 §3.2, §3.3.3. Ranks of one axis hold the same parameters and different tokens. Their gradients are
stored in flat FP32 buckets (`parallel/buckets.py`), `main_grad` is a view of one. A bucket is cut into `axis.size`
equal shards:

    backward   main_grad = or += ...                every rank, its own tokens
    reduce     reduce-scatter, sum                  rank r holds the finished sums of shard r (`early_reduction`)
    update     masters and moments of the shard     `train.optim`, on `parameter_shards()`
    gather     all-gather in the weights' dtype     every rank holds all new weights (FP8: `parallel.fp8_weights`)

Without ZeRO (`sharded=False`) an all-gather of the sums follows the reduce-scatter and every rank updates everything:
the same calls form the sums, so ZeRO on or off changes no bit.

Which axis: dense parameters the data axis; experts the expert-data axis only, because an expert's gradient already
holds the tokens of all ranks of its expert group. Copies of one embedding on two pipeline ranks are summed over both
(`tied`), updated by both alike and counted in the norm by one.

Shapes: [elements] flat FP32 for buckets and shards; `start` and `numel` count elements; padding is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.deferred import accumulate_grad, backwards_due, forget, is_fresh, settle
from parallel.buckets import BUCKET_BYTES, BucketRange, plan_buckets
from parallel.buckets import BucketPlan as PlanOf
from parallel.mesh import Axis
from parallel.shards import Shard
from parallel.waiting import waiting

# One all-gather runs while the weights of the one before are copied; more would only hold more buffers.
GATHERS_IN_FLIGHT = 2

# torch 2.13 renames the two calls and deprecates the names that torch 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


BucketPlan = PlanOf[torch.dtype]

# What updates one parameter shard: name, and where its new weights are to be written, [elements] of any dtype.
WeightUpdate = Callable[[str, Tensor], None]


@dataclass(frozen=True, eq=False)
class ParameterShard:
    """What this rank updates of one parameter."""

    name: str
    parameter: nn.Parameter
    shard: Shard  # of the flattened parameter
    grad: Tensor  # [elements] fp32, a live view of the bucket


@dataclass(frozen=True, eq=False)
class Bucket:
    """A bucket's gradients, the shard of them that is this rank's, and its parameters in the order of the ranges."""

    plan: BucketPlan
    grads: Tensor
    shard: Tensor
    shard_start: int
    parameters: tuple[nn.Parameter, ...]


class GradientBuckets:
    """The FP32 gradients of the parameters that are reduced over one axis; owns their `main_grad`.

    Args:
        named_params: (name, parameter) pairs, the same in the same order on all ranks of the axis; frozen ones and
            repeated ones are passed over. Names must be unique.
        axis: ranks that hold copies of these parameters and different tokens.
        sharded: ZeRO-1; each rank updates only its shard.
        bucket_bytes: FP32 bytes of a bucket.
        tied: ranks that hold another copy of the same parameters under the same names, with gradients of their own.
        counts_in_norm: False on all ranks of `tied` but the first.
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        *,
        axis: Axis,
        sharded: bool,
        bucket_bytes: int = BUCKET_BYTES,
        tied: Axis | None = None,
        counts_in_norm: bool = True,
    ) -> None:
        self.axis, self.sharded = axis, sharded
        self._tied, self._counts_in_norm = tied, counts_in_norm
        self.parameters = _unique(named_params)
        sizes = [(name, parameter.numel(), parameter.dtype) for name, parameter in self.parameters.items()]
        plans = plan_buckets(sizes, shards=axis.size, bucket_bytes=bucket_bytes)
        self._buckets = [*map(self._bucket, plans, self.allocate(plans))]
        self._reducing: dict[int, dist.Work] = {}
        # New weights: of this rank's shards, and of whole buckets under way; how many have arrived.
        self._place = {each: index for index, bucket in enumerate(self._buckets) for each in bucket.parameters}
        self._later, self._arrived = False, 0
        self._made: deque[tuple[Bucket, Tensor]] = deque()
        self._on_the_way: deque[tuple[Bucket, Tensor, dist.Work]] = deque()
        self._shards = {shard.name: shard for bucket in self._buckets for shard in self._cut(bucket)}
        # The model's kernels write and add to `main_grad` themselves (`kernels.deferred`). What autograd makes of any
        # other parameter as `.grad`, this hook moves over as soon as autograd has finished the tensor.
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(_move_into_main_grad)

    def allocate(self, plans: Sequence[BucketPlan]) -> Sequence[Tensor]:
        """The gradients of each bucket, zero; called once, by the constructor."""
        devices = [self.parameters[plan.ranges[0].name].device for plan in plans]
        return [torch.zeros(p.numel, dtype=torch.float32, device=d) for p, d in zip(plans, devices, strict=True)]

    def master(self, held: ParameterShard) -> Tensor:
        """[elements] fp32, the weights that the optimizer moves; of an FP32 parameter a view, else a copy."""
        start = held.shard.offsets[0]
        weights = held.parameter.detach().view(-1)[start : start + held.shard.numel]
        return weights if weights.dtype == torch.float32 else weights.to(torch.float32)

    def _bucket(self, plan: BucketPlan, grads: Tensor) -> Bucket:
        parameters = tuple(self.parameters[each.name] for each in plan.ranges)
        for each, parameter in zip(plan.ranges, parameters, strict=True):
            assert parameter.is_contiguous(), f"{each.name} is not contiguous: its flat view would be a copy"
            main_grad = grads[each.start : each.start + each.numel].view(parameter.shape)
            parameter.main_grad = main_grad  # type: ignore[attr-defined]
        length = plan.numel // self.axis.size
        first = self.axis.rank * length
        return Bucket(plan, grads, grads[first : first + length], first, parameters)

    def _cut(self, bucket: Bucket) -> list[ParameterShard]:
        """What this rank updates of the bucket's parameters; empty shards are left out."""
        shards = []
        for (each, start, stop), parameter in zip(
            self._owned(bucket.plan, self.axis.rank), bucket.parameters, strict=True
        ):
            if start < stop:
                shard = Shard((each.numel,), (start - each.start,), (stop - start,))
                shards.append(ParameterShard(each.name, parameter, shard, bucket.grads[start:stop]))
        return shards

    def _owned(self, plan: BucketPlan, rank: int) -> Iterator[tuple[BucketRange, int, int]]:
        """Each range of a bucket with the elements that a rank of the axis updates: from, to."""
        return plan.owned(rank, shards=self.axis.size) if self.sharded else plan.owned(0, shards=1)

    def shards_of(self, rank: int) -> dict[str, tuple[int, int]]:
        """Name -> elements of the flattened parameter that a rank of the axis updates: from, to."""
        owned = (each for bucket in self._buckets for each in self._owned(bucket.plan, rank))
        return {each.name: (start - each.start, stop - each.start) for each, start, stop in owned if start < stop}

    @property
    def grad_bytes(self) -> int:
        """Bytes of the FP32 gradient buckets, padding included."""
        return sum(bucket.grads.numel() * 4 for bucket in self._buckets)

    def parameter_shards(self) -> list[ParameterShard]:
        """What this rank must update: its shard of every bucket, or every parameter whole without ZeRO."""
        return list(self._shards.values())

    def norm_shards(self) -> list[Tensor]:
        """This rank's shard of every bucket, padding included; none for tied copies that do not count."""
        # With and without ZeRO: one rank of the axis counts each element, and the order of the sum is the same.
        return [bucket.shard for bucket in self._buckets] if self._counts_in_norm else []

    def release(self) -> None:
        """Masters hold the weights now: let go of those that are not kept; here all are."""
        return

    def restore(self, masters: WeightUpdate) -> None:
        """Until `release`, every weight has values, gathered from masters where it had none; as `gather`'s update."""
        self.arrive()

    def forget(self) -> None:
        """Begin a step: the first gradient replaces each `main_grad`; drop what autograd may have left in `.grad`."""
        for parameter in self.parameters.values():
            forget(parameter)
            parameter.grad = None

    def names_by_bucket(self) -> list[tuple[str, ...]]:
        """The parameters of each bucket."""
        return [tuple(each.name for each in bucket.plan.ranges) for bucket in self._buckets]

    @torch.no_grad()
    def begin_reduce(self, index: int) -> None:
        """Begin to sum a bucket over an axis of several ranks, in order; no gradient of it is to come in this step."""
        bucket = self._buckets[index]
        for parameter in bucket.parameters:
            settle(parameter)
        # In place: the shard is the part of its bucket that this rank owns. With ZeRO, `main_grad` outside this shard
        # still holds afterwards what this rank alone has summed.
        work = _reduce_scatter(bucket.shard, bucket.grads, group=self.axis.group, async_op=True)
        assert work is not None, "this rank is not in the group of its axis"
        self._reducing[index] = work

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the axis, as far as that has not begun, and over the tied copies; once per step."""
        assert all(p.grad is None for p in self.parameters.values()), "a gradient was left in .grad, not in main_grad"
        wrong = [name for name, parameter in self.parameters.items() if backwards_due(parameter)]
        assert not wrong, f"the gradient of {wrong} has losses that were not differentiated once: use torch.no_grad()"
        awaited = self._awaited()
        wrong = [name for name, parameter in self.parameters.items() if parameter in awaited and is_fresh(parameter)]
        assert not wrong, f"{wrong} were read before their new weights had come: call the modules that hold them"
        group, several = self.axis.group, self.axis.size > 1
        if several:
            for index in range(len(self._buckets)):
                if index not in self._reducing:
                    self.begin_reduce(index)
            _wait_for(self._reducing.values())
            self._reducing.clear()
        else:
            for parameter in self.parameters.values():
                settle(parameter)
        if self._tied is not None and self._tied.size > 1:
            _wait_for(dist.all_reduce(each.shard, group=self._tied.group, async_op=True) for each in self._buckets)
        if several and not self.sharded:
            _wait_for(all_gather(each.grads, each.shard, group=group, async_op=True) for each in self._buckets)

    @torch.no_grad()
    def nonfinite(self) -> list[tuple[str, int, int]]:
        """After `reduce`: (name, elements, summed) of each parameter with gradients that are not finite; waits.

        elements: of this rank alone, known outside its shard or where the axis has no other; summed: in its shard,
        where all ranks are in the sum. Without ZeRO every element is a sum.
        """
        counts, names = list[Tensor](), list[str]()
        for bucket in self._buckets:
            first, end = 0, bucket.plan.numel if self.axis.size > 1 else 0
            if self.axis.size > 1 and self.sharded:
                first, end = bucket.shard_start, bucket.shard_start + bucket.shard.numel()
            wrong = ~torch.isfinite(bucket.grads)
            for each in bucket.plan.ranges:
                start, stop = each.start, each.start + each.numel
                here = wrong[start:stop].sum()
                summed = wrong[max(first, start) : max(first, start, min(end, stop))].sum()
                counts += [here - summed, summed]
                names.append(each.name)
        pairs = torch.stack(counts).view(-1, 2).tolist() if counts else []
        return [(name, here, summed) for name, (here, summed) in zip(names, pairs, strict=True) if here or summed]

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiply the gradients of `parameter_shards()` by a 0-d fp32 tensor, in place."""
        owned = [bucket.shard if self.sharded else bucket.grads for bucket in self._buckets]
        if owned:
            torch._foreach_mul_(owned, factor)

    @torch.no_grad()
    def gather(self, update: WeightUpdate) -> None:
        """Make the new weights, each of `parameter_shards()` in order, and give them to every rank of the axis.

        After `let_arrive_later` some are still under way; `arrive` waits for them.
        """
        self.arrive()
        # Whoever writes weights raises the parameter's version: that makes cached FP8 copies stale.
        if not self.sharded or self.axis.size == 1:
            for name, shard in self._shards.items():
                update(name, shard.parameter.detach().view(-1))
            return
        self._arrived = 0
        for bucket in self._buckets:
            self._made.append((bucket, self._make_shard(bucket, update)))
            self._send_weights()
            if len(self._on_the_way) == GATHERS_IN_FLIGHT and not self._later:
                self._take_in()
        if not self._later:
            self.arrive()

    def let_arrive_later(self) -> bool:
        """From now on `gather` does not wait: whoever reads a weight calls `arrive` first. Whether that is so here."""
        self._later = self.sharded and self.axis.size > 1
        return self._later

    @torch.no_grad()
    def arrive(self, parameter: nn.Parameter | None = None) -> None:
        """Let the new weights of a parameter arrive, or all; bucket by bucket, and send the next ones."""
        last = len(self._buckets) if parameter is None else self._place[parameter]
        while self._on_the_way and self._arrived <= last:
            self._take_in()

    def _awaited(self) -> set[nn.Parameter]:
        """Parameters whose new weights have not come."""
        buckets = [*(bucket for bucket, *_ in self._on_the_way), *(bucket for bucket, _ in self._made)]
        return {parameter for bucket in buckets for parameter in bucket.parameters}

    def _take_in(self) -> None:
        _finish_gather(*self._on_the_way.popleft())
        self._arrived += 1
        self._send_weights()

    def _make_shard(self, bucket: Bucket, update: WeightUpdate) -> Tensor:
        """This rank's new weights of a bucket, rounded to the weights' dtype before they travel."""
        own = torch.empty(bucket.shard.numel(), dtype=bucket.plan.dtype, device=bucket.grads.device)
        for each in bucket.plan.ranges:
            if each.name in self._shards:
                shard = self._shards[each.name].shard
                first = each.start + shard.offsets[0] - bucket.shard_start
                update(each.name, own[first : first + shard.numel])
        return own

    def _send_weights(self) -> None:
        while self._made and len(self._on_the_way) < GATHERS_IN_FLIGHT:
            bucket, own = self._made.popleft()
            weights = torch.empty(bucket.plan.numel, dtype=own.dtype, device=own.device)
            work = all_gather(weights, own, group=self.axis.group, async_op=True)
            self._on_the_way.append((bucket, weights, work))


def _finish_gather(bucket: Bucket, weights: Tensor, work: dist.Work) -> None:
    with waiting():
        work.wait()
    for each, parameter in zip(bucket.plan.ranges, bucket.parameters, strict=True):
        parameter.copy_(weights[each.start : each.start + each.numel].view(parameter.shape))


def _wait_for(started: Iterable[dist.Work | None]) -> None:
    """Start all, then wait for all."""
    with waiting():
        for work in list(started):
            assert work is not None, "this rank is not in the group of its axis"
            work.wait()


def _unique(named_params: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in named_params:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        if name in parameters:
            raise ValueError(f"parameter name {name!r} appears twice; give each parameter its own name")
        seen.add(id(parameter))
        parameters[name] = parameter
    return parameters


@torch.no_grad()
def _move_into_main_grad(parameter: Tensor) -> None:
    if parameter.grad is not None:
        accumulate_grad(parameter, parameter.grad)
        parameter.grad = None
