"""What each of two pipeline ranks does and measures for `test_pipeline.py`, beside the same steps of one process.

Each rank takes every step through the pipeline, rank 0 also with the whole model in its own process, and returns what
it found, in numbers. `WatchedStage` is the product's stage and looks at memory after each of its methods.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import parallel.pipeline
import parallel.pipeline_stage
from kernels import deferred
from parallel.layout import Layout
from parallel.mesh import init_processes, make_mesh
from parallel.pipeline import Pipeline
from parallel.pipeline_stage import MessagesUnderWay, WaitingWgrads
from parallel.schedules import SCHEDULES
from tests.operator_calls import OperatorCalls
from tests.parity.layout_theorem import NOW, batch_of, engine_on, gradient_pieces
from train.data.batch import Batch
from train.model.transformer import recompute_up_projections
from train.stage import Stage
from train.step import Engine, StepGradients, apply_update, compute_gradients

# Micro-batches, and sequences of each: repeated, fewer, as few but larger, as at first, too few to fill the pipeline.
CASES = ((6, 2), (6, 2), (4, 2), (4, 4), (6, 2), (2, 2))


@dataclass
class Watch:
    """Events of one step on this rank.

    held: micro-batches whose activations are held, counted per stage. expected: (direction, stage, micro-batch) whose
    receive buffer must exist now; memory: of all that there have been. surprises: where memory was not as expected.
    """

    held: int = 0
    most_held: int = 0
    expected: set[tuple[str, int, int]] = field(default_factory=set)
    memory: dict[tuple[str, int, int], list[StorageWeakRef]] = field(default_factory=dict)
    most_alive: Counter[str] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

    def began(self) -> None:
        self.held += 1
        self.most_held = max(self.most_held, self.held)

    def finished(self, stage: int, micro_batch: int) -> None:
        self.held -= 1
        self.expected -= {("forward", stage, micro_batch), ("backward", stage, micro_batch)}

    def received(self, direction: str, stage: int, micro_batch: int, buffers: list[Tensor]) -> None:
        if buffers:
            key = (direction, stage, micro_batch)
            self.expected.add(key)
            self.memory[key] = [StorageWeakRef(buffer.untyped_storage()) for buffer in buffers]

    def alive(self) -> set[tuple[str, int, int]]:
        return {key for key, storages in self.memory.items() if not all(storage.expired() for storage in storages)}

    def look(self, event: str) -> None:
        """Compare the receive buffers that exist with those that should."""
        alive = self.alive()
        if alive != self.expected:
            self.surprises.append(f"{event}: {sorted(alive)}, expected {sorted(self.expected)}")
        for direction in ("forward", "backward"):
            count = sum(key[0] == direction for key in alive)
            self.most_alive[direction] = max(self.most_alive[direction], count)


# Of the step under way.
WATCH = Watch()


def has_memory(info: Any) -> bool:
    """Whether an entry of torch's tables holds a buffer; one on the meta device is only a shape."""
    buffer: Tensor | None = getattr(info, "buffer", None)
    return buffer is not None and not buffer.is_meta


