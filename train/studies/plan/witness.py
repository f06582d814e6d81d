"""What a run measures of itself, once, for the plan that lies in its directory (`judged.py`).

`launch/pretrain.py` gives a `Witness` to rank 0's trainer, which calls it after each step. It keeps the times that the
step was bounded with anyway and waits for nothing. After a process's tenth step it looks for a plan; the first three
steps, in which kernels are compiled and measured, do not count. A run is judged once: its card says so, also to the
process that resumes it.

Memory is rank 0's. State is the storage of each tensor that the step works with, as `memory.py` counts a plan's; on a
GPU torch's peak since the third step, and what the device has in use beside torch's memory, complete it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from statistics import mean, median
from typing import Any

import torch

from train.assemble import device_name
from train.config import PretrainConfig
from train.observe.metrics import PHASES
from train.observe.sinks import PLAN_FILE, Sinks, read_card
from train.step import Engine
from train.studies.measured import commit
from train.studies.plan.candidate import candidate_of, run_of
from train.studies.plan.judged import KEY, Measured, verdict
from train.studies.plan.stand_ins import fp8_copy, storage_bytes
from train.trainer import Trainer

WARM_STEPS, STEPS = 3, 10


class Witness:
    """Called after every step of a process; speaks once."""

    def __init__(self) -> None:
        self._steps = 0
        # Of the steps that count: number, sequences and seconds; seconds of each phase.
        self._times: list[tuple[int, int, float]] = []
        self._walls_s: list[Sequence[float]] = []
        self._busy_s: list[Sequence[float]] = []

    def __call__(self, trainer: Trainer, sinks: Sinks) -> None:
        """Note a step; after the tenth compare, where there is a plan and the run was not judged before."""
        self._steps += 1
        if self._steps > STEPS:
            return
        if self._steps > WARM_STEPS:
            self._note(trainer)
        elif self._steps == WARM_STEPS and trainer.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.mesh.device)
        if self._steps < STEPS or not (trainer.directory / PLAN_FILE).exists() or KEY in read_card(trainer.directory):
            return
        lines, found = verdict(trainer.directory, self._measured(trainer))
        sinks.say(lines)
        if found is not None:
            sinks.write_card(trainer.run_card() | {KEY: found})

    def _note(self, trainer: Trainer) -> None:
        record = trainer.last_record
        sequences = record["schedule/batch_sequences"]
        tokens = sequences * trainer.config.data.sequence_length
        self._times.append((record["step"], sequences, tokens / record["speed/tokens_per_s"]))
        self._walls_s.append(trainer.busy.walls_s)
        # With several ranks the record has all of them, one step later.
        tables = [record.get(f"step/{phase}_ms") for phase in PHASES]
        self._busy_s.append([mean(chain(*table)) / 1e3 for table in tables if table] or trainer.busy_s)

    def _measured(self, trainer: Trainer) -> Measured:
        config, mesh = trainer.config, trainer.mesh
        # In the batch ramp steps grow.
        batch = self._times[-1][1]
        kept = [index for index, (_, sequences, _) in enumerate(self._times) if sequences == batch]

        def by_phase(seconds: Sequence[Sequence[float]]) -> dict[str, float]:
            columns = zip(*(seconds[index] for index in kept), strict=True)
            return dict(zip(PHASES, map(median, columns), strict=True))

        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        where: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit(),
            "versions": versions,
        }
        where |= {"device": device_name(mesh.device), "precision": config.precision.name, "rank": mesh.rank}
        return Measured(
            run=run_of(config),
            candidate=compared(config),
            where=where,
            steps=(self._times[kept[0]][0], self._times[-1][0]),
            batch_sequences=batch,
            step_s=median(self._times[index][2] for index in kept),
            walls_s=by_phase(self._walls_s),
            busy_s=by_phase(self._busy_s),
            memory_bytes=state_bytes(trainer.engine) | device_bytes(trainer.engine),
        )


def compared(config: PretrainConfig) -> dict[str, Any]:
    """The run's layout as a plan has it, without what does not matter to it."""
    candidate = candidate_of(config)
    values = asdict(candidate) | {"stage_layers": list(candidate.stage_layers)}
    # SMs are lent to an exchange that is hidden, and a pipeline of one rank has no schedule.
    unused = {"comm_sms"} | ({"schedule"} if candidate.pp == 1 else set())
    return {name: value for name, value in values.items() if name not in unused}


def state_bytes(engine: Engine) -> dict[str, int]:
    """What is there between steps, by component, bytes of this rank's device."""
    tensors = [tensor for model in engine.models for tensor in (*model.parameters(), *model.buffers())]
    copies = storage_bytes(copy for tensor in tensors for copy in fp8_copy(tensor))
    # Offloaded, they pass through buffers that a peak counts.
    shards = {} if engine.optimizer.staging else engine.optimizer.state_shards()
    by_kind = {
        kind: storage_bytes(s.tensor for name, s in shards.items() if name.startswith("master.") == (kind == "masters"))
        for kind in ("masters", "moments")
    }
    gradients = sum(bucket.grad_bytes for bucket in engine.optimizer.buckets)
    return {"weights": storage_bytes(tensors), "fp8_copies": copies, "gradients": gradients} | by_kind


def device_bytes(engine: Engine) -> dict[str, int]:
    """What a GPU's peak has above the state, and what is in use there and not torch's; nothing for a CPU."""
    device = engine.mesh.device
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    above = torch.cuda.max_memory_allocated(device) - sum(state_bytes(engine).values())
    return {"step": above, "reserved": total - free - torch.cuda.memory_reserved(device)}
