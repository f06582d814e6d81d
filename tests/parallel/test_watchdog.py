"""The watchdog with real processes and real signals: all others name the rank that died, and no other rank dies.

Every group of ranks is forked from the clean server that tests/ranks.py uses. Each rank writes its stderr to a file of
its own; the configured exit code is 41, so that no other end can be taken for it. No time is asserted: a group that
has not ended by DEADLINE_S has failed, and its processes are killed.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.places import waits_for_others
from parallel.watchdog import DEATH_EXIT_CODE, HANGS, Death, Watchdog, end_process, is_communication_error
from tests.ranks import PRELOAD

EXIT_CODE = 41
# Without /proc a dead process is known by its silence.
ENDED = "its process has ended" if Path("/proc/self/ns/pid").exists() else "no heartbeat for 1.5 s"
DEADLINE_S = 60
WORLD = 4
Body = Callable[[Watchdog, dist.Store], None]


def rank_main(rank: int, world: int, folder: Path, timeout_s: float, host_rank: int | None, body: Body) -> None:
    """One rank: stderr to its file, the store (its own server on the host rank), the watchdog around `body`."""
    os.dup2(os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    port_file = folder / "port"
    if rank == host_rank:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port_file.with_suffix(".new").write_text(str(store.port))
        port_file.with_suffix(".new").rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port_file.read_text()), wait_for_workers=False)
    scoped = dist.PrefixStore("attempt_0", store)
    ending = functools.partial(end_process, exit_code=EXIT_CODE)
    with Watchdog(
        scoped, rank, world, peer_timeout_s=timeout_s, describe=f"dp {rank}", store_rank=host_rank, on_death=ending
    ) as watchdog:
        while not watchdog.watching:
            time.sleep(0.01)
        (folder / f"{rank}.ready").touch()
        body(watchdog, scoped)
    # What aborts an ending interpreter is a thread that outlives it; so it is looked for on every rank.
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    if body is short and rank == 1:
        end_interpreter(0)


def end_interpreter(code: int) -> None:
    """A child of multiprocessing ends by os._exit; this runs the exit handlers and takes the interpreter down."""
    # Frozen, the modules that the server imported are not collected: 0.5 s of processor time instead of 1.2.
    gc.freeze()
    ctypes.pythonapi.Py_Exit(code)


class Group:
    """The processes of one run, their exit codes and their stderr."""

    def __init__(self, folder: Path, world: int, timeout_s: float, host_rank: int | None, body: Body) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder, self.world = folder, world
        arguments = (world, folder, timeout_s, host_rank, body)
        self.processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world)]
        for process in self.processes:
            process.start()
        self.deadline = time.monotonic() + DEADLINE_S

    def wait_until_all_are_in(self) -> None:
        """Until every rank watches its neighbour."""
        while len(list(self.folder.glob("*.ready"))) < self.world:
            assert time.monotonic() < self.deadline, f"ranks do not start: {self.said()}"
            time.sleep(0.01)

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def put(self, key: str) -> None:
        """Set a key in the ranks' store."""
        port = int((self.folder / "port").read_text())
        dist.PrefixStore("attempt_0", dist.TCPStore("127.0.0.1", port, wait_for_workers=False)).set(key, "")

    def who(self, rank: int) -> str:
        """As a sentence names a rank."""
        return f"rank {rank} (dp {rank}, host {socket.gethostname()}, pid {self.processes[rank].pid})"

    def said(self) -> list[str]:
        files = [self.folder / f"{rank}.stderr" for rank in range(self.world)]
        return [file.read_text() if file.exists() else "" for file in files]

    def exit_codes(self, *ranks: int) -> list[int | None]:
        """Of these ranks, once they have ended; the test fails if they have not by the deadline."""
        left = {self.processes[rank].sentinel for rank in ranks}
        while left:
            ended = wait(list(left), timeout=max(0.0, self.deadline - time.monotonic()))
            assert ended, f"ranks still run after {DEADLINE_S} s: {self.said()}"
            left -= set(ended)  # type: ignore[arg-type]
        for rank in ranks:
            self.processes[rank].join()
        return [self.processes[rank].exitcode for rank in ranks]

    def sentences(self, rank: int) -> list[str]:
        return [line for line in self.said()[rank].splitlines() if " ends because " in line]


