"""One sbatch for all nodes: a preflight and a torchrun on each, a save before the time is up, another turn if it helps.

    --signal=TERM@grace   torchrun and workers get SIGTERM that long before the end: the run saves and stops
    requeue               if the run has made progress in this turn and did not end by itself

Run under Slurm 22.05.8 on CPUs by hand (docs/launch.md), and in `tests/system/test_cluster_job.py` with a stand-in.
"""

from __future__ import annotations

import shlex

from train.observe.sinks import METRICS_FILE
from train.run_directory import run_directory
from train.studies.job_files.job import IN_IMAGE, Job, Names, check_mounts, outside

NAMES = Names(node_rank="SLURM_NODEID", head="HEAD", run="SLURM_JOB_ID", nodes="NODES")


def write(job: Job) -> str:
    """The text of the file.

    Raises:
        ValueError: the container would lose what the run writes.
    """
    in_container = job.config.job.container != "none"
    if in_container:
        check_mounts(job)
    bin_ = "" if in_container else ".venv/bin/"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    # As this script sees it, which runs outside the container.
    directory = str(run_directory(job.config.run))
    log = shlex.quote(f"{(outside(job, directory) if in_container else None) or directory}/{METRICS_FILE}")
    grace = f"# A stop takes {job.grace}." if job.grace else "# How long a stop takes is not known: no speed is."
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.config.run.name}: {job.nodes} nodes of {job.gpus_per_node} ranks. Change the configuration, not this:",
        f"#   python -m launch.cluster slurm {shlex.join(job.arguments)}",
        grace,
        *(f"#SBATCH --{option}" for option in _options(job)),
        "",
        "set -euo pipefail",
        "# Settings of NCCL and of torch above it have their reasons in configs/network/ and configs/cluster/.",
        *exports,
        # Not by `head`, which closes the pipe: that would end this script, whoever writes into it.
        'NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)',
        "HEAD=${NODES%%,*}",
        "export HEAD NODES",
        # A task is a torchrun with many children: not bound to one core, and no other node's to be ended with.
        f'on_each_node() {{ srun {_step(job)} bash -c "$1"; }}',
        "",
        "# What each node runs; quoted, since $SLURM_NODEID is known only there.",
        "preflight=$(",
        "  cat <<'NODE'",
        f"exec {job.preflight(NAMES, python=bin_ + 'python')}",
        "NODE",
        ")",
        "training=$(",
        "  cat <<'NODE'",
        f"exec {job.training(NAMES, torchrun=bin_ + 'torchrun')}",
        "NODE",
        ")",
        "",
        "# A sick node ends the job here, by name: put it into job.exclude.",
        'on_each_node "$preflight"',
        "",
        f"log={log}",
        'before=$(stat -c %s "$log" 2>/dev/null || echo 0)',
        "status=0",
        'on_each_node "$training" || status=$?',
        "",
        "# torchrun makes 1 of every end; the run's own log says which it was. Another turn helps where this one has",
        "# taken steps and the run was asked to stop, or died.",
        'written=$(tail -c "+$((before + 1))" "$log" 2>/dev/null || true)',
        """end=$(grep '^{"event":"stop"' <<<"$written" | tail -n 1 || true)""",
        """if grep -q '^{"step"' <<<"$written" && [[ -z $end || $end == *"the same command resumes"* ]]; then""",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def _options(job: Job) -> list[str]:
    """Of sbatch, in its spelling."""
    facts = job.config.job
    given = {"partition": facts.partition, "account": facts.account, "time": facts.time_limit}
    return [
        f"job-name={job.config.run.name}",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        f"nodes={job.nodes}",
        "ntasks-per-node=1",
        *([f"gpus-per-node={job.gpus_per_node}"] if job.on_gpus else []),
        "exclusive",
        *([f"exclude={','.join(facts.exclude)}"] if facts.exclude else []),
        f"signal=TERM@{facts.grace_s}",
        "requeue",
        "open-mode=append",
        "output=%x-%j.out",
    ]


def _step(job: Job) -> str:
    """Words between srun and the command of a node."""
    facts, step = job.config.job, f"--ntasks={job.nodes} --ntasks-per-node=1 --cpu-bind=none"
    if facts.container == "none":
        return step
    image = shlex.quote(str(facts.image))
    if facts.container == "pyxis":
        mounts = f" --container-mounts={shlex.quote(','.join(facts.mounts))}" if facts.mounts else ""
        return f"{step} --container-image={image}{mounts} --container-workdir={IN_IMAGE}"
    binds = "".join(f"--bind {shlex.quote(mount)} " for mount in facts.mounts)
    return f"{step} apptainer exec {'--nv ' * job.on_gpus}--pwd {IN_IMAGE} {binds}{image}"
