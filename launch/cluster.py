"""Write the job file of a run: `python -m launch.cluster slurm +cluster=h800_2048 job.partition=gpu > job.sbatch`.

    slurm          one sbatch for all nodes
    kubernetes     a TrainJob of Kubeflow Trainer 2.3
    sky            a task of SkyPilot 0.14

Arguments are those of launch/pretrain.py. What the scheduler must be told besides is `job.…` (configs/job/), of which
`job.exclude='[gpu017]'` keeps a sick node out. Each node runs launch/preflight.py before the run. A fact that is
missing or contradicts another is one sentence and exit code 2. docs/launch.md walks from a plan to a requeue.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.studies.job_files import kubernetes, sky, slurm
from train.studies.job_files.job import job_of

SCHEDULERS = {"slurm": slurm.write, "kubernetes": kubernetes.write, "sky": sky.write}


def main(arguments: list[str]) -> int:
    """Write the file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scheduler", choices=list(SCHEDULERS), help="whose file")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override, as of launch/pretrain.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to (standard output)")
    options = parser.parse_intermixed_args(arguments)
    try:
        text = SCHEDULERS[options.scheduler](job_of(options.overrides))
        if options.out is None:
            print(text, end="")
        else:
            options.out.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
