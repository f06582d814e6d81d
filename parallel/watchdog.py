"""A rank that dies ends all the others, by name, within a set time: a heartbeat over the c10d store.

A collective does not say who is missing: gloo reports "Connection closed by peer", NCCL waits for its timeout. So each
rank runs two daemon threads that need no collective. The paper does not describe its own (arXiv:2412.19437 §3 only
states 2,048 GPUs).

    courier   writes this rank's beat, reads the shared key `dead`, reads the beat of its neighbour (rank + 1) % world;
              whoever misses its neighbour for `peer_timeout_s` writes `dead`, and the first to write it is believed
    judge     ends the process once a death is known, or when the courier's store call does not return

The main thread may be stuck in a collective at that time, so the process ends by `os._exit`: no exit handler runs.
Keys: one beat per rank and four shared ones, O(world); reads: at most three per rank and beat, whatever the world.
A death is known everywhere within `notice_s`: the timeout and four beats (to notice it, to write it, to read it).
When watched and watcher die together, the dead watcher is missed by its own watcher, and that ends everybody.

What counts as a death: no beat for `peer_timeout_s`; `announce`, by a rank that fails and can still say why; the end of
the interpreter without `leave`; the loss of the store, which is laid to the rank or the launcher that hosts it.
What does not: a slow step; SIGSTOP of a rank for less than the timeout; suspension of the whole job for any time
(silence is counted in the watcher's own looks, not by the clock); a rank that waits in `leave` for the others.
A C call that holds the GIL stops the beat as well: longer than `peer_timeout_s`, and the rank is declared dead and ends
when it comes back. Torch's kernels, collectives and file reads release it.

Not seen: a rank that beats and makes no progress (the timeout of its collective turns that into an exception), and a
rank that never starts (the rendezvous has its own timeout); beats are watched only after every rank has started.
Shapes: there are no tensors here, and no process group either.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Protocol, Self

import torch.distributed as dist

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, and it may succeed when it is started again.
DEATH_EXIT_CODE = 75

_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL_S = 5.0
# Ranks that wait for the last one to leave look more often, so that an orderly end takes no whole beat.
_LEAVING_INTERVAL_S = 0.5
_MAX_REASON_CHARACTERS = 300
_DEAD, _STARTED, _LEFT, _HEARD = (f"watchdog/{name}" for name in ("dead", "started", "left", "heard"))

# Words by which gloo and NCCL say, in a plain RuntimeError, that the other side failed.
_COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe")


class Store(Protocol):
    """What is used of a c10d store; beside it `clone`, which torch's stub lacks: another client, for another thread."""

    def set(self, key: str, value: str) -> None:
        """Write a key."""

    def get(self, key: str) -> bytes:
        """Read a key, waiting until it exists."""

    def add(self, key: str, value: int) -> int:
        """Add to a counter, absent counts as 0; the new value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        """Write a key that is absent (expected '') or has the expected value; the value afterwards."""


@dataclass(frozen=True)
class Death:
    """The first death of a run, as every rank reads it.

    Args:
        rank: who died; None when the store was lost and no rank is known to host it.
        host: name of its host; '' when unknown.
        pid: its process id; 0 when unknown.
        label: what else describes it, such as its place in the mesh; may be ''.
        reason: why, in one line.
        seen_by: the rank that says so.
    """

    rank: int | None
    host: str
    pid: int
    label: str
    reason: str
    seen_by: int

    def sentence(self, reader: int) -> str:
        """One line for stderr.

        Args:
            reader: the rank that prints it.
        Returns:
            who died, where, why, and who noticed.
        """
        parts = (self.label, f"host {self.host}" if self.host else "", f"pid {self.pid}" if self.pid else "")
        where = ", ".join(part for part in parts if part)
        who = "the run" if self.rank is None else f"rank {self.rank}" + (f" ({where})" if where else "")
        witness = "" if self.seen_by in (self.rank, reader) else f" (seen by rank {self.seen_by})"
        return f"rank {reader} ends because {who} is dead: {self.reason}{witness}"


def end_process(sentence: str, *, exit_code: int = DEATH_EXIT_CODE) -> None:
    """Print one sentence to stderr, flush what Python still buffers, and end this process at once.

    Args:
        sentence: what happened.
        exit_code: of the process, not 0.
    """

    def say() -> None:
        # One write, so that the lines of several ranks do not mix.
        os.write(2, f"{sentence}\n".encode(errors="replace"))
        sys.stdout.flush()
        sys.stderr.flush()

    # A full pipe, or a lock held by the stuck main thread, must not keep the process alive.
    speaker = threading.Thread(target=say, daemon=True)
    try:
        speaker.start()
        speaker.join(2.0)
    except RuntimeError:
        # From 3.12 on, an interpreter that is ending starts no thread.
        say()
    finally:
        os._exit(exit_code)


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception tells of another rank's failure rather than of one's own.

    Args:
        error: as caught; the exceptions it came from are looked at too.
    Returns:
        True for torch's distributed errors and for a RuntimeError in which gloo or NCCL complains.
    """
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        text = str(link).lower()
        if isinstance(link, dist.DistError):
            return True
        if isinstance(link, RuntimeError) and any(word in text for word in _COMMUNICATION_WORDS):
            return True
        link = link.__cause__ or link.__context__
    return False