@contextmanager
def started(
    folder: Path, body: Body, *, timeout_s: float, world: int = WORLD, host_rank: int | None = None
) -> Iterator[Group]:
    """A group whose store is on `host_rank`, or in this process; whatever is left of it is killed."""
    folder.mkdir(exist_ok=True)
    server = None
    if host_rank is None:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "port").write_text(str(server.port))
    group = Group(folder, world, timeout_s, host_rank, body)
    try:
        yield group
    finally:
        for process in group.processes:
            process.kill()
        for process in group.processes:
            process.join()
        del server


def stuck(watchdog: Watchdog, store: dist.Store) -> None:
    """The main thread as a hanging collective leaves it."""
    time.sleep(600)


def patient(watchdog: Watchdog, store: dist.Store) -> None:
    """Works until the test sets `over`, and does not end at the same time as the others."""
    store.wait(["over"], timedelta(seconds=600))
    time.sleep(0.05 * watchdog.rank)


def short(watchdog: Watchdog, store: dist.Store) -> None:
    time.sleep(0.1 * watchdog.rank)


def last_raises(watchdog: Watchdog, store: dist.Store) -> None:
    if watchdog.rank == watchdog.world - 1:
        raise ValueError("the loss is not finite\nand more of that")
    time.sleep(600)


def last_exits(watchdog: Watchdog, store: dist.Store) -> None:
    if watchdog.rank == watchdog.world - 1:
        end_interpreter(7)
    time.sleep(600)


def sums_until_one_is_killed(watchdog: Watchdog, store: dist.Store) -> None:
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=watchdog.rank, world_size=watchdog.world
    )
    for step in range(1_000_000):
        if step == 3 and watchdog.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones == watchdog.world


def third_hangs(watchdog: Watchdog, store: dist.Store) -> None:
    store = dist.PrefixStore("gloo", store)
    limit = timedelta(seconds=2)
    dist.init_process_group("gloo", store=store, rank=watchdog.rank, world_size=watchdog.world, timeout=limit)
    for step in range(1_000_000):
        if step == 3 and watchdog.rank == 2:
            time.sleep(600)
        dist.all_reduce(torch.ones(1))


def second_holds_the_gil(watchdog: Watchdog, store: dist.Store) -> None:
    if watchdog.rank == 1:
        store.wait(["watched"], timedelta(seconds=600))
        # PyDLL calls C without releasing the GIL: no thread of this process runs meanwhile.
        ctypes.PyDLL(None).usleep(2_400_000)
    time.sleep(600)


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_killed_ranks_end_the_others_which_name_the_first(tmp_path: Path) -> None:
    """One rank, then two at once.

    Rank 0 watches 1, and 1 watches 2: when both die no rank is left to miss 2, and all end for 1. In the first group
    rank 0 hosts the store, which must outlive the others' reading: else the loss would be attributed to rank 0.
    """
    # Groups run at the same time: they mostly wait.
    with (
        started(tmp_path / "one", stuck, timeout_s=1.5, host_rank=0) as one,
        started(tmp_path / "two", stuck, timeout_s=1.5) as two,
    ):
        for group, victims in ((one, (2,)), (two, (1, 2))):
            group.wait_until_all_are_in()
            group.signal(signal.SIGKILL, *victims)
        for group, survivors, named in ((one, (0, 1, 3), 2), (two, (0, 3), 1)):
            assert group.exit_codes(*survivors) == [EXIT_CODE] * len(survivors)
            for rank in survivors:
                (sentence,) = group.sentences(rank)
                assert sentence.startswith(f"rank {rank} ends because {group.who(named)} is dead: {ENDED}")


def test_a_rank_killed_between_collectives_is_named_and_not_the_one_that_lost_its_connection(tmp_path: Path) -> None:
    """The neighbours of a killed rank get gloo's error at once, long before the heartbeat is missed."""
    with started(tmp_path, sums_until_one_is_killed, timeout_s=1.5) as group:
        assert group.exit_codes(0, 2, 3, 1) == [EXIT_CODE, EXIT_CODE, EXIT_CODE, -signal.SIGKILL]
        for rank in (0, 2, 3):
            (sentence,) = group.sentences(rank)
            assert f"because {group.who(1)} is dead: {ENDED}" in sentence


