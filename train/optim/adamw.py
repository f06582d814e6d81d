"""AdamW of the report: FP32 master weights, FP32 gradients, BF16 moments (arXiv:2412.19437 §3.3.3, §4.2).

Each `ParameterShard`, what this rank updates of a trained parameter (`parallel.zero`), gets four companions:

    grad         fp32, the reduced and clipped gradient; a view of the gradient bucket
    master       fp32, the weight that AdamW moves; for an FP32 parameter a view of the parameter itself
    exp_avg      bf16 (or fp32, or fp32 holding FP8 values), first moment
    exp_avg_sq   the same, second moment

For a checkpoint the state is given as shards of the flattened global parameter, so what is saved does not depend on how
ranks had cut it. Shapes: all companions are [elements], as long as their shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.adamw import AdamWHyper, adamw_update
from kernels.formats import TILE
from kernels.quantize import dequantize_tiles, quantize_tiles
from parallel.shards import LocalShard, Shard
from parallel.zero import GradientBuckets, ParameterShard
from train.optim.config import OptimConfig
from train.optim.offload import Segment, Staging, on_host, segments

# Storage of both moments (§3.3.3); fp8 is rounded by `round_to_fp8`.
MOMENT_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float32}


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, embedding and head included, not to norm gains nor vectors."""
    # The report does not say which parameters it spares; this is our choice. A gain that decays towards 0 is not a
    # simpler network but a dead one.
    module = name.rpartition(".")[0]
    return parameter.ndim >= 2 and not module.endswith("norm")


def round_to_fp8(moment: Tensor) -> None:
    """Round a moment in place to what E4M3 with a power-of-two scale for each 128 elements can hold."""
    # Tiles begin where this rank's shard begins, so they depend on the layout.
    tiles = F.pad(moment, (0, -moment.numel() % TILE)).view(-1, TILE)
    values = dequantize_tiles(quantize_tiles(tiles, power_of_two=True))
    moment.copy_(values.flatten()[: moment.numel()])


