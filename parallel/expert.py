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

In a pair of micro-batches each of these exchanges, in either direction, is in flight (`parallel/flight.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from kernels.formats import CarriedTiles, GradientTiles, Quantized
from kernels.fp8_linear import LinearInput, carried, dequantized_rows
from kernels.permute import Dispatched, Grouping, group_gates, partial_grouping
from kernels.quantize import quantize_tiles
from parallel.collectives import Traffic
from parallel.flight import Exchange, Flight, Journey, gradients
from parallel.hops import Arrivals, ExpertChoice, Hop, HopPlanner, as_if_in_order
from parallel.mesh import Axis

Wire = Literal["fp32", "bf16", "fp8"]
T = TypeVar("T")
# A phase with an exchange, which it yields and whose result it is sent.
Travel = Generator[Exchange[Any], Any, T]


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


class TokenRoute(Protocol):
    """The way of a layer's tokens in one micro-batch; forward and backward share it. Every rank calls it alike."""

    @property
    def power_of_two(self) -> bool:
        """Whether scales of an fp8 wire are powers of two."""

    def to_experts(self, x: Tensor) -> Journey[Tensor]:
        """[tokens, hidden] -> [received, hidden] in x.dtype, over a plain dispatch wire."""

    def tiles_to_experts(self, tokens: Quantized) -> Journey[Quantized]:
        """Tokens in tiles -> received ones, over the fp8 dispatch wire."""

    def to_tokens(self, sums: Tensor) -> Journey[Tensor]:
        """[received, hidden] -> [tokens, hidden] in sums.dtype, over the combine wire."""

    def gradients_to_tokens(self, sums: Tensor, gates: Tensor) -> Journey[tuple[Tensor, Tensor]]:
        """Gradients of received tokens [received, hidden] and of their gates [received, topk] -> of tokens."""


@dataclass(frozen=True)
class Delivery:
    """What has reached the experts' rank, and the way home."""

    tokens: Tensor | Quantized  # [received, hidden]
    arrivals: Arrivals
    route: TokenRoute


@dataclass(frozen=True)
class DispatchPlan:
    """`TokenRoute` over hops."""

    hops: tuple[Hop, ...]
    wire: Wire
    power_of_two: bool

    def to_experts(self, x: Tensor) -> Journey[Tensor]:
        """As in `TokenRoute`."""
        rows = yield from self._forward(x.to(_plain_dtype(self.wire)))
        return rows.to(x.dtype)

    def tiles_to_experts(self, tokens: Quantized) -> Journey[Quantized]:
        """As in `TokenRoute`; passed on as bytes."""
        packets = yield from self._forward(pack_fp8(tokens))
        return unpack_fp8(packets, tokens.payload.shape[1])

    def to_tokens(self, sums: Tensor) -> Journey[Tensor]:
        """As in `TokenRoute`; rounded to the wire before each hop."""
        out_dtype, plain = sums.dtype, _plain_dtype(self.wire)
        sums = sums.to(plain)
        for hop in reversed(self.hops):
            sums = yield hop.back(sums, "combine", out_dtype=out_dtype if hop is self.hops[0] else plain)
        return sums

    def gradients_to_tokens(self, sums: Tensor, gates: Tensor) -> Journey[tuple[Tensor, Tensor]]:
        """As in `TokenRoute`; each gate was used on one rank, the other copies bring zeros."""
        out_dtype, plain = sums.dtype, _plain_dtype(self.wire)
        sums = sums.to(plain)
        for hop in reversed(self.hops):
            # Home together: one order on every rank.
            tokens = hop.back(sums, "combine", out_dtype=out_dtype if hop is self.hops[0] else plain)
            weights = hop.back(gates, "gates", out_dtype=gates.dtype)
            sums = yield tokens
            gates = yield weights
        return sums, gates

    def _forward(self, rows: Tensor) -> Journey[Tensor]:
        for hop in self.hops:
            rows = yield hop.there(rows, "dispatch")
        return rows


def _plain_dtype(wire: Wire) -> torch.dtype:
    return torch.float32 if wire == "fp32" else torch.bfloat16


def _carrier(like: Tensor, tokens: int) -> Tensor:
    """What autograd gets in place of tiles: [tokens, hidden], a NaN that takes no memory."""
    return like.new_full((1, 1), float("nan")).expand(tokens, like.shape[1])


class _Dispatch(torch.autograd.Function):
    """Tokens and gates have gone out; here autograd learns it. Of tokens in tiles it gets a carrier."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gates: Tensor, delivery: Delivery) -> tuple[Tensor, Tensor]:
        ctx.route, received = delivery.route, delivery.tokens
        ctx.shapes = tokens.shape, gates.shape
        if isinstance(received, Quantized):
            received = _carrier(tokens, len(received.payload))
        return received, delivery.arrivals.gates

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        route: TokenRoute = ctx.route
        home = Exchange(route.gradients_to_tokens(grads[0], grads[1]), route, grads)
        tokens, gates = gradients(home, *zip(ctx.shapes, (grads[0].dtype, grads[1].dtype), strict=True))
        return tokens, gates, None


class _Combine(torch.autograd.Function):
    """Sums have come home; here autograd learns it."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, home: list[Tensor], dispatched: Dispatched) -> Tensor:
        ctx.route, ctx.gradient, ctx.shape = dispatched.handle, dispatched.gradient, sums.shape
        return home.pop()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        route: TokenRoute = ctx.route
        tiles: GradientTiles[Quantized] | None = ctx.gradient
        journey: Journey[Any] = (
            route.to_experts(grads[0]) if tiles is None else _leave_tiles(grads[0], route, tiles, ctx.shape[0])
        )
        (received,) = gradients(Exchange(journey, route, grads), (ctx.shape, grads[0].dtype))
        return received, None, None


def _leave_tiles(
    grad: Tensor, route: TokenRoute, gradient: GradientTiles[Quantized], received: int
) -> Journey[tuple[Tensor, Quantized]]:
    """A carrier of the gradient at the experts, and its tiles, which are left for them beside autograd."""
    # Each token is quantised once, however many copies leave.
    tiles = yield from route.tiles_to_experts(quantize_tiles(grad, power_of_two=route.power_of_two))
    gradient.put(tiles)
    return _carrier(grad, received), tiles


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

    def begin(self, routing: ExpertChoice) -> object:
        """Exchange the counts; the host waits for them in `dispatch`, not for what is issued in between."""
        return Exchange(self._planner.begin(routing), routing).depart()

    def dispatch(self, tokens: LinearInput, routing: ExpertChoice, begun: object = None) -> Travel[Dispatched]:
        """Send tokens to their experts' ranks.

        Args:
            tokens: [tokens, hidden] fp32 or bf16, or in tiles for an fp8 wire, which quantises what is not; 0 tokens
                are legal, the exchange still takes place.
            routing: of these tokens.
            begun: what `begin` has returned for it; None begins now.
        Yields:
            The exchange, for whoever runs the phase.
        Returns:
            The tokens that arrived, and how the local experts group them: each expert's rows in order of (source rank,
            token). Over an fp8 wire they are in tiles, and so is the gradient of the experts' sums.
        """
        assert len(tokens.shape) == 2, tokens.shape
        assert tokens.shape[0] == len(routing.topk_ids), (tokens.shape, routing.topk_ids.shape)
        sent: Tensor | Quantized
        if self.wire == "fp8":
            known = carried(tokens, power_of_two=self.power_of_two) if isinstance(tokens, Tensor) else tokens
            tokens, sent = known.carrier, known.tiles
        else:
            assert isinstance(tokens, Tensor), f"a wire in {self.wire} takes no tiles"
            sent = tokens
        begun = self.begin(routing) if begun is None else begun
        delivery: Delivery = yield Exchange(self._deliver(sent, routing, begun), sent, routing, begun)
        received, gates = _Dispatch.apply(tokens, routing.gates, delivery)  # type: ignore[no-untyped-call]
        grouping, tiles = self._grouping(delivery.arrivals), None
        if isinstance(delivery.tokens, Quantized):
            tiles = delivery.tokens
            received = CarriedTiles(received, tiles, partial(dequantized_rows, tiles, received.dtype))
        return Dispatched(
            tokens=received,
            gates=group_gates(gates, grouping),
            grouping=grouping,
            gradient=None if tiles is None else GradientTiles(),
            handle=delivery.route,
        )

    def _deliver(self, tokens: Tensor | Quantized, routing: ExpertChoice, begun: object) -> Journey[Delivery]:
        """Send tokens, and before them their routing."""
        assert isinstance(begun, Flight), type(begun)
        rows = pack_fp8(tokens) if isinstance(tokens, Quantized) else tokens.detach().to(_plain_dtype(self.wire))
        hops, arrivals, received = yield from self._planner.send(routing, begun.wait(), rows)
        plan = DispatchPlan(hops, self.wire, self.power_of_two)
        if isinstance(tokens, Quantized):
            return Delivery(unpack_fp8(received, tokens.payload.shape[1]), arrivals, plan)
        return Delivery(received.to(tokens.dtype), arrivals, plan)

    @torch.no_grad()
    def _grouping(self, arrivals: Arrivals) -> Grouping:
        """Only indices are put in order: what arrived stays where it is."""
        in_order, local = arrivals.in_order, len(self.experts)
        ids = arrivals.ids - self.axis.rank * local
        ids = torch.where((ids >= 0) & (ids < local), ids, -1)
        grouping = partial_grouping(ids, local, num_rows=arrivals.num_rows)
        return grouping if in_order is None else as_if_in_order(grouping, in_order)

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Travel[Tensor]:
        """Send the experts' sums of the received tokens, gates included, home, and sum them there.

        A token's sum [tokens, hidden], in sums.dtype, is rounded to the wire's dtype on each rank, and once here.
        """
        route: Any = dispatched.handle
        home: Tensor = yield Exchange(route.to_tokens(sums.detach()), route, sums)
        y: Tensor = _Combine.apply(sums, [home], dispatched)  # type: ignore[no-untyped-call]
        return y
