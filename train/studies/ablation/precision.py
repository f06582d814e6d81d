"""FP8 with one piece of the recipe changed, as a precision that a model can be built with (arXiv:2412.19437 §3.3.2).

A subclass, so that `Precision`, its checkpoints and the shipped path know nothing of it: what a linear computes under
an ablation stands in `linear.py`. Embedding, head, router, norms and the attention core are as in
every precision. Used by `runs.py`, on one process: an FP8 wire between ranks would stay E4M3 in 1x128.

Shapes as in `train/model/precision.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.swiglu import gated_swiglu, swiglu
from train.model.precision import Precision
from train.studies.ablation.linear import AblatedLinears, Ablation


@dataclass(frozen=True)
class AblatedPrecision(Precision):
    """`Precision("fp8")` with an ablation; with the default one every bit is the same on a CPU.

    Raises:
        ValueError: the precision is not fp8, or the ablation does not go with its scales.
    """

    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        if self.name != "fp8":
            raise ValueError(f"precision.name={self.name} quantises nothing: an ablation needs precision.name=fp8")
        # Refuses what does not go together now, not at the first forward.
        AblatedLinears(self.ablation, self.power_of_two_scales)

    @property
    def linears(self) -> AblatedLinears:
        """The linears that stand for the recipe's."""
        return AblatedLinears(self.ablation, self.power_of_two_scales)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T`: [..., in] x [out, in] -> [..., out]."""
        return self.linears.linear(x, weight)

    def linear_of_kept(self, x: Tensor, weight: Tensor) -> Tensor:
        """`linear` of attention's output, which is kept in full."""
        return self.linears.linear_of_kept(x, weight)

    def grouped_linear(self, x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """One linear per expert: [rows, in] x [experts, out, in] -> [rows, out]."""
        return self.linears.linear(x, weight, group_ends)

    def swiglu_linear(self, gate_up: Tensor, weight: Tensor) -> Tensor:
        """Down-projection of a dense FFN: [..., 2 * inter] x [out, inter] -> [..., out]."""
        if self.cache_swiglu_input:
            return self.linears.swiglu_linear(gate_up, None, weight)
        return self.linear(swiglu(gate_up), weight)

    def grouped_swiglu_linear(self, gate_up: Tensor, gates: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """Down-projections of the experts: [rows, 2 * inter], [rows] x [experts, out, inter] -> [rows, out]."""
        if self.cache_swiglu_input:
            return self.linears.swiglu_linear(gate_up, gates, weight, group_ends)
        return self.grouped_linear(gated_swiglu(gate_up, gates), weight, group_ends)