def test_a_rank_that_hangs_while_its_heart_beats_is_named_with_the_place_and_all_print_their_stacks(
    tmp_path: Path,
) -> None:
    with started(tmp_path, third_hangs, timeout_s=1.5) as group:
        assert group.exit_codes(*range(WORLD)) == [EXIT_CODE] * WORLD
        for rank in range(WORLD):
            (sentence,) = group.sentences(rank)
            here = "/".join(Path(__file__).parts[-2:])
            named = f"rank {rank} ends because {group.who(2)} is dead: it hangs at {here}:"
            assert sentence.startswith(named)
            assert " in third_hangs, and others wait for it" in sentence
            stacks = group.said()[rank].partition(" ends because ")[0]
            assert ("in third_hangs" if rank == 2 else "in rank_main") in stacks


def test_a_rank_that_fails_says_why_before_the_timeout(tmp_path: Path) -> None:
    """An exception and an exit in the middle of the run; the rank that fails hosts the store."""
    with (
        started(tmp_path / "raising", last_raises, timeout_s=6, host_rank=WORLD - 1) as raising,
        started(tmp_path / "leaving", last_exits, timeout_s=6, host_rank=WORLD - 1) as leaving,
    ):
        for group, reason, own_code in (
            (raising, "ValueError: the loss is not finite", 1),
            (leaving, "its process ended without leaving the run", 7),
        ):
            assert group.exit_codes(0, 1, 2, 3) == [EXIT_CODE, EXIT_CODE, EXIT_CODE, own_code]
            for rank in (0, 1, 2):
                assert group.sentences(rank) == [f"rank {rank} ends because {group.who(3)} is dead: {reason}"]
            assert group.sentences(3) == []
        assert "Traceback" in raising.said()[3]


def test_an_orderly_end_is_no_death(tmp_path: Path) -> None:
    """The host of the store is done first, and the other still needs it.

    Five times: where threads did not end in order, one process in five aborted while its interpreter ended.
    """
    with ExitStack() as stack:
        folders = [tmp_path / str(number) for number in range(5)]
        groups = [stack.enter_context(started(each, short, timeout_s=10, world=2, host_rank=0)) for each in folders]
        for group in groups:
            assert group.exit_codes(0, 1) == [0, 0], group.said()
            assert [group.sentences(rank) for rank in range(2)] == [[], []]


def test_a_stopped_rank_and_a_suspended_job_survive(tmp_path: Path) -> None:
    """One rank stops for half the timeout; then all for longer than it, and rank 0 comes back before the others."""
    with started(tmp_path, patient, timeout_s=1.6) as group:
        group.wait_until_all_are_in()
        for ranks, stop_s in (((2,), 0.8), (tuple(range(WORLD)), 2.0)):
            group.signal(signal.SIGSTOP, *ranks)
            time.sleep(stop_s)
            for rank in ranks:
                group.signal(signal.SIGCONT, rank)
                time.sleep(0.3 if rank == 0 else 0)
        group.put("over")
        assert group.exit_codes(*range(WORLD)) == [0] * WORLD, group.said()


def test_the_loss_of_the_store_is_attributed_to_its_host(tmp_path: Path) -> None:
    """Killed, its connections break; stopped (or without power), its clients' calls never return."""
    with (
        started(tmp_path / "killed", stuck, timeout_s=1.5, host_rank=0) as killed,
        started(tmp_path / "stopped", stuck, timeout_s=1.5, host_rank=0) as stopped,
    ):
        for group in (killed, stopped):
            group.wait_until_all_are_in()
        killed.signal(signal.SIGKILL, 0)
        stopped.signal(signal.SIGSTOP, 0)
        for group, how in ((killed, ""), (stopped, "no answer for 1.5 s)")):
            assert group.exit_codes(1, 2, 3) == [EXIT_CODE] * 3
            for rank in (1, 2, 3):
                (sentence,) = group.sentences(rank)
                assert f"because {group.who(0)} is dead: the store at 127.0.0.1:" in sentence
                assert f"is gone ({how}" in sentence


