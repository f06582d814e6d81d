"""Expert parallelism: tokens travel to the ranks of their experts, results travel home (arXiv:2412.19437 §3.2.2, §3.3).

    dispatch   quantise, if the norm has not -> all-to-all -> tokens in tiles, as they arrived
    experts    one row per (token, local expert), grouped, padded to 128; FP32 sum of a token's rows (`kernels`)
    combine    all-to-all -> FP32 sum over ranks, in order of rank

Expert e is on rank e // local_experts of the axis. A token goes at most once to each rank and is expanded there; its
experts (int32, -1 for experts elsewhere) and gates (FP32) travel with it, and the gradients of the gates come back.
Backward of combine is a dispatch of the token's own gradient in the same format, backward of dispatch a combine. What
arrives in FP8 is never expanded to numbers: experts gather rows for their products from it (`kernels.gather`).

The wire follows precision: FP32; BF16; or, for fp8, E4M3 payload + FP32 scales for dispatch (one uint8 row of
hidden + 4 * ceil(hidden / 128) bytes per (token, rank), 7392 at 7168) and BF16 for combine. fprop of the experts' first
linear and dgrad of their last compute on exactly what was sent, as do the wgrads with power-of-two scales, but for
underflow.

Shapes: tokens of this rank [tokens, hidden]; copies = (token, rank) pairs sent; received = copies that arrived, in
order of (source rank, token). Gathers and ordered sums only: results repeat to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kernels.formats import TILE, CarriedTiles, GradientTiles, Quantized, ceil_div
from kernels.fp8_linear import LinearInput, carried, dequantized_rows
from kernels.permute import Dispatched, group_gates, partial_grouping, sum_rows
from kernels.quantize import quantize_tiles
from parallel.collectives import Traffic, all_to_all_rows
from parallel.mesh import Axis

Wire = Literal["fp32", "bf16", "fp8"]


class ExpertChoice(Protocol):
    """The part of the router's decision that a dispatcher reads."""

    @property
    def topk_ids(self) -> Tensor:
        """[tokens, topk] int64, global ids, distinct within a token."""

    @property
    def gates(self) -> Tensor:
        """[tokens, topk] FP32."""

    @property
    def counts(self) -> Tensor:
        """[experts] int64, this rank's tokens of each expert."""


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
    """Which tokens travel between which ranks, for one layer and micro-batch; forward and backward share it."""

    axis: Axis
    wire: Wire
    power_of_two: bool
    send_splits: tuple[int, ...]  # copies for each rank
    recv_splits: tuple[int, ...]  # copies from each rank
    token_of_copy: Tensor  # [copies] int64, sorted by (destination rank, token)
    copies_of_token: Tensor  # [tokens, columns] int64 in order of rank; `copies` where a token has fewer
    traffic: Traffic | None

    def send(self, copies: Tensor, kind: str) -> Tensor:
        """[copies, width] -> [received, width]: from the tokens' rank to the experts'."""
        return all_to_all_rows(copies, self.send_splits, self.recv_splits, self.axis, kind=kind, traffic=self.traffic)

    def send_back(self, received: Tensor, kind: str) -> Tensor:
        """[received, width] -> [copies, width]: from the experts' rank to the tokens'."""
        return all_to_all_rows(received, self.recv_splits, self.send_splits, self.axis, kind=kind, traffic=self.traffic)

    def to_experts(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [received, hidden] in x.dtype, over a plain dispatch wire."""
        return self.send(x.to(self._plain_dtype).index_select(0, self.token_of_copy), "dispatch").to(x.dtype)

    def tiles_to_experts(self, tokens: Quantized) -> Quantized:
        """Tokens in tiles -> received ones, over the fp8 dispatch wire."""
        packets = pack_fp8(tokens).index_select(0, self.token_of_copy)
        return unpack_fp8(self.send(packets, "dispatch"), tokens.payload.shape[1])

    def to_tokens(self, sums: Tensor) -> Tensor:
        """[received, hidden] -> [tokens, hidden] in sums.dtype, over the combine wire, summed in order of rank."""
        copies = self.send_back(sums.to(self._plain_dtype), "combine")
        return sum_rows(copies, self.copies_of_token, partial=True, out_dtype=sums.dtype)

    @property
    def _plain_dtype(self) -> torch.dtype:
        return torch.float32 if self.wire == "fp32" else torch.bfloat16


@dataclass(frozen=True)
class CountsUnderWay:
    """What `begin` has exchanged for one layer and micro-batch, on its way to the host."""

    goes: Tensor  # [tokens, ranks] bool: whether a token has an expert there
    # int64 on the host once `arrived`: copies to each rank, copies from each, and each local expert's tokens from each.
    # None where they are assumed.
    numbers: Tensor | None
    arrived: torch.cuda.Event | None


def _carrier(like: Tensor, tokens: int) -> Tensor:
    """What autograd gets in place of tiles: [tokens, hidden], a NaN that takes no memory."""
    return like.new_full((1, 1), float("nan")).expand(tokens, like.shape[1])


class _Dispatch(torch.autograd.Function):
    """Tokens and gates go out together, and their gradients come home together: one order on every rank.

    Of tokens that went out in tiles, `arrived` of them, the carrier follows here.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, gates: Tensor, ids: Tensor, plan: DispatchPlan, arrived: int | None
    ) -> tuple[Tensor, ...]:
        ctx.plan = plan
        received = plan.to_experts(tokens) if arrived is None else _carrier(tokens, arrived)
        topk = gates.shape[1]
        gate_bits = gates.index_select(0, plan.token_of_copy).view(torch.int32)
        choices = plan.send(torch.cat((ids, gate_bits), dim=1), "routing")  # [received, 2 * topk] int32
        received_ids = choices[:, :topk].contiguous()
        received_gates = choices[:, topk:].contiguous().view(torch.float32)
        ctx.mark_non_differentiable(received_ids)
        return received, received_gates, received_ids

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        plan: DispatchPlan = ctx.plan
        grad_tokens = plan.to_tokens(grads[0])
        # Each gate was used on one rank only; the other copies bring zeros.
        by_copy = plan.send_back(grads[1], "gates")
        grad_gates = sum_rows(by_copy, plan.copies_of_token, partial=True, out_dtype=by_copy.dtype)
        return grad_tokens, grad_gates, None, None, None


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
        wire: the precision of the run.
        power_of_two: round the scales of an fp8 wire up to powers of two.
        assume_balanced: for plans with fake tensors, where there is nothing to read: take the split sizes of perfectly
            balanced routing. Values are then void.
    """

    def __init__(
        self,
        n_routed_experts: int,
        axis: Axis,
        *,
        wire: Wire,
        power_of_two: bool,
        assume_balanced: bool = False,
        traffic: Traffic | None = None,
    ) -> None:
        if n_routed_experts % axis.size:
            raise ValueError(
                f"model.n_routed_experts={n_routed_experts} cannot be shared by layout.ep={axis.size} ranks: "
                f"choose an ep that divides it"
            )
        self.axis, self.wire, self.power_of_two = axis, wire, power_of_two
        self.assume_balanced, self.traffic = assume_balanced, traffic
        local = n_routed_experts // axis.size
        self.experts = range(axis.rank * local, (axis.rank + 1) * local)

    @torch.no_grad()
    def begin(self, routing: ExpertChoice) -> CountsUnderWay:
        """Exchange the counts; the host waits for them in `dispatch`, not for what is issued in between."""
        ids, ep, local = routing.topk_ids, self.axis.size, len(self.experts)
        goes = torch.zeros(len(ids), ep, dtype=torch.bool, device=ids.device).scatter_(1, ids // local, True)
        sent = torch.cat((goes.sum(0)[:, None], routing.counts.view(ep, local)), dim=1)  # [ep, 1 + local]
        ones = [1] * ep
        counts = all_to_all_rows(sent, ones, ones, self.axis, kind="counts", traffic=self.traffic)
        if self.assume_balanced:
            return CountsUnderWay(goes, None, None)
        numbers = torch.cat((sent[:, 0], counts.t().flatten()))
        if not numbers.is_cuda:
            return CountsUnderWay(goes, numbers, None)
        # A pinned copy and an event behind it: a plain read would wait for all that was launched until then.
        host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return CountsUnderWay(goes, host, arrived)

    def dispatch(self, tokens: LinearInput, routing: ExpertChoice, begun: object = None) -> Dispatched:
        """Send tokens to their experts' ranks.

        Args:
            tokens: [tokens, hidden] fp32 or bf16, or in tiles for an fp8 wire, which quantises what is not; 0 tokens
                are legal, the exchange still takes place.
            routing: of these tokens.
            begun: what `begin` has returned for it; None begins now.
        Returns:
            The tokens that arrived, in order of (source rank, token), and how the local experts group them. Over an fp8
            wire they are in tiles, and so is the gradient of the experts' sums.
        """
        assert len(tokens.shape) == 2, tokens.shape
        assert tokens.shape[0] == len(routing.topk_ids), (tokens.shape, routing.topk_ids.shape)
        begun = self.begin(routing) if begun is None else begun
        assert isinstance(begun, CountsUnderWay), type(begun)
        plan, ids, num_rows = self._plan(routing, begun)
        tiles = None
        if self.wire == "fp8":
            known = carried(tokens, power_of_two=self.power_of_two) if isinstance(tokens, Tensor) else tokens
            tokens, tiles = known.carrier, plan.tiles_to_experts(known.tiles)
        assert isinstance(tokens, Tensor), f"a wire in {self.wire} takes no tiles"
        arrived = None if tiles is None else len(tiles.payload)
        received, gates, local_ids = _Dispatch.apply(tokens, routing.gates, ids, plan, arrived)  # type: ignore[no-untyped-call]
        grouping = partial_grouping(local_ids, len(self.experts), num_rows=num_rows)
        if tiles is not None:
            received = CarriedTiles(received, tiles, partial(dequantized_rows, tiles, received.dtype))
        return Dispatched(
            tokens=received,
            gates=group_gates(gates, grouping),
            grouping=grouping,
            gradient=None if tiles is None else GradientTiles(),
            handle=plan,
        )

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Tensor:
        """Send the experts' sums of the received tokens, gates included, home, and sum them there.

        A token's sum [tokens, hidden], in sums.dtype, is rounded to the wire's dtype on each rank, and once here.
        """
        plan = dispatched.handle
        assert isinstance(plan, DispatchPlan), type(plan)
        y: Tensor = _Combine.apply(sums, plan, dispatched.gradient)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def _plan(self, routing: ExpertChoice, begun: CountsUnderWay) -> tuple[DispatchPlan, Tensor, int]:
        """The plan, the local ids of each copy [copies, topk] int32, and the number of rows on this rank."""
        ids, ep, local = routing.topk_ids, self.axis.size, len(self.experts)
        tokens, topk = ids.shape
        if begun.numbers is None:
            # Copies and tokens are spread evenly, rounded up.
            send_splits = recv_splits = [ceil_div(tokens * min(topk, ep), ep)] * ep
            expert_tokens = [ceil_div(tokens * topk, local)] * local
        else:
            send_splits, recv_splits, expert_tokens = _read_counts(begun.numbers, begun.arrived, ep)
        copies = sum(send_splits)
        by_rank = begun.goes.t().flatten()  # [ep * tokens], in the order of sending
        # A stable sort brings the copies that exist to the front; `nonzero` would make the host wait.
        order = by_rank.logical_not().byte().sort(stable=True).indices[:copies]
        token_of_copy = order.remainder(max(tokens, 1))
        rank_of_copy = order.div(max(tokens, 1), rounding_mode="floor")
        chosen = ids.index_select(0, token_of_copy)
        local_ids = torch.where(chosen // local == rank_of_copy[:, None], chosen % local, -1).int()
        copies_of_token = torch.where(by_rank, by_rank.cumsum(0) - 1, copies).view(ep, tokens).t()  # [tokens, ep]
        plan = DispatchPlan(
            axis=self.axis,
            wire=self.wire,
            power_of_two=self.power_of_two,
            send_splits=tuple(send_splits),
            recv_splits=tuple(recv_splits),
            token_of_copy=token_of_copy,
            copies_of_token=copies_of_token.sort(dim=1).values[:, : min(topk, ep)].contiguous(),
            traffic=self.traffic,
        )
        return plan, local_ids, sum(ceil_div(count, TILE) * TILE for count in expert_tokens)


def _read_counts(numbers: Tensor, arrived: torch.cuda.Event | None, ep: int) -> tuple[list[int], list[int], list[int]]:
    """Copies to and from each rank, and tokens of each local expert."""
    # The host's one wait in a MoE layer and micro-batch; backward reuses what it reads.
    if arrived is not None:
        arrived.synchronize()
    read: list[int] = numbers.tolist()
    columns = [read[start : start + ep] for start in range(0, len(read), ep)]
    return columns[0], columns[1], [sum(column) for column in columns[2:]]
