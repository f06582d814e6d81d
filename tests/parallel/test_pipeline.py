"""Two pipeline ranks against one process: what a schedule computes, how often, and what it holds meanwhile.

Each rank takes every step twice, through the pipeline and with the whole model in its own process, and sends home what
it found, in numbers. The bound on gradients is that of `tests/parity/test_layouts.py`; what only re-arranges is bit-equal.
Splits of layers are compared with all possible ones.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import parallel.pipeline
from kernels import deferred
from kernels.cross_entropy import cross_entropy_sum
from parallel.mesh import Layout, init_processes, make_mesh
from parallel.pipeline import Pipeline, balanced_split
from parallel.schedules import SCHEDULES, stage_ids
from tests.operator_calls import OperatorCalls
from tests.parity.layout_theorem import MODEL, NOW, batch_of, engine_on, gradient_pieces
from tests.ranks import run_ranks
from train.data.batch import Batch
from train.model.transformer import recompute_up_projections
from train.stage import Stage
from train.step import Engine, StepGradients, apply_update, compute_gradients

# A gradient is a sum over at most 384 tokens, regrouped: sqrt(384) 2^-24 times 4 for cancellation (docs/numerics.md).
GRADIENT_BOUND = 5e-6
LAYOUTS = {
    "1F1B": Layout(pp=2, stage_layers=(3, 2)),
    "ZBVZeroBubble": Layout(pp=2, schedule="ZBVZeroBubble", stage_layers=(2, 1, 1, 1)),
}
# Micro-batches, and sequences of each: repeated, fewer, back again, longer ones, too few to fill the pipeline.
CASES = ((8, 2), (8, 2), (4, 2), (8, 2), (4, 4), (2, 2))
# Which schedule object runs each case: a new one whenever the number or the shape of micro-batches changes.
SCHEDULE_OF_CASE = [0, 0, 1, 2, 3, 4]


# Layers over stages.


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    """All ways to give each stage at least one of so many layers."""
    ends = [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), stages - 1)]
    return [tuple(end - start for start, end in itertools.pairwise(cut)) for cut in ends]


def stage_costs(costs: list[float], cut: tuple[int, ...]) -> list[float]:
    rest = iter(costs)
    return [sum(itertools.islice(rest, layers)) for layers in cut]


@pytest.mark.parametrize("stages", range(1, 6))
def test_a_balanced_split_is_the_best_of_all_cuts(stages: int) -> None:
    """Cheapest dearest stage, then least sum of squares, then the first: whole costs, so that every sum is exact."""
    rng = random.Random(stages)
    for layers, spread, _ in itertools.product(range(stages, 10), (1, 3, 1000), range(8)):
        costs = [float(rng.randint(1, spread)) for _ in range(layers)]
        rated = {}
        for cut in every_cut(layers, stages):
            parts = stage_costs(costs, cut)
            rated[cut] = (max(parts), sum(part * part for part in parts), cut)
        assert balanced_split(costs, stages) == min(rated, key=rated.__getitem__), costs


def test_a_split_keeps_the_dearest_stage_cheap_and_evens_out_the_others() -> None:
    # By hand. The head makes the last layer dear; of (3, 1, 2, 1, 2) and (4, 1, 1, 1, 2), both bound by 13, the first.
    assert balanced_split([1, 1, 1, 5, 8, 1, 13, 2, 2], 5) == (3, 1, 2, 1, 2)
    assert balanced_split([1.0] * 61, 16) == (3, 3, 3) + (4,) * 13
    # A layer dearer than all others together stands alone, and no stage is empty for it.
    assert balanced_split([1, 1, 1, 100], 3) == (1, 2, 1)


# What the stages of a rank do in a step.


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


WATCH = Watch()


class WatchedStage(parallel.pipeline._Stage):
    """The stage of the product, telling WATCH what it does."""

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        WATCH.received("forward", self.stage_index, fwd_chunk_id, [op.tensor for op in operations])
        WATCH.look(f"receive {self.stage_index} {fwd_chunk_id}")
        return operations

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        WATCH.received("backward", self.stage_index, bwd_chunk_id, [op.tensor for op in operations])
        WATCH.look(f"receive gradient {self.stage_index} {bwd_chunk_id}")
        return operations

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        WATCH.began()
        WATCH.look(f"forward {self.stage_index} {fwd_chunk_id}")
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if kwargs.get("full_backward", True):
            WATCH.finished(self.stage_index, bwd_chunk_id)
        WATCH.look(f"backward {self.stage_index} {bwd_chunk_id}")

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        WATCH.finished(self.stage_index, bwd_chunk_id)
        WATCH.look(f"weights {self.stage_index} {bwd_chunk_id}")


# One step after another on one Pipeline, beside the same steps of one process.


@dataclass
class StepFacts:
    """One rank's view of one step.

    same_losses: bit for bit those of one process. error: the worst parameter's relative gradient error, and its name.
    repeats: whether the gradients have the bits of the first step (None: other tokens or partition). schedule: number
    of the schedule object. forwards: calls of each stage. held, announced: most micro-batches in flight, seen and said.
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
class Walk:
    """What one rank found; see `walk`."""

    steps: list[StepFacts]
    queue_survived: bool
    same_hidden: bool | None
    same_score: bool | None
    holds: dict[int, set[str]]
    one_embedding: bool
    embeddings: list[str]


