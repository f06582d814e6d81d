"""Memory of every pipeline rank of a candidate, by component, in closed form: what the search prunes by.

    state         weights, FP8 copies, FP32 gradients, this rank's masters and moments (`state_bytes.py`)
    activations   of all micro-batches in flight and of weight gradients that wait (`stage_bytes.py`), where a forward
                  leaves most of them
    temporaries   how far the highest moment of a step lies above that, buffers of the exchange apart
    messages      hidden states and gradients between ranks that micro-batches do not hold (`moments.py`)
    in_flight     exchanges of a pair, beside both micro-batches
    reserved      what CUDA, NCCL and the allocator take: assumed, not measured

Of the ranks with equal layers, the one with the largest share of the optimizer's states. Routing is as even as
`imbalance` says, in every layer and micro-batch of the rank. Left out: `optim.offload`, which would move masters and
moments to the host; the moving average, which is there; token ids, 16 bytes a token and micro-batch of a step; what
the update gathers, which comes when activations are gone. Two copies of a stage (DualPipe) share masters and moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from train.model.config import ModelConfig
from train.model.sizes import BF16_BYTES, FP32_BYTES, Held, weights
from train.studies.plan.candidate import Candidate
from train.studies.plan.kept import Work
from train.studies.plan.moments import Moment
from train.studies.plan.orders import SCHEDULES
from train.studies.plan.stage_bytes import StageBytes, StageShape, stage_bytes
from train.studies.plan.state_bytes import StateBytes, state_bytes

if TYPE_CHECKING:
    from train.config import PretrainConfig

RESERVED_BYTES = 4e9
IMBALANCES = (1.0, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Footprint:
    """Bytes of the fullest rank of a pipeline rank."""

    weights: float
    fp8_copies: float
    gradients: float
    masters: float
    moments: float
    activations: float
    messages: float
    temporaries: float
    dispatch: float
    in_flight: float
    reserved: float = RESERVED_BYTES

    @property
    def total(self) -> float:
        """At the highest moment of a step."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def footprint(
    config: PretrainConfig, candidate: Candidate, moments: Sequence[Sequence[Moment]], *, imbalance: float = 1.0
) -> list[Footprint]:
    """The memory of each pipeline rank.

    Args:
        config: model, sequence length, `precision.cache_swiglu_input`, `optim.name`, `optim.moments_dtype` and whether
            whole layers run again; all else that decides is the candidate's.
        moments: of each pipeline rank, from `moments.moments`; with one rank they are not read.
        imbalance: how many times its even share the experts of the rank receive.
    """
    assert candidate.pp == 1 or len(moments) == candidate.pp, (len(moments), candidate.pp)
    work = replace(_work(config, candidate), imbalance=imbalance)
    shapes = _shapes(config.model, candidate)
    if candidate.pp == 1:
        moments = [[Moment((), (), 0, (("F", 0),)), Moment(((0, 1),), (), 0, (("B", 0),))]]
    return [_of_rank(config, candidate, work, shapes, of_rank) for of_rank in moments]


def breaking_imbalance(
    config: PretrainConfig, candidate: Candidate, bytes_at: Callable[[float], float], *, limit: float
) -> float | None:
    """The imbalance at which a rank no longer fits `limit` bytes, to 0.001; 1.0 if it never does.

    Args:
        bytes_at: imbalance -> bytes of the rank, or of the fullest one.
    Returns:
        None if a rank fits whose experts get all tokens of their group.
    """
    work = _work(config, candidate)
    low, high = 1.0, work.most_imbalance
    # Beyond a limit on rows memory falls, then rises again: each side has a highest point.
    if low < work.imbalance_at_limit < high:
        if bytes_at(work.imbalance_at_limit) > limit:
            high = work.imbalance_at_limit
        else:
            low = work.imbalance_at_limit
    if bytes_at(high) <= limit:
        return None
    if bytes_at(low) > limit:
        return low
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if bytes_at(middle) <= limit else (low, middle)
    return high


def rows_at(config: PretrainConfig, candidate: Candidate, imbalance: float) -> int:
    """Rows of a rank's experts in one layer and micro-batch."""
    return replace(_work(config, candidate), imbalance=imbalance).rows


def _work(config: PretrainConfig, candidate: Candidate) -> Work:
    return Work(
        model=config.model,
        sequences=candidate.micro_batch_sequences,
        length=config.data.sequence_length,
        ep=candidate.ep,
        precision=candidate.precision,
        recompute=candidate.recompute,
        e5m6=candidate.attention_output == "e5m6",
        swiglu_input=config.precision.cache_swiglu_input,
        deferred=candidate.pp > 1,
        ranks_per_node=candidate.ranks_per_node if candidate.two_hops else None,
        max_rows=candidate.max_expert_rows,
        layers_again=config.run.recompute == "layers",
    )


