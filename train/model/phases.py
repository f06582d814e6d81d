"""A forward written once as a sequence of named phases, which somebody else may issue one at a time.

    def steps(self, run: Run, x: Tensor) -> Steps[Tensor]:
        y = yield from run("attend", self.attend, x)
        return (yield from run("feed", self.feed, y))

What happens around a phase is the runner's business, not the model's. With `at_once` nothing does:
`finish(self.steps(at_once, x))` is the ordinary forward. A pipeline that overlaps two micro-batches (arXiv:2412.19437
§3.2.1) cuts autograd's graph between two phases (`parallel/phases.py`). So every tensor that a phase reads must be an
input of the forward or the result of a phase as it came: nothing is computed between two phases.

A phase in which tokens travel is a generator itself: it yields its exchange, once at most, and is sent what that
brings. In between a pipeline may compute for the other micro-batch; `arrived` waits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
# Yields the name of each phase once it has been issued, and returns what the forward returns.
Steps = Generator[str, None, T]


class Departure(Protocol):
    """Tokens that travel before a phase can go on."""

    def now(self) -> Any:
        """Let them, and wait; what arrives."""
        ...


Travel = Generator[Departure, Any, T]


class Run(Protocol):
    """Issues one phase."""

    def __call__(self, name: str, phase: Callable[..., T | Travel[T]], *args: Any) -> Steps[T]:
        """Call `phase(*args)`, yield its name, return its result."""
        ...


def at_once(name: str, phase: Callable[..., T | Travel[T]], *args: Any) -> Steps[T]:
    """A phase with nothing around it."""
    returned = phase(*args)
    result = arrived(returned) if isinstance(returned, Generator) else returned
    del returned
    # Whoever reads the names may take a while, and inputs must not live meanwhile.
    del args
    yield name
    return result


def finish(steps: Steps[T]) -> T:
    """Issue all phases that are left; what the forward returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def arrived(travel: Travel[T]) -> T:
    """Run a phase with an exchange to its end, waiting for what travels."""
    try:
        departure = next(travel)
        while True:
            departure = travel.send(departure.now())
    except StopIteration as end:
        result: T = end.value
        return result
