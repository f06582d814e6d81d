"""`make endurance`: 30 faults of all kinds strike one training; the truth is the run that was never broken.

    python -m tests.endurance [--seed 0] [--faults 30] [--folder runs/endurance]

    1  unbroken, and the same command again and again, each time until a fault strikes. At the end every logged loss
       and norm and every tensor of the last checkpoint must be equal to the bit: then no token was lost or seen twice.
    2  a loss that jumps (the policy goes back and leaves data out) and kill -9 in between, against an unbroken run that
       leaves out the same data.

Two ranks (data and expert parallel) under torchrun, gloo, CPU. Every kind is drawn once before any comes again. A fault
either ends the run, or is refused or outlived by it; the table says which, and how long it took until the run had
logged a step beyond the fault. The run's folder is a small file system of its own, which needs root: without it the
kinds with a full disk are left out, and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.huggingface.hf_folders import flip_a_bit
from tests.system.conftest import small_overrides, small_store
from tests.system.lives import losses
from tests.system.test_torchrun import ONE_NODE, Launch
from train.checkpoint import publish
from train.checkpoint.dcp import load
from train.observe.guards import TerminationGuard
from train.observe.sinks import read_events, read_run

STEPS, SPIKE_STEPS, SPIKE_AT, EVERY, TOKENS = 1500, 400, 200, 20, 4 * 32
PEER_TIMEOUT_S = 10
TMPFS_MB = 400
KINDS: dict[str, Callable[[Training], None]] = {}


class Training:
    """The run that is broken: its command, its folder, and the launch that is under way."""

    def __init__(self, folder: Path, name: str, steps: int, chance: random.Random) -> None:
        self.folder, self.name, self.chance = folder, name, chance
        self.run = folder / "runs" / name
        changes = (
            f"schedule.total_tokens={TOKENS * steps}",
            "schedule.batch_start_sequences=4",
            "schedule.batch_full_sequences=4",
            f"checkpoint.every_steps={EVERY}",
            "layout.dp=2",
            "layout.ep=2",
        )
        paths = (f"run.directory={folder / 'runs'}", f"run.name={name}", "data.heldout=null")
        network = f"network.peer_timeout_s={PEER_TIMEOUT_S}"
        self.command = partial(small_overrides, folder / "store", *changes, *paths, network)
        self.store = folder / "store"
        self.launch: Launch | None = None

    def start(self, *changes: str) -> Launch:
        """The command, with changes."""
        return Launch(self.folder / "said", ONE_NODE, self.command(*changes), {})

    @property
    def step(self) -> int:
        """The last logged step; 0 where there is none."""
        if not (self.run / "metrics.jsonl").exists():
            return 0
        records = read_run(self.run)
        return records[-1]["step"] if records else 0

    def go_on(self, beyond: int, patience_s: float = 180) -> None:
        """Until a step after `beyond` is logged; starts the command where it does not run."""
        deadline = time.monotonic() + patience_s
        if self.launch is None:
            self.launch = self.start()
        while self.step <= beyond:
            assert self.launch.torchrun.poll() is None, self.launch.said()
            assert time.monotonic() < deadline, f"no step after {beyond}\n{self.launch.said()}"
            time.sleep(0.02)

    def ended(self) -> str:
        """Wait for the launch to end by itself; what it said."""
        assert self.launch is not None
        try:
            self.launch.torchrun.wait(60)
            deadline = time.monotonic() + 60
            while self.launch.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not self.launch.alive(), "processes were left behind"
        finally:
            self.launch.end()
        said, self.launch = self.launch.said(), None
        return said

    def kill(self) -> None:
        """kill -9 of every process."""
        assert self.launch is not None
        self.launch.end()
        self.launch = None

    def signal_launcher(self, number: signal.Signals) -> None:
        assert self.launch is not None
        self.launch.torchrun.send_signal(number)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        assert self.launch is not None
        os.kill(self.launch.workers()[rank], number)

    def refused(self, sentence: str, *changes: str) -> None:
        """The command is refused with these words, and no traceback."""
        launch = self.start(*changes)
        try:
            assert launch.torchrun.wait(120) != 0
            assert sentence in launch.said(), launch.said()
            assert "pretrain: " in launch.said(), launch.said()
        finally:
            launch.end()

    def checkpoints(self) -> list[Path]:
        return publish.published(self.run / "checkpoints")

    def wait_for_save(self) -> None:
        """Until a checkpoint is being written."""
        deadline = time.monotonic() + 60
        while not list((self.run / "checkpoints").glob(".writing-*")) and time.monotonic() < deadline:
            time.sleep(0.001)


def kind(fault: Callable[[Training], None]) -> Callable[[Training], None]:
    """List a fault under its name."""
    KINDS[fault.__name__.replace("_", " ")] = fault
    return fault


@kind
def kill_9_of_rank_0(run: Training) -> None:
    run.signal_rank(0, signal.SIGKILL)
    assert "rank 1 ends because rank 0" in run.ended()


@kind
def kill_9_of_rank_1(run: Training) -> None:
    run.signal_rank(1, signal.SIGKILL)
    assert "rank 0 ends because rank 1" in run.ended()


@kind
def kill_9_of_torchrun(run: Training) -> None:
    run.signal_launcher(signal.SIGKILL)
    run.ended()


@kind
def kill_9_of_everything(run: Training) -> None:
    run.kill()


@kind
def kill_9_while_a_save_is_written(run: Training) -> None:
    run.wait_for_save()
    run.kill()


@kind
def sigterm_while_a_save_is_written(run: Training) -> None:
    run.wait_for_save()
    run.signal_launcher(signal.SIGTERM)
    run.ended()


@kind
def sigterm_to_torchrun(run: Training) -> None:
    run.signal_launcher(signal.SIGTERM)
    run.ended()


@kind
def sigterm_to_one_rank(run: Training) -> None:
    run.signal_rank(1, signal.SIGTERM)
    run.ended()


@kind
def ctrl_c_to_torchrun(run: Training) -> None:
    run.signal_launcher(signal.SIGINT)
    run.ended()


@kind
def ctrl_c_twice_to_a_rank(run: Training) -> None:
    run.signal_rank(0, signal.SIGINT)
    time.sleep(TerminationGuard.ECHO_S + 0.1)
    # It may have ended meanwhile.
    if run.launch is not None and 0 in run.launch.workers():
        run.signal_rank(0, signal.SIGINT)
    run.ended()


@kind
def a_rank_stopped_for_a_second(run: Training) -> None:
    run.signal_rank(1, signal.SIGSTOP)
    time.sleep(1)
    run.signal_rank(1, signal.SIGCONT)


@kind
def a_rank_stopped_for_good(run: Training) -> None:
    assert run.launch
    stopped = run.launch.workers()[1]
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "rank 0 ends because rank 1" not in run.launch.said():
        assert time.monotonic() < deadline, run.launch.said()
        time.sleep(0.1)
    # torchrun asks it in vain to end, for 30 s.
    os.kill(stopped, signal.SIGKILL)
    run.ended()


@kind
def the_whole_job_suspended(run: Training) -> None:
    assert run.launch
    processes = list(run.launch.alive())
    for number, pause in ((signal.SIGSTOP, PEER_TIMEOUT_S + 2), (signal.SIGCONT, 0)):
        for pid in processes:
            os.kill(pid, number)
        time.sleep(pause)


@kind
def eight_busy_loops_beside_it(run: Training) -> None:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
    time.sleep(6)
    for loop in loops:
        loop.kill()
        loop.wait()


@kind
def a_second_trainer(run: Training) -> None:
    run.refused("is in use")


@kind
def a_newest_checkpoint_with_a_flipped_bit(run: Training) -> None:
    run.kill()
    flip_a_bit(run.chance.choice(sorted(run.checkpoints()[0].glob("*.safetensors"))))


@kind
def a_newest_checkpoint_without_a_rank(run: Training) -> None:
    run.kill()
    run.chance.choice(sorted(run.checkpoints()[0].glob("*.safetensors"))).unlink()


@kind
def a_newest_checkpoint_cut_short(run: Training) -> None:
    run.kill()
    shard = run.chance.choice(sorted(run.checkpoints()[0].glob("*.safetensors")))
    os.truncate(shard, run.chance.randrange(shard.stat().st_size))


@kind
def a_newest_checkpoint_without_its_state(run: Training) -> None:
    run.kill()
    (run.checkpoints()[0] / "state.json").unlink()


@kind
def a_newest_checkpoint_with_another_manifest(run: Training) -> None:
    run.kill()
    manifest = run.checkpoints()[0] / "manifest.json"
    manifest.write_bytes(run.chance.randbytes(manifest.stat().st_size))


@kind
def every_checkpoint_damaged_and_one_restored(run: Training) -> None:
    run.kill()
    newest = run.checkpoints()[0]
    backup = shutil.copytree(newest, run.folder / "backup", dirs_exist_ok=False)
    for checkpoint in run.checkpoints():
        flip_a_bit(next(checkpoint.glob("*.safetensors")))
    run.refused("is whole, so the run cannot go on")
    shutil.rmtree(newest)
    shutil.move(backup, newest)


@kind
def a_log_torn_in_its_last_line(run: Training) -> None:
    run.kill()
    log = run.run / "metrics.jsonl"
    os.truncate(log, log.stat().st_size - run.chance.randrange(1, 200))


@kind
def a_link_planted_as_a_newer_checkpoint(run: Training) -> None:
    run.kill()
    (run.run / "checkpoints" / "step_99999999").symlink_to(run.store)


@kind
def what_a_killed_save_left(run: Training) -> None:
    run.kill()
    shutil.copytree(run.checkpoints()[0], run.run / "checkpoints" / ".writing-step_00000999")


@kind
def a_typo_in_the_command(run: Training) -> None:
    run.kill()
    run.refused("schedule.lr_peek", "schedule.lr_peek=1e-3")


@kind
def another_architecture(run: Training) -> None:
    run.kill()
    run.refused("saved with another model: num_attention_heads was 2, now 4", "model.num_attention_heads=4")


@kind
def a_missing_store(run: Training) -> None:
    run.kill()
    run.store.rename(run.store.with_name("moved"))
    run.refused("store")
    run.store.with_name("moved").rename(run.store)


@kind
def token_data_with_a_flipped_bit(run: Training) -> None:
    run.kill()
    data = next((run.store / "train").glob("*.arrow"))
    whole = data.read_bytes()
    flip_a_bit(data)
    run.refused("does not have the sha256 of its block")
    data.write_bytes(whole)


@kind
def token_data_cut_short(run: Training) -> None:
    run.kill()
    data = next((run.store / "train").glob("*.arrow"))
    whole = data.read_bytes()
    os.truncate(data, run.chance.randrange(len(whole)))
    run.refused("bytes")
    data.write_bytes(whole)


@kind
def a_disk_full_for_some_saves(run: Training) -> None:
    with full_disk(run):
        time.sleep(4)
    assert run.launch
    if run.launch.torchrun.poll() is not None or "in a row" in run.launch.said():
        assert "No space left on device" in run.ended()


@kind
def a_disk_full_at_the_start(run: Training) -> None:
    run.kill()
    with full_disk(run):
        run.refused("No space left on device")


@contextmanager
def full_disk(run: Training) -> Iterator[None]:
    """The file system of the runs has no byte left."""
    filler = run.run.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
    yield
    filler.unlink()


def strike(run: Training, name: str) -> dict[str, Any]:
    """One fault some steps after the last one; what it did and how long it took."""
    run.go_on(run.step + run.chance.randint(1, EVERY))
    before, started = run.step, time.monotonic()
    KINDS[name](run)
    survived = run.launch is not None
    resumes = sum(event["event"] == "resume" for event in read_events(run.run))
    run.go_on(run.step)
    events = [event["step"] for event in read_events(run.run) if event["event"] == "resume"]
    lost = before - events[-1] if len(events) > resumes else 0
    return {
        "fault": name,
        "at": before,
        "outlived": survived,
        "repeated": max(0, lost),
        "s": time.monotonic() - started,
    }


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from the shards of all ranks."""
    saved = publish.read_json(checkpoint / publish.MANIFEST)["tensors"]
    dtypes = {name: getattr(torch, entry["dtype"].removeprefix("torch.")) for name, entry in saved.items()}
    tensors = {name: torch.empty(entry["shape"], dtype=dtypes[name]) for name, entry in saved.items()}
    load(checkpoint, tensors)
    return tensors


