"""Forks processes that die inside a save, or end after one; driven by test_kill.py.

    python -m tests.checkpoint.killed_saves DIRECTORY

For each phase of a save a child publishes a first checkpoint and dies by SIGKILL inside the second save.
Other children save and then end as a program does. Printed as JSON: phase -> signal, and the exit statuses.

Forking after the import of torch makes a child cost milliseconds instead of seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from train.checkpoint import dcp, publish
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.dcp import Saver

KILLED_AT_RANDOM = 8
ENDED = 6

Scenario = Callable[[Path], None]


def tensors_of(step: int) -> dict[str, Tensor]:
    """Tensors whose values show which save they belong to."""
    return {"w": torch.full((50, 7), float(step)), "step": torch.tensor(step)}


def die() -> None:
    """Kill this process as the kernel's memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(owner: Any, name: str, *, call: int = 1, after: bool = False) -> None:
    """Let the process die just before, or just after, the n-th call of a function from now on."""
    original, calls = getattr(owner, name), [0]

    def fatal(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            die()
        result = original(*args, **kwargs)
        if calls[0] == call:
            die()
        return result

    setattr(owner, name, fatal)


def die_with_half_a_shard() -> None:
    """The shard's file holds half of its bytes at the moment of death."""
    original = safetensors.torch.save

    def half(*args: Any, **kwargs: Any) -> bytes:
        content = original(*args, **kwargs)
        return content[: len(content) // 2]

    safetensors.torch.save = half
    die_at_call(os, "fsync")


def die_in_the_middle_of_a_deletion() -> None:
    """One file of the doomed directory is gone, the others are still there."""

    def half(path: Path) -> None:
        min(path.iterdir()).unlink()
        die()

    shutil.rmtree = half  # type: ignore[assignment]


def second_save(directory: Path, *, fatal: Callable[[], None], step: int = 2, keep: int = 9) -> None:
    """Publish step 1, arm the fault, save once more."""
    saver = Saver(directory, CheckpointConfig(every_steps=1, keep=keep))
    saver.save_async(1, tensors_of(1), {"value": 1})
    saver.wait()
    fatal()
    saver.save_async(step, tensors_of(2), {"value": 2})
    saver.close()


def scenario(fatal: Callable[[], None], **options: int) -> Scenario:
    """A second save that dies by `fatal`."""
    return lambda directory: second_save(directory, fatal=fatal, **options)


# The names begin with what must be found afterwards: the first checkpoint ("old") or the second ("new").
PHASES: dict[str, Scenario] = {
    "old: before staging": scenario(lambda: die_at_call(dcp._ShardWriter, "stage")),
    "old: after staging": scenario(lambda: die_at_call(dcp._ShardWriter, "stage", after=True)),
    "old: shard opened": scenario(lambda: die_at_call(safetensors.torch, "save")),
    "old: shard half written": scenario(die_with_half_a_shard),
    "old: before fsync of the shard": scenario(lambda: die_at_call(os, "fsync", call=1)),
    "old: before fsync of the state": scenario(lambda: die_at_call(os, "fsync", call=2)),
    "old: before the manifest": scenario(lambda: die_at_call(publish, "write_manifest")),
    "old: before fsync of the manifest": scenario(lambda: die_at_call(os, "fsync", call=3)),
    "old: before fsync of the directory": scenario(lambda: die_at_call(os, "fsync", call=4)),
    "old: before the rename": scenario(lambda: die_at_call(os, "rename")),
    "new: after the rename": scenario(lambda: die_at_call(os, "rename", after=True)),
    "new: before fsync of the parent": scenario(lambda: die_at_call(os, "fsync", call=5)),
    "new: before pruning": scenario(lambda: die_at_call(publish, "prune"), keep=1),
    "new: pruned one hidden": scenario(lambda: die_at_call(os, "rename", call=2, after=True), keep=1),
    "new: in the middle of pruning": scenario(die_in_the_middle_of_a_deletion, keep=1),
    "old: replacing, old one set aside": scenario(lambda: die_at_call(os, "rename", after=True), step=1),
    "new: replacing, both there": scenario(lambda: die_at_call(os, "rename", call=2, after=True), step=1),
    "new: replacing, old one half deleted": scenario(die_in_the_middle_of_a_deletion, step=1),
}


def save_for_ever(directory: Path) -> None:
    """Save one step after the other until the process is killed."""
    saver = Saver(directory, CheckpointConfig(every_steps=1, keep=2))
    for step in itertools.count(1):
        saver.save_async(step, tensors_of(step), {"value": step})


def fork(scenario: Scenario, directory: Path) -> int:
    """Start a child that runs a scenario; it exits with 7 if nothing ended it."""
    child = os.fork()
    if child == 0:
        try:
            scenario(directory)
        finally:
            os._exit(7)
    return child


def end_after_saving(directory: Path, *, close: bool) -> int:
    """Start a child that saves three times and then goes the whole way out, through the interpreter's end."""
    child = os.fork()
    if child == 0:
        saver = Saver(directory, CheckpointConfig(every_steps=1))
        for step in (1, 2, 3):
            saver.save_async(step, tensors_of(step), {"value": step})
        if close:
            saver.close()
        sys.exit(0)
    return child


def main(root: Path) -> None:
    """Run every phase, saves killed from outside at random moments, processes that end by themselves."""
    signals = {}
    for number, (phase, run) in enumerate(PHASES.items()):
        _, status = os.waitpid(fork(run, root / str(number)), 0)
        signals[phase] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    generator = random.Random(0)
    for number in range(KILLED_AT_RANDOM):
        directory = root / f"random_{number}"
        child = fork(save_for_ever, directory)
        while not list(directory.glob("step_*")):
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    ended = [end_after_saving(root / f"ended_{number}", close=number % 2 == 0) for number in range(ENDED)]
    statuses = [os.waitpid(child, 0)[1] for child in ended]
    print(json.dumps({"signals": signals, "statuses": statuses}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
