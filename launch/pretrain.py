"""Pretrain a model: `torchrun launch/pretrain.py experiment=tiny` or `torchrun ... +cluster=h800_2048 run.name=first`.

Arguments are Hydra overrides of configs/pretrain.yaml. `--config` prints the composed configuration and stops;
`dry_run=true` plans the fullest rank (`rank=N` another, `rank=all` each pipeline rank) and stops. A wrong key, value,
layout, store or device is one sentence and exit code 2, before anything is allocated. SIGTERM or Ctrl-C finishes the
step, saves and exits 0 (before the first step: saves nothing); the same command then resumes. A plan.json in the run's
directory is compared with what ten steps took. Exit code 3: stopped by the non-finite guard. 4: nothing could be saved
any more. 5: the loss left its band for good. 75: another rank died, and is named. docs/operating.md says more.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from dataclasses import replace

from launch.ending import EARLY, STOPPED, handle_early, tell_launcher
from launch.threads import spin_default
from train.observe.guards import AskedToStop, TerminationGuard, TrainingStopped

# Kept before the imports, which take seconds: a launcher that dies meanwhile would not be missed.
os.environ["V3FP8_LAUNCHER_PID"] = str(os.getppid())
# cuBLAS repeats bit for bit only with a fixed workspace; it reads this once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.update(spin_default(os.environ))
if __name__ == "__main__":
    handle_early(sys.argv[1:])
    # Until `keep_imports`: looking for garbage among what imports make took a sixth of their time.
    gc.disable()

# Nothing here loads torch, which takes seconds: a mistake in the configuration is refused before.
from parallel.layout import check_world
from train.config import PretrainConfig, changed_world, compose, to_yaml

# How long the first rank may start after the others and still be heard when it refuses a configuration.
SPEAKER_S = 30


def keep_imports() -> None:
    """Collect garbage from now on, but do not look at what this command has imported: it stays until the end."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def start(config: PretrainConfig, *, rank: int, world: int) -> None:
    """Meet the other ranks and train; ValueError and TrainingStopped as `pretrain`."""
    # Before the guard is in force: an import may swallow what a signal raises in it.
    from launch.meeting import meet, stop_with_launcher
    from train.studies.plan.witness import Witness
    from train.worker import pretrain

    keep_imports()
    with TerminationGuard(interrupts=world == 1) as guard:
        stop_with_launcher()
        info = meet(config, rank=rank, world=world)
        pretrain(config, replace(info, is_asked_to_stop=lambda: guard.requested, after_step=Witness()))


def run(arguments: list[str], *, rank: int, world: int) -> None:
    """Do what the command line says; ValueError and TrainingStopped as `start`."""
    overrides = [argument for argument in arguments if argument != "--config"]
    config = compose(overrides)
    if "--config" in arguments:
        print(to_yaml(config), end="")
    elif config.dry_run:
        # A file may ask for the plan: nothing to save, so a signal ends it.
        EARLY.close()
        from train.studies.plan.dry_run import dry_run

        keep_imports()
        if sentence := changed_world(overrides, config):
            print(f"{sentence}\n")
        print(dry_run(config))
    else:
        check_world(config.layout, world)
        start(config, rank=rank, world=world)


def main(arguments: list[str]) -> int:
    """Compose, meet the other ranks, train; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        with EARLY:
            run(arguments, rank=rank, world=world)
    except AskedToStop:
        if rank == 0:
            print(STOPPED, end="", file=sys.stderr)
    except (ValueError, TrainingStopped) as error:
        sentence = f"pretrain: {error}"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tell_launcher(sentence)
        # What is wrong for one rank is wrong for all: one of them says it. torchrun ends all ranks of a node as soon as
        # one has ended, so the others wait: else a first rank that starts more slowly would be ended unheard.
        if rank == 0:
            print(sentence, file=sys.stderr)
        else:
            time.sleep(SPEAKER_S)
        return error.exit_code if isinstance(error, TrainingStopped) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