def part_of_batch(micro_batches: int, sequences: int) -> Batch:
    whole = batch_of(0)
    count = micro_batches * sequences
    return Batch(whole.input_ids[:count], whole.labels[:count])


def gradients_of(engine: Engine, micro_batches: int, sequences: int) -> StepGradients:
    batch, count = part_of_batch(micro_batches, sequences), micro_batches * sequences
    return compute_gradients(engine, batch, num_micro_batches=micro_batches, num_sequences=count, now=NOW)


def copied_gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: piece.local.clone() for name, piece in gradient_pieces(engine).items()}


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


# Schedule, and every rank's walk under it.
Walks = tuple[str, list[Walk]]


class Walker:
    """The engine of this rank and one of the whole model, through CASES."""

    def __init__(self, layout: Layout) -> None:
        parallel.pipeline._Stage = WatchedStage  # type: ignore[misc]
        self.engine, self.alone = engine_on(layout, "fp32"), engine_on(None, "fp32")
        self.weights = weights_of(self.engine)
        self.schedules: list[Any] = []
        self.first: dict[str, Tensor] | None = None
        self.calls: Counter[int] = Counter()
        for index, stage in self.engine.stages.items():
            stage.register_forward_pre_hook(partial(self._count, index))

    def _count(self, index: int, *_: Any) -> None:
        self.calls[index] += 1

    def step(self, micro_batches: int, sequences: int) -> StepFacts:
        truth = losses_of(gradients_of(self.alone, micro_batches, sequences))
        true_gradients = copied_gradients(self.alone)
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

    def relayed(self, forward: Callable[[dict[str, Tensor], nn.Module, Tensor | None], Tensor]) -> bool | None:
        """Whether an evaluation of 3 sequences has the bits of one process; None where nothing comes out."""
        whole = batch_of(1)
        inputs = Batch(whole.input_ids[:3], whole.labels[:3]).inputs(torch.device("cpu"))
        truth = self.alone.pipeline.relay(inputs, partial(forward, inputs))
        found = self.engine.pipeline.relay(inputs, partial(forward, inputs))
        assert truth is not None
        return None if found is None else torch.equal(found, truth)

    def updates(self, count: int) -> list[str]:
        """Digests of this rank's embedding weights, before and after each of so many updates."""
        digests = [digest(weight) for weight in self.embeddings()[:1]]
        for update in range(1, count + 1):
            result = gradients_of(self.engine, *CASES[0])
            apply_update(self.engine, result, now=NOW, update=update)
            digests += [digest(weight) for weight in self.embeddings()[:1]]
        return digests

    def embeddings(self) -> list[nn.Parameter]:
        return [model.embed_tokens.weight for model in self.engine.models if hasattr(model, "embed_tokens")]

    def one_embedding(self) -> bool:
        """Whether this rank has one embedding: one tensor, one gradient, one entry in the optimizer."""
        segments = [segment for bucket in self.engine.optimizer.buckets for segment in bucket.segments()]
        entries = [segment for segment in segments if segment.name == "embed_tokens.weight"]
        return len({id(weight) for weight in self.embeddings()}) == len(entries) == 1


