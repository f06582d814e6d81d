"""Pretrain a model: `torchrun launch/pretrain.py experiment=tiny` or `... +cluster=h100_1 run.name=first`.

Arguments are Hydra overrides of configs/pretrain.yaml. `--config` prints the composed configuration and stops.
A wrong key, value, store or device is one sentence and exit code 2, before anything is allocated. SIGTERM finishes
the step, saves and exits 0; the same command then resumes. Exit code 3: stopped by the non-finite guard.
"""

from __future__ import annotations

import os
import sys

# cuBLAS repeats bit for bit only with a fixed workspace; it reads this once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from train.build import build
from train.config import compose, to_yaml
from train.observe.guards import TrainingStopped
from train.trainer import Trainer


def main(arguments: list[str]) -> int:
    """Compose, build, resume and train; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    overrides = [argument for argument in arguments if argument != "--config"]
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains on one process; use --nproc-per-node 1"
            )
        config = compose(overrides)
        if "--config" in arguments:
            print(to_yaml(config), end="")
            return 0
        trainer = Trainer(config, build(config))
        trainer.resume()
    except ValueError as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 2
    try:
        trainer.fit()
    except TrainingStopped as stopped:
        print(f"pretrain: {stopped}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
