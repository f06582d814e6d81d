"""Bytes that are alive while a program runs: every storage from the call that made it to its last reference.

Made for `FakeTensorMode`, where nothing is allocated: operators report the shapes they would make, and Python's
reference counts say how long each is alive. Views share a storage and count once. What an allocator adds (blocks
rounded up, holes) is not counted, nor what a kernel takes and frees inside one call.

    with FakeTensorMode(), LiveBytes() as live:
        ...
    live.now, live.peak
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return while it is active: `now` and at the `peak`, bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then count what it returned."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            # The meta device has no memory: a schedule keeps its receive buffers there until they are needed.
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # An address is free for reuse only after the finalizer of its last owner has run.
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        num_bytes = storage.nbytes()
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes
