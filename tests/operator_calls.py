"""Counts the calls of our operators: `with OperatorCalls() as calls: ...; calls.of("gemm_tile_block")`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from kernels.operators import NAMESPACE

# The GEMMs of an FP8 linear: fprop and dgrad are tile_block, wgrad is tile_tile.
FP8_GEMMS = ("gemm_tile_block", "gemm_tile_tile", "grouped_gemm_tile_block", "grouped_gemm_tile_tile")


class OperatorCalls(TorchDispatchMode):
    """Name without the namespace -> calls, in forward and backward alike."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))

    def of(self, *names: str) -> dict[str, int]:
        """The counts of some operators, zeros included."""
        return {name: self.counts[name] for name in names}