def digest(weight: Tensor) -> str:
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def buffers_in(schedule: Any) -> int:
    """Receive buffers that torch's stages still hold."""
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    tables = [table for stage in stages for table in (stage.args_recv_info, stage.grad_recv_info)]
    infos = [info for table in tables for row in table.values() for info in row]
    assert infos, "a pipeline of two ranks receives something on every rank"
    return sum(info.buffer is not None for info in infos)


def hidden_of(inputs: dict[str, Tensor], stage: nn.Module, inbound: Tensor | None) -> Tensor:
    assert isinstance(stage, Stage)
    return stage.model.next_token_hidden(inputs["input_ids"], None, inbound)


def score_of(inputs: dict[str, Tensor], stage: nn.Module, inbound: Tensor | None) -> Tensor:
    assert isinstance(stage, Stage)
    hidden = hidden_of(inputs, stage, inbound)
    if not stage.model.part.ends:
        return hidden
    return cross_entropy_sum(stage.model.logits(hidden).flatten(0, 1), inputs["labels"].flatten())


def walk(rank: int, world: int, layout: Layout) -> Walk:
    """CASES step by step without an update, then evaluations, then three updates."""
    walker = Walker(layout)
    steps = [walker.step(*case) for case in CASES]
    return Walk(
        steps=steps,
        queue_survived=walker.queue_survives(),
        same_hidden=walker.relayed(hidden_of),
        same_score=walker.relayed(score_of),
        holds={
            index: {name for name, _ in stage.model.named_children()} for index, stage in walker.engine.stages.items()
        },
        one_embedding=walker.one_embedding(),
        embeddings=walker.updates(3),
    )


@pytest.fixture(scope="module", params=LAYOUTS)
def walks(request: pytest.FixtureRequest) -> Walks:
    """Schedule, and what each of two ranks found under it."""
    return request.param, run_ranks(2, walk, LAYOUTS[request.param])


def test_any_number_of_micro_batches_gives_the_losses_and_gradients_of_one_process(walks: Walks) -> None:
    """8, 8, 4, 8 micro-batches, longer ones, and fewer than fill the pipeline, one after another."""
    for facts in (facts for rank in walks[1] for facts in rank.steps):
        assert facts.same_losses, "a pipeline changes no bit of the forward"
        assert facts.error[0] <= GRADIENT_BOUND, facts.error
        assert facts.pending == 0


def test_a_step_repeats_bit_for_bit_the_first_one_included(walks: Walks) -> None:
    """torch left to itself infers shapes by a forward and a backward of the first step, which stay in the gradients."""
    for rank in walks[1]:
        assert [facts.repeats for facts in rank.steps] == [True, True, None, True, None, None]
        for facts, (micro_batches, _) in zip(rank.steps, CASES, strict=True):
            assert set(facts.forwards.values()) == {micro_batches}
            assert facts.forwards.keys() == rank.holds.keys()


def test_only_another_number_or_shape_of_micro_batches_makes_a_new_schedule(walks: Walks) -> None:
    for rank in walks[1]:
        assert [facts.schedule for facts in rank.steps] == SCHEDULE_OF_CASE
        assert all(facts.same_weights for facts in rank.steps)
        assert rank.queue_survived


