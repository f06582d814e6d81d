"""Expert parallelism: tokens travel to the ranks of their experts, results travel home (arXiv:2412.19437 §3.2.2, §3.3).

    routing    counts and one host read; ids and gates -> hops
    dispatch   quantise, if the norm has not -> hops -> tokens in tiles, as they arrived
    experts    one row per (token, local expert), grouped, padded to 128; FP32 sum of a token's rows (`kernels`)
    combine    hops, backward -> FP32 sum over ranks at each, in order of rank

Expert e is on rank e // local_experts of the axis. A token goes at most once to each rank and is expanded there, over
one hop or two (`parallel/hops.py`); its experts (int32) and gates (FP32) go before it, and the gradients of the gates
come back. Backward of combine is a dispatch of the token's own gradient in the same format, backward of dispatch a
combine. What arrives in FP8 is never expanded to numbers: experts gather rows for their products from it
(`kernels.gather`).

The wire follows precision: FP32; BF16; or, for fp8, E4M3 payload + FP32 scales for dispatch (one uint8 row of
hidden + 4 * ceil(hidden / 128) bytes per copy, 7392 at 7168) and BF16 for combine. fprop of the experts' first
linear and dgrad of their last compute on exactly what was sent, as do the wgrads with power-of-two scales, but for
underflow.

Shapes: tokens of this rank [tokens, hidden]; received = copies that arrived, each of another token. Gathers and ordered
sums only: results repeat to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.formats import CarriedTiles, GradientTiles, Quantized
from kernels.fp8_linear import LinearInput, carried, dequantized_rows
from kernels.permute import Dispatched, Grouping, group_gates, partial_grouping
from kernels.quantize import quantize_tiles
from parallel.collectives import Traffic
from parallel.hops import Arrivals, ExpertChoice, Hop, HopPlanner, as_if_in_order
from parallel.mesh import Axis

Wire = Literal["fp32", "bf16", "fp8"]


def pack_fp8(q: Quantized) -> Tensor:
    """Tokens in 1x128 tiles -> packets [tokens, hidden + 4 * ceil(hidden / 128)] uint8, scales last."""
    # A fresh tensor, for `contiguous` keeps odd strides of one column, which cannot be viewed as bytes.
    scales = torch.empty(q.scale.shape[::-1], device=q.scale.device).copy_(q.scale.t())  # [tokens, tiles]
    return torch.cat((q.payload.view(torch.uint8), scales.view(torch.uint8)), dim=1)


# 1x128 -> 128x1 for wgrad is exact with power-of-two scales, but for elements that fall below 2^-6 of their new tile's
# scale and are no multiple of 2^-9 of it; with FP32 scales it is a second rounding.
def unpack_fp8(packets: Tensor, hidden: int) -> Quantized:
    """The tokens in 1x128 tiles, as views of the packets: payload [tokens, hidden], scale [tiles, tokens]."""
    scales = packets[:, hidden:]
    if hidden % 4:
        # Misaligned for FP32.
        scales = torch.empty_like(scales, memory_format=torch.contiguous_format).copy_(scales)
    return Quantized(packets[:, :hidden].view(torch.float8_e4m3fn), scales.view(torch.float32).t())


@dataclass(frozen=True)
class DispatchPlan:
    """The way of a layer's tokens in one micro-batch; forward and backward share it."""

    hops: tuple[Hop, ...]
    wire: Wire
    power_of_two: bool

    def to_experts(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [received, hidden] in x.dtype, over a plain dispatch wire."""
        return self._forward(x.to(self._plain_dtype)).to(x.dtype)

    def tiles_to_experts(self, tokens: Quantized) -> Quantized:
        """Tokens in tiles -> received ones, over the fp8 dispatch wire: passed on as bytes."""
        return unpack_fp8(self._forward(pack_fp8(tokens)), tokens.payload.shape[1])

    def to_tokens(self, sums: Tensor) -> Tensor:
        """[received, hidden] -> [tokens, hidden] in sums.dtype; rounded to the combine wire before each hop."""
        out_dtype, plain = sums.dtype, self._plain_dtype
        sums = sums.to(plain)
        for hop in reversed(self.hops):
            sums = hop.back(sums, "combine", out_dtype=out_dtype if hop is self.hops[0] else plain)
        return sums

    def gates_to_tokens(self, grads: Tensor) -> Tensor:
        """[received, topk] -> [tokens, topk]: each gate was used on one rank, the other copies bring zeros."""
        for hop in reversed(self.hops):
            grads = hop.back(grads, "gates", out_dtype=grads.dtype)
        return grads

    def _forward(self, rows: Tensor) -> Tensor:
        for hop in self.hops:
            rows = hop.there(rows, "dispatch")
        return rows

    @property
    def _plain_dtype(self) -> torch.dtype:
        return torch.float32 if self.wire == "fp32" else torch.bfloat16


def _carrier(like: Tensor, tokens: int) -> Tensor:
    """What autograd gets in place of tiles: [tokens, hidden], a NaN that takes no memory."""
    return like.new_full((1, 1), float("nan")).expand(tokens, like.shape[1])


class _Dispatch(torch.autograd.Function):
    """Tokens go out, with gates that have (`hops`); their gradients come home together: one order on every rank.

    Of tokens that went out in tiles, `arrived` of them, the carrier follows here.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, arrivals: Arrivals, plan: DispatchPlan, arrived: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        return plan.to_experts(tokens) if arrived is None else _carrier(tokens, arrived), arrivals.gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        plan: DispatchPlan = ctx.plan
        return plan.to_tokens(grads[0]), plan.gates_to_tokens(grads[1]), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, plan: DispatchPlan, gradient: GradientTiles[Quantized] | None) -> Tensor:
        ctx.plan, ctx.gradient, ctx.received = plan, gradient, len(sums)
        return plan.to_tokens(sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        plan: DispatchPlan = ctx.plan
        if ctx.gradient is None:
            return plan.to_experts(grads[0]), None, None
        # Each token is quantised once, however many copies leave.
        ctx.gradient.put(plan.tiles_to_experts(quantize_tiles(grads[0], power_of_two=plan.power_of_two)))
        return _carrier(grads[0], ctx.received), None, None


class ExpertParallelDispatcher:
    """Brings tokens to the experts of an axis and the results home.

    Every rank of the axis calls `dispatch`, `combine` and their backward in the same order, with any number of tokens.

    Args:
        n_routed_experts: experts of the layer, over all ranks.
        axis: the ranks that share one copy of the experts.
        hops: what tokens cross on their way, `Mesh.hops`; empty: the axis itself.
        wire: the precision of the run.
        power_of_two: round the scales of an fp8 wire up to powers of two.
        assume_balanced: for plans with fake tensors, where there is nothing to read: take the split sizes of perfectly
            balanced routing. Values are then void.
        most_nodes: with it, to how many nodes a token goes at most; None: to all.
    """

    def __init__(
        self,
        n_routed_experts: int,
        axis: Axis,
        *,
        hops: tuple[Axis, ...] = (),
        wire: Wire,
        power_of_two: bool,
        assume_balanced: bool = False,
        most_nodes: int | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        if n_routed_experts % axis.size:
            raise ValueError(
                f"model.n_routed_experts={n_routed_experts} cannot be shared by layout.ep={axis.size} ranks: "
                f"choose an ep that divides it"
            )
        self.axis, self.wire, self.power_of_two = axis, wire, power_of_two
        self._planner = HopPlanner(
            axis, hops or (axis,), assume_balanced=assume_balanced, most_nodes=most_nodes, traffic=traffic
        )
        local = n_routed_experts // axis.size
        self.experts = range(axis.rank * local, (axis.rank + 1) * local)

    def dispatch(self, tokens: LinearInput, routing: ExpertChoice) -> Dispatched:
        """Send tokens to their experts' ranks.

        Args:
            tokens: [tokens, hidden] fp32 or bf16, or in tiles for an fp8 wire, which quantises what is not; 0 tokens
                are legal, the exchange still takes place.
            routing: of these tokens.
        Returns:
            The tokens that arrived, and how the local experts group them: each expert's rows in order of (source rank,
            token). Over an fp8 wire they are in tiles, and so is the gradient of the experts' sums.
        """
        assert len(tokens.shape) == 2, tokens.shape
        assert tokens.shape[0] == len(routing.topk_ids), (tokens.shape, routing.topk_ids.shape)
        hops, arrivals = self._planner.plan(routing)
        plan, tiles = DispatchPlan(hops, self.wire, self.power_of_two), None
        if self.wire == "fp8":
            known = carried(tokens, power_of_two=self.power_of_two) if isinstance(tokens, Tensor) else tokens
            tokens, tiles = known.carrier, plan.tiles_to_experts(known.tiles)
        assert isinstance(tokens, Tensor), f"a wire in {self.wire} takes no tiles"
        arrived = None if tiles is None else len(tiles.payload)
        received, gates = _Dispatch.apply(tokens, routing.gates, arrivals, plan, arrived)  # type: ignore[no-untyped-call]
        grouping = self._grouping(arrivals)
        if tiles is not None:
            received = CarriedTiles(received, tiles, partial(dequantized_rows, tiles, received.dtype))
        return Dispatched(
            tokens=received,
            gates=group_gates(gates, grouping),
            grouping=grouping,
            gradient=None if tiles is None else GradientTiles(),
            handle=plan,
        )

    @torch.no_grad()
    def _grouping(self, arrivals: Arrivals) -> Grouping:
        """Only indices are put in order: what arrived stays where it is."""
        in_order, local = arrivals.in_order, len(self.experts)
        ids = arrivals.ids - self.axis.rank * local
        ids = torch.where((ids >= 0) & (ids < local), ids, -1)
        grouping = partial_grouping(ids, local, num_rows=arrivals.num_rows)
        return grouping if in_order is None else as_if_in_order(grouping, in_order)

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' sums of the received tokens, gates included, home, and sum them there.

        A token's sum [tokens, hidden], in sums.dtype, is rounded to the wire's dtype on each rank, and once here.
        """
        plan = dispatched.handle
        assert isinstance(plan, DispatchPlan), type(plan)
        y: Tensor = _Combine.apply(sums, plan, dispatched.gradient)  # type: ignore[no-untyped-call]
        return y
