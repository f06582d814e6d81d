"""Same tokens, any layout, same loss: the reference trajectory, and one rank's comparison with it.

The reference is one process. At each of STEPS steps it writes down its state before the step and what the step gave:
losses, every gradient, their norm, expert counts, and every router's scores and choices. A rank of another layout
starts those of FORCED from that state and takes the step on its share of the same micro-batches (*teacher-forced*).

Choices are forced too: a router whose scores were rounded otherwise may choose another expert, and that is a jump, not
an error. So each rank makes its own choice, compares it with the reference's, notes how close to a tie every token was
that differs, and goes on with the reference's choice.

One thing depends on the layout by design: a token's expert outputs are summed where the experts live, rounded to the
wire's dtype, and summed again at home. `PartialSums` does the same in one process; with it the reference of BF16 and
FP8 differs from expert parallelism by FP32 sums only.

Shapes: gradients flat, as pieces of the global parameter. The bounds are derived in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import kernels.router
from kernels.formats import TILE, CarriedTiles, ceil_div
from kernels.fp8_linear import LinearInput
from kernels.permute import Dispatched, group_gates, partial_grouping
from kernels.tiles import rows_of_tiles
from parallel.layout import Layout
from parallel.mesh import make_mesh, single
from parallel.shards import LocalShard
from tests.tiny_model import TINY
from train.assemble import assemble, build_engine
from train.data.batch import IGNORE_INDEX, Batch
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.moe import Routing
from train.model.phases import Travel
from train.model.precision import Precision
from train.optim.balance import routers
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.stage import build_stages, expert_shards
from train.step import Engine, StepGradients, apply_update, compute_gradients

STEPS = 20
# Of those, the ones that other layouts take: each is a comparison of its own.
FORCED = range(0, STEPS, 7)
# Of 48 tried, the one whose FP32 reference stays furthest from a tie between experts (`Reference.closest_tie`): a free
# run that rounds a tie the other way jumps by 1e-4, and proves nothing about its layout.
DATA_SEED = 4600
SEQUENCES, MICRO_BATCH, TOKENS = 16, 4, 24
# Five layers and two MTP depths; two ragged FP8 tiles along hidden; four routing groups of two experts. Three experts a
# token: with two, no rank ever has two of them to sum and round before they travel.
MODEL: ModelConfig = replace(
    TINY,
    hidden_size=160,
    num_hidden_layers=5,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    initializer_range=0.05,
)
# No clipping: gradients are compared as they come.
OPTIM = OptimConfig(clip_norm=1e9)
NOW = ScheduledValues(lr=2.2e-4, batch_sequences=SEQUENCES, bias_speed=1e-3, mtp_weight=0.3, balance_alpha=0.01)


def batch_of(step: int) -> Batch:
    """16 sequences; they have different numbers of targets, and the second micro-batch has none."""
    generator = torch.Generator().manual_seed(DATA_SEED + step)
    tokens = torch.randint(0, MODEL.vocab_size, (SEQUENCES, TOKENS + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(SEQUENCES):
        labels[row, : 5 * row % TOKENS] = IGNORE_INDEX
    labels[4:8] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), labels)


def _in_order(parts: Tensor, count: int) -> Tensor:
    """The sum of equal parts in FP32, one after the other, rounded once."""
    total, *rest = (part.float() for part in parts.chunk(count))
    for part in rest:
        total = total + part
    return total.to(parts.dtype)


class _Copies(torch.autograd.Function):
    """One copy for each rank; their gradients come home rounded, are summed in FP32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, sums: PartialSums) -> Tensor:
        ctx.sums = sums
        return tokens.repeat(sums.ranks, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.sums.sum_of(grads[0]), None


class PartialSums:
    """A dispatcher of one process that sums as `ranks` expert ranks would: each has a copy of every token.

    With `ranks_per_node` the ranks of a node are summed first, and rounded, as two hops do.
    """

    def __init__(self, ranks: int, experts: int = MODEL.n_routed_experts, ranks_per_node: int | None = None) -> None:
        self.ranks, self.local, self.ranks_per_node = ranks, experts // ranks, ranks_per_node
        self.experts = range(experts)

    def sum_of(self, parts: Tensor) -> Tensor:
        """[ranks * tokens, hidden] -> [tokens, hidden], rounded once, or once more for each node."""
        if self.ranks_per_node is None:
            return _in_order(parts, self.ranks)
        nodes = parts.chunk(self.ranks // self.ranks_per_node)
        return _in_order(torch.cat([_in_order(node, self.ranks_per_node) for node in nodes]), len(nodes))

    def begin(self, routing: Routing) -> object:
        return None

    def dispatch(self, tokens: LinearInput, routing: Routing, begun: object = None) -> Travel[Dispatched]:
        yield from ()
        rank_of_copy = torch.arange(self.ranks).repeat_interleave(len(routing.topk_ids))[:, None]
        ids = routing.topk_ids.repeat(self.ranks, 1)
        ids = torch.where(ids // self.local == rank_of_copy, ids, -1)
        counts = [int((ids == expert).sum()) for expert in self.experts]
        grouping = partial_grouping(ids, len(counts), num_rows=sum(ceil_div(count, TILE) * TILE for count in counts))
        if isinstance(tokens, Tensor):
            copies: LinearInput = _Copies.apply(tokens, self)  # type: ignore[no-untyped-call]
        else:
            rows = torch.arange(len(routing.topk_ids)).repeat(self.ranks)
            carrier = _Copies.apply(tokens.carrier, self)  # type: ignore[no-untyped-call]
            copies = CarriedTiles(carrier, rows_of_tiles(tokens.tiles, rows), tokens.rows)
        gates = group_gates(routing.gates.repeat(self.ranks, 1), grouping)
        return Dispatched(copies, gates, grouping, gradient=None, handle=None)

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Travel[Tensor]:
        yield from ()
        return self.sum_of(sums)


def engine_on(layout: Layout | None, precision: str, *, expert_ranks: int = 1) -> Engine:
    """This rank's engine; None is one process without a process group, which may sum as several expert ranks do."""
    device, numbers = torch.device("cpu"), Precision(precision)  # type: ignore[arg-type]
    if layout is not None:
        mesh = make_mesh(layout, device=device, tied_embedding=True)
        return build_engine(MODEL, numbers, OPTIM, mesh, seed=7)
    mesh = single(device)
    stages = build_stages(MODEL, numbers, mesh, PartialSums(expert_ranks) if expert_ranks > 1 else None)
    initialize(stages[0].model, seed=7, std=MODEL.initializer_range)
    return assemble(stages, OPTIM, mesh)


def state_of(engine: Engine) -> dict[str, Tensor | LocalShard]:
    """Live state by name: parameters, biases, masters and moments."""
    state: dict[str, Tensor | LocalShard] = {}
    for model in engine.models:
        state |= model.state_dict() | expert_shards(model)
    return state | engine.optimizer.state_shards()


def take_step(engine: Engine, step: int) -> StepGradients:
    """Gradients of this rank's share of a step."""
    dp = engine.mesh.dp
    share = batch_of(step).share(dp.rank, dp.size)
    pieces = SEQUENCES // dp.size // MICRO_BATCH
    return compute_gradients(engine, share, num_micro_batches=pieces, now=NOW)


def gradient_pieces(engine: Engine) -> dict[str, LocalShard]:
    """Parameter name -> the mean gradients that this rank owns, as pieces of the flat global parameter."""
    grads = {segment.name: segment.grad for bucket in engine.optimizer.buckets for segment in bucket.parameter_shards()}
    return {
        name: LocalShard.at(grads[name], master.shard.global_shape, master.shard.offsets)
        for name, master in engine.optimizer.masters().items()
    }


@dataclass
class RouterBook:
    """What the routers of one rank did in one step, and what the reference's did.

    first_micro_batch: global number of this rank's first one. known: 'scores.L.m' and 'ids.L.m' of the reference, empty
    while it is the reference that writes. flips: tied margins (biased score) of tokens that chose otherwise.
    """

    first_micro_batch: int
    known: dict[str, Tensor] = field(default_factory=dict)
    written: dict[str, Tensor] = field(default_factory=dict)
    seen: Counter[int] = field(default_factory=Counter)
    layer: int = -1
    score_error: float = 0.0
    flips: list[float] = field(default_factory=list)
    closest_tie: float = 1.0

    def watch(self, engine: Engine) -> None:
        """Learn which router is speaking, and answer in place of `select_experts`."""
        choose = kernels.router.select_experts
        for layer_id, router in routers(engine.models).items():
            router.forward = self._announce(router.forward, layer_id)  # type: ignore[method-assign]

        def select(scores: Tensor, bias: Tensor, **limits: int) -> Tensor:
            return self._select(choose(scores, bias, **limits), scores, bias, limits)

        kernels.router.select_experts = select  # type: ignore[assignment]

    def begin(self, known: dict[str, Tensor]) -> None:
        """Start a step."""
        self.known, self.written, self.seen = known, {}, Counter()

    def _announce(self, forward: Any, layer_id: int) -> Any:
        def speaking(*inputs: Any) -> Any:
            self.layer = layer_id
            return forward(*inputs)

        return speaking

    def _select(self, own: Tensor, scores: Tensor, bias: Tensor, limits: dict[str, int]) -> Tensor:
        key = f"{self.layer}.{self.first_micro_batch + self.seen[self.layer]}"
        self.seen[self.layer] += 1
        if not self.known:
            self.written |= {f"scores.{key}": scores.clone(), f"ids.{key}": own.clone()}
            self.closest_tie = min(self.closest_tie, float(margins(scores + bias, **limits).min()))
            return own
        ids, reference = self.known[f"ids.{key}"], self.known[f"scores.{key}"]
        self.score_error = max(self.score_error, float((scores - reference).abs().max()))
        differs = (own.sort(-1).values != ids.sort(-1).values).any(-1)
        self.flips += margins(reference[differs] + bias, **limits).tolist()
        return ids


def margins(biased: Tensor, *, n_group: int, topk_group: int, topk: int) -> Tensor:
    """How far each token's choice is from a tie, [tokens]: of groups, and of experts inside the chosen groups."""
    grouped = biased.unflatten(-1, (n_group, -1))
    ranked_groups = grouped.topk(2, dim=-1).values.sum(-1).sort(-1, descending=True)
    # Where every group is kept, none can be missed.
    ends = F.pad(ranked_groups.values, (0, 1), value=-math.inf)
    of_groups = ends[:, topk_group - 1] - ends[:, topk_group]
    kept = ranked_groups.indices[:, :topk_group, None].expand(-1, -1, grouped.shape[-1])
    ranked = grouped.gather(1, kept).flatten(1).sort(-1, descending=True).values
    # A group's sum moves by two scores, so half its margin compares with one score.
    return torch.minimum(of_groups / 2, ranked[:, topk - 1] - ranked[:, topk])


@dataclass(frozen=True)
class Reference:
    """What the reference trajectory was: losses of each step, and the smallest margin of any choice."""

    losses: list[tuple[float, ...]]
    closest_tie: float


def write_reference(
    rank: int, world: int, folder: Path, precision: str, expert_ranks: int = 1, steps: int = STEPS
) -> Reference:
    """The free-running trajectory of one process, written to a folder step by step."""
    engine, losses = engine_on(None, precision, expert_ranks=expert_ranks), []
    book = RouterBook(first_micro_batch=0)
    book.watch(engine)
    for step in range(steps):
        state = {name: local_part(value).clone() for name, value in state_of(engine).items()}
        save_file(state, folder / f"state_{step}.safetensors")
        book.begin({})
        result = take_step(engine, step)
        save_file(facts_of(result) | book.written | named_gradients(engine), folder / f"step_{step}.safetensors")
        losses.append(_losses(result))
        apply_update(engine, result, now=NOW, update=step + 1)
    return Reference(losses, book.closest_tie)


def named_gradients(engine: Engine) -> dict[str, Tensor]:
    """Copies of the gradients that this rank owns, by 'grad.<name>'."""
    return {f"grad.{name}": piece.tensor.clone() for name, piece in gradient_pieces(engine).items()}


def facts_of(result: StepGradients) -> dict[str, Tensor]:
    """Counts, losses and norm of a step, by name."""
    counts = {f"counts.{layer}": counts.clone() for layer, counts in result.counts.items()}
    return counts | {"losses": torch.tensor(_losses(result), dtype=torch.float64), "norm": result.grad_norm.clone()}


def _losses(result: StepGradients) -> tuple[float, ...]:
    return tuple(float(x) for x in (result.loss_total, result.loss_main, result.loss_mtp, result.loss_balance))


def local_part(value: Tensor | LocalShard) -> Tensor:
    """The tensor on this rank."""
    return value.tensor if isinstance(value, LocalShard) else value


@torch.no_grad()
def force(engine: Engine, state: dict[str, Tensor]) -> None:
    """Give this rank its part of the reference's state."""
    for name, value in state_of(engine).items():
        source = state[name]
        if isinstance(value, LocalShard):
            for dim, (offset, length) in enumerate(zip(value.shard.offsets, value.tensor.shape, strict=True)):
                source = source.narrow(dim, offset, length)
        local_part(value).copy_(source)


@dataclass
class Comparison:
    """One rank's differences from the reference, the largest over all steps.

    losses: relative, of total, main, mtp, balance. norm: relative. errors: name -> [steps] squared norm of this rank's
    pieces minus the reference's; squares: the same of the whole reference gradient. covered: name -> elements that this
    rank compared; sizes: all names of the reference and their elements. counts_equal: of the step.
    score_error, flips: see RouterBook. free_losses: [steps] of the run that is not forced.
    """

    losses: list[float] = field(default_factory=lambda: [0.0] * 4)
    norm: float = 0.0
    covered: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)
    squares: dict[str, list[float]] = field(default_factory=dict)
    counts_equal: bool = True
    score_error: float = 0.0
    flips: list[float] = field(default_factory=list)
    free_losses: list[tuple[float, ...]] = field(default_factory=list)


def compare(
    rank: int, world: int, layout: Layout, precision: str, folder: Path, *, free: int = 0, steps: Iterable[int] = FORCED
) -> Comparison:
    """This rank's teacher-forced steps; before them so many free ones."""
    engine, found = engine_on(layout, precision), Comparison()
    # Before choices are replaced: a run of its own from the same initial values.
    for step in range(free):
        result = take_step(engine, step)
        found.free_losses.append(_losses(result))
        apply_update(engine, result, now=NOW, update=step + 1)
    book = RouterBook(first_micro_batch=engine.mesh.dp.rank * (SEQUENCES // engine.mesh.dp.size // MICRO_BATCH))
    book.watch(engine)
    for step in steps:
        force(engine, load_file(folder / f"state_{step}.safetensors"))
        reference = load_file(folder / f"step_{step}.safetensors")
        book.begin(reference)
        result = take_step(engine, step)
        compare_step(found, engine, result, reference)
    found.score_error, found.flips = book.score_error, book.flips
    return found


def compare_step(found: Comparison, engine: Engine, result: StepGradients, reference: dict[str, Tensor]) -> None:
    """Add one step's differences to what was found."""
    # `max` below would pass over a NaN.
    assert all(map(math.isfinite, _losses(result))), _losses(result)
    for index, (ours, theirs) in enumerate(zip(_losses(result), reference["losses"].tolist(), strict=True)):
        # Without MTP, its loss is 0.
        found.losses[index] = max(found.losses[index], abs(ours - theirs) / max(abs(theirs), 1e-30))
    norm = float(reference["norm"])
    found.norm = max(found.norm, abs(float(result.grad_norm) - norm) / norm)
    for layer, counts in result.counts.items():
        found.counts_equal &= torch.equal(counts, reference[f"counts.{layer}"])
    sizes = {key.removeprefix("grad."): grad.numel() for key, grad in reference.items() if key.startswith("grad.")}
    pieces = gradient_pieces(engine)
    found.covered = {name: piece.tensor.numel() for name, piece in pieces.items()}
    found.sizes = sizes
    for name, piece in pieces.items():
        whole = reference[f"grad.{name}"].double()
        assert piece.shard.global_shape == tuple(whole.shape), name
        assert piece.tensor.isfinite().all(), name
        part = whole[piece.shard.offsets[0] : piece.shard.offsets[0] + len(piece.tensor)]
        found.errors.setdefault(name, []).append(float((piece.tensor.double() - part).square().sum()))
        found.squares.setdefault(name, []).append(float(whole.square().sum()))


@dataclass(frozen=True)
class Verdict:
    """The largest difference over ranks and steps; see Comparison.

    gradient: relative norm of the worst parameter's error, and its name. whole: of all gradients together.
    """

    losses: list[float]
    norm: float
    gradient: tuple[float, str]
    whole: float
    counts_equal: bool
    score_error: float
    flips: list[float]


def verdict(ranks: list[Comparison]) -> Verdict:
    """Put the pieces of all ranks together; copies of a parameter count each, which can only make it look worse."""
    errors: dict[str, list[float]] = {}
    squares: dict[str, list[float]] = {}
    for name, elements in ranks[0].sizes.items():
        assert sum(found.covered.get(name, 0) for found in ranks) >= elements, f"{name} was not compared as a whole"
    for found in ranks:
        squares |= found.squares
        for name, values in found.errors.items():
            errors[name] = [a + b for a, b in zip(errors.get(name, [0.0] * len(values)), values, strict=True)]
    steps = range(len(next(iter(errors.values()))))
    by_step = [(sum(e[i] for e in errors.values()), sum(squares[name][i] for name in errors)) for i in steps]
    relative = {
        name: max((e / max(s, 1e-30)) ** 0.5 for e, s in zip(values, squares[name], strict=True))
        for name, values in errors.items()
    }
    return Verdict(
        losses=[max(found.losses[i] for found in ranks) for i in range(4)],
        norm=max(found.norm for found in ranks),
        gradient=max((value, name) for name, value in relative.items()),
        whole=max((e / s) ** 0.5 for e, s in by_step),
        counts_equal=all(found.counts_equal for found in ranks),
        score_error=max(found.score_error for found in ranks),
        flips=[flip for found in ranks for flip in found.flips],
    )
