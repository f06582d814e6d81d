"""The command line of a preflight, read without torch: the process that starts the ranks needs none."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from train.job import ExpectConfig

NAMES = [each.name for each in fields(ExpectConfig)]


def parse(arguments: list[str], description: str) -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="preflight", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nnodes", type=int, default=1, metavar="N", help="nodes in all (%(default)s)")
    add("--node-rank", type=int, default=0, metavar="I", help="this one (%(default)s)")
    add("--nproc-per-node", type=int, default=1, metavar="N", help="ranks of a node (%(default)s)")
    add("--endpoint", default="localhost:29401", help="HOST:PORT of the first node (%(default)s)")
    add("--nodes", default="", metavar="NAME,NAME", help="the nodes in order, to name one that is silent")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what is examined (%(default)s)")
    add("--out", type=Path, default=Path("runs"), help="the run's folder, on a disk that all share (%(default)s)")
    add("--all-to-all-ranks", type=int, default=1, metavar="N", help="ranks that share experts (%(default)s)")
    add("--share", type=float, default=0.5, help="of the peers' median, below which is slow; 0: never (%(default)s)")
    add("--expect", action="append", default=[], metavar="NAME=VALUE", help=f"the least of {', '.join(NAMES)}")
    add("--timeout-s", type=float, default=300, help="for each phase (%(default)s)")
    options = parser.parse_args(arguments)
    host, _, port = options.endpoint.rpartition(":")
    if not (host and port.isdigit()):
        parser.error(f"--endpoint {options.endpoint}: write HOST:PORT")
    for name in ("nnodes", "nproc_per_node", "all_to_all_ranks"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: use 1 or more")
    if not 0 <= options.node_rank < options.nnodes:
        parser.error(
            f"--node-rank {options.node_rank}: of --nnodes {options.nnodes} there are 0 to {options.nnodes - 1}"
        )
    try:
        options.expect = expected(options.expect)
    except ValueError as error:
        parser.error(str(error))
    return options


def expected(words: list[str]) -> ExpectConfig:
    """What `--expect` says.

    Raises:
        ValueError: an unknown name, or no number of 0 or more.
    """
    found = ExpectConfig()
    for word in words:
        name, _, value = word.partition("=")
        if name not in NAMES:
            raise ValueError(f"--expect {word}: {name} is none of {', '.join(NAMES)}")
        try:
            found = replace(found, **{name: float(value)})
        except ValueError as error:
            raise ValueError(f"--expect {word}: {error}") from None
    return found
