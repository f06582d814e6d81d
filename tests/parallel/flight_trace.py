"""A record of what pairs issue, with results that are NaN until somebody waits for them, and a check of the record.

("begin", "F", "")          a side's turn goes on
("start", "F", "ep dispatch 3")   an all-to-all over an axis has started, asynchronous
("wait", "F", "ep dispatch 3")    somebody waits for it
("end", "F", "dispatch")    a phase has been issued; side W for weight gradients
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import parallel.hops
import parallel.overlap


class Event(NamedTuple):
    what: str
    side: str
    name: str


@dataclass
class Record:
    """Of one rank: each pair's events, and the order in which collectives began on each axis, pair or not."""

    pairs: list[list[Event]] = field(default_factory=list)
    by_axis: dict[str, list[str]] = field(default_factory=dict)


class _Late:
    """A collective whose result, NaN until then, comes when it is waited for."""

    def __init__(self, work: Any, hidden: Tensor, result: Tensor, note: Any) -> None:
        self._work, self._hidden, self._result, self._note = work, hidden, result, note
        poison(result)

    def wait(self) -> None:
        self._note()
        self._work.wait()
        self._result.copy_(self._hidden)


def poison(tensor: Tensor) -> None:
    """NaN, in FP8 packets too; ids and counts that nothing has."""
    tensor.fill_({torch.uint8: 0x7F, torch.int32: -1, torch.int64: 0}.get(tensor.dtype, torch.nan))


# What travels in which phase of a side, and in which phase it is read; None: in that side's next.
TRAVELS = {
    ("F", "counts"): ("route", "dispatch"),
    ("F", "routing"): ("dispatch", None),
    ("F", "dispatch"): ("dispatch", None),
    ("F", "combine"): ("combine", None),
    ("B", "dispatch"): ("combine", "experts"),
    ("B", "combine"): ("dispatch", "route"),
    ("B", "gates"): ("dispatch", "route"),
}


def faults_of(pair: list[Event]) -> list[str]:
    """What is started and not waited for once, or is waited for behind the phase that reads it."""
    faults, issued = [], {"F": "", "B": "", "W": ""}
    for at, event in enumerate(pair):
        if event.what == "end":
            issued[event.side] = event.name
        if event.what != "start":
            continue
        waits = [index for index, other in enumerate(pair) if other == event._replace(what="wait")]
        if len(waits) != 1:
            faults.append(f"{event.side} {event.name}: {len(waits)} waits")
            continue
        phase, reader = TRAVELS[event.side, event.name.split()[1]]
        later = [index for index in range(at, len(pair)) if pair[index][:2] == ("end", event.side)]
        if reader is None:
            # Its own phase may have been issued, where one hop follows another.
            reads = later[0 if issued[event.side] == phase else 1 :][:1]
        else:
            reads = [index for index in later if pair[index].name == reader][:1]
        if reads and waits[0] > reads[0]:
            faults.append(f"{event.side} {event.name}: read in {pair[reads[0]].name} before the wait")
    return faults


def hidden_behind(pair: list[Event]) -> dict[tuple[str, str], list[list[str]]]:
    """(side, kind) of what started -> for each, what the other side and W issued before somebody waited."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for at, event in enumerate(pair):
        if event.what != "start":
            continue
        until = next(index for index in range(at, len(pair)) if pair[index] == event._replace(what="wait"))
        others = [
            f"{side} {name}".strip() for what, side, name in pair[at:until] if what == "end" and side != event.side
        ]
        found.setdefault((event.side, event.name.split()[1]), []).append(others)
    return found


@contextmanager
def recording() -> Iterator[Record]:
    """Pairs' events of this process while the block runs."""
    record, side, sending = Record(), [""], [""]
    turns, rows, exchange = parallel.overlap.take_turns, parallel.hops.all_to_all_rows, dist.all_to_all_single

    def watched(name: str, phases: Generator[str, None, None]) -> Generator[str, None, None]:
        while True:
            side[0] = name
            record.pairs[-1].append(Event("begin", name, ""))
            try:
                phase = next(phases)
            except StopIteration:
                return
            yield phase

    def pair(ahead: Any, behind: Any) -> Generator[tuple[str, str], None, None]:
        record.pairs.append([])
        for issued in turns(watched("F", ahead), watched("B", behind)):
            record.pairs[-1].append(Event("end", *issued))
            yield issued

    def send(*args: Any, kind: str, **named: Any) -> Any:
        axis, bare = args[3].name, kind.rpartition(".")[2]
        begun = record.by_axis.setdefault(axis, [])
        begun.append(bare)
        sending[0] = f"{axis} {bare} {len(begun)}"
        return rows(*args, kind=kind, **named)

    def late(result: Tensor, given: Tensor, *splits: Any, group: Any, async_op: bool = False) -> Any:
        if not async_op:
            return exchange(result, given, *splits, group=group)
        events, started = record.pairs[-1], Event("start", side[0], sending[0])
        events.append(started)
        hidden = torch.empty_like(result)
        work = exchange(hidden, given, *splits, group=group, async_op=True)
        return _Late(work, hidden, result, lambda: events.append(Event("wait", side[0], started.name)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.overlap, "take_turns", pair)
        patch.setattr(parallel.hops, "all_to_all_rows", send)
        patch.setattr(dist, "all_to_all_single", late)
        yield record