class WatchedStage(parallel.pipeline_stage.ScheduledStage):
    """The stage of the product, with its events recorded in WATCH."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        WATCH.received("forward", self.stage_index, fwd_chunk_id, [op.tensor for op in operations])
        self.look(f"receive {fwd_chunk_id}")
        return operations

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        WATCH.received("backward", self.stage_index, bwd_chunk_id, [op.tensor for op in operations])
        self.look(f"receive gradient {bwd_chunk_id}")
        return operations

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        WATCH.began()
        self.look(f"forward {fwd_chunk_id}")
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if kwargs.get("full_backward", True):
            WATCH.finished(self.stage_index, bwd_chunk_id)
        elif hasattr(self, "backward_phases"):
            # No weight gradient that waits reaches the input through the graph of its own phase.
            WATCH.expected.discard(("forward", self.stage_index, bwd_chunk_id))
        self.look(f"backward {bwd_chunk_id}")

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        WATCH.finished(self.stage_index, bwd_chunk_id)
        self.look(f"weights {bwd_chunk_id}")

    def look(self, event: str) -> None:
        """Compare what there is with what should be: memory that was received into, and buffers of torch's tables."""
        WATCH.look(f"stage {self.stage_index}, {event}")
        idle = {
            (direction, self.stage_index, micro_batch)
            for direction, table in (("forward", self.args_recv_info), ("backward", self.grad_recv_info))
            for micro_batch, infos in table.items()
            for info in infos
            if has_memory(info) and self._is_remote(info.source)
        }
        if not idle <= WATCH.expected:
            WATCH.surprises.append(
                f"stage {self.stage_index}, {event}: buffers wait for {sorted(idle - WATCH.expected)}"
            )

    def _is_remote(self, stage: Any) -> bool:
        """Two neighbours on one rank hand over the tensor itself, in the same tables."""
        return bool(self.stage_index_to_group_rank[stage] != self.group_rank)


@dataclass
class StepFacts:
    """One rank's view of one step.

    same_losses: bit for bit those of one process. error: the worst parameter's relative gradient error, and its name.
    repeats: whether the gradients have the bits of the first step (None: other tokens or partition). schedule: number
    of the schedule object. forwards: calls of each stage. held, announced: most micro-batches in flight, as counted and
    as `most_in_flight` has it.
    """

    same_losses: bool
    error: tuple[float, str]
    repeats: bool | None
    same_weights: bool
    pending: int
    schedule: int
    forwards: dict[int, int]
    held: int
    announced: int
    surprises: list[str]
    most_alive: dict[str, int]
    left_in_memory: int
    left_in_stages: int


@dataclass
class Calls:
    """Operator -> calls in the first step, the next, and one with recomputation: of this rank, and of one process.

    micro_batches: of each of these steps. same_bits: whether recomputation left every gradient as it was.
    """

    micro_batches: int
    pipeline: list[Counter[str]]
    alone: list[Counter[str]]
    same_bits: bool


@dataclass
class Walk:
    """What one rank found; see `walk`."""

    steps: list[StepFacts]
    queue_survived: bool
    same_hidden: bool | None
    same_score: bool | None
    holds: dict[int, set[str]]
    one_embedding: bool
    embeddings: list[str]
    calls: Calls


def gradients_of(engine: Engine, micro_batches: int, sequences: int) -> StepGradients:
    """Of the first sequences of step 0, so many in each micro-batch; four of them keep documents apart."""
    whole, count = batch_of(0), micro_batches * sequences
    # Sequence i is cut before its last i tokens.
    documents = torch.ones_like(whole.input_ids[:count]).tril(-1).flip(1) if micro_batches == 4 else None
    batch, now = Batch(whole.input_ids[:count], whole.labels[:count], documents), replace(NOW, batch_sequences=count)
    return compute_gradients(engine, batch, num_micro_batches=micro_batches, now=now)


def copied_gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: shard.tensor.clone() for name, shard in gradient_pieces(engine).items()}


def losses_of(result: StepGradients) -> list[float]:
    return [float(loss) for loss in (result.loss_total, result.loss_main, result.loss_mtp, result.loss_balance)]


def worst_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative norm of a parameter's gradient error, and the parameter."""
    return max(
        (float((value.double() - truth[name].double()).norm() / truth[name].double().norm()), name)
        for name, value in found.items()
    )


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {f"{i}.{name}": p.clone() for i, model in enumerate(engine.models) for name, p in model.named_parameters()}


# Losses, and gradients by name.
Truth = tuple[list[float], dict[str, Tensor]]
# Schedule, and every rank's walk under it.
Walks = tuple[str, list[Walk]]


class Walker:
    """The engine of this rank and one of the whole model, through CASES."""

    def __init__(self, layout: Layout) -> None:
        parallel.pipeline_stage.ScheduledStage = WatchedStage  # type: ignore[misc]
        self.engine, self.alone = engine_on(layout, "fp32"), engine_on(None, "fp32")
        self.weights = weights_of(self.engine)
        self.truths: dict[tuple[int, int], Truth] = {}
        self.schedules: list[Any] = []
        self.first: dict[str, Tensor] | None = None
        self.calls: Counter[int] = Counter()
        for index, stage in self.engine.stages.items():
            stage.steps = self._counted(index, stage.steps)  # type: ignore[method-assign]

    def _counted(self, index: int, steps: Callable[..., Any]) -> Callable[..., Any]:
        """A stage's forward, whole or phase by phase, with its calls counted."""

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls.update([index])
            return steps(*args, **kwargs)

        return counting

    def truth(self, micro_batches: int, sequences: int) -> Truth:
        """Losses and gradients of one process: that of rank 0, once for each case, since no weight changes."""
        case = (micro_batches, sequences)
        if case not in self.truths:
            found: list[Truth | None] = [None]
            if dist.get_rank() == 0:
                losses = losses_of(gradients_of(self.alone, *case))
                found = [(losses, copied_gradients(self.alone))]
            dist.broadcast_object_list(found)
            assert found[0] is not None
            self.truths[case] = found[0]
        return self.truths[case]

    def step(self, micro_batches: int, sequences: int) -> StepFacts:
        truth, true_gradients = self.truth(micro_batches, sequences)
        WATCH.__init__()  # type: ignore[misc]
        self.calls.clear()
        losses = losses_of(gradients_of(self.engine, micro_batches, sequences))
        gradients = copied_gradients(self.engine)
        self.first = self.first or gradients
        schedule = self.engine.pipeline._schedule
        if schedule not in self.schedules:
            self.schedules.append(schedule)
        return StepFacts(
            same_losses=losses == truth,
            error=worst_error(gradients, true_gradients),
            repeats=same_bits(gradients, self.first) if (micro_batches, sequences) == CASES[0] else None,
            same_weights=same_bits(weights_of(self.engine), self.weights),
            pending=deferred.pending(),
            schedule=self.schedules.index(schedule),
            forwards=dict(self.calls),
            held=WATCH.most_held,
            announced=self.engine.pipeline.most_in_flight(micro_batches),
            surprises=WATCH.surprises,
            most_alive=dict(WATCH.most_alive),
            left_in_memory=len(WATCH.alive()),
            left_in_stages=buffers_in(schedule),
        )

    def queue_survives(self) -> bool:
        """A weight gradient that waits while the schedule is made anew is still there, and runs once."""
        ran: list[int] = []
        with deferred.deferred():
            deferred.push(lambda: ran.append(1))
            before = self.engine.pipeline._schedule
            after = self.engine.pipeline._schedule_for(batch_of(0).input_ids, 8)
            waited = deferred.pending() == 1 and not ran and after is not before
            deferred.take()()
        return waited and ran == [1] and deferred.pending() == 0

    def relayed(self, forward: Callable[[dict[str, Tensor], Stage, Tensor | None], Tensor]) -> bool | None:
        """Whether an evaluation of 3 sequences has the bits of one process; None where nothing comes out."""
        whole = batch_of(1)
        inputs = Batch(whole.input_ids[:3], whole.labels[:3]).inputs(torch.device("cpu"))
        truth = self.alone.pipeline.relay(inputs, partial(forward, inputs))
        found = self.engine.pipeline.relay(inputs, partial(forward, inputs))
        return None if found is None else torch.equal(found, truth)

    def updates(self, count: int) -> list[str]:
        """Digests of this rank's embedding weights, before and after each of so many updates."""
        digests = [digest(weight) for weight in self.embeddings()[:1]]
        for update in range(1, count + 1):
            result = gradients_of(self.engine, *CASES[-1])
            apply_update(self.engine, result, now=NOW, update=update)
            digests += [digest(weight) for weight in self.embeddings()[:1]]
        return digests

    def embeddings(self) -> list[nn.Parameter]:
        return [model.embed_tokens.weight for model in self.engine.models if hasattr(model, "embed_tokens")]

    def one_embedding(self) -> bool:
        """Whether this rank has one embedding: one tensor, one gradient, one entry in the optimizer."""
        segments = [segment for bucket in self.engine.optimizer.buckets for segment in bucket.parameter_shards()]
        entries = [segment for segment in segments if segment.name == "embed_tokens.weight"]
        return len({id(weight) for weight in self.embeddings()}) == len(entries) == 1


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def buffers_in(schedule: Any) -> int:
    """Receive buffers that torch's stages still hold."""
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    tables = [table for stage in stages for table in (stage.args_recv_info, stage.grad_recv_info)]
    infos = [info for table in tables for row in table.values() for info in row]
    assert infos, "a pipeline of two ranks receives something on every rank"
    return sum(has_memory(info) for info in infos)


