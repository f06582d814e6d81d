"""A run as a scheduler sees it: nodes, environment, and what each node runs, in words of bash.

    preflight    python launch/preflight.py on each node; one that is sick ends the job
    training     torchrun launch/pretrain.py with the overrides that were given, so the job composes the same run

What differs from node to node (its rank, the head node's address) has another name under each scheduler: `Names`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from train.config import compose
from train.run_directory import run_directory
from train.studies.job_files.grace import Grace, checkpoint_bytes, grace_of

if TYPE_CHECKING:
    from train.config import PretrainConfig
    from train.model.config import ModelConfig

# WORKDIR of launch/container/Dockerfile.
IN_IMAGE = PurePosixPath("/v3fp8")
# Checkpoints beside those that are kept: the last good one, and the one that is being written.
MORE_CHECKPOINTS = 2


class Names(NamedTuple):
    """Variables of bash that hold what differs by node or job."""

    node_rank: str
    head: str  # name or address of the first node
    run: str  # of this job, and of no other
    nodes: str | None = None  # every node's name in order of rank, with commas between; None: nobody knows them


@dataclass(frozen=True)
class Job:
    """A run as a scheduler sees it.

    Args:
        arguments: overrides as they were given.
    """

    config: PretrainConfig
    arguments: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        """Those of the run, without the scheduler's own."""
        return [text for text in self.arguments if not re.match(r"\+*job[.=]", text)]

    @property
    def gpus_per_node(self) -> int:
        """Ranks of a node."""
        return min(self.config.layout.world, self.config.layout.ranks_per_node)

    @property
    def nodes(self) -> int:
        """Nodes in all."""
        return self.config.layout.world // self.gpus_per_node

    @property
    def on_gpus(self) -> bool:
        """Whether a node must have a GPU for each rank."""
        return self.config.run.device != "cpu"

    @cached_property
    def grace(self) -> Grace | None:
        """What a stop takes."""
        return grace_of(self.config, _v3())

    @property
    def environment(self) -> dict[str, str]:
        """Of preflight and training: NCCL's settings, whose reasons stand in configs/network/ and configs/cluster/."""
        ours = {
            # A rank's lines reach its file when they are written, not when the buffer is full.
            "PYTHONUNBUFFERED": "1",
            # A new store for each restart: torchrun keeps one for all (torch 2.13), and a rank would read there that
            # its neighbour of the attempt before is dead.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        return ours | dict(sorted(self.config.network.environment.items()))

    def preflight(self, names: Names, *, python: str) -> str:
        """One command for a node."""
        config = self.config
        words = [
            f"{python} launch/preflight.py --nnodes {self.nodes} --nproc-per-node {self.gpus_per_node}",
            f'--node-rank "${names.node_rank}" --endpoint "${names.head}:{config.job.port + 1}"',
            *([f'--nodes "${names.nodes}"'] if names.nodes else []),
            f"--device {'cuda' if self.on_gpus else 'cpu'} --out {shlex.quote(str(run_directory(config.run)))}",
            f"--all-to-all-ranks {config.layout.ep}",
            *(f"--expect {name}={value:g}" for name, value in self._expected().items()),
        ]
        return _lines(words)

    def _expected(self) -> dict[str, float]:
        expect = self.config.job.expect
        given = {each.name: getattr(expect, each.name) for each in fields(expect)}
        if given["free_gb"] is None:
            count = self.config.checkpoint.keep + MORE_CHECKPOINTS
            given["free_gb"] = round(count * checkpoint_bytes(self.config) / 1e9, 1)
        return {name: value for name, value in given.items() if value is not None}

    def training(self, names: Names, *, torchrun: str) -> str:
        """One command for a node; each rank writes into a file of its own, the first of a node into the job's too."""
        config, logs = self.config, shlex.quote(str(run_directory(self.config.run) / "logs"))
        words = [
            f"{torchrun} --nnodes {self.nodes} --nproc-per-node {self.gpus_per_node}",
            f"--max-restarts {config.job.max_restarts} --shutdown-timeout {config.job.grace_s}",
            f'--rdzv-backend c10d --rdzv-id "${names.run}" --rdzv-endpoint "${names.head}:{config.job.port}"',
            # Else torchrun guesses by the host's own name, and where an address is no such name nobody would host.
            f'--rdzv-conf "is_host=$(({names.node_rank} == 0))"',
            f'--log-dir {logs}/"${names.run}/node_${names.node_rank}" --redirects 3 --tee 0:3',
            f"launch/pretrain.py {shlex.join(self.overrides)}",
        ]
        return _lines(words)


@cache
def _v3() -> ModelConfig:
    return compose(["+cluster=h800_2048"]).model


def _lines(words: Sequence[str]) -> str:
    return " \\\n  ".join(words)


def job_of(overrides: Sequence[str]) -> Job:
    """The job of a command line.

    Raises:
        ValueError: a configuration that cannot run, or a fact of the scheduler that contradicts it, in one sentence.
    """
    config = compose(list(overrides))
    job, layout = Job(config, tuple(overrides)), config.layout
    if config.dry_run:
        raise ValueError("dry_run=true plans a run and trains nothing: leave it out of a job")
    if layout.world % job.gpus_per_node:
        raise ValueError(
            f"layout.pp={layout.pp} x layout.dp={layout.dp} = {layout.world} ranks do not fill nodes of "
            f"layout.ranks_per_node={layout.ranks_per_node}: change one of the three"
        )
    if job.grace is not None and config.job.grace_s < job.grace.least_s:
        least = int(-(-job.grace.least_s // 10) * 10)
        raise ValueError(
            f"job.grace_s={config.job.grace_s} is too short for a stop, which takes {job.grace}: "
            f"use job.grace_s={least} or more"
        )
    return job


def outside(job: Job, folder: str) -> PurePosixPath | None:
    """Where a folder of the container is for the scheduler's own shell; None: in the image, and gone with it."""
    inside = IN_IMAGE / folder
    for source, _, place in (mount.partition(":") for mount in job.config.job.mounts):
        if inside.is_relative_to(place):
            return PurePosixPath(source) / inside.relative_to(place)
    return None


def check_mounts(job: Job) -> None:
    """What a run writes and reads must outlive its container.

    Raises:
        ValueError: the run's folder or a store is inside the image.
    """
    run, data = job.config.run, job.config.data
    wanted = {"run.directory": run.directory, "data.store": data.store, "data.heldout": data.heldout}
    for key, folder in wanted.items():
        if folder is not None and outside(job, folder) is None:
            raise ValueError(
                f"{key}={folder} is {IN_IMAGE / folder} in the container, which no job.mounts holds: "
                f"add one, such as 'job.mounts=[SOURCE:{IN_IMAGE / folder}]'"
            )


def required(value: str | None, key: str, what: str) -> str:
    """A fact that only the site knows.

    Raises:
        ValueError: nobody gave it.
    """
    if value is None:
        raise ValueError(f"job.{key} is not set: give {what}, as job.{key}=... or in a file of configs/job/")
    return value
