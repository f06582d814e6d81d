"""FP8 with one piece of the recipe changed, as a precision that a model can be built with (arXiv:2412.19437 §3.3.2).

A subclass leaves `Precision`, its checkpoints and the shipped path as they are. The linears are those of `linear.py`;
embedding, head, router, norms and the attention core are as in every precision. For one process: an FP8 wire between
ranks would stay E4M3 in 1x128. Shapes as in `train/model/precision.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from kernels.fp8_linear import LinearInput
from kernels.swiglu import gated_swiglu, swiglu
from train.model.precision import Precision
from train.studies.ablation.linear import AblatedLinears, Ablation


@dataclass(frozen=True)
class AblatedPrecision(Precision):
    """`Precision("fp8")` with an ablation; with the default one every bit is the same on a CPU."""

    ablation: Ablation = field(default_factory=Ablation)

    def __post_init__(self) -> None:
        if self.name != "fp8":
            raise ValueError(f"precision.name={self.name} quantises nothing: an ablation needs precision.name=fp8")
        if self.attention_output != "bf16":
            raise ValueError(
                f"precision.attention_output={self.attention_output} is not in the ablation's linears: set "
                "precision.attention_output=bf16"
            )
        if not self.keep_bf16_weights:
            raise ValueError(
                "precision.keep_bf16_weights=false leaves the ablation's linears nothing to quantise: set "
                "precision.keep_bf16_weights=true"
            )
        # Refuse what does not go together now, not at the first forward.
        _ = self.linears

    @property
    def linears(self) -> AblatedLinears:
        """What replaces the recipe's linears."""
        return AblatedLinears(self.ablation, self.power_of_two_scales)

    @property
    def reads_tiles(self) -> bool:
        """It quantises by itself."""
        return False

    def linear(self, x: LinearInput, weight: Tensor, *, gradient: None = None) -> Tensor:  # type: ignore[override]
        """`x @ weight.T`."""
        assert isinstance(x, Tensor), "an ablation quantises by itself"
        return self.linears.linear(x, weight)

    def linear_of_kept(self, x: Tensor, weight: Tensor, give_back: Callable[[Tensor], object] | None = None) -> Tensor:
        """`linear` of attention's output, which is kept in full."""
        assert give_back is None
        return self.linears.linear_of_kept(x, weight)

    def grouped_linear(self, x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """One linear per expert."""
        return self.linears.linear(x, weight, group_ends)

    def swiglu_linear(self, gate_up: Tensor, weight: Tensor, *, gradient: None = None) -> Tensor:  # type: ignore[override]
        """Down-projection of a dense FFN."""
        if self.cache_swiglu_input:
            return self.linears.swiglu_linear(gate_up, None, weight)
        return self.linear(swiglu(gate_up), weight)

    def grouped_swiglu_linear(self, gate_up: Tensor, gates: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        """Down-projections of the experts."""
        if self.cache_swiglu_input:
            return self.linears.swiglu_linear(gate_up, gates, weight, group_ends)
        return self.grouped_linear(gated_swiglu(gate_up, gates), weight, group_ends)