def hidden_of(inputs: dict[str, Tensor], stage: Stage, inbound: Tensor | None) -> Tensor:
    return stage.model.next_token_hidden(inputs["input_ids"], None, inbound)


def score_of(inputs: dict[str, Tensor], stage: Stage, inbound: Tensor | None) -> Tensor:
    hidden = hidden_of(inputs, stage, inbound)
    if not stage.model.spec.is_last:
        return hidden
    return stage.model.cross_entropy(hidden, inputs["labels"])


def walk(rank: int, world: int, layout: Layout) -> Walk:
    """CASES step by step without an update, then evaluations, three updates, and the operators of FP8 steps."""
    walker = Walker(layout)
    steps = [walker.step(*case) for case in CASES]
    return Walk(
        steps=steps,
        queue_survived=walker.queue_survives(),
        same_hidden=walker.relayed(hidden_of),
        same_score=walker.relayed(score_of),
        holds={i: {name for name, _ in stage.model.named_children()} for i, stage in walker.engine.stages.items()},
        one_embedding=walker.one_embedding(),
        embeddings=walker.updates(3),
        calls=count_calls(layout),
    )


# (schedule, micro-batches) -> most micro-batches in flight, by rank.
Announced = dict[tuple[str, int], list[int]]


def counted(engine: Engine, micro_batches: int) -> Counter[str]:
    with OperatorCalls() as calls:
        gradients_of(engine, micro_batches, 2)
    counts: Counter[str] = calls.counts
    return counts


def count_calls(layout: Layout) -> Calls:
    """Three FP8 steps on this rank's stages and on the whole model; the last one recomputes up-projections."""
    # In FP8 what backward keeps is not what was received, so these steps are not WATCHed with the others.
    WATCH.__init__()  # type: ignore[misc]
    # The fewest that the schedule itself takes.
    count = next(count for count in (2, 4) if SCHEDULES[layout.schedule].takes(layout.pp, count))
    engine = engine_on(layout, "fp8")
    # One rank is enough to count for the one process.
    alone = [engine_on(None, "fp8")] if dist.get_rank() == 0 else []
    of_pipeline, of_alone = [counted(engine, count) for _ in range(2)], [counted(one, count) for one in alone * 2]
    kept = copied_gradients(engine)
    for model in (model for one in (engine, *alone) for model in one.models):
        recompute_up_projections(model)
    of_pipeline.append(counted(engine, count))
    of_alone += [counted(one, count) for one in alone]
    return Calls(count, of_pipeline, of_alone, same_bits(copied_gradients(engine), kept))


def announced(rank: int, world: int, ranks: int, played: list[int], counts: list[int]) -> Announced:
    """What the played ones of so many ranks would hold with these numbers of micro-batches."""
    found: Announced = {}
    for pp_rank in played:
        dist.destroy_process_group()
        init_processes(rank=pp_rank, world=ranks, backend="fake", store=None)
        for name in SCHEDULES:
            layout = Layout(pp=ranks, schedule=name)
            mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=False)
            modules = {index: nn.Identity() for index in layout.stages_of_rank(pp_rank)}
            pipeline = Pipeline(modules, mesh=mesh, hidden_size=1, dtype=torch.float32)
            for count in (count for count in counts if SCHEDULES[name].takes(ranks, count)):
                found.setdefault((name, count), []).append(pipeline.most_in_flight(count))
    return found


