"""From reports of all ranks to faults of nodes: pure functions, the same for two ranks and for 2,048.

A report is what `rank.py` sends, as JSON gives it back; None: the rank was silent. What must be equal is compared with
the majority, what should be fast with the expectation and with half of what the peers show.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.job import ExpectConfig
from train.studies.preflight.links import Link

Reports = Sequence[Mapping[str, Any] | None]
LINK_KINDS = ("node", "rail", "all_to_all")


class Fault(NamedTuple):
    """What is wrong with a node; None: with all of them together."""

    node: int | None
    what: str


@dataclass(frozen=True)
class Bench:
    """By what nodes are judged.

    Args:
        per_node: ranks of a node.
        share: of the peers' median, below which a node is slow; 0: only expectations count.
    """

    per_node: int
    expect: ExpectConfig
    share: float = 0.5

    def least(self, values: Sequence[float], expected: float | None) -> float:
        """Below this a value is slow."""
        # Of two, the higher: a slow one must not hide behind itself.
        return max(expected or 0.0, self.share * statistics.median_high(values) if values else 0.0)


def silent(reports: Reports, last_word: Callable[[int], str | None], bench: Bench, *, timeout_s: float) -> list[Fault]:
    """Ranks that did not come, or came and did not answer."""
    found = []
    for rank, report in enumerate(reports):
        if report is None:
            word = last_word(rank)
            what = f"did not answer, in: {word}" if word else "did not come"
            found.append(Fault(rank // bench.per_node, f"rank {rank} {what} ({timeout_s:.0f} s)"))
    return found


def failed(reports: Reports, bench: Bench) -> list[Fault]:
    """Checks that ended with an error."""
    return [
        Fault(rank // bench.per_node, f"{check} on rank {rank}: {error}")
        for rank, report in enumerate(reports)
        for check, error in ((report or {}).get("errors") or {}).items()
    ]


def local_faults(reports: Reports, bench: Bench) -> list[Fault]:
    """What ranks have found on their own nodes."""
    come = {rank: report for rank, report in enumerate(reports) if report is not None}
    return [*_versions(come, bench), *_gpus(come, bench), *_products(come, bench), *_disks(come, bench)]


def _versions(come: Mapping[int, Mapping[str, Any]], bench: Bench) -> Iterator[Fault]:
    """Devices and versions that few have; each node once."""
    for name in dict.fromkeys(key for report in come.values() for key in report.get("versions", {})):
        held = {rank: str(report.get("versions", {}).get(name, "none")) for rank, report in come.items()}
        (usual, count), *others = Counter(held.values()).most_common()
        # No majority: all are named.
        tied = bool(others) and others[0][1] == count
        odd = {(rank // bench.per_node, value) for rank, value in held.items() if tied or value != usual}
        against = "not all alike" if tied else f"the others have {usual}"
        yield from (Fault(node, f"{name} {value}, {against}") for node, value in sorted(odd) if others)


def _gpus(come: Mapping[int, Mapping[str, Any]], bench: Bench) -> Iterator[Fault]:
    for rank, report in come.items():
        yield from (Fault(rank // bench.per_node, f"GPU of rank {rank}: {each}") for each in report.get("gpu", ()))


def _products(come: Mapping[int, Mapping[str, Any]], bench: Bench) -> Iterator[Fault]:
    found = {rank: report["product"] for rank, report in come.items() if report.get("product")}
    least = bench.least([each["tflops"] for each in found.values()], bench.expect.gemm_tflops)
    for rank, each in found.items():
        if each["wrong"]:
            what = f"{each['wrong']:,} of {each['values']:,} values of a product are wrong on rank {rank}"
            yield Fault(rank // bench.per_node, what)
        if each["tflops"] < least:
            what = f"rank {rank} multiplies at {each['tflops']:.3g} TFLOP/s, {least:.3g} expected"
            yield Fault(rank // bench.per_node, what)


def _disks(come: Mapping[int, Mapping[str, Any]], bench: Bench) -> Iterator[Fault]:
    found = {rank: report["disk"] for rank, report in come.items() if report.get("disk")}
    least = bench.least([each["gb_per_s"] for each in found.values()], bench.expect.disk_gb_per_s)
    for rank, each in found.items():
        node, needed = rank // bench.per_node, bench.expect.free_gb or 0.0
        if each["free_gb"] < needed:
            yield Fault(node, f"{each['free_gb']:,.3g} GB free on its disk, {needed:,.3g} needed")
        if each["gb_per_s"] < least:
            yield Fault(node, f"its disk takes {each['gb_per_s']:.3g} GB/s, {least:.3g} expected")


def group_faults(reports: Reports, bench: Bench) -> list[Fault]:
    """What ranks have found together."""
    come = {rank: report for rank, report in enumerate(reports) if report is not None}
    links = [Link(*each) for report in come.values() for each in report.get("links", ())]
    slow = [fault for kind in LINK_KINDS for fault in _slow_links([link for link in links if link.kind == kind], bench)]
    unseen = [
        Fault(rank // bench.per_node, "does not see rank 0's file: the run's folder is not shared")
        for rank, report in come.items()
        if not report.get("shared", True)
    ]
    return [*slow, *_sums(come, bench, explained=bool(slow)), *_clocks(reports, bench), *unseen]


def _slow_links(links: Sequence[Link], bench: Bench) -> Iterator[Fault]:
    """The fewest nodes that explain the slow links of a kind; both ends where nothing tells them apart."""
    if not links:
        return
    kind = links[0].kind
    least = bench.least([link.gb_per_s for link in links], getattr(bench.expect, f"{kind}_gb_per_s"))
    left = [link for link in links if link.gb_per_s < least]
    while left:
        ends = [{link.source // bench.per_node, link.to // bench.per_node} for link in left]
        counts = Counter(node for pair in ends for node in pair)
        most = max(counts.values())
        named = {node for node, count in counts.items() if count == most}
        for node in sorted(named):
            own = [link for link, pair in zip(left, ends, strict=True) if node in pair]
            worst = min(own, key=lambda link: link.gb_per_s)
            what = f"{kind}: {worst.gb_per_s:.3g} GB/s from rank {worst.source} to {worst.to}, {least:.3g} expected"
            yield Fault(node, what + (f", and {len(own) - 1} more slow links" if len(own) > 1 else ""))
        left = [link for link, pair in zip(left, ends, strict=True) if not pair & named]


def _sums(come: Mapping[int, Mapping[str, Any]], bench: Bench, *, explained: bool) -> Iterator[Fault]:
    found = {rank: report["sum"] for rank, report in come.items() if report.get("sum")}
    for rank, each in found.items():
        if each["wrong"]:
            yield Fault(
                rank // bench.per_node, f"{each['wrong']:,} values of a sum over all ranks are wrong on rank {rank}"
            )
    expected = bench.expect.all_reduce_gb_per_s
    slowest = min((each["gb_per_s"] for each in found.values()), default=0.0)
    if found and expected is not None and slowest < expected and not explained:
        yield Fault(
            None, f"a sum over all ranks runs at {slowest:.3g} GB/s, {expected:.3g} expected, and no link is slow"
        )


def ahead_s(reports: Reports, bench: Bench) -> dict[int, float]:
    """Seconds by which each node's clock is ahead of the first's that reports."""
    clocks = ((rank, (report or {}).get("clock")) for rank, report in enumerate(reports))
    times: dict[int, list[float]] = {rank // bench.per_node: each for rank, each in clocks if each}
    first: list[float] = next(iter(times.values()), [])
    return {
        node: statistics.median(own - other for own, other in zip(each, first, strict=True))
        for node, each in times.items()
    }


def _clocks(reports: Reports, bench: Bench) -> Iterator[Fault]:
    """Clocks with which few agree; all where no majority does."""
    ahead, limit = ahead_s(reports, bench), bench.expect.clock_s
    agree = {node: sum(abs(own - other) <= limit for other in ahead.values()) for node, own in ahead.items()}
    most = max(agree.values(), default=0)
    usual = statistics.median([own for node, own in ahead.items() if agree[node] == most] or [0.0])
    for node, own in ahead.items():
        if 2 * most <= len(ahead):
            furthest = max(abs(own - other) for other in ahead.values())
            yield Fault(node, f"its clock differs from another's by {furthest:,.1f} s")
        elif agree[node] < most:
            yield Fault(node, f"its clock is {abs(own - usual):,.1f} s {'ahead' if own > usual else 'behind'}")