def scale_rows(flat: Tensor, factors: Tensor, *, first: int, cols: int) -> None:
    """Multiply elements from `first` on of a flattened [rows, cols] matrix by their rows' factors, in place."""
    rows = factors[first // cols : -(-(first + len(flat)) // cols)]
    elements = rows[:, None].expand(-1, cols).flatten()
    flat.mul_(elements[first % cols :][: len(flat)])


@dataclass(frozen=True, eq=False)
class _State:
    """What this rank updates of a parameter, with its master and its moments by name, [elements] each."""

    held: ParameterShard
    master: Tensor
    moments: dict[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.master, *self.moments.values()


class AdamW:
    """AdamW over what this rank updates of gradient buckets; owns masters and moments.

    Args:
        buckets: all gradients of this rank; no name may be in two.
        config: hyperparameters.
        flat_shards: for parameters that are a shard of the global one (experts): which, both flattened.
    """

    def __init__(
        self, buckets: Sequence[GradientBuckets], config: OptimConfig, flat_shards: Mapping[str, Shard] | None = None
    ) -> None:
        self.buckets, self.config, self._flat_shards = tuple(buckets), config, flat_shards or {}
        names = Counter(name for bucket in self.buckets for name in bucket.parameters)
        if name := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"parameter name {name!r} appears twice; give each parameter its own name")
        self._states = {
            held.name: self._adopt(held, bucket.master(held))
            for bucket in self.buckets
            for held in bucket.parameter_shards()
        }
        self.staging: Staging | None = None
        self._segments: dict[str, list[Segment]] = {}
        if config.offload == "cpu" and self._states:
            self._segments = {name: [*segments(name, state.tensors)] for name, state in self._states.items()}
            device = next(iter(self._states.values())).held.grad.device
            self.staging = Staging(device, self._segments.values())
        for bucket in self.buckets:
            bucket.release()

    def _adopt(self, held: ParameterShard, master: Tensor) -> _State:
        dtype = MOMENT_DTYPES[self.config.moments_dtype]
        moments = {name: torch.zeros_like(master, dtype=dtype) for name in self.moments_of(held.name)}
        if self.config.offload == "none":
            return _State(held, master, moments)
        # An FP32 parameter is its own master and stays where it is.
        is_own = held.parameter.dtype == torch.float32
        return _State(held, master if is_own else on_host(master), {name: on_host(x) for name, x in moments.items()})

    def moments_of(self, name: str) -> tuple[str, ...]:
        """The moments that a parameter has."""
        return "exp_avg", "exp_avg_sq"

    @torch.no_grad()
    def step(self, *, lr: float, step: int, row_factors: Mapping[str, Tensor] | None = None) -> None:
        """Update this rank's masters, then give the new weights to all ranks; `step` counts from 1.

        row_factors: name -> [rows] fp32, by which the rows of new masters are multiplied.
        """
        assert step >= 1, f"updates are counted from 1, got step {step}"
        passing = None if self.staging is None else self.staging.passing(self._segments.values())
        for bucket in self.buckets:
            bucket.gather(partial(self._update, lr=lr, step=step, row_factors=row_factors or {}, passing=passing))
        if passing is not None:
            # What is asked for after the last segment copies that one back.
            after = next(passing, None)
            assert after is None, f"a segment of {after.name} was not updated"

    def _update(
        self,
        name: str,
        new_weights: Tensor,
        *,
        lr: float,
        step: int,
        row_factors: Mapping[str, Tensor],
        passing: Iterator[Segment] | None,
    ) -> None:
        """Move master and moments of one shard; its new weights are written rounded."""
        state = self._states[name]
        whole = [Segment(name, 0, len(new_weights), state.tensors)]
        for segment in whole if passing is None else islice(passing, len(self._segments[name])):
            assert segment.name == name, f"{name} was to be updated, but a segment of {segment.name} has come"
            grad, weight = (each[segment.start : segment.stop] for each in (state.held.grad, new_weights))
            self._move(segment, grad, weight, lr=lr, step=step)
            if name in row_factors:
                first, (_, cols) = state.held.shard.offsets[0] + segment.start, state.held.parameter.shape
                scale_rows(segment.tensors[0], row_factors[name], first=first, cols=cols)
                weight.copy_(segment.tensors[0])

    def _move(self, segment: Segment, grad: Tensor, weight: Tensor, *, lr: float, step: int) -> None:
        config, (master, exp_avg, exp_avg_sq) = self.config, segment.tensors
        weight_decay = config.weight_decay if decays(segment.name, self._states[segment.name].held.parameter) else 0.0
        hyper = AdamWHyper(lr=lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay, step=step)
        adamw_update(master, grad, exp_avg, exp_avg_sq, weight, **hyper)
        if config.moments_dtype == "fp8":
            round_to_fp8(exp_avg)
            round_to_fp8(exp_avg_sq)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every parameter has values, to be read or to be filled with the state; a collective call.

        Weights that are kept in FP8 only are made from the masters, and quantised at the end as they are then.
        """
        self._wait_for_host()

        def rounded(name: str, weights: Tensor) -> None:
            weights.copy_(self._states[name].master)

        for bucket in self.buckets:
            bucket.restore(rounded)
        try:
            yield
        finally:
            for bucket in self.buckets:
                bucket.release()

    def zero_grad(self) -> None:
        """Begin a step; see `GradientBuckets.forget`."""
        for bucket in self.buckets:
            bucket.forget()

    def state_shards(self) -> dict[str, LocalShard]:
        """The optimizer's state on this rank, live: filling the tensors in place loads it.

        'exp_avg.<name>', 'exp_avg_sq.<name>', and 'master.<name>' where the master is a tensor of its own (an FP32
        parameter is its own master and travels with the model); each a shard of the flattened global parameter.
        """
        self._wait_for_host()
        shards: dict[str, LocalShard] = {}
        for name, state in self._states.items():
            if state.held.parameter.dtype != torch.float32:
                shards[f"master.{name}"] = self._local_shard(state, state.master)
            shards |= {f"{kind}.{name}": self._local_shard(state, x) for kind, x in state.moments.items()}
        return shards

    def masters(self) -> dict[str, LocalShard]:
        """The FP32 weights that this rank updates, live, by parameter name; FP32 parameters included."""
        self._wait_for_host()
        return {name: self._local_shard(state, state.master) for name, state in self._states.items()}

    def _wait_for_host(self) -> None:
        if self.staging is not None:
            self.staging.wait()

    def _local_shard(self, state: _State, tensor: Tensor) -> LocalShard:
        whole = Shard.whole((state.held.parameter.numel(),))
        return LocalShard(tensor, state.held.shard.of(self._flat_shards.get(state.held.name, whole)))
