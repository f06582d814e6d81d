"""Stand-ins for pipeline stages: one micro-batch of each kind of stage is measured, the others allocate what it did.

Every micro-batch of a stage allocates the same, and so do stages with as many layers of each kind. So a plan runs two
micro-batches through each kind of stage (`observe`), builds and updates each kind of rank once, and runs the schedule
of every rank (arXiv:2412.19437 §3.2.1) on modules that only allocate those bytes (`StandIn`). Order, receive buffers
and waiting weight gradients stay those of the real pipeline; tests/studies/plan/test_fullest.py compares both, to 4
bytes.

Shapes: inbound and output [sequences, tokens, hidden]; the output of the last stage is a scalar.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import deferred
from kernels.formats import Quantized
from parallel.collectives import Traffic
from train.model.config import ModelConfig, StageSpec
from train.stage import Stage
from train.studies.plan.live_bytes import LiveBytes


class StageKind(NamedTuple):
    """Stages of one kind allocate the same."""

    dense_layers: int
    moe_layers: int
    is_first: bool
    is_last: bool

    @classmethod
    def of(cls, config: ModelConfig, spec: StageSpec) -> StageKind:
        """The kind of a stage; `config` is of the whole model."""
        moe = sum(config.is_moe(layer_id) for layer_id in spec.layer_ids)
        return cls(len(spec.layer_ids) - moe, moe, spec.is_first, spec.is_last)


@dataclass(frozen=True)
class ChunkBytes:
    """What one micro-batch of a stage allocates, bytes; a peak is above what was alive when its part began."""

    kept: int  # from the first micro-batch on: FP8 copies of weights, RoPE tables
    fp8_copies: int  # of these
    exchange: int  # the largest send and receive buffer of a MoE layer
    forward_held: int  # until backward, without the output
    forward_peak: int
    backward_peak: int
    wgrad_held: int  # from backward until the weight gradients have run, what follows apart
    wgrad_needs: tuple[bool, bool]  # whether they hold the output's gradient, and the stage's input
    wgrad_peak: int


def observe(
    stage: Stage, hidden: Tensor, inputs: Mapping[str, Tensor], *, live: LiveBytes, traffic: Traffic
) -> ChunkBytes:
    """Run two micro-batches through a real stage and measure the second: what is made once is there by then.

    `hidden` is of the shape that travels between stages, `inputs` those of one micro-batch.
    """
    before, traffic.largest_exchange = live.now, 0
    _run_chunk(stage, hidden, inputs, live)
    kept = live.now - before
    found = _run_chunk(stage, hidden, inputs, live)
    copies = storage_bytes(tensor for parameter in stage.parameters() for tensor in fp8_copy(parameter))
    return ChunkBytes(kept=kept, fp8_copies=copies, exchange=traffic.largest_exchange, **found)


def _run_chunk(stage: Stage, hidden: Tensor, inputs: Mapping[str, Tensor], live: LiveBytes) -> dict[str, Any]:
    spec, start = stage.model.spec, live.now
    inbound = inputs["input_ids"]
    if not spec.is_first:
        inbound = torch.empty_like(hidden, device=inbound.device, requires_grad=True)
    begin = live.peak = live.now
    output = stage(inbound, **inputs)
    forward_peak, forward_held = live.peak - begin, live.now - begin - _bytes(output)
    ends = [torch.ones_like(output), inbound]
    before = live.peak = live.now
    with deferred.deferred():
        torch.autograd.backward(output, ends[0])
    backward_peak = live.peak - before
    inbound.grad = None
    # A schedule keeps the last stage's loss, and what hangs on its graph, to the end of the step.
    base = start + (_bytes(output) if spec.is_last else 0)
    loss = output if spec.is_last else None
    del output, inbound
    # Dropped one by one, to see which of them the weight gradients hold.
    needs = []
    while ends:
        now, num_bytes = live.now, _bytes(ends[0])
        del ends[0]
        needs.append(live.now == now and not (spec.is_first and not ends))
        base += num_bytes if needs[-1] else 0
    held = live.now - base
    now = live.peak = live.now
    deferred.take()()
    wgrad_peak = live.peak - now
    del loss
    return {
        "forward_held": forward_held,
        "forward_peak": forward_peak,
        "backward_peak": backward_peak,
        "wgrad_held": held,
        "wgrad_needs": tuple(needs),
        "wgrad_peak": wgrad_peak,
    }


class StandIn(nn.Module):
    """A module that allocates what a stage does, and returns an output of its shape.

    What the stage's first micro-batch would make for all, it holds from the beginning.
    """

    def __init__(self, found: ChunkBytes, *, output: Tensor) -> None:
        super().__init__()
        self.found, self.like, self.kept = found, output, _empty(found.kept)
        # Without a parameter the first stage's output would need no backward.
        self.anchor = nn.Parameter(torch.empty(0))

    def forward(self, inbound: Tensor, **_: Tensor) -> Tensor:
        """Allocate; backward and the weight gradients follow as for the stage."""
        output: Tensor = _Allocate.apply(inbound, self.anchor, self.found, self.like)  # type: ignore[no-untyped-call]
        return output


class _Allocate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inbound: Tensor, _: Tensor, found: ChunkBytes, like: Tensor) -> Tensor:
        output = torch.empty_like(like, device=inbound.device)
        ctx.found, ctx.inbound, ctx.held = found, inbound, _empty(found.forward_held)
        _empty(found.forward_peak - found.forward_held - _bytes(output))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found, inbound = ctx.found, ctx.inbound
        _empty(found.backward_peak)
        ctx.held = ctx.inbound = None
        held = [_empty(found.wgrad_held)]
        held += [tensor for tensor, needed in zip((grad, inbound), found.wgrad_needs, strict=True) if needed]

        def run() -> None:
            _empty(found.wgrad_peak)
            held.clear()

        deferred.push(run)
        return torch.empty_like(inbound) if inbound.requires_grad else None, None, None, None


def _empty(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def fp8_copy(parameter: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a weight's FP8 copy, if it has one."""
    if (cached := getattr(parameter, "_fp8_copy", None)) is None:
        return ()
    copy: Quantized = cached[1]
    return tuple(tensor for tensor in (copy.payload, copy.scale, copy.payload_t) if tensor is not None)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())