def test_a_call_that_holds_the_gil_beyond_the_timeout_is_a_death(tmp_path: Path) -> None:
    """As the module says; the rank itself ends too when the call returns, since the others are gone."""
    with started(tmp_path, second_holds_the_gil, timeout_s=1, world=2) as group:
        group.wait_until_all_are_in()
        group.put("watched")
        assert group.exit_codes(0, 1) == [EXIT_CODE, EXIT_CODE]
        assert "because rank 1 " in group.sentences(0)[0]
        assert group.sentences(1)[0].endswith("is dead: no heartbeat for 1 s (seen by rank 0)")


class CountingStore:
    """A store in memory that counts its reads and writes; `clone` is itself."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls: list[str] = []

    def clone(self) -> CountingStore:
        return self

    def set(self, key: str, value: str) -> None:
        self.calls.append(f"set {key}")
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.calls.append(f"get {key}")
        return self.values[key]

    def add(self, key: str, value: int) -> int:
        self.calls.append(f"add {key}")
        total = int(self.values.get(key, b"0")) + value
        self.values[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        self.calls.append(f"check {keys}")
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        assert expected_value == ""
        return self.values.setdefault(key, desired_value.encode())


def test_a_beat_costs_the_same_at_any_world() -> None:
    """Rank 7 of 2,048 as of 8: one write, two reads, and only its neighbour is looked at."""
    for world in (8, 2048):
        store = CountingStore()
        neighbour = f"watchdog/beat/{8 % world}"
        store.values |= {"watchdog/started": str(world - 1).encode(), neighbour: json.dumps({"pid": 1}).encode()}
        ended = threading.Event()
        # `on_death`, which ends the process, takes its time here.
        watchdog = Watchdog(store, 7, world, peer_timeout_s=0.2, on_death=lambda _, e=ended: e.wait(0.1) or e.set())
        watchdog.start()
        # The neighbour never beats again: the watch ends by itself.
        expected = f"rank 7 ends because rank {8 % world} (pid 1) is dead: no heartbeat for 0.2 s"
        assert watchdog.wait_for_death(DEADLINE_S) == expected
        # The call returns only after `on_death`.
        assert ended.is_set()
        watchdog.finish()
        beat_at = [index for index, call in enumerate(store.calls) if call == "set watchdog/beat/7"]
        cost = store.calls[beat_at[2] : beat_at[3]]
        assert cost == ["set watchdog/beat/7", "check ['watchdog/dead']", f"get {neighbour}"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_hanging_rank_ends_though_the_system_gives_no_thread_and_the_end_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, told = threading.Thread.start, list[str]()
    store = CountingStore()
    # What `on_death` raises must not keep the main thread waiting.
    watchdog = Watchdog(store, 0, 2, peer_timeout_s=1, on_death=lambda sentence: told.append(sentence) or 1 / 0)
    watchdog.start()

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    # Only now, or the monitor would have printed the stacks before.
    store.values["watchdog/dead"] = json.dumps(asdict(Death(1, "", 2, "", f"{HANGS} x", 1))).encode()
    assert watchdog.wait_for_death(DEADLINE_S) == f"rank 0 ends because rank 1 (pid 2) is dead: {HANGS} x"
    monkeypatch.setattr(threading.Thread, "start", start)
    watchdog.finish()
    assert len(told) == 1


def test_the_first_death_is_the_one_that_is_reported() -> None:
    """Two ranks announce, on one store; the second and a bystander report the first."""
    store = dist.HashStore()
    heard: dict[int, list[str]] = {rank: [] for rank in range(3)}
    dogs = [
        Watchdog(store, rank, 3, peer_timeout_s=0.8, describe=f"ep {rank}", on_death=heard[rank].append)
        for rank in range(3)
    ]
    for dog in dogs:
        dog.start()
    assert dogs[1].wait_for_death(0.0) is None
    dogs[1].report_failure("out of memory")
    dogs[2].report_failure("connection closed")
    told = [dog.wait_for_death(DEADLINE_S) for dog in dogs]
    for dog in dogs:
        dog.finish()
    who = f"rank 1 (ep 1, host {socket.gethostname()}, pid {os.getpid()}) is dead: out of memory"
    assert told == [f"rank 0 ends because {who}", f"rank 1 ends because {who}", f"rank 2 ends because {who}"]
    # Its own announcement gives rank 1 the timeout to end in its own way; it did not, so it is ended too.
    assert heard == {rank: [told[rank]] for rank in range(3)}


def test_of_two_deaths_at_the_same_instant_the_first_written_is_reported() -> None:
    """Between this rank's look at `dead` and its own announcement another rank wrote: the store decides."""

    class LateStore(CountingStore):
        def check(self, keys: list[str]) -> bool:
            return False

    store = LateStore()
    other = Death(1, "node1", 11, "", "out of memory", seen_by=1)
    store.values["watchdog/dead"] = json.dumps(asdict(other)).encode()
    told: list[str] = []
    watchdog = Watchdog(store, 0, 2, peer_timeout_s=3, on_death=told.append)
    watchdog.start()
    watchdog.report_failure("connection closed by peer")
    watchdog.finish()
    assert told == ["rank 0 ends because rank 1 (host node1, pid 11) is dead: out of memory"]


