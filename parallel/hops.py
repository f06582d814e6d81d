"""Which copies of a token travel where: the way to the experts as hops over axes of the mesh (arXiv:2412.19437 §3.2.2).

    direct   ep      a token goes once to each rank that holds one of its experts
    node     rail    it goes once to each node that holds one, to the rank of its own index there,
             node    and from there once to each rank of that node that holds one

A hop forward is a gather and an exchange, a hop back an exchange and a sum in FP32, in order of rank. The routing (ids
and gates) travels first: what a rank passes on follows from the ids that reach it. How much follows from the counts, of
which one exchange over ep and one host read serve every hop.

Shapes: tokens of this rank [tokens, hidden]; of a hop, rows = what a rank has before it, copies = (row, rank) pairs
that it sends; received = tokens that reach their experts' rank, in order of arrival. After one hop that is (source
rank, token), after two (index of the source on its node, node, token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.permute import Grouping, sum_rows
from parallel.collectives import Traffic, all_to_all_rows
from parallel.flight import Journey, UnderWay
from parallel.mesh import Axis


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


@dataclass(frozen=True)
class Hop:
    """One exchange of copies over one axis, there and back."""

    axis: Axis
    send_splits: tuple[int, ...]  # copies for each rank of the axis
    recv_splits: tuple[int, ...]  # copies from each rank of the axis
    row_of_copy: Tensor  # [copies] int64, sorted by (destination, row)
    copies_of_row: Tensor  # [rows, columns] int64 in order of destination; `copies` where a row has fewer
    traffic: Traffic | None

    def there(self, rows: Tensor, kind: str) -> UnderWay:
        """[rows, width] -> [sum(recv_splits), width], by source, then row."""
        copies = rows.index_select(0, self.row_of_copy)
        return self._send(copies, self.send_splits, self.recv_splits, kind, then=lambda received: received)

    def back(self, received: Tensor, kind: str, *, out_dtype: torch.dtype) -> UnderWay:
        """[sum(recv_splits), width] -> [rows, width]: each row's copies summed in FP32, in order of destination."""

        def total(copies: Tensor) -> Tensor:
            return sum_rows(copies, self.copies_of_row, partial=True, out_dtype=out_dtype)

        return self._send(received, self.recv_splits, self.send_splits, kind, then=total)

    def _send(
        self, rows: Tensor, send: tuple[int, ...], recv: tuple[int, ...], kind: str, then: Callable[[Tensor], Tensor]
    ) -> UnderWay:
        # On rail and node the axis says which bytes cross nodes.
        kind = kind if self.axis.name == "ep" else f"{self.axis.name}.{kind}"
        return all_to_all_rows(rows, send, recv, self.axis, kind=kind, traffic=self.traffic, then=then)


@dataclass(frozen=True)
class Arrivals:
    """What is known on the experts' rank about the tokens that arrive there."""

    ids: Tensor  # [received, topk] int32, global ids, by (source rank, token)
    gates: Tensor  # [received, topk] FP32, as they arrived
    in_order: Tensor | None  # [received] int64: the arrivals by (source rank, token); None: as they are
    num_rows: int  # of the local experts, each expert's padded


@dataclass(frozen=True)
class CountsUnderWay:
    """What `HopPlanner.begin` has exchanged for one layer and micro-batch, on its way to the host."""

    goes: Tensor  # [tokens, ranks] bool: whether a token crosses the first hop to that rank
    arriving: Tensor | None  # [nodes, peers], copies from each source; only of two hops
    parts: tuple[Tensor, ...]  # int64 on the host once `arrived`; none where they are assumed
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, goes: Tensor, arriving: Tensor | None, parts: Sequence[Tensor]) -> CountsUnderWay:
        """Start to bring int64 vectors to the host."""
        if not parts or not goes.is_cuda:
            return cls(goes, arriving, tuple(parts), None)
        # A pinned copy and an event behind it: a plain read would wait for all that was launched until then.
        numbers = torch.cat(tuple(parts))
        host = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(goes, arriving, host.split([len(part) for part in parts]), arrived)


