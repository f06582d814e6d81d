"""One life of a run on some ranks, in process, and what tests read of any run: its log and its state.

    join -> build -> Trainer -> resume -> [look] -> fit -> [or look here]

A *look* is every tensor of the run's state as this rank holds it, its counters and, where asked for, the held-out bits
per byte. The test puts the looks of all ranks together and compares runs bit by bit, without a checkpoint file: the
comparison does not pass through the code under test.

A life may end early: one rank sends itself SIGTERM, as a scheduler would, and the ranks agree to stop.

Shapes: bits of a shard have the shard's shape, as integers of the same width (numpy has no BF16).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from parallel.mesh import make_mesh
from parallel.shards import LocalShard
from train.assemble import build, build_alone, open_resources
from train.config import PretrainConfig
from train.observe.sinks import read_run
from train.trainer import Trainer

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Held(NamedTuple):
    """One rank's shard of one tensor: bits, dtype, shape of the whole and offset in it."""

    bits: NDArray[Any]
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Look(NamedTuple):
    """One rank's state at one moment: counters, tensors, held-out bits per byte (None: not asked for)."""

    counters: dict[str, int]
    tensors: dict[str, Held]
    bits_per_byte: float | None


class Life(NamedTuple):
    """One rank's life: the look that was asked for, the last step, and the checkpoints there were at the end."""

    look: Look
    step: int
    checkpoints: list[str]


class Plan(NamedTuple):
    """One life.

    Args:
        config: of the run; its layout fits the number of ranks.
        look: when: where the life takes the run up, or where it leaves it.
        stop_after: step after which the run ends because one rank got SIGTERM; None: when the budget is spent.
        score: whether the look scores the held-out text.
        train: False ends the life after `resume`.
        forget: names of checkpoints that are put away first, as if the run had died before it wrote them.
    """

    config: PretrainConfig
    look: Literal["before", "after"]
    stop_after: int | None = None
    score: bool = False
    train: bool = True
    forget: tuple[str, ...] = ()


def trainer_on(config: PretrainConfig, world: int) -> Trainer:
    """This rank's trainer, as `train.worker` makes it."""
    if world == 1:
        return Trainer(config, build_alone(config))
    tied, timeout_s = config.model.num_nextn_predict_layers > 0, config.network.timeout_s
    mesh = make_mesh(config.layout, device=torch.device("cpu"), tied_embedding=tied, timeout_s=timeout_s)
    return Trainer(config, build(config, mesh, open_resources(config)))


def live(rank: int, world: int, plans: list[Plan]) -> list[Life]:
    """The lives of some runs, one after the other, in these processes."""
    return [_live(rank, world, plan) for plan in plans]


def _live(rank: int, world: int, plan: Plan) -> Life:
    checkpoints = Path(plan.config.run.directory) / plan.config.run.name / "checkpoints"
    if rank == 0:
        for name in plan.forget:
            (checkpoints / name).rename(checkpoints.parent / f"forgotten_{name}")
    dist.barrier()
    trainer = trainer_on(plan.config, world)
    # Looks score.
    trainer.evaluation_is_due = lambda: False  # type: ignore[method-assign]
    trainer.resume()
    before = look(trainer, score=plan.score) if plan.look == "before" else None
    if plan.stop_after is not None and rank == world - 1:
        # Before the ranks agree, at the beginning of that step, on whether it is the last.
        _terminate(trainer, before_step=plan.stop_after)
    if plan.train:
        trainer.fit()
    names = sorted(path.name for path in checkpoints.glob("*"))
    return Life(before or look(trainer, score=plan.score), trainer.state.step, names)


def _terminate(trainer: Trainer, *, before_step: int) -> None:
    """Send this process SIGTERM as it begins a step (counted from 1)."""
    take_step = trainer.take_step

    def interrupted(*args: Any, **named: Any) -> None:
        if trainer.state.step + 1 == before_step:
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(*args, **named)

    trainer.take_step = interrupted  # type: ignore[method-assign]


def copied_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the run's tensors, as far as this rank holds them."""
    state = trainer.tensors()
    return {name: (t.tensor if isinstance(t, LocalShard) else t).detach().clone() for name, t in state.items()}


def wait_for_step(
    process: subprocess.Popen[str], run: Path, reached: Callable[[int], bool], output: Callable[[], str] | None = None
) -> None:
    """Until the log shows a step that is `reached`; a process that ended before fails with its output."""
    log, size, step = run / "metrics.jsonl", 0, 0
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        # Read anew only what has grown: the run needs the cores.
        if log.exists() and log.stat().st_size != size:
            size, records = log.stat().st_size, read_run(run)
            step = records[-1]["step"] if records else 0
        if step and reached(step):
            return
        assert process.poll() is None, output() if output else process.communicate()[0]
        time.sleep(0.005)
    raise AssertionError("the run made no progress")


def losses(run: Path) -> list[tuple[float, ...]]:
    """Of each logged step: total, main, MTP and the gradient norm; the log holds each step once, in order."""
    records = read_run(run)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1)), "every step once, in order"
    return [(r["loss/total"], r["loss/main"], r["loss/mtp"], r["grad/norm"]) for r in records]


def look(trainer: Trainer, *, score: bool) -> Look:
    """The state of now; copied, since the tensors are live."""
    tensors = {}
    for name, value in trainer.tensors().items():
        held = value if isinstance(value, LocalShard) else LocalShard.at(value, tuple(value.shape), (0,) * value.dim())
        local = held.tensor.detach().contiguous()
        bits = local.view(_BITS[local.element_size()]).numpy().copy()
        tensors[name] = Held(bits, str(local.dtype), held.shard.global_shape, held.shard.offsets)
    return Look(trainer.state.to_json(), tensors, trainer.evaluate() if score else None)


def whole(looks: list[Look]) -> dict[str, tuple[str, NDArray[Any]]]:
    """The global tensors, name -> (dtype, bits); every element from some rank, and copies equal to the bit."""
    tensors: dict[str, tuple[str, NDArray[Any]]] = {}
    known: dict[str, NDArray[np.bool_]] = {}
    for rank, seen in enumerate(looks):
        for name, held in seen.tensors.items():
            dtype, bits = tensors.setdefault(name, (held.dtype, np.zeros(held.shape, dtype=held.bits.dtype)))
            there = known.setdefault(name, np.zeros(held.shape, dtype=bool))
            assert (dtype, bits.shape) == (held.dtype, held.shape), name
            place = tuple(slice(o, o + n) for o, n in zip(held.offset, held.bits.shape, strict=True))
            assert (bits[place] == held.bits)[there[place]].all(), f"{name}: rank {rank} holds another copy"
            bits[place] = held.bits
            there[place] = True
    holes = [name for name, there in known.items() if not there.all()]
    assert not holes, f"no rank holds all of {holes}"
    return tensors
