"""Exchanges in flight: started in one phase, waited for in a later one, the other micro-batch's phases in between.

    journey     what an exchange does: a generator that starts all-to-alls and yields each when it needs the rows
    Exchange    a journey that has not begun: `now` runs it to its end, `depart` starts it
    Flight      one that has started; `wait` gives its result
    Lane        where the flights of a pair run (arXiv:2412.19437 §3.2.1); without one `depart` is `now`

On CUDA a journey runs whole on the lane's stream, behind what was launched before it: the host goes on, a second hop
begins when the first has ended, and `wait` is an event for the stream that reads. Elsewhere what it starts first is
under way meanwhile, and `wait` does the rest. Either way collectives are issued in the order of phases, which names
alone decide, so each communicator sees one order on all of its ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from parallel.waiting import waiting

T = TypeVar("T")


class Started(Protocol):
    """A collective that has started."""

    def wait(self) -> object:
        """Have the current stream wait for it; on a CPU the host."""


@dataclass(frozen=True)
class UnderWay:
    """Rows that have left; nobody reads `buffer` before `work` was waited for."""

    buffer: Tensor
    work: Started | None  # None: they are here
    then: Callable[[Tensor], Tensor]  # what arrives -> what the journey goes on with


Journey = Generator[UnderWay, Tensor, T]


class Lane:
    """Where the flights of a pair run. While one is open, all-to-alls of journeys are asynchronous.

    Args:
        device: of the stages; a CUDA device gets a stream for exchanges.
    """

    # A plain global, not a thread-local one: on CUDA, autograd runs backward on threads of its own.
    current: ClassVar[Lane | None] = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight = 0
        self._nans: dict[torch.dtype, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let exchanges fly until the block ends; by then somebody has waited for each."""
        assert Lane.current is None, "two pairs at once"
        Lane.current = self
        try:
            yield
        finally:
            Lane.current = None
        assert self.in_flight == 0, f"nobody has waited for {self.in_flight} exchanges of a pair"

    @classmethod
    @contextmanager
    def closed(cls) -> Iterator[None]:
        """No exchange that begins in the block flies; those in flight go on."""
        lane, cls.current = cls.current, None
        try:
            yield
        finally:
            cls.current = lane

    def wait(self, work: Started) -> None:
        """Have the lane's stream wait for a collective; without one the host does."""
        with waiting() if self.stream is None else nullcontext():
            work.wait()

    def hand_over(self, result: object, event: torch.cuda.Event) -> None:
        """Have the current stream wait for an event of the lane's, behind which a result is."""
        reader = torch.cuda.current_stream(self.device)
        with waiting():
            reader.wait_event(event)
        for tensor in tensors_in(result):
            # Allocated on the lane's stream: its memory must not be given away while the reader's uses it.
            if tensor.device.type == self.device.type:
                tensor.record_stream(reader)

    def nan(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A NaN expanded: no memory, no launch but the first of its dtype."""
        if dtype not in self._nans:
            self._nans[dtype] = torch.full((), torch.nan, dtype=dtype, device=self.device)
        return self._nans[dtype].expand(shape)


class Exchange(Generic[T]):
    """A journey that has not begun.

    Args:
        journey: the same generator never serves twice.
        reads: tensors, or what holds them, that it reads: held until somebody has waited, whatever stream reads them.
    """

    def __init__(self, journey: Journey[T], *reads: object) -> None:
        self.journey, self.reads = journey, reads

    @torch.no_grad()
    def now(self) -> T:
        """Run it to its end."""
        assert Lane.current is None, "a lane is open: depart"
        rows = None
        try:
            while True:
                # Nothing is asynchronous without a lane.
                arrived = self.journey.send(rows)  # type: ignore[arg-type]
                rows = arrived.then(arrived.buffer)
        except StopIteration as end:
            result: T = end.value
            return result

    def depart(self) -> Flight[T]:
        """Start it; without a lane it also ends here."""
        return Flight(self, Lane.current)


class Flight(Generic[T]):
    """An exchange that has started."""

    def __init__(self, exchange: Exchange[T], lane: Lane | None) -> None:
        self._lane, self._journey = lane, exchange.journey
        self._landed = lane is None
        self._result: T
        self._under_way: UnderWay | None
        self._event: torch.cuda.Event | None = None
        if lane is None:
            self._result = exchange.now()
            return
        self._reads = exchange.reads
        lane.in_flight += 1
        if lane.stream is None:
            self._go_on(None)
            return
        lane.stream.wait_stream(torch.cuda.current_stream(lane.device))
        with torch.cuda.stream(lane.stream):
            self._go_on(None)
            self._finish(lane)
            self._event = lane.stream.record_event()

    @torch.no_grad()
    def _go_on(self, rows: Tensor | None) -> None:
        """Up to where the journey waits next, or to its end."""
        try:
            self._under_way = self._journey.send(rows)  # type: ignore[arg-type]
        except StopIteration as end:
            self._result, self._under_way = end.value, None

    @torch.no_grad()
    def _finish(self, lane: Lane) -> None:
        while (under_way := self._under_way) is not None:
            if under_way.work is not None:
                lane.wait(under_way.work)
            self._go_on(under_way.then(under_way.buffer))

    def wait(self) -> T:
        """What it brings; whoever asks again gets the same."""
        if self._landed:
            return self._result
        assert self._lane is not None
        self._finish(self._lane)
        if self._event is not None:
            self._lane.hand_over(self._result, self._event)
        self._landed = True
        del self._reads
        self._lane.in_flight -= 1
        return self._result


@dataclass(frozen=True)
class _Awaited:
    """Which gradient a carrier stands for."""

    flight: Flight[Any]
    index: int


def gradients(exchange: Exchange[Any], *like: tuple[torch.Size, torch.dtype]) -> tuple[Tensor, ...]:
    """The gradients that an exchange brings, first in its result, for autograd to pass on.

    In a pair NaNs of those shapes and dtypes in their place, of which `landed` gets the gradients.
    """
    if (lane := Lane.current) is None:
        return _first(exchange.now(), len(like))
    flight, carriers = exchange.depart(), []
    for index, (shape, dtype) in enumerate(like):
        carrier = lane.nan(shape, dtype)
        carrier.awaited = _Awaited(flight, index)  # type: ignore[attr-defined]
        carriers.append(carrier)
    return tuple(carriers)


def landed(gradient: Tensor) -> Tensor:
    """The gradient itself, waited for if it is in flight."""
    awaited: _Awaited | None = getattr(gradient, "awaited", None)
    return gradient if awaited is None else _first(awaited.flight.wait(), awaited.index + 1)[-1]


def _first(result: Any, count: int) -> tuple[Tensor, ...]:
    return (result if isinstance(result, tuple) else (result,))[:count]


def here(value: T) -> Journey[T]:
    """The journey of what is here already."""
    yield from ()
    return value


def by_turns(name: str, phase: Generator[Exchange[Any], Any, T]) -> Generator[str, None, T]:
    """A phase with at most one exchange: yields its name while that is in flight, and then ends it."""
    try:
        flight = next(phase).depart()
    except StopIteration as end:
        yield name
        return end.value  # type: ignore[no-any-return]
    yield name
    try:
        phase.send(flight.wait())
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError(f"{name} has a second exchange")


def parts(value: object) -> dict[Any, Any]:
    """What a tuple, list, dict or dataclass holds, by index, key or field; of anything else nothing."""
    if isinstance(value, dict):
        return value
    if type(value) is tuple or type(value) is list:
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in a structure."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in parts(value).values():
            yield from tensors_in(part)
