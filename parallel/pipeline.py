"""Pipeline parallelism: layers split over stages, micro-batches sent through them by a named schedule.

arXiv:2412.19437 §3.2.1. The schedules are those of `torch.distributed.pipelining`:

    1F1B, 2 ranks               rank 0: stage 0         rank 1: stage 1
    Interleaved..., 2 ranks     rank 0: stages 0, 2     rank 1: stages 1, 3
    ZBVZeroBubble, DualPipeV    rank 0: stages 0, 3     rank 1: stages 1, 2     so one rank begins and ends

A stage is any module called as `stage(inbound, **inputs)`: every rank gets the same `inputs` (token ids, labels), only
`inbound`, the hidden state [sequences, tokens, hidden], travels. The stage that ends returns the loss, a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import deferred
from parallel.collectives import texts_of
from parallel.mesh import Mesh
from parallel.phases import Phases
from parallel.schedules import MOST_MESSAGES
from parallel.waiting import waiting

if TYPE_CHECKING:
    from parallel.pipeline_stage import ScheduledStage

Inputs = Mapping[str, Tensor]


class Pipeline:
    """Runs the micro-batches of a step through the stages of all pipeline ranks; with one rank, through its one stage.

    Args:
        stages: stage index -> module, those of this rank.
        mesh: its layout names the schedule.
        hidden_size: last dim of the hidden state between stages, in `dtype`.
    """

    def __init__(self, stages: Mapping[int, nn.Module], *, mesh: Mesh, hidden_size: int, dtype: torch.dtype) -> None:
        self.stages, self.mesh = dict(stages), mesh
        self.hidden_size, self.dtype = hidden_size, dtype
        self.num_stages = mesh.layout.num_stages
        self._built_for: tuple[object, ...] | None = None
        self._schedule: Any = None
        self._running: list[ScheduledStage] = []

    def run(self, inputs: Inputs, *, num_micro_batches: int) -> None:
        """Forward and backward of every micro-batch; gradients go to `main_grad`, losses to the stages' step metrics.

        Args:
            inputs: name -> [sequences, tokens]; `input_ids` and `labels` among them; the same on every pipeline rank.
            num_micro_batches: divides sequences. When it changes, only the schedule is built again.
        """
        if self.mesh.pp.size == 1:
            (stage,) = self.stages.values()
            for chunk in split(inputs, num_micro_batches):
                stage(chunk["input_ids"], **chunk).backward()
            return
        schedule = self._schedule_for(inputs["input_ids"], num_micro_batches)
        first = (inputs["input_ids"],) if 0 in self.stages else ()
        # The stage that ends has computed the loss itself. torch only hands it on, but demands a target.
        last = {"target": inputs["labels"]} if self.num_stages - 1 in self.stages else {}
        # torch would ask a custom autograd function for its gradients twice, for inputs and for weights. So linears
        # hand their wgrad to `kernels.deferred`, and the schedule runs it in its W slot through `dw_builder`; a
        # schedule without W slots runs it right after each backward.
        # Outside its chunks of work a rank of the pipeline waits.
        with deferred.deferred(), waiting():
            schedule.step(*first, **last, **inputs, return_outputs=False)
            for running in self._running:
                running.finish_sends()

    @torch.no_grad()
    def relay(self, inputs: Inputs, forward: Callable[[nn.Module, Tensor | None], Tensor]) -> Tensor | None:
        """One micro-batch forward through all stages in order, for evaluation: no schedule, no overlap.

        Args:
            inputs: as in `run`, of one micro-batch.
            forward: (stage, inbound or None where it begins) -> the stage's output.
        Returns:
            The last stage's result on the rank that holds it, None elsewhere.
        """
        layout, pp = self.mesh.layout, self.mesh.pp
        carried: Tensor | None = None
        for index in range(self.num_stages):
            here = layout.rank_of_stage(index)
            before = layout.rank_of_stage(index - 1) if index else here
            if before != here and pp.rank == before:
                assert carried is not None
                dist.send(carried, group=pp.group, group_dst=here)
                carried = None
            if pp.rank != here:
                continue
            if before != here:
                carried = self._empty_hidden(inputs["input_ids"])
                dist.recv(carried, group=pp.group, group_src=before)
            carried = forward(self.stages[index], carried).contiguous()
        return carried if self.num_stages - 1 in self.stages else None

    def most_in_flight(self, num_micro_batches: int) -> int:
        """The most micro-batches whose activations this rank holds at once, counted per stage."""
        if self.mesh.pp.size == 1:
            return 1
        sample = torch.empty(num_micro_batches, 1, dtype=torch.int64, device="meta")
        schedule = self._new_schedule(self._new_stages(sample[:1]), num_micro_batches)
        # Activations are held from a stage's forward to its weight gradients, which need them too.
        held = most = 0
        order = [action for action in schedule.pipeline_order[self.mesh.pp.rank] if action is not None]
        # An overlapped pair is one action of two, forward first: both are held while it runs.
        for part in (part for action in order for part in action.sub_actions or (action,)):
            kind = part.computation_type.name
            held += (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
            most = max(most, held)
        return most

    def _empty_hidden(self, input_ids: Tensor) -> Tensor:
        return torch.empty(*input_ids.shape, self.hidden_size, dtype=self.dtype, device=input_ids.device)

    def _schedule_for(self, input_ids: Tensor, num_micro_batches: int) -> Any:
        """The schedule for this many micro-batches of this shape; kept until either changes."""
        shape = (input_ids.shape[0] // num_micro_batches, *input_ids.shape[1:])
        wanted = (num_micro_batches, shape)
        if self._built_for != wanted:
            self._running = self._new_stages(torch.empty(shape, dtype=input_ids.dtype, device="meta"))
            self._schedule = self._new_schedule(self._running, num_micro_batches)
            self._refuse_other_orders()
            self._built_for = wanted
        return self._schedule

    def _refuse_other_orders(self) -> None:
        """A collective call of the ranks of `ep`: in a step they would wait for each other without end."""
        from parallel.overlap import PhasedStage, order_of

        mesh, phased = self.mesh, [stage for stage in self._running if isinstance(stage, PhasedStage)]
        if not phased or mesh.ep.size == 1:
            return
        orders = texts_of(order_of(phased, self._schedule.pipeline_order[mesh.pp.rank]), mesh.ep, device=mesh.device)
        other = next((rank for rank, order in enumerate(orders) if order != orders[0]), None)
        if other is not None:
            raise ValueError(
                f"ranks 0 and {other} of an expert group issue their exchanges in different orders: {orders[0]}; "
                f"{orders[other]}: start all ranks with the same code and configuration"
            )

    def _new_stages(self, sample: Tensor) -> list[ScheduledStage]:
        """This rank's stages as torch wants them; `sample` is the token ids of one micro-batch on the meta device."""
        from parallel.overlap import PhasedStage
        from parallel.pipeline_stage import MessagesUnderWay, ScheduledStage, WaitingWgrads

        # Shapes are given: else torch runs the model once to infer them.
        hidden = self._empty_hidden(sample).requires_grad_()
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        waiting = WaitingWgrads(self.mesh.layout.max_waiting_wgrads)
        messages = MessagesUnderWay(MOST_MESSAGES) if self.mesh.layout.facts.chunks != 1 else None
        phased = self.mesh.layout.schedule == "DualPipeV" and all(isinstance(m, Phases) for m in self.stages.values())
        return [
            (PhasedStage if phased else ScheduledStage)(
                module,
                index,
                self.num_stages,
                self.mesh.device,
                input_args=sample if index == 0 else hidden,
                output_args=loss if index == self.num_stages - 1 else hidden,
                group=self.mesh.pp.group,
                dw_builder=deferred.take,
                waiting=waiting,
                messages=messages,
            )
            for index, module in sorted(self.stages.items())
        ]

    def _new_schedule(self, stages: list[ScheduledStage], num_micro_batches: int) -> Any:
        from torch.distributed.pipelining.schedules import OVERLAP_F_B, get_schedule_class

        from parallel.overlap import Pairs, PhasedStage

        # A step of the batch ramp may have too few micro-batches for the layout's own.
        facts = self.mesh.layout.facts.of_step(self.mesh.pp.size, num_micro_batches)
        assert facts is not None, "check_layout refuses such a ramp"
        given = stages[0] if facts.chunks == 1 else stages
        schedule_class = get_schedule_class(facts.name)
        schedule = schedule_class(given, num_micro_batches, loss_fn=lambda output, _: output, scale_grads=False)
        if phased := [stage for stage in stages if isinstance(stage, PhasedStage)]:
            schedule.register_custom_function(OVERLAP_F_B, Pairs(phased))
        return schedule


def split(inputs: Inputs, num_micro_batches: int) -> list[dict[str, Tensor]]:
    """The inputs of each micro-batch, in order: equal chunks along the first dim."""
    chunks = {name: tensor.chunk(num_micro_batches) for name, tensor in inputs.items()}
    assert all(len(each) == num_micro_batches for each in chunks.values()), num_micro_batches
    return [{name: each[i] for name, each in chunks.items()} for i in range(num_micro_batches)]
