"""How the processes of a run find each other: as torchrun numbers them, with NCCL's settings where NCCL looks for them.

A file of its own: it loads torch, and `launch/pretrain.py` refuses a configuration before that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from torch.distributed.rendezvous import rendezvous

from launch.ending import tell_launcher
from train.config import PretrainConfig
from train.run_directory import run_directory
from train.worker import WorkerInfo

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def network_environment(config: PretrainConfig) -> dict[str, str]:
    """Variables of NCCL and of torch's layer above it."""
    # The prefix of what torch's flight recorder writes, where it is on.
    prefix = str(run_directory(config.run).absolute() / "collectives_")
    return {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix} | config.network.environment


def meet(config: PretrainConfig, *, rank: int, world: int) -> WorkerInfo:
    """This process among all, as torchrun gives it; NCCL's settings are put where NCCL looks for them."""
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