class LostStore(CountingStore):
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize(("dead", "seen_by", "reporters"), [(1, 0, [0]), (0, 3, [3]), (2, 2, [0]), (0, 0, [1]),
                                                            (None, 0, [0, 3])])  # fmt: skip
def test_one_living_rank_reports_a_death_outside(dead: int | None, seen_by: int, reporters: list[int]) -> None:
    """The one that noticed; another where a rank reports itself; the first and the last where the store is lost."""
    reported = []
    for rank in range(4):
        store = LostStore() if dead is None else CountingStore()
        store.values["watchdog/dead"] = json.dumps(asdict(Death(dead, "node", 1, "", "gone", seen_by))).encode()
        watchdog = Watchdog(store, rank, 4, peer_timeout_s=3, on_death=str)
        watchdog.start()
        watchdog.wait_for_death(DEADLINE_S)
        watchdog.finish()
        reported += [rank] if rank != dead and watchdog.reports_death else []
    assert reported == reporters


def test_no_rank_finishes_before_the_last() -> None:
    store = dist.HashStore()
    told: list[str] = []
    dogs = [Watchdog(store, rank, 2, peer_timeout_s=30, on_death=told.append) for rank in range(2)]
    for dog in dogs:
        dog.start()
    first = threading.Thread(target=dogs[0].finish)
    first.start()
    first.join(0.3)
    assert first.is_alive()
    dogs[1].finish()
    first.join(DEADLINE_S)
    assert not first.is_alive()
    assert told == []


def test_a_timeout_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"peer_timeout_s = 0 must be above 0; give seconds, such as 60"):
        Watchdog(dist.HashStore(), 0, 1, peer_timeout_s=0)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), False),
        (ValueError("gloo is a strange word for a field"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors_of_the_wire_are_told_from_errors_of_this_rank(error: BaseException, expected: bool) -> None:
    assert is_communication_error(error) is expected
    outer = RuntimeError("in stage 1")
    outer.__cause__ = error
    assert is_communication_error(outer) is expected


def test_a_death_is_known_within_the_timeout_and_four_beats_and_ends_with_75() -> None:
    """The configured time, by arithmetic: beats of an eighth of it, at most 5 s (docs/reliability.md)."""
    times = {timeout: Watchdog(dist.HashStore(), 0, 2, peer_timeout_s=timeout).notice_s for timeout in (4, 60, 120)}
    assert times == {4: 6, 60: 80, 120: 140}
    assert DEATH_EXIT_CODE == 75


def test_an_instruction_without_a_line_ends_no_heartbeat() -> None:
    """Python 3.11 gives None as the line of some; found as a healthy rank that was called dead."""
    frame = SimpleNamespace(f_globals={"__name__": "train.step"}, f_lineno=None, f_code=waits_for_others.__code__)
    assert not waits_for_others(frame)  # type: ignore[arg-type]
