"""What a scheduler must be told about a job and no model decides: field `job` of the configuration.

`python -m launch.cluster` writes job files from it (`train/studies/job_files/`); a run itself reads nothing of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Literal

# Slurm's `--signal` counts seconds in 16 bits.
MOST_GRACE_S = 65_535


@dataclass(frozen=True)
class ExpectConfig:
    """The least that `launch/preflight.py` wants to see; None: only half of what the node's peers show."""

    gemm_tflops: float | None = None  # BF16, of one GPU
    node_gb_per_s: float | None = None  # received from the next GPU of the node
    rail_gb_per_s: float | None = None  # received from the same GPU of another node
    all_to_all_gb_per_s: float | None = None  # received from each of the ranks that share experts
    all_reduce_gb_per_s: float | None = None  # bus bandwidth over all ranks
    disk_gb_per_s: float | None = None  # written by one process of a node into the run's folder
    free_gb: float | None = None  # on the disk of the run's folder
    clock_s: float = 1.0  # the most that a node's clock may differ from the others'

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 0:
                raise ValueError(f"job.expect.{each.name}={value} is negative: use 0 or more, or null")


@dataclass(frozen=True)
class JobConfig:
    """Who pays, where, and how long a stop may take."""

    partition: str | None = None  # Slurm's
    account: str | None = None  # Slurm's
    time_limit: str | None = None  # Slurm's, such as 2-00:00:00
    exclude: tuple[str, ...] = ()  # nodes to stay away from, by the scheduler's names
    container: Literal["none", "pyxis", "apptainer"] = "none"  # Slurm's; Kubernetes takes the image in any case
    image: str | None = None
    # SOURCE:/path in the container; the source is a folder for Slurm, a claim for Kubernetes, a volume for SkyPilot.
    mounts: tuple[str, ...] = ()
    gpu: str | None = None  # SkyPilot's name of the device, such as H100
    rdma: str | None = None  # NAME:COUNT of a pod's InfiniBand cards as Kubernetes counts them
    port: int = 29400  # the run's; the preflight takes the next one
    max_restarts: int = 3  # of the workers, by torchrun, where they are
    grace_s: int = 120  # from SIGTERM to SIGKILL
    storage_gb_per_s: float | None = None  # what all nodes together write to the run's folder; None: not known
    expect: ExpectConfig = field(default_factory=ExpectConfig)

    def __post_init__(self) -> None:
        ranges = {"port": (1024, 65_534), "max_restarts": (0, 1000), "grace_s": (1, MOST_GRACE_S)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"job.{name}={getattr(self, name)} is out of range: use {low} to {high}")
        if self.storage_gb_per_s is not None and self.storage_gb_per_s <= 0:
            raise ValueError(f"job.storage_gb_per_s={self.storage_gb_per_s} must be above 0, or null if nobody knows")
        for name, form, pattern in (("mounts", "SOURCE:/path", r"[^:,\s]+:/[^:,\s]*"), ("exclude", "NODE", r"\S+")):
            for text in getattr(self, name):
                if not re.fullmatch(pattern, text):
                    raise ValueError(f"job.{name} holds {text!r}: write {form}")
        if self.rdma is not None and not re.fullmatch(r"[\w./-]+:[1-9]\d*", self.rdma):
            raise ValueError(f"job.rdma={self.rdma} must be NAME:COUNT, such as rdma/hca:1")
        if self.container != "none" and self.image is None:
            raise ValueError(f"job.container={self.container} needs job.image: a tag of a registry, or a file")
