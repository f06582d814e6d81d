"""Runs as users start them: `torchrun --nproc-per-node N launch/pretrain.py ...` on gloo, watched from outside.

What is seen is what an operator sees: exit codes, stderr, the run's folder and the process table. A worker's own exit
code is read from torchrun's report, since torchrun itself exits 1 whatever its workers did. Processes are found by a
mark in their environment, which they inherit, and only those are signalled.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.watchdog import DEATH_EXIT_CODE
from tests.system.lives import wait_for_step
from train.checkpoint.dcp import latest
from train.observe.sinks import read_events, read_run

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = Path(sys.executable).with_name("torchrun")
MARK = "V3FP8_TEST_LAUNCH"
TIMEOUT_S = 120
PEER_TIMEOUT_S = 3
ONE_NODE = ("--standalone", "--nproc-per-node", "2")
# Short and without scores, on two data ranks, which share the experts: two sequences of 32 tokens a step.
TWO_RANKS = (
    "data.heldout=null",
    "schedule.total_tokens=1024",
    "layout.dp=2",
    "layout.ep=2",
    "run.micro_batch_sequences=1",
    f"network.peer_timeout_s={PEER_TIMEOUT_S}",
    "run.name=run",
)


class Launch:
    """One torchrun with its workers; output goes to files, so that no process waits for a full pipe."""

    def __init__(
        self,
        folder: Path,
        options: tuple[str, ...],
        overrides: list[str],
        environment: dict[str, str],
        script: tuple[str, ...] = ("launch/pretrain.py",),
        through: tuple[str, ...] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.stderr = folder / f"{self.mark}.err"
        command = [*through, str(TORCHRUN), *options, *script, *overrides]
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", MARK: self.mark}
        with self.stderr.open("w") as err:
            self.torchrun = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | settings | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                # A terminal's Ctrl-C goes to a whole group.
                start_new_session=True,
            )

    def alive(self) -> dict[int, int | None]:
        """Process id -> rank (None: not a worker) of every process of this launch that is not a zombie."""
        found: dict[int, int | None] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                # Gone meanwhile, or not ours to read.
                continue
            if f"{MARK}={self.mark}".encode() in environment and state != "Z":
                ranks = [value for name, _, value in (x.partition(b"=") for x in environment) if name == b"RANK"]
                found[int(folder.name)] = int(ranks[0]) if ranks else None
        return found

    def workers(self) -> dict[int, int]:
        """Rank -> process id."""
        return {rank: pid for pid, rank in sorted(self.alive().items(), reverse=True) if rank is not None}

    def wait(self) -> int:
        return self.torchrun.wait(TIMEOUT_S)

    def said(self) -> str:
        return self.stderr.read_text()

    def sentences(self) -> list[str]:
        """Lines of stderr that are ours: those that the entrypoint or the watchdog print."""
        return [line for line in self.said().splitlines() if re.match(r"pretrain: |rank \d+ ends because ", line)]

    def reported(self) -> dict[int, int]:
        """Rank -> exit code of the workers that failed, from torchrun's report; a signal is negative."""
        pattern = r"^  rank\s+: (\d+) .*\n  exitcode\s+: (-?\d+) "
        return {int(rank): int(code) for rank, code in re.findall(pattern, self.said(), flags=re.MULTILINE)}

    def root_cause(self) -> int:
        """The rank that torchrun reports as the first to fail."""
        report = self.said().partition("Root Cause (first observed failure):")[2]
        return int(re.findall(r"^  rank\s+: (\d+) ", report, flags=re.MULTILINE)[0])

    def end(self) -> None:
        """Kill what is left of this launch."""
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.torchrun.wait(TIMEOUT_S)


Start = Callable[..., Launch]


@pytest.fixture
def start(small_run: Callable[..., list[str]], tmp_path: Path) -> Iterator[Start]:
    """Start the small run with TWO_RANKS and changes, on one node unless options say more; all end with the test."""
    launches: list[Launch] = []

    def begin(*changes: str, options: tuple[str, ...] = ONE_NODE, **environment: str) -> Launch:
        overrides = small_run(*TWO_RANKS, f"run.directory={tmp_path}", *changes)
        launches.append(Launch(tmp_path / "said", options, overrides, environment))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.end()


def assert_refused(launch: Launch, sentence: str) -> None:
    """One worker says one sentence and exits 2, torchrun ends the others and exits 1, and nothing is left."""
    assert launch.wait() == 1
    assert launch.sentences() == [sentence]
    # Above the border of torchrun's table: the last that its user reads.
    assert launch.said().splitlines()[-2] == f"  {sentence}"
    codes = launch.reported()
    assert codes.pop(0) == 2
    assert set(codes.values()) <= {2, -signal.SIGTERM}
    assert_no_traceback_of_ours(launch)
    assert launch.alive() == {}


def assert_no_traceback_of_ours(launch: Launch) -> None:
    """torchrun shows its own when a worker fails; none may go through our files."""
    ours = re.findall(rf'File "{re.escape(str(ROOT))}/(?:kernels|launch|parallel|train)/.*', launch.said())
    assert ours == [], launch.said()


