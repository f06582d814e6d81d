"""A forward and a backward of two micro-batches that are issued by turns, phase by phase: a pair of DualPipeV.

arXiv:2412.19437 §3.2.1, figure 4. Of one MoE layer in either direction, in the order of issue:

    B combine | F attend, route | B shared, experts | F dispatch | B dispatch
    W | F experts, shared, combine | B route, attend

so that every exchange of tokens (dispatch and combine, of either direction) stands between computation of the other
micro-batch. Names of phases alone decide the order: the ranks of an expert-parallel group, which own the same stages
and run the same pairs, meet in each exchange. What torch does around a forward and a backward stays as it is.

An exchange is in flight (`parallel/flight.py`) from its phase until its micro-batch reads what it brings: in forward
when its turn comes again, in backward when `Slot.take` hands the gradient to the phase that made the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import deferred
from parallel.flight import Lane
from parallel.phases import Phases, Tape, border, slot_of
from parallel.pipeline_stage import ScheduledStage
from parallel.waiting import working

# Phases in which tokens travel, and those after which the other micro-batch takes its turn.
EXCHANGES = ("dispatch", "combine")
FORWARD_TURNS = ("route", "dispatch", "combine")
BACKWARD_TURNS = ("combine", "experts", "dispatch")


def take_turns(
    forward: Generator[str, None, None], backward: Generator[str, None, None]
) -> Generator[tuple[str, str], None, None]:
    """Issue both to their ends; yields ("F" or "B", phase) as each has been issued, and ("W", "") for weight gradients.

    Weight gradients of the backward are issued behind a forward's exchange, or behind the backward's dispatch where
    that is next, and once the forward has ended behind each turn of the backward. Where one side has fewer layers, the
    rest of the other runs alone.
    """
    running = {"B": (backward, BACKWARD_TURNS), "F": (forward, FORWARD_TURNS)}
    # The last phase of each side's last turn.
    last: dict[str, str | None] = {}
    while running:
        for side, (phases, turns) in [*running.items()]:
            phase = None
            for phase in phases:
                yield side, phase
                if phase in turns:
                    break
            else:
                del running[side]
                phase = None
            last[side] = phase
            # An exchange starts behind what has been launched: both dispatches go before the weight gradients.
            both = last.get("F") == "dispatch" and last.get("B") == ("experts" if side == "F" else "dispatch")
            if (phase in EXCHANGES and not both) if side == "F" else ("F" not in running or both):
                deferred.take()()
                yield "W", ""


@dataclass(frozen=True)
class _MicroBatch:
    """Between forward and backward: what came in and what went out, each with a slot, and the phases in between."""

    tape: Tape
    inbound: Tensor
    output: Tensor


class PhasedStage(ScheduledStage):
    """A stage whose module has `Phases`: torch's part of a forward or a backward finds the computation done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._micro_batches: dict[int, _MicroBatch] = {}
        # Whose computation torch asks for.
        self._asked = -1

    def forward_phases(
        self, chunk_id: int, args: Sequence[Any], inputs: dict[str, Tensor]
    ) -> Generator[str, None, None]:
        """The forward of a micro-batch whose input has arrived."""
        (inbound,) = args if self.is_first else self._retrieve_recv_activations(chunk_id)
        inbound = inbound if self.is_first else border(inbound)
        module, tape = self.submod, Tape(self._anchor)
        assert isinstance(module, Phases)
        output = yield from module.steps(tape.run, inbound, **inputs)
        self._micro_batches[chunk_id] = _MicroBatch(tape, inbound, output)

    def backward_phases(self, chunk_id: int) -> Generator[str, None, None]:
        """The backward of a micro-batch whose gradient has arrived; weight gradients are queued."""
        here = self._micro_batches[chunk_id]
        (grad,) = (torch.ones_like(here.output),) if self.is_last else self._retrieve_recv_grads(chunk_id)
        slot_of(here.output, "the stage after").add(grad)
        del grad
        yield from here.tape.backward()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if fwd_chunk_id not in self._micro_batches:
            with working():
                _issue(self.forward_phases(fwd_chunk_id, *args))
        self._asked = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        if not self._micro_batches[bwd_chunk_id].tape.is_empty:
            with working():
                _issue(self.backward_phases(bwd_chunk_id))
        self._asked = bwd_chunk_id
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._micro_batches[self._asked].output

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor | None], None]:
        inbound = self._micro_batches.pop(self._asked).inbound
        return (None if self.is_first else slot_of(inbound, "the stage before").take(),), None


def order_of(stages: Sequence[PhasedStage], actions: Sequence[object]) -> str:
    """What decides in which order a rank issues the exchanges of a step, in a line."""
    parameters = [name for stage in stages for name, _ in stage.submod.named_parameters()]
    layers, listed = (hashlib.sha256(str(each).encode()).hexdigest()[:8] for each in (parameters, [*actions]))
    turns = f"turns end with {'/'.join(FORWARD_TURNS)} and {'/'.join(BACKWARD_TURNS)}"
    return f"{turns}, {len(actions)} actions ({listed}), {len(parameters)} parameters ({layers})"


def _issue(phases: Generator[str, None, None]) -> None:
    for _ in phases:
        pass


def _wait(receives: dict[tuple[int, int], list[Any]], of: tuple[int, int]) -> None:
    """Wait for a micro-batch's receive and let go of it, for it holds the buffer; where a V turns there is none."""
    for work in receives.pop(of, ()):
        work.wait()


class Pairs:
    """Runs a schedule's overlapped pairs (`OVERLAP_F_B`) on the stages of this rank."""

    def __init__(self, stages: Sequence[PhasedStage]) -> None:
        self._stages = {stage.stage_index: stage for stage in stages}
        self._lane = Lane(stages[0].device)

    def __call__(self, action: Any, context: Any) -> None:
        """One pair: both receives, the phases by turns, then what torch does around a forward and a backward alone."""
        schedule = context.schedule_ref
        forward, backward = action.sub_actions
        ahead, behind = self._stages[forward.stage_index], self._stages[backward.stage_index]
        f, b = forward.microbatch_index, backward.microbatch_index
        args, inputs = context.arg_mbs[f], context.kwarg_mbs[f]
        _wait(schedule.fwd_recv_ops, (ahead.stage_index, f))
        _wait(schedule.bwd_recv_ops, (behind.stage_index, b))
        with working(), self._lane.open():
            for _ in take_turns(ahead.forward_phases(f, args, inputs), behind.backward_phases(b)):
                pass
        output = ahead.forward_one_chunk(f, args, inputs, save_forward_output=False)
        schedule._maybe_compute_loss(ahead, output, context.target_mbs, f)
        if (after := self._stages.get(ahead.stage_index + 1)) is not None:
            after.set_local_fwd_input(output, f)
        behind.backward_one_chunk(b, loss=schedule._maybe_get_loss(behind, b))
        schedule.backward_counter[behind.stage_index] += 1
        if (before := self._stages.get(behind.stage_index - 1)) is not None:
            before.set_local_bwd_input(behind.get_local_bwd_output(b), b)  # type: ignore[no-untyped-call]
