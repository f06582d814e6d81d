"""Attention's output as o_proj keeps it for both, in E5M6 (arXiv:2412.19437 §3.3.3), and attention does not.

    forward     attention saves a place instead of o; o_proj packs o as it quantises it
    backward    o_proj unpacks o for its wgrad and leaves it here; attention, the next node of the graph, takes it

Where a checkpoint makes queries, keys and values again, it runs attention again too, but for the core: what the core
returned besides o is recorded, and given back with the o that was left.

Where documents are kept apart, the core runs on some of the tokens at a time; it takes its part of what was left.

Shapes: o of a call of the core [sequences, heads, tokens, v], or [tokens, heads, v] of documents end to end; it may be
stored wider than v: torch's flash kernels want v as wide as q.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import CORE_OPERATORS


@dataclass
class _Call:
    """Of the core: the first of its tokens, its output's shape, what it returned besides."""

    first: int
    shape: Sequence[int]
    others: tuple[Any, ...]

    @property
    def tokens(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else self.shape[0] * self.shape[2]

    def output(self, o: Tensor) -> Tensor:
        """Its own of o [tokens, heads * v] of all calls."""
        heads, width = self.shape[1], self.shape[-1]
        own: Tensor = o[self.first : self.first + self.tokens].unflatten(1, (heads, -1))
        if own.shape[-1] != width:
            own = F.pad(own, (0, width - own.shape[-1]))
        if len(self.shape) == 3:
            return own
        sequences: Tensor = own.unflatten(0, (self.shape[0], -1))
        return sequences.transpose(1, 2)


class KeptOutput:
    """Of one attention."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._storages: list[int] = []
        self._o: Tensor | None = None
        self._taken = 0

    def put(self, o: Tensor) -> None:
        """Leave o [sequences * tokens, heads * v] for attention's backward, if that wants it."""
        self._o, self._taken = o if self._calls else None, 0

    def _take(self, call: _Call) -> Tensor:
        assert self._o is not None, "no output was left: the backward of o_proj did not run before attention's"
        o = call.output(self._o)
        self._taken += 1
        if self._taken == len(self._calls):
            self._o = None
        return o

    def not_saved_by(self, core: Callable[[], Tensor]) -> Tensor:
        """Run the core, which then takes from here what it would have saved of its output."""
        saved: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor))
            return saved[-1]

        def unpack(each: _Saved) -> Tensor:
            return self._take(each.kept) if isinstance(each.kept, _Call) else each.kept

        with saved_tensors_hooks(pack, unpack), _Recording(self):
            o = core()
        of_output = dict(zip(self._storages, self._calls, strict=True))
        for each in saved:
            assert isinstance(each.kept, Tensor)
            each.kept = of_output.get(each.kept.untyped_storage()._cdata, each.kept)
        for call in self._calls:
            # Autograd keeps it.
            call.others = ()
        self._storages.clear()
        return o

    def recorded(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The two contexts of a checkpoint, of forward and of recomputation, as its `context_fn`."""
        return _Recording(self), _Replaying(self)

    def record(self, o: Tensor, *others: Any) -> None:
        """What a core operator returned."""
        first = self._calls[-1].first + self._calls[-1].tokens if self._calls else 0
        self._calls.append(_Call(first, o.shape, others))
        self._storages.append(o.untyped_storage()._cdata)

    def replay(self) -> tuple[Any, ...]:
        """The same of the next call, with o as it was kept; once, so that nothing outlives backward."""
        call = self._calls[self._taken]
        others, call.others = call.others, ()
        return self._take(call), *others


@dataclass
class _Saved:
    """What attention saved: a tensor, or of the core's output the call that gave it."""

    kept: Tensor | _Call


class _Mode(TorchDispatchMode):
    def __init__(self, output: KeptOutput) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.output = output


class _Recording(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.name() in CORE_OPERATORS:
            self.output.record(*results)
        return results


class _Replaying(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.output.replay() if func.name() in CORE_OPERATORS else func(*args, **(kwargs or {}))
