"""A rank that dies ends all the others, by name, within a set time: a heartbeat over the c10d store.

A collective does not say which rank is missing: gloo reports "Connection closed by peer", NCCL waits for its timeout.
So each rank runs two daemon threads that need no collective:

    heartbeat   writes this rank's beat, reads the shared key `dead` and the beat of its neighbour (rank + 1) % world;
                a rank that misses its neighbour for `peer_timeout_s` writes `dead`, and the first to write is believed
    monitor     ends the process once a death is known, or when a store call of the heartbeat does not return

The main thread may be stuck in a collective at that time, so the process ends by `os._exit`: no exit handler runs.
When watched and watcher die together, the dead watcher is missed by its own watcher, and that ends all.

A rank may hang while its heart beats: then a collective of the others times out, though every process lives. Each beat
says where its rank's main thread is (`parallel/places.py`); the rank that waits for no other is named, and all ranks
print their stacks.

Deaths: no beat for `peer_timeout_s`; a process of the same machine that is gone; `report_failure`, by a rank that fails
and can still say why; the end of the interpreter without `finish`; the loss of the store, which is attributed to the
rank or the launcher that hosts it.
No deaths: a slow step; SIGSTOP of a rank for less than the timeout; suspension of the whole job for any time; a rank
that waits in `finish` for the others. Torch's kernels, collectives and file reads release the GIL; a C call that holds
it for longer than `peer_timeout_s` stops the beat and is a death. Beats are watched only after every rank has started.
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
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from parallel.places import place_of_main_thread

# EX_TEMPFAIL of sysexits.h: nothing is wrong with the command, and it may succeed when it is started again.
DEATH_EXIT_CODE = 75

_BEATS_PER_TIMEOUT = 8
_MAX_INTERVAL_S = 5.0
# Ranks that wait for the last one to finish look more often: an orderly end takes no whole beat.
_FINISHING_INTERVAL_S = 0.5
_MAX_REASON_CHARACTERS = 300
HANGS = "it hangs at"
_LAUNCHER_LOOKS_S = 1.0
_DEAD, _STARTED, _FINISHED, _HEARD = (f"watchdog/{name}" for name in ("dead", "started", "finished", "heard"))

# Words by which gloo and NCCL say, in a plain RuntimeError, that the other side failed.
_COMMUNICATION_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe")


@dataclass(frozen=True)
class Death:
    """The first death of a run, as every rank reads it."""

    rank: int | None  # None when the store was lost and no rank is known to host it
    host: str  # '' when unknown
    pid: int  # 0 when unknown
    label: str  # position in the mesh, or ''
    reason: str  # one line
    seen_by: int  # the rank that reports it

    def sentence(self, reader: int) -> str:
        """One line for the stderr of rank `reader`: which rank died, where, why, and which rank noticed."""
        parts = (self.label, f"host {self.host}" if self.host else "", f"pid {self.pid}" if self.pid else "")
        where = ", ".join(part for part in parts if part)
        who = "the run" if self.rank is None else f"rank {self.rank}" + (f" ({where})" if where else "")
        noticed = "" if self.seen_by in (self.rank, reader) else f" (seen by rank {self.seen_by})"
        return f"rank {reader} ends because {who} is dead: {self.reason}{noticed}"


def end_process(sentence: str, *, exit_code: int = DEATH_EXIT_CODE) -> None:
    """Print one sentence to stderr, flush what Python still buffers, and end this process at once."""

    def say() -> None:
        # In one write the lines of several ranks do not mix.
        os.write(2, f"{sentence}\n".encode(errors="replace"))
        sys.stdout.flush()
        sys.stderr.flush()

    # A full pipe, or a lock held by the stuck main thread, must not keep the process alive.
    printer = threading.Thread(target=say, daemon=True)
    try:
        printer.start()
        printer.join(2.0)
    except RuntimeError:
        # From 3.12 on, an interpreter that is ending starts no thread.
        say()
    finally:
        os._exit(exit_code)


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, tells of another rank's failure rather than of one's own."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        is_named = any(word in str(link).lower() for word in _COMMUNICATION_WORDS)
        if isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and is_named):
            return True
        link = link.__cause__ or link.__context__
    return False


class Watchdog:
    """One rank's part in the heartbeat; `with Watchdog(...) as watchdog:` around the run does all that is needed.

    At the end of the block it waits for the other ranks, or reports the exception that ended the block.

    Args:
        store: a c10d store that all ranks reach, used by one watchdog per rank: a second run in the same processes
            needs a `PrefixStore` of its own.
        peer_timeout_s: silence after which a rank is dead, seconds; above the longest call that holds the GIL.
        describe: position of this rank in the mesh, such as 'pp 1, dp 3, ep 3'.
        store_rank: the rank whose process hosts the store; None where the launcher does (torchrun).
        on_death: gets the sentence, in the monitor's thread; ends the process unless a test gives something else.
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
        # True once every rank has started, from when on this one watches its neighbour.
        self.watching = False
        self._address = _address(store)
        # A connection of our own.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._store_rank, self._on_death = store_rank, on_death
        self._identity = {"host": socket.gethostname(), "pid": os.getpid(), "pids": _pid_namespace(), "label": describe}
        self._store_host: dict[str, object] = {}
        self._beats = 0
        self._counted_as_finished = False
        self._own_report: Death | None = None
        self._lost_contact, self._store_is_lost = False, False
        self._death: Death | None = None
        self._sentence = ""
        # Orders of the main thread.
        self._wake, self._finishing, self._stopping = threading.Event(), threading.Event(), threading.Event()
        # States of the two threads.
        self._heartbeat_done, self._death_known, self._monitor_done = (threading.Event() for _ in range(3))
        self._threads = [
            threading.Thread(target=self._heartbeat, name="watchdog-heartbeat", daemon=True),
            threading.Thread(target=self._monitor, name="watchdog-monitor", daemon=True),
        ]

    def start(self) -> None:
        """Enter the run: write the first beat and start both threads; returns without waiting for the others."""
        self._beat()
        self._store.add(_STARTED, 1)
        atexit.register(self._end_of_interpreter)
        for thread in self._threads:
            thread.start()

    def report_failure(self, reason: str) -> None:
        """Report that this rank fails, then return: the caller has `peer_timeout_s` to end in its own way.

        Where another rank died before, that one is named and this call does not return: the monitor ends the process.
        """
        if not self._monitor_done.is_set() and self._own_report is None:
            self._own_report = self._death_of(self.rank, self._identity, reason)
            self._wake.set()
            self._heartbeat_done.wait(self.notice_s)
            if self._death is not None and self._death.rank != self.rank:
                self._monitor_done.wait()

    def finish(self) -> None:
        """End in order: wait until every rank has finished, still watched and watching, then stop both threads."""
        # Waiting for all keeps the store's host alive as long as any rank needs it. Nothing but the others' progress
        # bounds the wait: a rank stuck in a collective has that one's timeout.
        self._finishing.set()
        self._wake.set()
        self._monitor_done.wait()
        self._join()
        atexit.unregister(self._end_of_interpreter)

    def wait_for_death(self, timeout_s: float) -> str | None:
        """The sentence, once it is known which rank died and `on_death` has returned; None after `timeout_s`.

        For a main thread that got a communication error; `notice_s` is enough for a death.
        """
        self._wake.set()
        if not self._death_known.wait(timeout_s):
            return None
        # If the caller went on before the monitor has ended the process, the exit code would be the caller's.
        self._monitor_done.wait()
        return self._sentence

    @property
    def reports_death(self) -> bool:
        """Whether this rank is to report the death to somebody outside: one rank is, or two where the store is lost."""
        death = self._death
        if death is None:
            return False
        if self._store_is_lost:
            # No rank knows which others live.
            return self.rank in (0, self.world - 1)
        # A rank that fails by its own report ends in its own way.
        return self.rank == (death.seen_by if death.seen_by != death.rank else int(death.rank == 0))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()
            return
        # Another rank caused a communication error: let that one be named first.
        if is_communication_error(error):
            self.wait_for_death(self.notice_s)
            # Every process lives: is one of them stuck?
            self._lost_contact = True
        self.report_failure(f"{type(error).__name__}: {error}")

    def _heartbeat(self) -> None:
        """All calls to the store are made here; any of them may block for ever."""
        try:
            death = self._watch()
        except RuntimeError as error:
            # Once this rank is counted as finished, the store's host may end first.
            death = None if self._counted_as_finished or self._stopping.is_set() else self._store_lost(str(error))
        self._death = death
        if death is not None:
            with contextlib.suppress(RuntimeError):
                self._keep_store_until_heard(death)
        self._heartbeat_done.set()

    def _watch(self) -> Death | None:
        """Beat and look until a death is known (returned) or the watch is over in order (None)."""
        neighbour = (self.rank + 1) % self.world
        silence_s, last_beat, last_look = 0.0, b"", time.monotonic()
        while not self._stopping.is_set():
            self._beat()
            if self._store.check([_DEAD]):
                return Death(**json.loads(self._store.get(_DEAD)))
            if self._own_report is not None:
                hanging = self._hanging() if self._lost_contact and self.watching else None
                return self._publish(hanging or self._own_report)
            if self._finishing.is_set() and self._all_finished():
                return None
            if self._all_started():
                now = time.monotonic()
                beat = self._store.get(_beat_key(neighbour))
                # Time in which this process did not run itself (SIGSTOP, a suspended host) proves nothing: each look
                # counts for two intervals at most.
                silence_s = 0.0 if beat != last_beat else silence_s + min(now - last_look, 2 * self.interval_s)
                last_beat, last_look = beat, now
                if self._has_ended(identity := json.loads(beat)):
                    # torchrun, which looks ten times a second, is to find that one dead before the others end.
                    time.sleep(_LAUNCHER_LOOKS_S)
                    return self._publish(self._death_of(neighbour, identity, "its process has ended"))
                if silence_s > self.peer_timeout_s:
                    reason = f"no heartbeat for {self.peer_timeout_s:g} s"
                    return self._publish(self._death_of(neighbour, identity, reason))
            self._wake.wait(_FINISHING_INTERVAL_S if self._finishing.is_set() else self.interval_s)
            self._wake.clear()
        return None

    def _beat(self) -> None:
        self._beats += 1
        where, waits = place_of_main_thread()
        beat = {**self._identity, "beat": self._beats, "where": where, "waits": waits}
        self._store.set(_beat_key(self.rank), json.dumps(beat))

    def _all_started(self) -> bool:
        if not self.watching and self._store.add(_STARTED, 0) >= self.world:
            if self._store_rank is not None:
                self._store_host = json.loads(self._store.get(_beat_key(self._store_rank)))
            self.watching = True
        return self.watching

    def _has_ended(self, identity: dict[str, object]) -> bool:
        """Whether a process was on this machine and is gone, not in order: known at once, without the timeout.

        torchrun kills the others 30 s after the first has died; by then they have named it.
        """
        if not identity.get("pids") or identity["pids"] != self._identity["pids"]:
            return False
        try:
            state = Path(f"/proc/{identity['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
        # A zombie has ended too: its parent has not asked yet.
        return state in "ZX" and self._store.add(_FINISHED, 0) < self.world

    def _hanging(self) -> Death | None:
        """The rank that others wait for and that does not wait itself; None where most are so, or none is."""
        beats = [json.loads(self._store.get(_beat_key(rank))) for rank in range(self.world)]
        busy = [rank for rank, beat in enumerate(beats) if rank != self.rank and not beat.get("waits", True)]
        if not busy or len(busy) > self.world // 2:
            return None
        return self._death_of(busy[0], beats[busy[0]], f"{HANGS} {beats[busy[0]]['where']}, and others wait for it")

    def _all_finished(self) -> bool:
        finished = self._store.add(_FINISHED, 0 if self._counted_as_finished else 1)
        self._counted_as_finished = True
        return finished >= self.world

    def _publish(self, death: Death) -> Death:
        """Write `dead` unless it is written; returns the death that was written first."""
        return Death(**json.loads(self._store.compare_set(_DEAD, "", json.dumps(asdict(death)))))

    def _keep_store_until_heard(self, death: Death) -> None:
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

    def _monitor(self) -> None:
        """Ends the process; makes no call to the store, so it cannot block."""
        try:
            beats, still = -1, 0
            while not self._heartbeat_done.wait(self.interval_s):
                # Counted in looks, as silence is: a stopped process comes back with one look, not with many.
                beats, still = self._beats, still + 1 if beats == self._beats else 0
                if still * self.interval_s > self.peer_timeout_s:
                    if not self._counted_as_finished and not self._stopping.is_set():
                        self._death = self._store_lost(f"no answer for {self.peer_timeout_s:g} s")
                    break
            if (death := self._death) is not None:
                self._sentence = death.sentence(self.rank)
                self._death_known.set()
                # After its own report a rank gets time for its traceback and its own way out.
                is_own = self._own_report is not None and death.rank == self.rank
                if not (is_own and self._stopping.wait(self.peer_timeout_s)):
                    if death.reason.startswith(HANGS):
                        # A full pipe must not keep the process alive.
                        printer = threading.Thread(target=_print_stacks, daemon=True)
                        # The system may give no thread; the end does not wait for that.
                        with contextlib.suppress(RuntimeError):
                            printer.start()
                            printer.join(2.0)
                    self._on_death(self._sentence)
        finally:
            self._monitor_done.set()

    def _death_of(self, rank: int | None, identity: dict[str, object], reason: str) -> Death:
        line = (reason.strip().splitlines() or ["no reason given"])[0][:_MAX_REASON_CHARACTERS]
        host, label, pid = (identity.get(field, "") for field in ("host", "label", "pid"))
        return Death(rank, str(host), int(str(pid or 0)), str(label), line, seen_by=self.rank)

    def _store_lost(self, error: str) -> Death:
        self._store_is_lost = True
        what = f"the store at {self._address} is gone ({(error.strip().splitlines() or [''])[0][:120]})"
        if self._store_rank is None:
            host = "its host, the first node's launcher, has ended (read its log) or cannot be reached"
            return self._death_of(None, {}, f"{what}; {host}")
        return self._death_of(self._store_rank, self._store_host, f"{what}, which this rank hosted")

    def _end_of_interpreter(self) -> None:
        """At exit without `finish`: report it, and stop our threads, which would abort an ended interpreter."""
        # A forked child inherits this handler and no thread.
        if os.getpid() != self._identity["pid"]:
            return
        self.report_failure("its process ended without leaving the run")
        self._stopping.set()
        self._wake.set()
        self._join()

    def _join(self) -> None:
        for thread in self._threads:
            # A heartbeat whose call never returns is given up.
            if thread is not threading.current_thread():
                thread.join(2.0)


def _beat_key(rank: int) -> str:
    return f"watchdog/beat/{rank}"


def _pid_namespace() -> str:
    """What two processes share that see each other's pids: a boot and a namespace; '' where that is not known."""
    try:
        # In a namespace whose /proc is another's, pids mean something else there.
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _print_stacks() -> None:
    """Where every thread of this process is, on stderr."""
    frames = sys._current_frames().items()
    stacks = [f"thread {ident}, most recent call last:\n{''.join(traceback.format_stack(f))}" for ident, f in frames]
    os.write(2, "".join(stacks).encode(errors="replace"))


def _address(store: Store) -> str:
    """host:port of a TCPStore, inside any number of prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return f"{getattr(store, 'host', type(store).__name__)}:{getattr(store, 'port', '-')}"
