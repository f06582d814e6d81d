"""The machine an emulated Gluon kernel runs on: programs, their warp-specialised partitions, mbarriers, and time.

Each partition is a thread, and one baton decides which of them runs: a run is a pure function of its `Options`. The
baton changes hands where a partition waits for a barrier and, with `switch`, at any emulated operation.

Happens-before is kept in vector clocks. An actor is a partition or a barrier; a clock maps an actor to the latest of
its times that is known to have happened. Arriving at a barrier hands the partition's clock over, the phase's
completion is a time of the barrier, and waiting for it takes the collected clocks. What an access may not overlap is
judged from these clocks, so a race is reported whether or not this schedule showed it.

Not emulated: the threads inside a partition (it is one sequential actor), warp and register counts, clusters, and any
time at all (`early`, `late` and `random` are orders, not durations).
"""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from tests.kernels.gluon_values import BarrierMisuse, Deadlock, Misuse, Tensor, where

if TYPE_CHECKING:
    from tests.kernels.gluon_hopper import TmaLoad, TmaStore

Clock = dict[object, int]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a launch is run.

    Args:
        seed: of every random choice below.
        tma: a TMA copy lands "early" (when issued), "late" (only when nothing else can run), or at a "random" time.
        mma: an asynchronous wgmma reads shared memory "early" (when issued) or "late" (in the wait that retires it).
        lazy_loads: a shared load takes its value at once (""); at its first use and at the latest when the next
            "wgmma" is issued; or at its first "use" alone, which is stricter than any kernel measured right.
        switch: chance of changing partition at each emulated operation.
        races: check happens-before, unwritten memory and proxy fences.
        programs: positions in the grid (x fastest) of the programs to run, one after another; None runs all.
    """

    seed: int = 0
    tma: str = "early"
    mma: str = "early"
    lazy_loads: str = ""
    switch: float = 0.0
    races: bool = True
    programs: Sequence[int] | None = None

    def __post_init__(self) -> None:
        known = {"tma": ("early", "late", "random"), "mma": ("early", "late"), "lazy_loads": ("", "wgmma", "use")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {values}")


@dataclasses.dataclass
class Program:
    """One program of the grid."""

    index: tuple[int, ...]
    grid: tuple[int, ...]
    body: Callable[[], object]
    shared_bytes: int = 0
    # Barrier -> the barrier's time at which the last TMA load of this program is there.
    loads: Clock = dataclasses.field(default_factory=dict)


def join(clock: Clock, other: Clock) -> None:
    """Add to `clock` what `other` knows to have happened."""
    for actor, time in other.items():
        if clock.get(actor, 0) < time:
            clock[actor] = time


class Barrier:
    """An mbarrier: a phase completes when its `count` arrivals and its bytes have all come; its maker must fence."""

    def __init__(self, name: str, count: int, *, maker: Partition) -> None:
        self.name, self.count, self.maker = name, count, maker
        self.fences_before = maker.fences
        self.phase = 0  # phases completed
        self.missing_arrivals, self.missing_bytes = count, 0
        self.copies_in_flight = 0
        self.clock: Clock = {}
        self.completed: list[Clock] = []

    def update(self, clock: Clock, *, arrivals: int = 0, expected_bytes: int = 0) -> None:
        """Take arrivals, and bytes expected (or, negative, copied), and complete the phase if nothing is missing."""
        join(self.clock, clock)
        self.missing_arrivals -= arrivals
        self.missing_bytes += expected_bytes
        phase = f"{self.name} phase {self.phase}"
        if self.missing_arrivals < 0:
            raise BarrierMisuse(f"{phase}: more than {self.count} arrivals, at {where()}")
        if self.missing_arrivals:
            return
        if self.missing_bytes < 0:
            raise BarrierMisuse(f"{phase}: {-self.missing_bytes} more bytes copied than expected")
        if self.missing_bytes == 0:
            if self.copies_in_flight:
                raise BarrierMisuse(
                    f"{phase} completes with {self.copies_in_flight} of its copies in flight "
                    "(fewer bytes expected than copied)"
                )
            self._complete()

    def __repr__(self) -> str:
        return self.name

    def _complete(self) -> None:
        self.clock[self] = self.phase + 1
        self.completed.append(self.clock)
        self.phase, self.missing_arrivals, self.clock = self.phase + 1, self.count, {}


class Stopped(BaseException):
    """Unwinds the threads of a launch that has failed."""


class Partition:
    """One warp-specialised partition, or a whole program before it splits: a thread that runs with the baton."""

    def __init__(
        self, machine: Machine, name: str, *, program: Program, body: Callable[[], object], clock: Clock
    ) -> None:
        self.machine, self.name, self.program = machine, name, program
        self.clock: Clock = {**clock, self: 1}
        self.fences = 0
        self.untaken_loads: list[Tensor] = []
        self.unfinished_mmas: list[Callable[[], None]] = []
        self.unfinished_stores: list[TmaStore] = []
        self.seen_phase: dict[Barrier, int] = {}
        self.done = False
        self.ready: Callable[[], bool] | None = None
        self.reason: Callable[[], str]
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, args=(body,), daemon=True)
        self.thread.start()

    def _main(self, body: Callable[[], object]) -> None:
        self.go.acquire()
        try:
            if not self.machine.stopping:
                # The grad mode belongs to a thread, and this one is new.
                with torch.no_grad():
                    body()
                self._refuse_leftovers()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (raised again by the thread that launched the kernel)
            self.machine.error = self.machine.error or error
        self.done = True
        self.machine.baton_back.release()

    def _refuse_leftovers(self) -> None:
        for what, left in (("wgmma", self.unfinished_mmas), ("TMA store", self.unfinished_stores)):
            if left:
                raise Misuse(f"{self.name} ends with {len(left)} {what} not waited for")

    def pause(self, ready: Callable[[], bool] | None = None, reason: Callable[[], str] = str) -> None:
        """Give the baton back until `ready()`; `reason()` is for the report of a deadlock."""
        self.ready, self.reason = ready, reason
        self.machine.baton_back.release()
        self.go.acquire()
        if self.machine.stopping:
            raise Stopped

    def step(self) -> None:
        """A place where another partition may come first."""
        options = self.machine.options
        if options.switch and self.machine.random.random() < options.switch:
            self.pause()

    def release(self) -> Clock:
        """A copy of the clock to hand on; what this partition does next is not in it."""
        clock = dict(self.clock)
        self.clock[self] += 1
        return clock

    def take_loads(self) -> None:
        """Take the value of every shared load that was not used yet."""
        for load in list(self.untaken_loads):
            _ = load.value

    def wait(self, barrier: Barrier, parity: int) -> None:
        """Wait until the barrier's next phase of this parity has completed, and take its clock."""
        last = self.seen_phase.get(barrier)
        # Before the first phase, odd parity passes at once: it stands for phase -1.
        first = 0 if parity == 0 else -1
        meant = first if last is None else last + 1 + (last + 1 - parity) % 2
        text = f"{self.name} waits for phase {meant} of {barrier.name} at {where()}"
        if parity not in (0, 1):
            raise BarrierMisuse(f"{text}: parity {parity}")
        if last is not None and meant == last + 2:
            raise BarrierMisuse(f"{text}: it waited for this parity last time as well, and would pass at once")
        if barrier.phase <= meant:
            self.pause(
                lambda: barrier.phase > meant,
                lambda: (
                    f"{text}; the barrier is in phase {barrier.phase}, missing {barrier.missing_arrivals} arrivals "
                    f"and {barrier.missing_bytes} bytes"
                ),
            )
        if barrier.phase > meant + 1:
            raise BarrierMisuse(f"{text}: {barrier.phase - meant - 1} further phases completed unseen")
        self.seen_phase[barrier] = meant
        if meant >= 0:
            join(self.clock, barrier.completed[meant])


