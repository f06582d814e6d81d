"""A TrainJob of Kubeflow Trainer 2.3: a pod a node, each with a preflight and then a torchrun.

Written for the runtime `torch-distributed` that Kubeflow ships: its replicated job and its container are both called
`node`, and its plugin sets PET_NODE_RANK and PET_MASTER_ADDR. Another turn of a failed job belongs to the runtime.
Source: kubeflow/trainer v2.3.0, CRD trainjobs and `pkg/runtime/framework/plugins/torch`, read 2026-11-30.
"""

from __future__ import annotations

import re
from typing import Any

from train.studies.job_files.job import IN_IMAGE, Job, Names, check_mounts, required
from train.studies.job_files.manifest import manifest

RUNTIME, NODE = "torch-distributed", "node"
# A pod's host is called NAME-node-0-0, one label of DNS with 63 letters at most.
MOST_LETTERS = 50


def write(job: Job) -> str:
    """The text of the file.

    Raises:
        ValueError: image, mounts or InfiniBand cards are not given, or the run's name is too long for a host.
    """
    facts, name = job.config.job, re.sub(r"[^a-z0-9]+", "-", job.config.run.name.lower()).strip("-")
    if len(name) > MOST_LETTERS:
        raise ValueError(
            f"run.name={job.config.run.name} has {len(name)} letters, and a host's name of Kubernetes begins with it: "
            f"use {MOST_LETTERS} or fewer"
        )
    image = required(facts.image, "image", "what launch/container/Dockerfile builds")
    check_mounts(job)
    names = Names(node_rank="PET_NODE_RANK", head="PET_MASTER_ADDR", run="RUN_ID")
    script = "\n".join(
        (
            "set -eu",
            f"cd {IN_IMAGE}",
            job.preflight(names, python="python"),
            f"exec {job.training(names, torchrun='torchrun')}",
            "",
        )
    )
    run_id = {"name": names.run, "value": name}
    document = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "image": image,
                "command": ["bash", "-c", script],
                "env": [run_id, *({"name": key, "value": value} for key, value in job.environment.items())],
                "numNodes": job.nodes,
                "numProcPerNode": job.gpus_per_node,
                "resourcesPerNode": {"limits": _devices(job)},
            },
            "runtimePatches": [_patch(job)],
        },
    }
    return manifest(job, "kubernetes", document)


def _devices(job: Job) -> dict[str, int]:
    devices = {"nvidia.com/gpu": job.gpus_per_node} if job.on_gpus else {}
    if job.config.network.environment.get("NCCL_NET") == "IB":
        what = "the resource of the InfiniBand cards that a pod asks for, NAME:COUNT"
        name, _, count = required(job.config.job.rdma, "rdma", what).partition(":")
        devices[name] = int(count)
    return devices


def _patch(job: Job) -> dict[str, Any]:
    """Of the runtime's pods: grace, nodes to stay away from, and what is mounted."""
    facts = job.config.job
    container: dict[str, Any] = {
        "name": NODE,
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *_mounts(facts.mounts)],
    }
    if facts.rdma is not None:
        # Memory that a card reads and writes must not be swapped.
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": facts.grace_s} | pod_affinity(facts.exclude)
    # NCCL passes data between the GPUs of a node through shared memory; a pod has 64 MB of it by default.
    shared = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    claims = dict.fromkeys(mount.partition(":")[0] for mount in facts.mounts)
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims]
    pod |= {"volumes": [shared, *volumes], "containers": [container]}
    of_node = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    spec = {"template": {"spec": {"replicatedJobs": [of_node]}}}
    return {"manager": "v3fp8.launch/cluster", "trainingRuntimeSpec": spec}


def _mounts(mounts: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"name": claim, "mountPath": path} for claim, _, path in (mount.partition(":") for mount in mounts)]


def pod_affinity(exclude: tuple[str, ...]) -> dict[str, Any]:
    """The field of a pod that keeps it off some nodes; empty for none."""
    if not exclude:
        return {}
    away = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(exclude)}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [away]}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}
