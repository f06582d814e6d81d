"""Attention's output as o_proj keeps it for both, in E5M6 (arXiv:2412.19437 §3.3.3), and attention does not.

    forward     attention saves a place instead of o; o_proj packs o as it quantises it
    backward    o_proj unpacks o for its wgrad and leaves it here; attention, the next node of the graph, takes it

Where a checkpoint makes queries, keys and values again, it runs attention again too, but for the core: what the core
returned besides o is recorded, and given back with the o that was left.

Shapes: o [sequences, heads, tokens, v], which may be stored wider than v: torch's flash kernel wants v as wide as q.
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


class KeptOutput:
    """Of one call of attention."""

    def __init__(self) -> None:
        # Of o as attention's backward wants it; None while it wants none.
        self._shape: Sequence[int] | None = None
        self._o: Tensor | None = None
        self._others: tuple[Any, ...] = ()

    def put(self, o: Tensor) -> None:
        """Leave o [sequences * tokens, heads * v] for attention's backward."""
        if self._shape is not None:
            self._o = o

    def _take(self) -> Tensor:
        o, self._o = self._o, None
        assert o is not None, "no output was left: the backward of o_proj did not run before attention's"
        assert self._shape is not None
        sequences, heads, tokens, width = self._shape
        o = o.view(sequences, tokens, heads, -1)
        if o.shape[-1] != width:
            o = F.pad(o, (0, width - o.shape[-1]))
        return o.transpose(1, 2)

    def not_saved_by(self, core: Callable[[], Tensor]) -> Tensor:
        """Run the core, which then takes from here what it would have saved of its output."""
        saved: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            saved.append(_Saved(tensor))
            return saved[-1]

        def unpack(each: _Saved) -> Tensor:
            return self._take() if each.tensor is None else each.tensor

        with saved_tensors_hooks(pack, unpack):
            o = core()
        for each in saved:
            if each.tensor is not None and each.tensor.untyped_storage()._cdata == o.untyped_storage()._cdata:
                self._shape, each.tensor = each.tensor.shape, None
        return o

    def recorded(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """The two contexts of a checkpoint, of forward and of recomputation, as its `context_fn`."""
        return _Recording(self), _Replaying(self)

    def record(self, o: Tensor, *others: Any) -> None:
        """What a core operator returned."""
        self._shape, self._others = o.shape, others

    def replay(self) -> tuple[Any, ...]:
        """The same, with o as it was kept."""
        return self._take(), *self._others


@dataclass
class _Saved:
    """A tensor that attention saved; None for its output."""

    tensor: Tensor | None


class _Mode(TorchDispatchMode):
    def __init__(self, output: KeptOutput) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.output = output


class _Recording(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in CORE_OPERATORS:
            self.output.record(*results)
        return results


class _Replaying(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.output.replay() if func in CORE_OPERATORS else func(*args, **(kwargs or {}))
