"""Reports and faults as one table: a row for each sick node, one for all others, and a last sentence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.studies.preflight.judge import LINK_KINDS, Bench, Fault, Reports, ahead_s

HEAD = ("node", "ranks", "TFLOP/s", *(f"{kind} GB/s" for kind in LINK_KINDS), "disk GB/s", "free GB", "clock s")
Figures = Mapping[str, float]


def table(
    local: Reports, group: Reports, faults: Sequence[Fault], bench: Bench, *, names: Sequence[str] = ()
) -> list[str]:
    """Lines of the table; figures are the lowest of a node's ranks, and of the row for all others the lowest of all.

    Args:
        names: of the nodes, where somebody knows them before they come.
    """
    figures = _figures(local, group, bench)
    wrong: dict[int | None, list[str]] = defaultdict(list)
    for fault in faults:
        wrong[fault.node].append(fault.what)
    sick = sorted(node for node in wrong if node is not None)
    rows = [HEAD]
    for node in sick:
        first = node * bench.per_node
        ranks = f"{first}-{first + bench.per_node - 1}" if bench.per_node > 1 else f"{first}"
        rows.append((node_name(node, local, bench, names), ranks, *_shown(figures[node : node + 1])))
    healthy = [each for node, each in enumerate(figures) if node not in sick]
    if healthy:
        rows.append((f"{'the other' if sick else 'all'} {len(healthy)}", "", *_shown(healthy)))
    lines = _aligned(rows)
    for row, node in enumerate(sick, start=1):
        lines[row] = "\n".join([lines[row], *(f"    {what}" for what in wrong[node])])
    lines += [f"all nodes together: {what}" for what in wrong[None]]
    return lines


def conclusion(local: Reports, faults: Iterable[Fault], bench: Bench, names: Sequence[str] = ()) -> str:
    """The last sentence."""
    nodes, sick = len(local) // bench.per_node, sorted({fault.node for fault in faults if fault.node is not None})
    if sick:
        named = ", ".join(node_name(node, local, bench, names) for node in sick)
        return f"preflight: {len(sick)} of {nodes} nodes must not be used: {named}"
    together = any(fault.node is None for fault in faults)
    return f"preflight: {'something is wrong with all' if together else 'nothing is wrong with'} {nodes} nodes"


def node_name(node: int, local: Reports, bench: Bench, names: Sequence[str]) -> str:
    """As the node calls itself, or as it was announced."""
    of_node = local[node * bench.per_node : (node + 1) * bench.per_node]
    own = next((str(report["host"]) for report in of_node if report), None)
    announced = names[node] if node < len(names) else None
    return f"{announced or own or 'unknown host'} (node {node})"


def _figures(local: Reports, group: Reports, bench: Bench) -> list[dict[str, float]]:
    """Of each node, by column."""
    found: list[dict[str, float]] = [{} for _ in range(len(local) // bench.per_node)]

    def lowest(rank: int, name: str, value: float) -> None:
        of_node = found[rank // bench.per_node]
        of_node[name] = min(of_node.get(name, value), value)

    for rank, report in enumerate(local):
        of_rank: Mapping[str, Any] = report or {}
        if product := of_rank.get("product"):
            lowest(rank, "TFLOP/s", product["tflops"])
        if disk := of_rank.get("disk"):
            lowest(rank, "disk GB/s", disk["gb_per_s"])
            lowest(rank, "free GB", disk["free_gb"])
    for rank, report in enumerate(group):
        for kind, _, _, gb_per_s in (report or {}).get("links", ()):
            lowest(rank, f"{kind} GB/s", gb_per_s)
    for node, ahead in ahead_s(group, bench).items():
        found[node]["clock s"] = ahead
    return found


def _shown(figures: Sequence[Figures]) -> list[str]:
    """The lowest of each column; of clocks the one furthest from the first node's."""
    cells = []
    for name in HEAD[2:]:
        values = [each[name] for each in figures if name in each]
        value = None if not values else max(values, key=abs) if name == "clock s" else min(values)
        cells.append("-" if value is None else f"{value:+.3f}" if name == "clock s" else f"{value:,.3g}")
    return cells


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