def assert_equal(broken: Path, unbroken: Path, steps: int) -> int:
    """Every logged number and every tensor of the last checkpoint, to the bit; returns how many tensors."""
    assert losses(broken) == losses(unbroken)
    assert len(losses(broken)) == steps
    assert read_run(broken)[-1]["tokens_seen"] == read_run(unbroken)[-1]["tokens_seen"] == TOKENS * steps
    actual, expected = (whole_tensors(run / "checkpoints" / publish.step_name(steps)) for run in (broken, unbroken))
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not [event for event in read_events(broken) if event["event"] == "replay_differs"]
    return len(expected)


def finish(run: Training) -> None:
    """The command until the budget is spent."""
    if run.launch is None:
        run.launch = run.start()
    assert run.launch.torchrun.wait(1800) == 0, run.launch.said()
    run.launch = None


def seconds_of_training(run: Path) -> float:
    """Between the first and the last record."""
    records = read_run(run)
    return records[-1]["time_unix_s"] - records[0]["time_unix_s"]


def faults(folder: Path, names: list[str], chance: random.Random) -> None:
    """Part 1; prints its table."""
    unbroken, broken = (Training(folder, name, STEPS, chance) for name in ("unbroken", "broken"))
    finish(unbroken)
    started, table = time.monotonic(), []
    try:
        # Two checkpoints and one that is good, before anything is damaged.
        broken.go_on(2 * EVERY + 6)
        for name in names:
            table.append(strike(broken, name))
            print(
                "{at:5d}  {fault:45s} outlived {outlived!s:5}  repeated {repeated:3d} steps  {s:6.1f} s".format(
                    **table[-1]
                )
            )
            sys.stdout.flush()
        finish(broken)
    finally:
        if broken.launch:
            broken.launch.end()
    wall = time.monotonic() - started
    tensors = assert_equal(broken.run, unbroken.run, STEPS)
    needed = seconds_of_training(unbroken.run)
    print(
        f"{len(table)} faults of {len(set(names))} kinds: {STEPS} steps, {tensors} tensors equal to the unbroken run\n"
        f"steps repeated: {sum(row['repeated'] for row in table)}; training {needed:.0f} s of {wall:.0f} s "
        f"({needed / wall:.0%} effective, at a fault every {wall / len(table):.0f} s)"
    )


