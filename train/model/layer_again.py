"""A layer of which only its input is kept, and which runs again in backward (activation checkpoints, arXiv:1604.06174).

    forward     no graph: of what the layer computes, the sum that leaves it stays
    backward    the layer again, with a graph, but for the way of the experts' sums home, which backward does not read;
                its backward, each weight gradient as soon as it can be

Between forward and backward a layer holds one hidden state, 59 MB at V3's size and 4096 tokens. The price is a second
forward, with its dispatch of tokens. The report recomputes less (arXiv:2412.19437 §3.2.3): this is for long sequences,
of which that would hold too much. Values are the same bits, for the stream is rounded where it always is.

Weight gradients do not wait for their slot in a pipeline, nor for the layer's end: what those of the MoE read, 6.1 GB
at V3's size and 32K tokens, would be held beside the 12 GB of attention's backward (counted, `stage_bytes.py`).

Shapes: x, total [sequences, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from kernels import deferred
from kernels.probe import current, watching
from train.model.moe import Routing
from train.model.phases import Run, Steps, Travel, at_once

T = TypeVar("T")
# Runner of its phases, x -> residual stream, what is to be added to it, and a MoE layer's routing.
Layer = Callable[[Run, Tensor], tuple[Tensor, Tensor | None, Routing | None]]


def _for_backward(x: Tensor) -> Run:
    """`at_once`, but the experts' sums stay where they are; a NaN without memory stands for what would come home."""
    home = x.new_full((1, 1), torch.nan).expand(x.shape[:-1].numel(), x.shape[-1])

    def run(name: str, phase: Callable[..., T | Travel[T]], *args: Any) -> Steps[T]:
        if name != "combine":
            return at_once(name, phase, *args)
        return at_once(name, lambda *inputs: _without_travel(phase(*inputs), home), *args)

    return run


def _without_travel(travel: Any, arrived: Tensor) -> Any:
    """What a phase returns if that arrives, and nothing leaves; where nothing would have left, what it returns."""
    try:
        next(travel)
        travel.send(arrived)
    except StopIteration as end:
        return end.value
    raise AssertionError("combine has a second exchange")


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, routings: list[Routing]) -> tuple[Tensor, Tensor | None]:
        # FP8's operands are shown when they are computed the second time, where backward follows.
        ctx.layer, ctx.probe = layer, current()
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        with watching(None):
            residual, delta, routing = layer(at_once, x)
        assert delta is not None, "a layer has added what its FFN gives"
        if routing is not None:
            routings.append(routing)
        return residual + delta, None if routing is None else routing.balance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        d_total, d_balance = grads
        # What those of later parts of the stage hold would be there all the while.
        deferred.take()()
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), watching(ctx.probe):
            residual, delta, routing = ctx.layer(_for_backward(x), x)
        outputs = [(residual, d_total), (delta, d_total)]
        outputs += [] if routing is None else [(routing.balance, d_balance)]
        # Nodes instead of tensors, so that what leaves the layer does not live through its backward.
        roots = [(get_gradient_edge(output), grad) for output, grad in outputs if grad is not None]
        del residual, delta, routing, outputs
        with deferred.at_once():
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        return x.grad, None, None


def layer_again(layer: Layer, residual: Tensor, delta: Tensor | None) -> tuple[Tensor, Routing | None]:
    """The sum that leaves a layer of residual + delta, and its routing, whose balance loss has a gradient."""
    routings: list[Routing] = []
    x = residual if delta is None else residual + delta
    total, balance = _Again.apply(x, layer, routings)  # type: ignore[no-untyped-call]
    return total, replace(routings[0], balance=balance) if routings else None
