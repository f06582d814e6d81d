"""Examine every node before a run: `python launch/preflight.py --nnodes 256 --node-rank N --nproc-per-node 8 ...`.

Started once on each node, it starts a process for each GPU itself: torchrun would wait for all nodes, and could not say
which one does not come. (Under torchrun it is one of the processes.) Versions, health, a product and the disk of each
rank; links, a sum and clocks of all together. One table names the sick node and what is wrong. Exit code 1 then, 2 for
a wrong argument, else 0. docs/launch.md explains the table. It needs no configuration and no Hydra.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from datetime import timedelta

from train.studies.preflight.arguments import parse

# Else c10d prints a page about each peer that is not there yet.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
# A rank has two phases and two waits for rank 0; after so many of them the kernel ends it, whatever it does.
MOST_PHASES = 6


def start_ranks(options: argparse.Namespace, arguments: list[str]) -> int:
    """A process for each rank of this node; 1 where one of them fails."""
    host, _, port = options.endpoint.rpartition(":")
    common = {"WORLD_SIZE": options.nnodes * options.nproc_per_node, "LOCAL_WORLD_SIZE": options.nproc_per_node}
    common |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    ranks = []
    for local in range(options.nproc_per_node):
        own = {"RANK": options.node_rank * options.nproc_per_node + local, "LOCAL_RANK": local}
        environment = os.environ | {name: str(value) for name, value in (common | own).items()}
        ranks.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))

    def end(*_: object) -> None:
        for each in ranks:
            each.terminate()

    signal.signal(signal.SIGTERM, end)
    # Of a rank that a signal has ended it is negative.
    codes = [each.wait() for each in ranks]
    return int(any(codes))


def be_rank(options: argparse.Namespace) -> int:
    """One rank, as the environment says which."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # torch does not say that it exports it

    from train.studies.preflight.judge import Bench
    from train.studies.preflight.rank import Place, examine

    rank, world, local_rank, per_node, port = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    )
    signal.alarm(int(MOST_PHASES * options.timeout_s))
    names = tuple(filter(None, options.nodes.split(",")))
    bench = Bench(per_node, options.expect, options.share)
    place = Place(
        rank, world, local_rank, options.device, options.out, options.all_to_all_ranks, names, options.timeout_s, bench
    )
    # Under torchrun its agent does.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=options.timeout_s)
    try:
        store = TCPStore(address, port, world, is_master=hosts, timeout=timeout, wait_for_workers=False)
        return examine(place, store)
    except (TimeoutError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        print(f"preflight: rank {rank} has lost rank 0 at {address}:{port}: {first}", file=sys.stderr)
        return 1


def main(arguments: list[str]) -> int:
    """Start the ranks of a node, or be one; returns the exit code."""
    options = parse(arguments, str(__doc__))
    return be_rank(options) if "RANK" in os.environ else start_ranks(options, arguments)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # A thread may still hang in a message.
    os._exit(code)
