"""Pretrain a model: `torchrun launch/pretrain.py experiment=tiny` or `torchrun ... +cluster=h800_2048 run.name=first`.

Arguments are Hydra overrides of configs/pretrain.yaml. `--config` prints the composed configuration and stops;
`dry_run=true` plans the fullest rank (`rank=N` another, `rank=all` each pipeline rank) and stops. A wrong key, value,
layout, store or device is one sentence and exit code 2, before anything is allocated. SIGTERM or Ctrl-C finishes the
step, saves and exits 0 (before the first step: saves nothing); the same command then resumes. Exit code 3: stopped by
the non-finite guard. 4: nothing could be saved any more. 5: the loss left its band for good. 75: another rank died, and
is named. docs/operating.md says more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import replace

from launch.ending import STOPPED, guarded, handle_early, tell_launcher
from launch.threads import spin_default
from train.observe.guards import AskedToStop, TrainingStopped

# Kept before the imports, which take seconds: a launcher that dies meanwhile would not be missed.
os.environ["V3FP8_LAUNCHER_PID"] = str(os.getppid())
# cuBLAS repeats bit for bit only with a fixed workspace; it reads this once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.update(spin_default(os.environ))
if __name__ == "__main__":
    handle_early(sys.argv[1:])

from torch.distributed.rendezvous import rendezvous

from parallel.layout import check_world
from train.config import PretrainConfig, changed_world, compose, to_yaml
from train.run_directory import run_directory
from train.studies.plan.dry_run import dry_run
from train.worker import WorkerInfo, pretrain

# How long the first rank may start after the others and still be heard when it refuses a configuration.
SPEAKER_S = 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def network_environment(config: PretrainConfig) -> dict[str, str]:
    """Variables of NCCL and of torch's layer above it."""
    # The prefix of what torch's flight recorder writes, where it is on.
    prefix = str(run_directory(config.run).absolute() / "collectives_")
    return {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix} | config.network.environment


def meet(config: PretrainConfig, *, rank: int, world: int) -> WorkerInfo:
    """This process among all, as torchrun gives it; NCCL's settings are put where NCCL looks for them."""
    check_world(config.layout, world)
    if world == 1:
        return WorkerInfo(tell_launcher=tell_launcher)
    for name, value in network_environment(config).items():
        os.environ.setdefault(name, value)
    store, _, _ = next(rendezvous("env://", rank, world))
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    store_rank = None if hosted_by_launcher else 0
    return WorkerInfo(rank, world, local_rank, store, store_rank=store_rank, tell_launcher=tell_launcher)


def stop_with_launcher() -> None:
    """Have the kernel send SIGTERM to this worker when torchrun dies: it saves, stops and leaves no orphan behind."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if str(os.getppid()) != os.environ["V3FP8_LAUNCHER_PID"]:
            raise ValueError("torchrun has ended while this worker started; start it again")


def run(arguments: list[str], *, rank: int, world: int) -> None:
    """Do what the command line says; ValueError and TrainingStopped as `pretrain`."""
    overrides = [argument for argument in arguments if argument != "--config"]
    with guarded(arguments, interrupts=world == 1) as guard:
        config = compose(overrides)
        if "--config" not in arguments and not config.dry_run:
            stop_with_launcher()
            info = meet(config, rank=rank, world=world)
            pretrain(config, replace(info, is_asked_to_stop=lambda: guard.requested))
            return
    # Nothing to save: from here on a signal ends the process, also where a file asks for the plan.
    if "--config" in arguments:
        print(to_yaml(config), end="")
        return
    if sentence := changed_world(overrides, config):
        print(f"{sentence}\n")
    print(dry_run(config))


def main(arguments: list[str]) -> int:
    """Compose, meet the other ranks, train; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
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
