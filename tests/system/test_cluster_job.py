"""The sbatch that `launch.cluster` writes, run by bash with a stand-in of srun and scontrol: two nodes on this machine.

What is real: preflight, torchrun, its rendezvous, the trainer, the signal and the script's own judgement. What is not:
Slurm; its srun starts the command once a node, its scontrol knows the nodes and notes what is put in the queue again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launch.cluster import main
from tests.system.lives import losses, wait_for_step
from tests.system.test_preflight import free_port
from train.config import compose
from train.observe.sinks import read_events, read_run
from train.studies.job_files.grace import checkpoint_bytes

ROOT = Path(__file__).resolve().parents[2]
Overrides = Callable[..., list[str]]
# Long enough to be struck in between.
STEPS = 60
SRUN = """#!/bin/bash
echo "$@" >>"$STAND_IN/srun.log"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & done
status=0
for _ in 0 1; do wait -n || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [[ $1 == requeue ]]; then echo "$2" >>"$STAND_IN/requeued"; else printf 'localhost\\nlocalhost\\n'; fi
"""
pytestmark = pytest.mark.long


class Slurm:
    """A folder with the commands, and one turn of a job at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.turn: subprocess.Popen[str] | None = None

    def start(self, file: Path) -> subprocess.Popen[str]:
        job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "two", "STAND_IN": str(self.folder)}
        path = {"PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment = os.environ | job | path | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.turn = subprocess.Popen(
            ["bash", str(file)], cwd=self.folder, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        return self.turn

    def of_the_step(self) -> dict[int, str]:
        """Process id -> command line of each torchrun and worker, as Slurm's `--signal` would reach them."""
        found, mark = {}, f"STAND_IN={self.folder}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                # Workers have sessions of their own.
                if "launch/pretrain.py" in line and "bash" not in line and mark in (place / "environ").read_bytes():
                    found[int(place.name)] = line
        return found

    def workers(self) -> list[int]:
        return [process for process, line in self.of_the_step().items() if "torchrun" not in line]

    def requeued(self) -> list[str]:
        place = self.folder / "requeued"
        return place.read_text().split() if place.exists() else []

    def end(self) -> None:
        if self.turn is not None:
            for process in self.of_the_step():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(self.turn.pid, signal.SIGKILL)
            self.turn.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    # The job's folder looks like a checkout.
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "torchrun"):
        (tmp_path / ".venv/bin" / name).write_text(f'#!/bin/sh\nexec {Path(sys.executable).with_name(name)} "$@"\n')
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    made = Slurm(tmp_path)
    yield made
    made.end()


def test_the_job_saves_asks_for_another_turn_restarts_what_dies_and_ends(
    slurm: Slurm, small_run: Overrides, tmp_path: Path
) -> None:
    overrides = small_run(
        "data.heldout=null", f"schedule.total_tokens={STEPS * 64}", "layout.dp=2", "layout.ep=2",
        "run.micro_batch_sequences=1",
        "layout.ranks_per_node=1", "run.name=run", f"run.directory={tmp_path}", "network.peer_timeout_s=5",
        f"job.port={free_port()}", "job.max_restarts=1", "checkpoint.every_steps=20",
    )  # fmt: skip
    file, run = tmp_path / "job.sbatch", tmp_path / "run"
    assert main(["slurm", *overrides, "--out", str(file)]) == 0
    # Two busy cores are no measure of speed.
    file.write_text(file.read_text().replace("--expect clock_s=1", "--share 0"))

    turn = slurm.start(file)
    wait_for_step(turn, run, lambda step: step >= 2, output=lambda: turn.communicate()[0])
    for process in slurm.of_the_step():
        os.kill(process, signal.SIGTERM)
    said, _ = turn.communicate(timeout=120)
    assert "preflight: nothing is wrong with 2 nodes" in said
    assert turn.returncode == 1, "torchrun's own, of a signal"
    stop = read_events(run)[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "asked to stop; the same command resumes")
    assert slurm.requeued() == ["77"], said
    assert 2 <= stop["step"] < STEPS

    turn = slurm.start(file)
    wait_for_step(turn, run, lambda step: step >= stop["step"] + 2, output=lambda: turn.communicate()[0])
    os.kill(slurm.workers()[0], signal.SIGKILL)
    said, _ = turn.communicate(timeout=240)
    assert turn.returncode == 0, said
    assert read_events(run)[-1]["reason"] == "token budget spent"
    assert slurm.requeued() == ["77"], "a run that has ended needs no turn"
    # Every step once, whatever came between.
    assert len(losses(run)) == STEPS == read_run(run)[-1]["step"]
    first = (
        "--ntasks=2 --ntasks-per-node=1 --cpu-bind=none bash -c exec .venv/bin/python launch/preflight.py --nnodes 2 "
    )
    assert (tmp_path / "srun.log").read_text().startswith(first)
    # A file for each rank, attempt and node; a node whose own rank did not fail may count no attempt.
    logs = sorted(
        str(path.relative_to(run / "logs/77")) for path in run.glob("logs/77/node_*/*/attempt_*/0/stdout.log")
    )
    assert {log.partition("/")[0] for log in logs} == {"node_0", "node_1"}
    assert {log.split("/")[2] for log in logs} == {"attempt_0", "attempt_1"}


def test_a_checkpoint_has_the_bytes_that_the_grace_counts(trained_run: Path, small_run: Overrides) -> None:
    """BF16 with FP32 masters: norms and routers, FP32 with no second copy, and headers are the 2 % that are left."""
    (newest,) = sorted((trained_run / "checkpoints").glob("step_*"))[-1:]
    written = sum(path.stat().st_size for path in newest.glob("*.safetensors"))
    assert checkpoint_bytes(compose(small_run())) == pytest.approx(written, rel=0.02)
