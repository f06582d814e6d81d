"""Two CUDA streams that only keep account: who read what before it was written, and whose memory went too early.

An event carries what its stream has seen so far. A tensor that is gone gives its memory back to the stream on which it
was allocated, and to it alone, unless `record_stream` has named another.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from parallel.flight import Exchange, Journey, Lane, UnderWay


class Stream:
    def __init__(self, name: str = "exchanges") -> None:
        self.name = name
        self.seen: Counter[str] = Counter()

    def record_event(self) -> Counter[str]:
        return self.seen.copy()

    def wait_event(self, event: Counter[str]) -> None:
        self.seen |= event

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Account:
    """What was launched, and what is wrong with it."""

    def __init__(self) -> None:
        self.compute = self.current = Stream("computation")
        self.faults: list[str] = []
        # Name of a tensor -> stream and number of the launch that wrote it; stream -> its last launch that read it.
        self._written: dict[str, tuple[Stream, int]] = {}
        self._read: dict[str, Counter[str]] = {}
        self._kept: set[tuple[str, str]] = set()
        self._names: dict[int, str] = {}

    def launch(self, reads: Sequence[Tensor], name: str) -> Tensor:
        """A kernel on the current stream -> the tensor that it writes."""
        stream = self.current
        stream.seen[stream.name] += 1
        for tensor in reads:
            read = self._names[id(tensor)]
            writer, number = self._written[read]
            if stream.seen[writer.name] < number:
                self.faults.append(f"{stream.name} reads {read} before it is written")
            self._read[read][stream.name] = stream.seen[stream.name]
        made = torch.zeros(1)
        self._names[id(made)] = name
        self._written[name], self._read[name] = (stream, stream.seen[stream.name]), Counter()
        weakref.finalize(made, self._free, name)
        return made

    def _free(self, name: str) -> None:
        owner, _ = self._written[name]
        for reader, number in self._read[name].items():
            if owner.seen[reader] < number and reader != owner.name and (name, reader) not in self._kept:
                self.faults.append(f"{name} is given away while {reader} reads it")

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        self._kept.add((self._names[id(tensor)], stream.name))

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@contextmanager
def accounted() -> Iterator[Account]:
    """torch's CUDA streams are those of an account."""
    account = Account()

    def keep(tensor: Tensor, stream: Stream) -> None:
        account.keep(tensor, stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: Stream())
        patch.setattr(torch.cuda, "current_stream", lambda device: account.current)
        patch.setattr(torch.cuda, "stream", account.on)
        patch.setattr(Tensor, "record_stream", keep)
        yield account


def in_flight(account: Account) -> None:
    """Two hops beside a product, and a product that reads what they bring."""

    def hops(tokens: Tensor) -> Journey[Tensor]:
        for hop in ("rail", "node"):
            copies = account.launch([tokens], f"copies over {hop}")
            tokens = yield UnderWay(copies, None, lambda copies: account.launch([copies], "rows"))
        return tokens

    lane = Lane(torch.device("cuda"))
    # The account's tensors are the host's.
    lane.device = torch.device("cpu")
    tokens = account.launch([], "tokens")
    with lane.open():
        flight = Exchange(hops(tokens), tokens).depart()
        del tokens
        account.launch([], "product")
        rows = flight.wait()
        account.launch([rows], "experts")
        del rows, flight