class Spiked(Training):
    """A training whose SPIKE_AT-th update is 3,000 times as long, or which leaves out data from its start."""

    def __init__(self, folder: Path, name: str, chance: random.Random, dropped: list[list[int]] | None = None) -> None:
        super().__init__(folder, name, SPIKE_STEPS, chance)
        self.dropped = dropped

    def start(self, *changes: str) -> Launch:
        settings = {"ENDURANCE_DROPPED": json.dumps(self.dropped)}
        script = ("-m", "tests.endurance", "worker")
        return Launch(self.folder / "said", ONE_NODE, self.command(*changes), settings, script)


def worker(arguments: list[str]) -> int:
    """One rank of `Spiked`."""
    import train.trainer
    from launch.pretrain import main as pretrain
    from train.spikes import SpikeState

    dropped = json.loads(os.environ["ENDURANCE_DROPPED"])
    apply_update, resume = train.trainer.apply_update, train.trainer.Trainer.resume
    struck = False

    def too_far(*values: Any, now: Any, update: int) -> None:
        nonlocal struck
        is_broken = dropped is None and update == SPIKE_AT and not struck
        struck |= is_broken
        apply_update(*values, now=replace(now, lr=now.lr * (3000 if is_broken else 1)), update=update)

    def resume_without(trainer: train.trainer.Trainer) -> None:
        resume(trainer)
        if dropped is not None and trainer.state.step == 0:
            trainer.spikes = SpikeState(dropped=tuple((first, count) for first, count in dropped))

    train.trainer.apply_update = too_far
    train.trainer.Trainer.resume = resume_without  # type: ignore[method-assign]
    return pretrain(arguments)


