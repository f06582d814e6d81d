"""AdamW of the report: FP32 master weights, FP32 gradients, BF16 moments (arXiv:2412.19437 §3.3.3, §4.2).

Each segment, the part of a trained parameter that this rank updates (`parallel.zero`), gets four companions:

    grad         fp32, the reduced and clipped gradient; a view of the gradient bucket
    master       fp32, the weight that AdamW moves; for an FP32 parameter a view of the parameter itself
    exp_avg      bf16 (or fp32, or fp32 holding FP8 values), first moment
    exp_avg_sq   the same, second moment

On one process, or without ZeRO, every segment is a whole parameter. For a checkpoint the state is given as pieces of
the flattened global parameter, so what is saved does not depend on how ranks had cut it. Experts lie one after the
other in it: a rank that holds experts [first, first + local) starts at first x elements per expert.

Weight decay spares the norm gains and every other parameter with fewer than two dims: a gain decays towards
0, which is not a simpler network but a dead one. All matrices decay, embedding and head included. The report
does not say which parameters it spares; this is our choice.

Shapes: all companions are [elements], as long as their segment, sharded over the data axis (dense) or the expert-data
axis (experts).

Not done here: the sums over ranks and the gathering of new weights (`parallel.zero`), the division by the number of
targets and the clipping (`parallel.grads`), the learning rate (`train.schedules`), the update formula
(`kernels.adamw`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.adamw import adamw_update
from kernels.formats import TILE
from kernels.quantize import dequantize_tiles, quantize_tiles
from parallel.pieces import Piece
from parallel.zero import GradientBuckets, Segment

# fp8 is an ablation: FP32 tensors that hold what E4M3 with a scale per 128 elements can hold. It saves no memory.
MOMENT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float32}


@dataclass(frozen=True)
class OptimConfig:
    """Hyperparameters of AdamW and of the clipping.

    Args:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment. The report does not give it.
        weight_decay: decoupled decay per step, times the learning rate.
        clip_norm: the global gradient norm is clipped to this.
        moments_dtype: storage of both moments, 'bf16' or 'fp32'; 'fp8' shows what E4M3 would do (docs/numerics.md).
        ema_decay: keep a moving average of the weights in CPU memory (`train/optim/ema.py`); None for none.
    Raises:
        ValueError: a field is out of range.
    Source: arXiv:2412.19437 §4.2 (betas, weight decay, clip), §3.3.3 (BF16 moments).
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments_dtype: str = "bf16"
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"optim.betas = {self.betas} must be two numbers in [0, 1); the report uses (0.9, 0.95)")
        if not self.eps > 0.0:
            raise ValueError(f"optim.eps = {self.eps} must be above 0; use 1e-8")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"optim.weight_decay = {self.weight_decay} must not be negative; give 0 for none")
        if not self.clip_norm > 0.0:
            raise ValueError(f"optim.clip_norm = {self.clip_norm} must be above 0; the report uses 1.0")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"optim.ema_decay = {self.ema_decay} must be in [0, 1); use 0.999, or null for none")
        if self.moments_dtype not in MOMENT_DTYPES:
            raise ValueError(
                f"optim.moments_dtype = {self.moments_dtype!r} is unknown; use one of {sorted(MOMENT_DTYPES)}"
            )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter.

    Args:
        name: Hugging Face name, such as 'layers.3.input_layernorm.weight'.
        parameter: the weight of that name.
    Returns:
        False for norm gains and for tensors with fewer than two dims.
    Source: ours; arXiv:2412.19437 does not state the set.
    """
    module = name.rpartition(".")[0]
    return parameter.ndim >= 2 and not module.endswith("norm")


def round_to_fp8(moment: Tensor) -> None:
    """Round a moment in place to what E4M3 with a power-of-two scale for each 128 elements can hold.

    Args:
        moment: [elements] fp32, a segment; its tiles begin where the segment begins, so they depend on the layout.
    Source: ours; arXiv:2412.19437 §3.3.3 stores moments in BF16.
    """
    tiles = F.pad(moment, (0, -moment.numel() % TILE)).view(-1, TILE)
    values = dequantize_tiles(quantize_tiles(tiles, power_of_two=True))
    moment.copy_(values.flatten()[: moment.numel()])


@dataclass(frozen=True)
class Within:
    """Where the flattened local parameter lies within the flattened global one; both in elements."""

    first: int
    global_numel: int


@dataclass(frozen=True, eq=False)
class _State:
    """A segment with its master and moments, [elements] each."""

    segment: Segment
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamW:
    """AdamW over the segments of gradient buckets; owns masters and moments.

    Args:
        buckets: all gradients of this rank.
        config: hyperparameters.
        within: for parameters that hold only a part of the global one (experts), which part; others are whole.
    Raises:
        ValueError: a name appears in two buckets.
    Source: arXiv:2412.19437 §3.3.3, §4.2.
    """

    def __init__(
        self,
        buckets: Sequence[GradientBuckets],
        config: OptimConfig,
        within: Mapping[str, Within] = MappingProxyType({}),
    ) -> None:
        self.buckets, self.config = tuple(buckets), config
        self._within = within
        self._states: dict[str, _State] = {}
        names: set[str] = set()
        for bucket in self.buckets:
            for name in bucket.parameters:
                if name in names:
                    raise ValueError(f"parameter name {name!r} appears twice; give each parameter its own name")
                names.add(name)
            for segment in bucket.segments():
                self._states[segment.name] = self._adopt(segment)

    def _adopt(self, segment: Segment) -> _State:
        weights = segment.parameter.detach().view(-1)[segment.start : segment.start + segment.grad.numel()]
        master = weights if weights.dtype == torch.float32 else weights.to(torch.float32)
        moments_dtype = MOMENT_DTYPES[self.config.moments_dtype]
        exp_avg, exp_avg_sq = (torch.zeros_like(master, dtype=moments_dtype) for _ in range(2))
        return _State(segment, master, exp_avg, exp_avg_sq)

    @torch.no_grad()
    def step(self, *, lr: float, step: int) -> None:
        """Update this rank's masters from their gradients, then give the new weights to all ranks.

        Args:
            lr: learning rate of this step.
            step: number of this update, counted from 1; the bias correction divides by 1 - beta**step.
        """
        assert step >= 1, f"updates are counted from 1, got step {step}"
        for bucket in self.buckets:
            states = {segment.name: self._states[segment.name] for segment in bucket.segments()}
            for name, state in states.items():
                adamw_update(
                    state.master,
                    state.segment.grad,
                    state.exp_avg,
                    state.exp_avg_sq,
                    lr=lr,
                    betas=self.config.betas,
                    eps=self.config.eps,
                    weight_decay=self.config.weight_decay if decays(name, state.segment.parameter) else 0.0,
                    step=step,
                )
                if self.config.moments_dtype == "fp8":
                    round_to_fp8(state.exp_avg)
                    round_to_fp8(state.exp_avg_sq)
            bucket.gather({name: state.master for name, state in states.items()})

    def zero_grad(self) -> None:
        """Set every `main_grad` to zero in place and drop what autograd may have left in `.grad`."""
        for bucket in self.buckets:
            bucket.zero()

    def state_pieces(self) -> dict[str, Piece]:
        """The optimizer's state on this rank for a checkpoint, the live tensors themselves.

        Returns:
            'exp_avg.<name>', 'exp_avg_sq.<name>', and 'master.<name>' where the master is a tensor of its own (an FP32
            parameter is its own master and travels with the model); each a piece of the flattened global parameter.
            Parameters of which this rank updates nothing are absent. Filling the tensors in place loads the state.
        """
        pieces: dict[str, Piece] = {}
        for name, state in self._states.items():
            if state.segment.parameter.dtype != torch.float32:
                pieces[f"master.{name}"] = self._piece(state, state.master)
            pieces[f"exp_avg.{name}"] = self._piece(state, state.exp_avg)
            pieces[f"exp_avg_sq.{name}"] = self._piece(state, state.exp_avg_sq)
        return pieces

    def masters(self) -> dict[str, Piece]:
        """The FP32 weights that this rank updates, live, by parameter name; FP32 parameters included."""
        return {name: self._piece(state, state.master) for name, state in self._states.items()}

    def _piece(self, state: _State, local: Tensor) -> Piece:
        name, parameter = state.segment.name, state.segment.parameter
        within = self._within.get(name, Within(first=0, global_numel=parameter.numel()))
        return Piece(local, (within.global_numel,), (within.first + state.segment.start,))