def test_receive_buffers_live_from_the_receive_to_the_end_of_the_backward(walks: Walks) -> None:
    """Looked at after every event: exactly the memory of micro-batches received and not yet finished is there."""
    name, ranks = walks
    for facts in (facts for rank in ranks for facts in rank.steps):
        assert facts.surprises == []
        assert (facts.left_in_memory, facts.left_in_stages) == (0, 0)
        assert sum(facts.most_alive.values()) > 0, "or nothing was looked at"
        # What is in flight bounds the inputs and the gradients that wait.
        assert max(facts.most_alive.values()) <= facts.held
    if name == "1F1B":
        assert [rank.steps[0].most_alive for rank in ranks] == [
            {"forward": 0, "backward": 1},
            {"forward": 1, "backward": 0},
        ]


def test_most_in_flight_is_what_a_run_holds(walks: Walks) -> None:
    for facts in (facts for rank in walks[1] for facts in rank.steps):
        assert facts.held == facts.announced


def test_relay_scores_as_one_process_does(walks: Walks) -> None:
    """The hidden state and the loss of 3 sequences, bit for bit, on the rank that ends and on no other."""
    name, ranks = walks
    ends = {"1F1B": 1, "ZBVZeroBubble": 0}[name]
    for rank, found in enumerate(ranks):
        expected = True if rank == ends else None
        assert (found.same_hidden, found.same_score) == (expected, expected)


def test_embedding_head_and_mtp_lie_where_the_model_begins_and_ends(walks: Walks) -> None:
    name, ranks = walks
    begins, ends = {"embed_tokens"}, {"embed_tokens", "norm", "lm_head"}
    placed = [{index: parts - {"layers", "mtp"} for index, parts in rank.holds.items()} for rank in ranks]
    if name == "1F1B":
        # MTP reads a copy of the embedding where the model ends.
        assert placed == [{0: begins}, {1: ends}]
        assert [rank.one_embedding for rank in ranks] == [True, True]
        assert ranks[0].embeddings == ranks[1].embeddings
    else:
        # The rank that begins also ends: both stages read one tensor, with one gradient.
        assert placed == [{0: begins, 3: ends}, {1: set(), 2: set()}]
        assert [rank.one_embedding for rank in ranks] == [True, False]
        assert ranks[1].embeddings == []
    # Before and after each of three updates; every update moved it.
    assert len(set(ranks[0].embeddings)) == 4


# How often each operator runs.

MICRO_BATCHES = 8
BLOCKS = MODEL.num_hidden_layers + MODEL.num_nextn_predict_layers
# MLA: q_kv_a, q_b, kv_b, o. A dense FFN or a shared expert: gate_up, down. Routed experts: two stacks.
LINEARS = 6 * BLOCKS
STACKS = 2 * (BLOCKS - MODEL.first_k_dense_replace)
EACH_STEP = {
    # fprop and dgrad; wgrad.
    "gemm_tile_block": 2 * LINEARS * MICRO_BATCHES,
    "gemm_tile_tile": LINEARS * MICRO_BATCHES,
    "grouped_gemm_tile_block": 2 * STACKS * MICRO_BATCHES,
    "grouped_gemm_tile_tile": STACKS * MICRO_BATCHES,
    # The input and the gradient along channels, the gradient along tokens, the kept input regrouped.
    "quantize_tiles": 2 * (LINEARS + STACKS) * MICRO_BATCHES,
    "quantize_tiles_transposed": (LINEARS + STACKS) * MICRO_BATCHES,
    "requantize_transposed": (LINEARS + STACKS) * MICRO_BATCHES,
}
# Each weight once, however many micro-batches use it.
FIRST_STEP = EACH_STEP | {"quantize_blocks": LINEARS + STACKS}
# q_b and kv_b run their fprop again, on an input quantised again.
AGAIN = {"gemm_tile_block": 2 * BLOCKS * MICRO_BATCHES, "quantize_tiles": 2 * BLOCKS * MICRO_BATCHES}