def _copies(model: ModelConfig, candidate: Candidate) -> int:
    """Of every stage, over all ranks."""
    return sum(candidate.stage_layers) // model.num_hidden_layers


def _shapes(model: ModelConfig, candidate: Candidate) -> list[StageShape]:
    """Of each stage; copies follow one another."""
    stages = len(candidate.stage_layers) // _copies(model, candidate)
    own = candidate.stage_layers[:stages]
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    starts = [*accumulate(own, initial=0)]
    shapes = []
    for index, count in enumerate(own):
        of_dense = min(count, max(0, dense - starts[index]))
        shapes.append(StageShape(of_dense, count - of_dense, index == 0, index == stages - 1))
    return shapes * _copies(model, candidate)


def _of_rank(
    config: PretrainConfig, candidate: Candidate, work: Work, shapes: Sequence[StageShape], moments: Sequence[Moment]
) -> Footprint:
    stages = sorted({stage for moment in moments for _, stage in moment.runs})
    state = _state(config.model, _recipe(config, candidate), tuple(shapes[stage] for stage in stages))
    held = {stage: stage_bytes(work, shapes[stage]) for stage in stages}
    # A V turns without sending: one stage's output is the other's input.
    shared = {stage: work.hidden * (stage - 1 in held) for stage in stages}
    activations = peak = messages = 0.0
    for moment in moments:
        before = sum(count * held[stage].waiting for stage, count in moment.waiting)
        before += sum(count * (held[stage].kept - shared[stage]) for stage, count in moment.live)
        forwards = [held[stage].kept - shared[stage] for kind, stage in moment.runs if kind == "F"]
        activations = max(activations, (before + sum(forwards)) * bool(forwards))
        highest = before + sum(_rise(held[stage], kind) for kind, stage in moment.runs)
        under_way = moment.messages * work.hidden
        if highest + under_way > peak + messages:
            peak, messages = highest, under_way
    dispatch = max(each.dispatch for each in held.values())
    temporaries = max(0.0, peak - activations - dispatch)
    return Footprint(*state, activations, messages, temporaries, dispatch, _in_flight(candidate, work))


def _in_flight(candidate: Candidate, work: Work) -> float:
    """At most: one combine of each of a pair's two micro-batches, all hops."""
    waits = candidate.dispatch == "deepep" or work.layers_again
    if not SCHEDULES[candidate.schedule].pairs or candidate.pp == 1 or candidate.ep == 1 or waits:
        return 0.0
    copies = work.sent + work.received + 2 * work.crossing
    return 2.0 * sum(work.plain(copies, work.model.hidden_size))


def _rise(stage: StageBytes, kind: str) -> float:
    """Above what is held before an action."""
    if kind == "F":
        return stage.forward
    if kind == "W":
        return stage.wgrad
    # A backward whole runs its weight gradients at its end.
    return max(stage.backward, stage.waiting - stage.kept + stage.wgrad) if kind == "B" else stage.backward


class _Recipe(NamedTuple):
    """What a rank's state depends on besides its layers; states are sharded over the copies of a stage too."""

    dp: int
    edp: int
    ep: int
    zero: bool
    precision: str
    keep_bf16_weights: bool
    moment_bytes: int
    moments_of_matrices: int


def _recipe(config: PretrainConfig, candidate: Candidate) -> _Recipe:
    copies = _copies(config.model, candidate)
    moment_bytes = BF16_BYTES if config.optim.moments_dtype == "bf16" else FP32_BYTES
    return _Recipe(
        candidate.dp * copies, candidate.edp * copies, candidate.ep, candidate.zero, candidate.precision,
        candidate.keep_bf16_weights, moment_bytes, config.optim.moments_of_matrices,
    )  # fmt: skip


@cache
def _state(model: ModelConfig, recipe: _Recipe, shapes: tuple[StageShape, ...]) -> StateBytes:
    """The first data rank's, whose shares are no smaller than any other's."""
    first, last = any(shape.is_first for shape in shapes), any(shape.is_last for shape in shapes)
    mtp = tuple(model.mtp_layer_ids) if last else ()
    # Layers of a kind are alike: any ids of that kind do.
    dense = (0,) * sum(shape.dense for shape in shapes)
    moe = (model.num_hidden_layers - 1,) * sum(shape.moe for shape in shapes)
    table = weights(model, Held(dense + moe + mtp, embedding=first or bool(mtp), head=last), ep=recipe.ep)
    precision, kept = recipe.precision, recipe.keep_bf16_weights
    return state_bytes(
        table, recipe, precision=precision, dp_rank=0, keep_bf16_weights=kept, moment_bytes=recipe.moment_bytes,
        moments_of_matrices=recipe.moments_of_matrices,
    )  # fmt: skip
