"""The command of the README under torchrun, two real processes over gloo: refusals, a whole run, stops and deaths.

Waiting loops have deadlines, far above what a busy machine needs; no time is asserted.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from parallel.watchdog import DEATH_EXIT_CODE
from train.checkpoint.dcp import latest
from train.observe.sinks import read_events, read_run

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 240
STEPS = 12


@pytest.fixture(scope="module")
def overrides(store: Path) -> list[str]:
    """A run of 12 steps of 4 x 32 tokens on two ranks that share the experts; a checkpoint every 3 steps."""
    return [
        "experiment=tiny",
        "model.num_hidden_layers=2",
        f"data.store={store / 'train'}",
        "data.heldout=null",
        "data.sequence_length=32",
        f"schedule.total_tokens={STEPS * 4 * 32}",
        "schedule.batch_start_sequences=4",
        "schedule.batch_full_sequences=4",
        "run.micro_batch_sequences=1",
        "run.threads=1",
        "run.device=cpu",
        "run.name=run",
        "checkpoint.every_steps=3",
        "observe.wandb=off",
        "network.peer_timeout_s=4",
        "layout.dp=2",
        "layout.ep=2",
    ]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start torchrun with two processes on this run's directory; whatever is left at the end is killed.

    With a RANK in the environment it starts that one rank, without torchrun.
    """
    started: list[subprocess.Popen[str]] = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
        launcher = [] if "RANK" in environment else torchrun
        process = subprocess.Popen(
            [sys.executable, *launcher, "launch/pretrain.py", *arguments, f"run.directory={tmp_path}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def workers(tmp_path: Path) -> dict[int, int]:
    """Rank -> process id of the workers of this run that are alive."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", (folder / "environ").read_bytes())
        except OSError:
            continue
        if rank and f"run.directory={tmp_path}".encode() in command and b"torch.distributed.run" not in command:
            found[int(rank[1])] = int(folder.name)
    return found


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(record["step"] >= step for record in read_run(run)):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_run(run)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["layout.dp=4"], r"2 processes were started, but .*layout\.dp=4.* needs 4"),
        (["data.store=nowhere"], r"nowhere.*"),
        (["layout.ep=3"], r"layout\.ep=3 does not divide layout\.dp=2"),
    ],
    ids=["too few ranks", "no store", "impossible layout"],
)
def test_what_cannot_run_is_one_sentence_and_exit_code_2(
    change: list[str], sentence: str, overrides: list[str], launch: Callable[..., subprocess.Popen[str]]
) -> None:
    name = change[0].partition("=")[0]
    kept = [item for item in overrides if not item.startswith(f"{name}=")]
    code, _, err = finish(launch([*kept, *change]))
    assert code == 1, "torchrun's own"
    assert len(re.findall(r"^pretrain: .*$", err, re.MULTILINE)) == 1, "one rank speaks for all"
    assert re.search(rf"^pretrain: .*{sentence}", err, re.MULTILINE), err
    assert set(re.findall(r"exitcode\s*:\s*(\d+)", err)) == {"2"}
    assert 'launch/pretrain.py", line' not in err, "no traceback of ours"


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint_and_the_same_command_goes_on(
    overrides: list[str], launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = launch(overrides)
    wait_for_step(process, run, 4)
    os.kill(workers(tmp_path)[1], signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 0, err
    stopped = steps_of(run)[-1]
    saved = latest(run / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{stopped:08d}", "nothing done is lost"
    assert stopped < STEPS
    code, _, err = finish(launch(overrides))
    assert code == 0, err
    assert steps_of(run) == list(range(1, STEPS + 1)), "every step once, by one rank"
    kinds = [event["event"] for event in read_events(run)]
    assert kinds.count("start") == kinds.count("resume") == 1
    assert "replay_differs" not in kinds
    card = json.loads((run / "run_card.json").read_text())
    assert (card["layout"]["dp"], card["layout"]["ep"]) == (2, 2)


def test_a_killed_rank_ends_torchrun_which_names_it_and_the_same_command_goes_on(
    overrides: list[str], launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """torchrun sees its own worker die, and ends the other before that one's heartbeat is due."""
    run = tmp_path / "run"
    process = launch(overrides)
    wait_for_step(process, run, 4)
    os.kill(workers(tmp_path)[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert re.search(r"Root Cause.*rank\s*: 1 .*SIGKILL", err, re.DOTALL), err
    assert not workers(tmp_path)
    code, _, err = finish(launch(overrides))
    assert code == 0, err
    assert steps_of(run) == list(range(1, STEPS + 1))
    assert "replay_differs" not in [event["event"] for event in read_events(run)]


def test_without_torchrun_the_others_name_the_dead_rank_and_end(
    overrides: list[str], launch: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """As a scheduler starts ranks that knows nothing of each other: environment variables only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [launch(overrides, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]
    wait_for_step(ranks[0], tmp_path / "run", 4)
    ranks[1].send_signal(signal.SIGKILL)
    code, _, err = finish(ranks[0])
    assert code == DEATH_EXIT_CODE
    assert re.search(
        r"^rank 0 ends because rank 1 \(pipeline rank 0, data rank 1, host .*\) is dead", err, re.MULTILINE
    )