class Watchdog:
    """One rank's part in the heartbeat; `with Watchdog(...) as watchdog:` around the run does all that is needed.

    The `with` statement starts it; at the end of the block it leaves, or announces the exception that ended the block.
    A communication error is announced only after `notice_s`, so that the rank that caused it is named first.

    Args:
        store: any c10d store that all ranks reach; it is cloned, for a connection of our own. One store serves one
            watchdog per rank: give a second run in the same processes a `PrefixStore` of its own.
        rank: this rank.
        world: number of ranks.
        peer_timeout_s: silence after which a rank is dead, seconds; above the longest call that holds the GIL.
        describe: what to say of this rank beside host and pid, such as 'pp 1, dp 3, ep 3'.
        store_rank: the rank whose process hosts the store; None where the launcher does (torchrun).
        on_death: gets the sentence, in the judge's thread; ends the process unless a test gives something else.
    Raises:
        ValueError: peer_timeout_s is not above 0.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        peer_timeout_s: float,
        describe: str = "",
        store_rank: int | None = None,
        on_death: Callable[[str], None] = end_process,
    ) -> None:
        if not peer_timeout_s > 0:
            raise ValueError(f"peer_timeout_s = {peer_timeout_s} must be above 0; give seconds, such as 60")
        assert 0 <= rank < world, (rank, world)
        self.rank, self.world, self.peer_timeout_s = rank, world, peer_timeout_s
        self.interval_s = min(_MAX_INTERVAL_S, peer_timeout_s / _BEATS_PER_TIMEOUT)
        # A look late to see its last beat, a look late to miss the next, a look late to read of it; one to spare.
        self.notice_s = peer_timeout_s + 4 * self.interval_s
        self._address = _address(store)
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._describe, self._store_rank, self._on_death = describe, store_rank, on_death
        self._identity = {"host": socket.gethostname(), "pid": os.getpid(), "label": describe}
        self._store_host: dict[str, object] = {}
        self._beats = 0
        # Public: True once every rank has started, from when on this one watches its neighbour.
        self.watching = False
        self._counted_as_left = False
        self._announcement: Death | None = None
        self._death: Death | None = None
        self._sentence = ""
        # _leaving, _stopping: orders of the main thread; _told: the courier is done; _known: a death is known here;
        # _over: the judge is done.
        self._wake, self._leaving, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._told, self._known, self._over = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._courier, name="watchdog-courier", daemon=True),
            threading.Thread(target=self._judge, name="watchdog-judge", daemon=True),
        ]

    def start(self) -> None:
        """Enter the run: write the first beat and start both threads; returns without waiting for the others."""
        self._beat()
        self._store.add(_STARTED, 1)
        atexit.register(self._end_of_interpreter)
        for thread in self._threads:
            thread.start()

    def announce(self, reason: str) -> None:
        """Tell the others that this rank fails, then return, so that the caller can end in its own way.

        It has `peer_timeout_s` to do so; then the judge ends it. Where another rank died before, that one is named and
        this call does not return: the judge ends the process.

        Args:
            reason: why; only the first line is told.
        """
        if not self._over.is_set() and self._announcement is None:
            self._announcement = self._death_of(self.rank, self._identity, reason)
            self._wake.set()
            self._told.wait(self.notice_s)
            if self._death is not None and self._death.rank != self.rank:
                self._over.wait()

    def leave(self) -> None:
        """End in order: wait until every rank has left, still watched and watching, then stop both threads.

        Waiting for all keeps the store's host alive until nobody needs it. A rank that dies meanwhile ends this one
        too. Nothing but the others' progress bounds the wait: a rank stuck in a collective has that one's timeout.
        """
        self._leaving.set()
        self._wake.set()
        self._over.wait()
        self._join()
        atexit.unregister(self._end_of_interpreter)

    def verdict(self, timeout_s: float) -> str | None:
        """Wait until it is known who died; for a main thread that got a communication error.

        Args:
            timeout_s: seconds; `notice_s` is enough for a death.
        Returns:
            None when nobody is known to have died; else the sentence, after `on_death`, which by default ends the
            process instead.
        """
        if not self._known.wait(timeout_s):
            return None
        # The caller must not overtake the judge, or the exit code would be another.
        self._over.wait()
        return self._sentence

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
            return
        if is_communication_error(error):
            self.verdict(self.notice_s)
        self.announce(f"{type(error).__name__}: {error}")

    def _courier(self) -> None:
        """Everything that talks to the store; any call here may block for ever."""
        try:
            death = self._watch()
        except RuntimeError as error:
            # Once everybody but the store's host needs nothing more, the host may end first.
            death = None if self._counted_as_left or self._stopping.is_set() else self._lost_store(str(error))
        self._death = death
        if death is not None:
            with contextlib.suppress(RuntimeError):
                self._spread(death)
        self._told.set()

    def _watch(self) -> Death | None:
        """Beat and look until a death is known (returned) or the watch is over in order (None)."""
        silence_s, last_beat, last_look = 0.0, b"", time.monotonic()
        while not self._stopping.is_set():
            self._beat()
            if self._store.check([_DEAD]):
                return Death(**json.loads(self._store.get(_DEAD)))
            if self._announcement is not None:
                return self._publish(self._announcement)
            if self._leaving.is_set() and self._everyone_left():
                return None
            if self._everyone_started():
                now = time.monotonic()
                beat = self._store.get(_beat_key((self.rank + 1) % self.world))
                # Time in which this process did not run itself (SIGSTOP, a suspended host) proves nothing.
                silence_s = 0.0 if beat != last_beat else silence_s + min(now - last_look, 2 * self.interval_s)
                last_beat, last_look = beat, now
                if silence_s > self.peer_timeout_s:
                    return self._publish(self._death_of_neighbour(beat))
            self._wake.wait(_LEAVING_INTERVAL_S if self._leaving.is_set() else self.interval_s)
            self._wake.clear()
        return None

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(_beat_key(self.rank), json.dumps({**self._identity, "beat": self._beats}))

    def _everyone_started(self) -> bool:
        if not self.watching and self._store.add(_STARTED, 0) >= self.world:
            if self._store_rank is not None:
                self._store_host = json.loads(self._store.get(_beat_key(self._store_rank)))
            self.watching = True
        return self.watching

    def _everyone_left(self) -> bool:
        left = self._store.add(_LEFT, 0 if self._counted_as_left else 1)
        self._counted_as_left = True
        return left >= self.world

    def _publish(self, death: Death) -> Death:
        """Write `dead` unless it is written; the death that was written first."""
        return Death(**json.loads(self._store.compare_set(_DEAD, "", json.dumps(asdict(death)))))

    def _spread(self, death: Death) -> None:
        """The store's host stays until the others have read of the death; its end would hide the cause."""
        # The dead rank does not count itself, so the living are world - 1, if only one died.
        if death.rank != self.rank:
            self._store.add(_HEARD, 1)
        if self._store_rank == self.rank:
            for _ in range(3 * _BEATS_PER_TIMEOUT):
                if self._store.add(_HEARD, 0) >= self.world - 1:
                    return
                self._beats += 1
                time.sleep(self.interval_s / _BEATS_PER_TIMEOUT)

    def _judge(self) -> None:
        """Ends the process; never talks to the store, so nothing can hold it up."""
        beats, still = -1, 0
        while not self._told.wait(self.interval_s):
            # Counted in looks, as silence is: a stopped process comes back with one look, not with many.
            beats, still = self._beats, still + 1 if beats == self._beats else 0
            if still * self.interval_s > self.peer_timeout_s:
                if not self._counted_as_left and not self._stopping.is_set():
                    self._death = self._lost_store(f"no answer for {self.peer_timeout_s:g} s")
                break
        death = self._death
        if death is not None:
            self._sentence = death.sentence(self.rank)
            self._known.set()
            # After its own announcement a rank gets time for its traceback and its own way out.
            by_myself = self._announcement is not None and death.rank == self.rank
            if not (by_myself and self._stopping.wait(self.peer_timeout_s)):
                self._on_death(self._sentence)
        self._over.set()

    def _death_of(self, rank: int | None, identity: dict[str, object], reason: str) -> Death:
        line = (reason.strip().splitlines() or ["no reason given"])[0][:_MAX_REASON_CHARACTERS]
        host, label, pid = (identity.get(field, "") for field in ("host", "label", "pid"))
        return Death(rank, str(host), int(str(pid or 0)), str(label), line, seen_by=self.rank)

    def _death_of_neighbour(self, beat: bytes) -> Death:
        reason = f"no heartbeat for {self.peer_timeout_s:g} s"
        return self._death_of((self.rank + 1) % self.world, json.loads(beat), reason)

    def _lost_store(self, error: str) -> Death:
        """What can be said when nothing can be read or written any more."""
        what = f"the store at {self._address} is gone ({(error.strip().splitlines() or [''])[0][:120]})"
        if self._store_rank is None:
            return self._death_of(None, {}, f"{what}; its host, the first node's launcher, has ended: read its log")
        return self._death_of(self._store_rank, self._store_host, f"{what}, which this rank hosted")

    def _end_of_interpreter(self) -> None:
        """At exit without `leave`: say so, and let no thread of ours outlive the interpreter, which would abort it."""
        # A forked child inherits this handler and no thread.
        if os.getpid() != self._identity["pid"]:
            return
        self.announce("its process ended without leaving the run")
        self._stopping.set()
        self._wake.set()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            # A courier whose call never returns is given up.
            if thread is not threading.current_thread():
                thread.join(2.0)


def _beat_key(rank: int) -> str:
    return f"watchdog/beat/{rank}"


def _address(store: Store) -> str:
    """Where a store is, for people: a TCPStore by host and port, inside any number of prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return f"{getattr(store, 'host', type(store).__name__)}:{getattr(store, 'port', '-')}"