def test_too_few_ranks_are_refused_in_one_sentence(start: Start, tmp_path: Path) -> None:
    """Though the rank that says it starts two seconds after the other."""
    # Python imports a module of this name at its start.
    slow = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    changes = ("layout.dp=4", "layout.ep=1", "schedule.batch_start_sequences=4", "schedule.batch_full_sequences=4")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    launch = start(*changes, PYTHONPATH=path)
    assert_refused(
        launch, "pretrain: 2 processes were started, but layout.pp=1 x layout.dp=4 needs 4: start 4, or set layout.dp=2"
    )
    assert not (tmp_path / "run").exists(), "refused before anything is made"


def test_a_missing_store_is_refused_in_one_sentence(start: Start, tmp_path: Path) -> None:
    launch = start(f"data.store={tmp_path / 'nowhere'}")
    assert launch.wait() == 1
    (sentence,) = launch.sentences()
    assert str(tmp_path / "nowhere") in sentence
    assert_refused(launch, sentence)
    assert not (tmp_path / "run").exists(), "refused before anything is made"


def test_a_killed_rank_of_a_node_is_named_and_nothing_is_left(start: Start, tmp_path: Path) -> None:
    """On one node torchrun sees it first, names it, and ends the others, which say first who died."""
    launch = start("schedule.total_tokens=1000000")
    wait_for_step(launch.torchrun, tmp_path / "run", lambda step: step >= 2, output=launch.said)
    workers = launch.workers()
    assert sorted(workers) == [0, 1]
    os.kill(workers[0], signal.SIGKILL)
    assert launch.wait() == 1
    assert launch.root_cause() == 0
    codes = launch.reported()
    assert codes[0] == -signal.SIGKILL
    # Ended by torchrun while it asks who died, or by its own watchdog.
    assert codes[1] in (-signal.SIGTERM, DEATH_EXIT_CODE)
    (sentence,) = launch.sentences()
    assert sentence.startswith("rank 1 ends because rank 0 (")
    assert sentence.endswith(f"pid {workers[0]}) is dead: its process has ended")
    assert launch.alive() == {}


def test_a_killed_node_is_named_by_the_ranks_of_the_others(start: Start, tmp_path: Path) -> None:
    """Two launchers of one rank each, as on two nodes; the second dies whole, so only the watchdog can notice.

    TIMEOUT_S is the deadline: far above the heartbeat's, far below the 600 s of a collective.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = f"--nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port} --node-rank"
    changes = ("schedule.total_tokens=1000000", f"observe.alert_command=tee {tmp_path / 'alert'}")
    nodes = [start(*changes, options=(*meeting.split(), rank)) for rank in "01"]
    wait_for_step(nodes[0].torchrun, tmp_path / "run", lambda step: step >= 2, output=nodes[0].said)
    ((rank, victim),) = nodes[1].workers().items()
    assert rank == 1
    # The launcher first, else it would end its worker itself and report it.
    for pid in (nodes[1].torchrun.pid, victim):
        os.kill(pid, signal.SIGKILL)
    assert nodes[0].wait() == 1
    (sentence,) = nodes[0].sentences()
    assert sentence.startswith("rank 0 ends because rank 1 (pipeline rank 0, data rank 1, host ")
    # Two nodes that share a machine; between real ones it is the heartbeat that is missed.
    assert sentence.endswith(f"pid {victim}) is dead: its process has ended")
    assert nodes[0].reported() == {0: DEATH_EXIT_CODE}
    assert nodes[0].said().splitlines()[-2] == f"  {sentence}"
    alert = json.loads((tmp_path / "alert").read_text())
    assert (alert["kind"], alert["message"], alert["run"]) == ("dead_rank", sentence, "run")
    nodes[1].wait()
    assert nodes[0].alive() | nodes[1].alive() == {}


def test_sigterm_to_the_workers_or_ctrl_c_saves_and_the_same_command_goes_on(start: Start, tmp_path: Path) -> None:
    """SIGTERM to the workers is the stop without a word of torchrun's; a Ctrl-C reaches each worker twice.

    Both end in order: where a thread outlives the interpreter, one process in five aborts at its very end.
    """
    run, stopped = tmp_path / "run", 0

    def to_the_workers(launch: Launch) -> None:
        for pid in launch.workers().values():
            os.kill(pid, signal.SIGTERM)

    def by_ctrl_c(launch: Launch) -> None:
        os.killpg(launch.torchrun.pid, signal.SIGINT)

    for stop, code in ((to_the_workers, 0), (by_ctrl_c, 1)):
        before, launch = stopped, start("schedule.total_tokens=1000000")
        wait_for_step(launch.torchrun, run, lambda step, least=before + 2: step >= least, output=launch.said)  # type: ignore[misc]
        stop(launch)
        assert launch.wait() == code, launch.said()
        stopped = read_run(run)[-1]["step"]
        assert latest(run / "checkpoints") == run / "checkpoints" / f"step_{stopped:08d}"
        assert read_events(run)[-1]["reason"] == "asked to stop; the same command resumes"
        assert_no_traceback_of_ours(launch)
        assert launch.alive() == {}
        resumed = [event["step"] for event in read_events(run) if event["event"] == "resume"]
        assert resumed == ([before] if before else [])
        assert launch.sentences() == []
    # Every step once, though two ranks took it, and in one log.
    assert [record["step"] for record in read_run(run)] == list(range(1, stopped + 1))
    assert list(run.rglob("metrics.jsonl")) == [run / "metrics.jsonl"]
    kinds = [event["event"] for event in read_events(run)]
    assert [kind for kind in kinds if kind in ("start", "resume", "stop")] == ["start", "stop", "resume", "stop"]