def spikes(folder: Path, chance: random.Random) -> None:
    """Part 2."""
    broken = Spiked(folder, "spiked", chance)
    kills = 0
    try:
        while broken.launch is None or broken.launch.torchrun.poll() is None:
            broken.go_on(broken.step)
            time.sleep(chance.uniform(0, 3))
            if kills < 6 and broken.launch and broken.launch.torchrun.poll() is None:
                broken.kill()
                kills += 1
            elif broken.launch:
                assert broken.launch.torchrun.wait(1800) == 0, broken.launch.said()
    finally:
        if broken.launch:
            broken.launch.end()
    state = json.loads((broken.checkpoints()[0] / "state.json").read_text())
    dropped = state["spikes"]["dropped"]
    assert dropped, "the fault was no spike"
    reference = Spiked(folder, "reference", chance, dropped)
    finish(reference)
    tensors = assert_equal(broken.run, reference.run, SPIKE_STEPS)
    counts = {
        name: sum(e["event"] == name for e in read_events(broken.run)) for name in ("spike", "rollback", "resume")
    }
    print(
        f"a spike, {kills} kills: {counts['spike']} steps skipped, {counts['rollback']} rollbacks, positions {dropped} "
        f"left out: {SPIKE_STEPS} steps and {tensors} tensors equal to the run that leaves out the same"
    )


def main() -> int:
    """Both parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/endurance"))
    options = parser.parse_args()
    folder: Path = options.folder.absolute()
    (folder / "runs").mkdir(parents=True)
    names, chance = sorted(KINDS), random.Random(options.seed)
    own_disk = os.geteuid() == 0
    if own_disk:
        command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "tmpfs", str(folder / "runs")]
        own_disk = subprocess.run(command, check=False).returncode == 0
    if not own_disk:
        left_out = [name for name in names if "disk" in name]
        print(f"without a file system of its own, left out: {', '.join(left_out)}")
        names = [name for name in names if name not in left_out]
    drawn: list[str] = []
    while len(drawn) < options.faults:
        drawn += chance.sample(names, min(len(names), options.faults - len(drawn)))
    try:
        small_store(folder)
        faults(folder, drawn, chance)
        spikes(folder, chance)
    finally:
        if own_disk:
            subprocess.run(["umount", "-l", str(folder / "runs")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main())