def calls_of(rank: int, world: int, layout: Layout) -> Calls:
    """`count_calls` alone."""
    return count_calls(layout)


def let_wait(rank: int, world: int, limits: list[int | None]) -> list[tuple[int, dict[str, str]]]:
    """For each limit: the most weight gradients that waited in a zero-bubble step, and every gradient's SHA-256."""
    return [_let_wait(limit) for limit in limits]


def _let_wait(limit: int | None) -> tuple[int, dict[str, str]]:
    layout = Layout(pp=2, schedule="ZBVZeroBubble", stage_layers=(2, 1, 1, 1), max_waiting_wgrads=limit)
    most = 0
    add = WaitingWgrads.add

    def counting(self: WaitingWgrads, runner: Callable[..., None]) -> Callable[[], None]:
        nonlocal most
        run = add(self, runner)
        most = max(most, len(self._runners))
        return run

    engine = engine_on(layout, "bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WaitingWgrads, "add", counting)
        gradients_of(engine, 8, 2)
    assert deferred.pending() == 0
    return most, {name: digest(grad) for name, grad in copied_gradients(engine).items()}


class Scale(nn.Module):
    """A stage of one weight: embeds where the pipeline begins, sums where it ends."""

    def __init__(self, index: int, *, is_last: bool) -> None:
        super().__init__()
        self.index, self.is_last = index, is_last
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4) + 0.01 * index)

    def forward(self, inbound: Tensor, *, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = (input_ids[..., None].float() if self.index == 0 else inbound) * self.weight
        return (hidden * labels[..., None]).sum() if self.is_last else hidden


class LateWork:
    """A send whose backend says that it is done only to who waits for it; `live` counts those under way."""

    live = most_live = 0

    def __init__(self, work: Any) -> None:
        self.work = work
        LateWork.live += 1
        LateWork.most_live = max(LateWork.most_live, LateWork.live)

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        self.work.wait()
        LateWork.live -= 1


def send_late(rank: int, world: int, limits: tuple[int, ...]) -> dict[str, list[tuple[int, str]]]:
    """Schedule -> for each limit: the most sends under way at once in a step, and SHA-256 of the gradients."""
    names = [name for name, facts in SCHEDULES.items() if facts.chunks != 1]
    return {name: [_send_late(Layout(pp=world, schedule=name), rank, limit) for limit in limits] for name in names}


def _send_late(layout: Layout, rank: int, limit: int) -> tuple[int, str]:
    isend = MessagesUnderWay.send

    def late(self: MessagesUnderWay, operation: Any) -> None:
        begin = operation.op
        operation.op = lambda *args, **kwargs: LateWork(begin(*args, **kwargs))
        isend(self, operation)

    LateWork.live = LateWork.most_live = 0
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=False)
    last = layout.num_stages - 1
    modules = {index: Scale(index, is_last=index == last) for index in layout.stages_of_rank(rank)}
    pipeline = Pipeline(modules, mesh=mesh, hidden_size=4, dtype=torch.float32)
    count = 4 * layout.pp
    ids = torch.arange(count * 3).reshape(count, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.pipeline, "MOST_MESSAGES", limit)
        patch.setattr(MessagesUnderWay, "send", late)
        pipeline.run({"input_ids": ids, "labels": ids % 5}, num_micro_batches=count)
    assert LateWork.live == 0, "a step ends when all has arrived"
    grads = [module.weight.grad for module in modules.values()]
    assert all(grad is not None for grad in grads)
    return LateWork.most_live, "".join(digest(grad) for grad in grads if grad is not None)
