"""A task of SkyPilot 0.14: `sky jobs launch FILE` finds the nodes and takes others when it loses them.

With `job.image` a container that holds the code; without, this checkout is sent and set up on each node.
"""

from __future__ import annotations

from typing import Any

from train.studies.job_files.job import IN_IMAGE, Job, Names, check_mounts, required
from train.studies.job_files.kubernetes import pod_affinity
from train.studies.job_files.manifest import manifest

NAMES = Names(node_rank="SKYPILOT_NODE_RANK", head="HEAD", run="SKYPILOT_TASK_ID", nodes="NODES")


def write(job: Job) -> str:
    """The text of the file.

    Raises:
        ValueError: the device has no name, or the container would lose what the run writes.
    """
    facts, in_image = job.config.job, job.config.job.image is not None
    resources: dict[str, Any] = {}
    if job.on_gpus:
        gpu = required(facts.gpu, "gpu", "SkyPilot's name of the device, such as H100")
        resources["accelerators"] = f"{gpu}:{job.gpus_per_node}"
    if in_image:
        check_mounts(job)
        resources["image_id"] = f"docker:{facts.image}"
    if job.nodes > 1:
        resources["network_tier"] = "best"
    resources["job_recovery"] = {"max_restarts_on_errors": facts.max_restarts}
    bin_ = "" if in_image else ".venv/bin/"
    script = [
        "set -eu",
        *([f"cd {IN_IMAGE}"] if in_image else []),
        'HEAD=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")',
        'NODES=$(paste -sd, <<<"$SKYPILOT_NODE_IPS")',
        job.preflight(NAMES, python=f"{bin_}python"),
        f"exec {job.training(NAMES, torchrun=f'{bin_}torchrun')}",
    ]
    document = {
        "name": job.config.run.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "envs": job.environment,
        **({} if in_image else {"workdir": ".", "setup": ".ci/setup run\n"}),
        **({"volumes": _volumes(facts.mounts)} if facts.mounts else {}),
        # Where the cloud is a Kubernetes cluster.
        "config": {"kubernetes": {"pod_config": {"spec": _pod(job)}}},
        "run": "\n".join([*script, ""]),
    }
    return manifest(job, "sky", document)


def _volumes(mounts: tuple[str, ...]) -> dict[str, str]:
    return {path: volume for volume, _, path in (mount.partition(":") for mount in mounts)}


def _pod(job: Job) -> dict[str, Any]:
    return {"terminationGracePeriodSeconds": job.config.job.grace_s} | pod_affinity(job.config.job.exclude)