class Machine:
    """One launch: its programs, their partitions, and the TMA loads in flight."""

    current: ClassVar[Machine]

    def __init__(self, options: Options) -> None:
        self.options, self.random = options, random.Random(options.seed)
        self.baton_back = threading.Semaphore(0)
        self.error: BaseException | None = None
        self.stopping = False
        self.partitions: list[Partition] = []
        self.running: Partition
        self.loads_in_flight: list[TmaLoad] = []

    def run(self, programs: Sequence[Program]) -> None:
        """Run the programs, one after another, to their ends."""
        Machine.current = self
        try:
            for program in programs:
                self._run(program)
        finally:
            self.stopping = True
            for partition in self.partitions:
                partition.go.release()
            for partition in self.partitions:
                partition.thread.join()
            del Machine.current

    def _run(self, program: Program) -> None:
        whole = Partition(self, f"program {program.index}", program=program, body=program.body, clock={})
        self.partitions = [whole]
        while unfinished := [partition for partition in self.partitions if not partition.done]:
            self._advance(unfinished)
        if self.loads_in_flight:
            raise Misuse(f"the kernel ends with {len(self.loads_in_flight)} TMA loads in flight")
        # By now its clock holds those of its parts.
        for barrier, time in program.loads.items() if self.options.races else ():
            if whole.clock.get(barrier, 0) < time:
                raise Misuse(f"{whole.name} ends without having waited for a TMA load announced by {barrier}")

    def _advance(self, unfinished: list[Partition]) -> None:
        """Land one copy, or let one partition run until it gives the baton back."""
        able = [partition for partition in unfinished if partition.ready is None or partition.ready()]
        is_random = self.options.tma == "random"
        landings = list(self.loads_in_flight)
        if is_random:
            landings += [copy for partition in unfinished for copy in partition.unfinished_stores if not copy.landed]
        if landings and (not able or (is_random and self.random.random() < 0.5)):
            self.random.choice(landings).land()
            return
        if not able:
            waits = "\n  ".join(f"{partition.name}: {partition.reason()}" for partition in unfinished)
            raise Deadlock(f"no partition can run:\n  {waits}")
        self.running = self.random.choice(able) if self.options.switch else able[0]
        self.running.ready = None
        self.running.go.release()
        self.baton_back.acquire()
        if self.error is not None:
            raise self.error

    def split(self, parts: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Run the (name, body) parts as partitions of the running program, and wait for them."""
        parent = self.running
        clock = parent.release()
        partitions = [Partition(self, name, program=parent.program, body=body, clock=clock) for name, body in parts]
        if self.options.switch:
            self.random.shuffle(partitions)
        self.partitions += partitions
        parent.pause(lambda: all(partition.done for partition in partitions), lambda: "waits for its partitions")
        for partition in partitions:
            join(parent.clock, partition.clock)


def now() -> Partition:
    return Machine.current.running