@dataclass
class Calls:
    """Operator -> calls on this rank: the first step, the next, one with recomputation; and of one process alike.

    same_bits: whether recomputation left every gradient as it was. surprises: see Watch.
    """

    pipeline: list[Counter[str]]
    alone: list[Counter[str]]
    same_bits: bool
    surprises: list[str]


def counted(engine: Engine) -> Counter[str]:
    with OperatorCalls() as calls:
        gradients_of(engine, MICRO_BATCHES, 2)
    return calls.counts


def count_calls(rank: int, world: int, layout: Layout) -> Calls:
    """Three FP8 steps on this rank's stages and on the whole model; the last one recomputes up-projections."""
    parallel.pipeline._Stage = WatchedStage  # type: ignore[misc]
    engine, alone = engine_on(layout, "fp8"), engine_on(None, "fp8")
    of_pipeline, of_alone = [counted(engine), counted(engine)], [counted(alone), counted(alone)]
    kept = copied_gradients(engine)
    for model in (*engine.models, *alone.models):
        recompute_up_projections(model)
    of_pipeline.append(counted(engine))
    of_alone.append(counted(alone))
    return Calls(of_pipeline, of_alone, same_bits(copied_gradients(engine), kept), WATCH.surprises)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_fp8_gemm_runs_exactly_once_per_micro_batch(name: str) -> None:
    """Summed over ranks every operator runs as often as in one process: fprop, dgrad and wgrad of each linear."""
    ranks = run_ranks(2, count_calls, LAYOUTS[name])
    for step, expected in enumerate([FIRST_STEP, EACH_STEP, Counter(EACH_STEP) + Counter(AGAIN)]):
        total = ranks[0].pipeline[step] + ranks[1].pipeline[step]
        assert total == ranks[0].alone[step] == ranks[1].alone[step]
        fp8 = {operator: count for operator, count in total.items() if "gemm" in operator or "quantize" in operator}
        assert fp8 == expected
    # Beyond its GEMMs and their quantisation, recomputation repeats no operator: no attention core, no wgrad.
    assert sum((rank.pipeline[2] - rank.pipeline[1] for rank in ranks), Counter()) == Counter(AGAIN)
    for rank in ranks:
        assert rank.same_bits
        assert rank.surprises == []


# What a schedule of any size holds.


def announced(rank: int, world: int, ranks: int, counts: list[int]) -> dict[tuple[str, int], list[int]]:
    """(schedule, micro-batches) -> what each of so many ranks would hold; one process plays them in turn."""
    found: dict[tuple[str, int], list[int]] = {}
    for pp_rank in range(ranks):
        dist.destroy_process_group()
        init_processes(rank=pp_rank, world=ranks, backend="fake", store=None)
        for name in SCHEDULES:
            mesh = make_mesh(Layout(pp=ranks, schedule=name), device=torch.device("cpu"), tied_embedding=False)
            modules = {index: nn.Identity() for index in stage_ids(name, ranks, pp_rank)}
            pipeline = Pipeline(modules, mesh=mesh, hidden_size=1, dtype=torch.float32)
            for count in (count for count in counts if count >= SCHEDULES[name].min_micro_batches(ranks)):
                found.setdefault((name, count), []).append(pipeline.most_in_flight(count))
    return found


@pytest.mark.parametrize(("ranks", "counts"), [(4, [1, 2, 4, 7, 20]), (16, [16, 31, 120])])
def test_most_in_flight_has_the_known_values(ranks: int, counts: list[int]) -> None:
    """1F1B: rank r warms up with pp - r. ZBV: 2 pp on every rank, half the size each, once it is filled."""
    (found,) = run_ranks(1, announced, ranks, counts)
    for (name, count), held in found.items():
        if name == "1F1B":
            assert held == [min(ranks - rank, count) for rank in range(ranks)]
        elif count >= 2 * ranks - 1:
            assert held == [2 * ranks] * ranks
        else:
            # No rank holds more than both its stages can of what there is.
            assert all(count <= most <= min(2 * ranks, 2 * count) for most in held)
    assert {name for name, _ in found} == set(SCHEDULES)