@dataclass(frozen=True)
class HopPlanner:
    """Plans the hops of one layer and micro-batch; every rank of `ep` calls it in the same order.

    Args:
        ep: the ranks that share one copy of the experts.
        axes: (ep,), or (rail, node) with ep.rank = rail.rank * node.size + node.rank.
        assume_balanced: read nothing: take the sizes of perfectly balanced routing.
        most_nodes: with it, to how many nodes a token goes at most; None: to all.
    """

    ep: Axis
    axes: tuple[Axis, ...]
    assume_balanced: bool = False
    most_nodes: int | None = None
    traffic: Traffic | None = None

    def __post_init__(self) -> None:
        if len(self.axes) == 2:
            rail, node = self.axes
            names = (rail.name, node.name)
            assert self.ep.size == rail.size * node.size, f"{names} hold not the ranks of {self.ep.name}"
            assert self.ep.rank == rail.rank * node.size + node.rank, f"{names} have not the order of {self.ep.name}"

    def begin(self, choice: ExpertChoice) -> Journey[CountsUnderWay]:
        """Exchange the counts; the host waits for them in `send`, not for what is issued in between."""
        by_rank = choice.counts.view(self.ep.size, -1)  # [ep, local]
        goes = _goes(choice.topk_ids, self.ep.size, local=by_rank.shape[1])  # [tokens, ep]
        if len(self.axes) == 1:
            sent = torch.cat((goes.sum(0)[:, None], by_rank), dim=1)
            counts = yield self._send_counts(sent)
            return self._read_later(goes, None, sent[:, 0], counts[:, 0], counts[:, 1:].sum(0))
        rail, node = self.axes
        goes = goes.unflatten(1, (rail.size, node.size))  # [tokens, nodes, peers]
        to_nodes = goes.any(2)  # [tokens, nodes]
        # For each node: tokens that go there, then copies for each of its ranks; all its ranks get the same.
        onward = torch.cat((to_nodes.sum(0)[:, None], goes.sum(0)), dim=1)  # [nodes, 1 + peers]
        counts = yield self._send_counts(torch.cat((onward.repeat_interleave(node.size, 0), by_rank), dim=1))
        counts = counts.unflatten(0, (rail.size, node.size))  # by source: [nodes, peers, 1 + peers + local]
        # This rank passes on what the sources of its own index send, and gets copies of every source.
        passed, arriving = counts[:, node.rank], counts[:, :, 1 + node.rank]
        for_peers, experts = passed[:, 1 : 1 + node.size].sum(0), counts[:, :, 1 + node.size :].sum((0, 1))
        return self._read_later(to_nodes, arriving, onward[:, 0], passed[:, 0], for_peers, arriving.sum(0), experts)

    def send(
        self, choice: ExpertChoice, begun: CountsUnderWay, rows: Tensor
    ) -> Journey[tuple[tuple[Hop, ...], Arrivals, Tensor]]:
        """Plan the hops, and send over each the routing and [tokens, width] -> hops, arrivals, [received, width]."""
        return self._direct(choice, begun, rows) if len(self.axes) == 1 else self._by_node(choice, begun, rows)

    def _direct(
        self, choice: ExpertChoice, begun: CountsUnderWay, rows: Tensor
    ) -> Journey[tuple[tuple[Hop, ...], Arrivals, Tensor]]:
        ids, (axis,) = choice.topk_ids, self.axes
        if self.assume_balanced:
            # Copies and tokens are spread evenly, rounded up.
            send = recv = _even(len(ids) * min(ids.shape[1], axis.size), axis.size)
            tokens = _even(ids.numel(), len(choice.counts) // axis.size)
        else:
            send, recv, tokens = _read_counts(begun)
        hop = _plan_hop(axis, begun.goes, send, recv, topk=ids.shape[1], traffic=self.traffic)
        routing, copies = hop.there(_packed(choice), "routing"), hop.there(rows, "dispatch")
        choices = yield routing
        return (hop,), _arrivals(choices, None, tokens), (yield copies)

    def _by_node(
        self, choice: ExpertChoice, begun: CountsUnderWay, rows: Tensor
    ) -> Journey[tuple[tuple[Hop, ...], Arrivals, Tensor]]:
        ids, topk, (rail, node) = choice.topk_ids, choice.topk_ids.shape[1], self.axes
        local = len(choice.counts) // self.ep.size
        if self.assume_balanced:
            nodes = min(topk, rail.size, self.most_nodes or rail.size)
            send1 = recv1 = _even(len(ids) * nodes, rail.size)
            send2 = recv2 = _even(len(ids) * min(topk, self.ep.size), node.size)
            tokens = _even(ids.numel(), local)
        else:
            send1, recv1, send2, recv2, tokens = _read_counts(begun)
        first = _plan_hop(rail, begun.goes, send1, recv1, topk=topk, traffic=self.traffic)
        routing, copies = first.there(_packed(choice), "routing"), first.there(rows, "dispatch")
        choices = yield routing
        goes_on = _goes(choices[:, :topk], node.size, local=local, first=rail.rank * node.size)
        second = _plan_hop(node, goes_on, send2, recv2, topk=topk, traffic=self.traffic)
        routing = second.there(choices, "routing")
        copies = second.there((yield copies), "dispatch")
        choices = yield routing
        assert begun.arriving is not None
        arrivals = _arrivals(choices, _source_order(begun.arriving, sum(recv2)), tokens)
        return (first, second), arrivals, (yield copies)

    def _read_later(self, goes: Tensor, arriving: Tensor | None, *parts: Tensor) -> CountsUnderWay:
        return CountsUnderWay.of(goes, arriving, () if self.assume_balanced else parts)

    def _send_counts(self, sent: Tensor) -> UnderWay:
        """[ep, numbers] int64 for each rank -> from each rank."""
        ones = [1] * self.ep.size
        return all_to_all_rows(sent, ones, ones, self.ep, kind="counts", traffic=self.traffic)


def _plan_hop(
    axis: Axis, goes: Tensor, send: list[int], recv: list[int], *, topk: int, traffic: Traffic | None = None
) -> Hop:
    """A hop of rows that go to some ranks of an axis each: `goes` [rows, ranks] bool, `topk` ranks at most."""
    rows, copies = len(goes), sum(send)
    by_rank = goes.t().flatten()  # [ranks * rows], in the order of sending
    # A stable sort brings the copies that exist to the front; `nonzero` would make the host wait.
    order = by_rank.logical_not().byte().sort(stable=True).indices[:copies]
    places = torch.where(by_rank, by_rank.cumsum(0) - 1, copies).view(axis.size, rows).t()  # [rows, ranks]
    return Hop(
        axis=axis,
        send_splits=tuple(send),
        recv_splits=tuple(recv),
        row_of_copy=order.remainder(max(rows, 1)),
        copies_of_row=places.sort(dim=1).values[:, : min(topk, axis.size)].contiguous(),
        traffic=traffic,
    )


def as_if_in_order(grouping: Grouping, in_order: Tensor) -> Grouping:
    """The grouping of x[in_order] as one of x: every expert's rows in that order, whatever the order of x."""
    slots, topk = grouping.slot_of_row, grouping.topk
    token = in_order.index_select(0, slots.clamp_min(0) // topk)
    return replace(
        grouping,
        slot_of_row=torch.where(slots < 0, -1, token * topk + slots % topk),
        rows_of_token=torch.empty_like(grouping.rows_of_token).index_copy_(0, in_order, grouping.rows_of_token),
    )


def _goes(ids: Tensor, ranks: int, *, local: int, first: int = 0) -> Tensor:
    """[rows, ranks] bool: on which of so many ranks, from `first` on, a row has an expert; each rank has `local`."""
    rank_of_slot = ids.div(local, rounding_mode="floor")[:, :, None]
    return (rank_of_slot == torch.arange(first, first + ranks, device=ids.device)).any(1)


def _packed(choice: ExpertChoice) -> Tensor:
    """[tokens, 2 * topk] int32: ids and the bits of the gates."""
    return torch.cat((choice.topk_ids.int(), choice.gates.detach().view(torch.int32)), dim=1)


def _arrivals(choices: Tensor, in_order: Tensor | None, expert_tokens: list[int]) -> Arrivals:
    ids, gates = (half.contiguous() for half in choices.chunk(2, dim=1))
    ids = ids if in_order is None else ids.index_select(0, in_order)
    return Arrivals(ids, gates.view(torch.float32), in_order, sum(ceil_div(n, TILE) * TILE for n in expert_tokens))


def _source_order(arriving: Tensor, received: int) -> Tensor:
    """[received]: arrivals by (source rank, token), of `arriving` [nodes, peers], copies from each source."""
    sources = torch.arange(arriving.numel(), device=arriving.device).view_as(arriving).t().flatten()
    # They come by (index of the source, its node, token). With the size given the host does not wait.
    source_of_row = sources.repeat_interleave(arriving.t().flatten(), output_size=received)
    return source_of_row.sort(stable=True).indices


def _read_counts(begun: CountsUnderWay) -> list[list[int]]:
    """Each of the vectors under way as a list."""
    # The host's one wait in a MoE layer and micro-batch; backward reuses what it reads.
    if begun.arrived is not None:
        begun.arrived.synchronize()
    numbers: list[int] = torch.cat(begun.parts).tolist()
    ends = [*accumulate(map(len, begun.parts))]
    return [numbers[end - len(part) : end] for part, end in zip(begun.parts, ends, strict=True)]


def _even(number: int, parts: int) -> list[int]:
    return [ceil_div(number, parts)] * parts
