"""Gradients are summed over ranks while the last backward runs: each bucket as soon as its last gradient is there.

arXiv:2412.19437 §3.2, arXiv:1910.02054 §5.1. The first step of a process counts how many gradients a parameter gets in
a micro-batch. From then on the last one of a step is known when it comes, under any schedule, in a W slot too:

    backward of the last micro-batch    layer 3 | layer 2 | layer 1 | embedding
    reduce-scatter, asynchronous                  bucket c  bucket b   bucket a     norm and clipping wait for all

Buckets begin in one order, the reverse of the model's: on ranks that hold the same layers each collective comes at the
same place among the others. A bucket with a parameter that was not counted begins at the end. The sums are those of
`GradientBuckets.reduce`, which waits for them: no bit depends on when one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from kernels import deferred
from parallel.zero import GradientBuckets


@dataclass(eq=False)
class _Sum:
    """One bucket of the step: what is still to come of it."""

    buckets: GradientBuckets
    index: int
    names: tuple[str, ...]
    missing: int = 0  # parameters whose last gradient has not come; -1: not known
    begun: bool = False


@dataclass(eq=False)
class _Count:
    """The gradients of one parameter."""

    of: _Sum
    name: str
    come: int = 0
    each: int = 0  # in a micro-batch; 0: not known
    last: int = 0


class EarlyReduction:
    """Begins the sums of a rank's gradient buckets; without an axis of several ranks it does nothing.

    Args:
        buckets: all gradients of this rank.
        names: of all parameters, in the order of the forward pass; the same on all ranks of an axis.
    """

    def __init__(self, buckets: Sequence[GradientBuckets], names: Sequence[str]) -> None:
        # Where two stages share an embedding, the first has it.
        place = {name: index for index, name in reversed([*enumerate(names)])}
        self._sums = [
            _Sum(each, index, held)
            for each in buckets
            if each.axis.size > 1
            for index, held in enumerate(each.names_by_bucket())
        ]
        # A bucket is complete when the first of its parameters in the forward pass has its gradient.
        self._sums.sort(key=lambda each: min(place[name] for name in each.names), reverse=True)
        self._counts = [_Count(each, name) for each in self._sums for name in each.names]
        for count in self._counts:
            self._follow(count.of.buckets.parameters[count.name], count)
        self._micro_batches = 0

    def begin(self, num_micro_batches: int) -> None:
        """Start a step of so many micro-batches."""
        self._micro_batches = num_micro_batches
        for each in self._sums:
            each.missing, each.begun = 0, False
        for count in self._counts:
            count.come, count.last = 0, count.each * num_micro_batches
            if not count.each:
                count.of.missing = -1
            elif count.of.missing >= 0:
                count.of.missing += 1

    def finish(self) -> None:
        """After the last backward: begin what has not begun."""
        for each in self._sums:
            self._begin(each)
        for count in self._counts:
            of_each, rest = divmod(count.come, max(self._micro_batches, 1))
            count.each = 0 if rest else of_each
        self._micro_batches = 0

    def _follow(self, parameter: nn.Parameter, count: _Count) -> None:
        def come() -> None:
            # Outside a step nothing is summed.
            if not self._micro_batches:
                return
            assert not count.of.begun, f"a gradient of {count.name} comes after its sum over ranks has begun"
            count.come += 1
            if count.come == count.last and count.of.missing > 0:
                count.of.missing -= 1
                self._begin_complete()

        deferred.listen(parameter, come)

    def _begin_complete(self) -> None:
        """Begin every bucket whose gradients are there, as far as those before it have begun or are not known."""
        for each in self._sums:
            if each.missing > 0:
                return
            if not each.missing:
                self._begin(each)

    def _begin(self, each: _Sum) -> None:
        if not each.begun:
            each.begun = True
            each.buckets.begin_reduce(each.index)
