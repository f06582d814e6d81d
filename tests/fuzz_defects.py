"""Mistakes that composing a layout invites, each planted in the ranks and in no reference: `fuzz_layouts.py --defects`.

A defect names the cases in which it can show, and replaces functions of the product for the length of one case. Which
figure caught which one stands in docs/parallelism.md. Long, but one idea: a table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import kernels.deferred
import kernels.router
import parallel.expert
import parallel.fp8_weights
import parallel.grads
import parallel.hops
import parallel.pipeline
import parallel.zero
import train.assemble
import train.optim.deepspeed_backend
import train.stage
import train.step
from parallel.expert import ExpertParallelDispatcher
from parallel.flight import UnderWay
from parallel.hops import Hop
from parallel.mesh import Axis, Mesh
from parallel.pipeline_stage import WaitingWgrads
from parallel.shards import LocalShard
from parallel.zero import GradientBuckets
from tests.fuzz_cases import Case
from train.data.batch import Batch
from train.losses import LossWeights
from train.model.attention import MultiHeadLatentAttention
from train.model.block import DispatchInput, MoEBlock
from train.model.phases import Travel
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.adamw import AdamW
from train.optim.offload import Staging
from train.stage import Stage, StepMetrics

# (object, attribute, what takes its place, given what was there)
Replacement = tuple[Any, str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Defect:
    """`replacements` of a case and a rank."""

    shows_in: Callable[[Case], object]
    replacements: Callable[[Case, int], list[Replacement]]


@contextmanager
def planted(name: str, case: Case, rank: int) -> Iterator[None]:
    """Inside, this rank has the defect."""
    with ExitStack() as stack:
        for target, attribute, made in DEFECTS[name].replacements(case, rank):
            stack.enter_context(patch.object(target, attribute, made(getattr(target, attribute))))
        yield


DEFECTS: dict[str, Defect] = {}


def _has_moe(case: Case) -> bool:
    return case.layers > case.dense


def _defect(name: str, shows_in: Callable[[Case], object], *replacements: Replacement) -> None:
    """One that is the same in every case and on every rank."""
    DEFECTS[name] = Defect(shows_in, lambda case, rank: [*replacements])


def _of_case(name: str, shows_in: Callable[[Case], object], made: Callable[[Case, int], list[Replacement]]) -> None:
    DEFECTS[name] = Defect(shows_in, made)


def _after(change: Callable[..., object]) -> Callable[[Any], Any]:
    """The function as it was, and then `change(its result, its arguments)`."""

    def made(before: Any) -> Any:
        def both(*args: Any, **named: Any) -> Any:
            return change(before(*args, **named), *args, **named)

        return both

    return made


def _instead(function: Any) -> Callable[[Any], Any]:
    return lambda before: function


# Losses.


def _weights(change: Callable[[LossWeights], LossWeights]) -> Callable[[Any], Any]:
    return lambda before: lambda model, output, labels, weights: before(model, output, labels, change(weights))


_defect(
    "the MTP loss is divided by its depths twice",
    lambda c: c.mtp == 2,
    (train.stage, "loss_sums", _weights(lambda w: replace(w, mtp_weight=w.mtp_weight / 2))),
)
_of_case(
    "an MTP depth is divided by its own T - k targets",
    lambda c: c.mtp,
    lambda c, _: [
        (train.stage, "loss_sums", _weights(lambda w: replace(w, mtp_weight=w.mtp_weight * c.tokens / (c.tokens - 1))))
    ],
)
_defect(
    "the balance loss of earlier stages is not attached",
    lambda c: c.pp > 1 and c.alpha and c.dense < 2 and c.layers > 4,
    (train.stage, "attach_loss", _instead(lambda hidden, loss: hidden)),
)
_defect(
    "the balance loss is lost",
    lambda c: c.alpha and _has_moe(c),
    (train.stage, "balance_sum", _instead(lambda output, weights: None)),
)
_of_case(
    "the balance loss is divided by the sequences of one rank",
    lambda c: c.dp > 1 and c.alpha and _has_moe(c),
    lambda c, _: [(LossWeights, "balance_weight", _after(lambda weight, *_: weight * c.dp))],
)
_defect(
    "the balance loss is weighted with the targets of one rank",
    lambda c: c.dp > 1 and c.alpha and _has_moe(c),
    (
        train.step,
        "LossWeights",
        lambda before: lambda mtp, alpha, targets, sequences: before(mtp, alpha, targets // 2, sequences),
    ),
)


def _mtp_shifted(before: Any) -> Any:
    def shifted(self: Transformer, run: Any, hidden: Tensor, input_ids: Tensor, *rest: Any) -> Any:
        return before(self, run, hidden, input_ids if self.spec.is_first else input_ids.roll(1, dims=1), *rest)

    return shifted


_defect(
    "behind a stage border MTP reads the token one place too early",
    lambda c: c.pp > 1 and c.mtp,
    (Transformer, "_predict_further", _mtp_shifted),
)


def _labels_late(before: Any) -> Any:
    def late(self: Stage, inbound: Tensor, *, labels: Tensor, **named: Any) -> Any:
        labels, self.labels_before = getattr(self, "labels_before", labels), labels
        return before(self, inbound, labels=labels, **named)

    return late


_defect(
    "the stage that ends reads the labels of the micro-batch before",
    lambda c: c.micro_batches > 1,
    (Stage, "forward", _labels_late),
)

# Batches and masks.


def _without_documents(ranks: Callable[[int], bool]) -> Callable[[Case, int], list[Replacement]]:
    def drop(inputs: dict[str, Tensor], *_: Any) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in inputs.items() if name != "document_ids"}

    return lambda case, rank: [(Batch, "inputs", _after(drop))] if ranks(rank) else []


_of_case("masks are ignored on one rank", lambda c: c.mask, _without_documents(lambda rank: rank == 1))
_defect(
    "MTP ignores masks",
    lambda c: c.mask and c.mtp,
    (
        Transformer,
        "_predict_further",
        lambda before: lambda self, run, hidden, ids, _, routings: before(self, run, hidden, ids, None, routings),
    ),
)


def _masks_late(chunks: list[dict[str, Tensor]], *_: Any) -> list[dict[str, Tensor]]:
    return [one | {"document_ids": chunks[i - 1]["document_ids"]} for i, one in enumerate(chunks)]


_defect(
    "a micro-batch has the mask of the one before",
    lambda c: c.pp == 1 and c.mask and c.micro_batches > 1,
    (parallel.pipeline, "split", _after(_masks_late)),
)
_defect(
    "a micro-batch is dropped",
    lambda c: c.pp == 1 and c.micro_batches > 1,
    (parallel.pipeline, "split", _after(lambda chunks, *_: chunks[1:])),
)
_defect(
    "every data rank takes the first share",
    lambda c: c.dp > 1,
    (Batch, "share", lambda before: lambda self, index, shares: before(self, 0, shares)),
)

# Numbers of targets, counts, norm.

_defect("targets are counted on one rank", lambda c: c.dp > 1, (train.step, "sum_over", _instead(lambda x, axis: x)))


def _targets_of_every_stage(x: Tensor, axis: Axis) -> Tensor:
    if axis.group is not None:
        dist.all_reduce(x, group=axis.group)
    x[0] *= 2
    return x


_defect(
    "targets are counted on two pipeline ranks",
    lambda c: c.pp == 2,
    (train.step, "sum_over", _instead(_targets_of_every_stage)),
)


def _keep(field: str) -> Callable[[Any], Any]:
    def made(before: Any) -> Any:
        def reduce(self: StepMetrics, world: Axis) -> None:
            kept = getattr(self, field).clone()
            before(self, world)
            setattr(self, field, kept)

        return reduce

    return made


_defect(
    "router counts stay on their rank", lambda c: c.dp > 1 and _has_moe(c), (StepMetrics, "reduce", _keep("counts"))
)
_defect("the logged losses stay on their rank", lambda c: c.world > 1, (StepMetrics, "reduce", _keep("losses")))
_defect(
    "the logged balance losses stay on their rank",
    lambda c: c.world > 1 and _has_moe(c),
    (StepMetrics, "reduce", _keep("balance")),
)
_defect(
    "the norm is that of one rank", lambda c: c.world > 1, (parallel.grads, "sum_over", _instead(lambda x, axis: x))
)
_defect(
    "the norm counts every copy of a sum",
    lambda c: c.dp > 1 and not c.zero,
    (GradientBuckets, "norm_shards", _instead(lambda self: [bucket.grads for bucket in self._buckets])),
)

# Sums of gradients.


def _with_mesh(change: Callable[[Mesh], Mesh]) -> Replacement:
    return (
        train.assemble,
        "build_optimizer",
        lambda before: lambda models, config, mesh: before(models, config, change(mesh)),
    )


def _alone(name: str) -> Axis:
    return Axis(name, size=1, rank=0, group=None)


def _buckets(**changes: Any) -> Replacement:
    return (
        GradientBuckets,
        "__init__",
        lambda before: lambda self, *args, **named: before(self, *args, **named | changes),
    )


_defect(
    "expert gradients are summed over dp",
    lambda c: c.ep > 1 and _has_moe(c),
    _with_mesh(lambda mesh: replace(mesh, edp=mesh.dp)),
)
_defect(
    "expert gradients are summed over ep",
    lambda c: c.ep > 1 and c.ep < c.dp and _has_moe(c),
    _with_mesh(lambda mesh: replace(mesh, edp=mesh.ep)),
)
_defect(
    "expert gradients are not summed",
    lambda c: c.dp > c.ep and _has_moe(c),
    _with_mesh(lambda mesh: replace(mesh, edp=_alone("edp"))),
)
_defect(
    "dense gradients are summed over ep only",
    lambda c: 1 < c.ep < c.dp,
    _with_mesh(lambda mesh: replace(mesh, dp=mesh.ep)),
)
_of_case(
    "experts are averaged over their expert group",
    lambda c: c.ep > 1 and _has_moe(c),
    lambda c, _: [
        (
            GradientBuckets,
            "reduce",
            _after(lambda _, self: [s.grad.div_(c.ep) for s in self.parameter_shards() if ".experts." in s.name]),
        )
    ],
)
_of_case(
    "gradients are divided by the data ranks as well",
    lambda c: c.dp > 1,
    lambda c, _: [(GradientBuckets, "scale", lambda before: lambda self, factor: before(self, factor / c.dp))],
)


def _shared_with_experts(before: Any) -> Any:
    def shards(model: Transformer) -> dict[str, LocalShard]:
        shared = {
            name: LocalShard.at(weight.detach(), weight.shape, tuple(0 for _ in weight.shape))
            for name, weight in model.named_parameters()
            if ".shared_experts." in name
        }
        return before(model) | shared

    return shards


_defect(
    "the shared expert's gradient is summed as the routed ones' are",
    lambda c: c.ep > 1 and c.shared and _has_moe(c),
    (train.assemble, "expert_shards", _shared_with_experts),
)
_defect("copies of the embedding are not summed", lambda c: not c.is_v and c.pp > 1 and c.mtp, _buckets(tied=None))
_defect(
    "copies of the embedding are both in the norm",
    lambda c: not c.is_v and c.pp > 1 and c.mtp,
    _buckets(counts_in_norm=True),
)


def _tied_again(_: object, self: GradientBuckets) -> None:
    if self._tied is not None and self._tied.size > 1:
        for bucket in self._buckets:
            dist.all_reduce(bucket.shard, group=self._tied.group)


_defect(
    "copies of the embedding are summed twice",
    lambda c: not c.is_v and c.pp > 1 and c.mtp and c.zero,
    (GradientBuckets, "reduce", _after(_tied_again)),
)


def _own_embedding(stages: dict[int, Stage], *_: Any) -> dict[int, Stage]:
    last = stages[max(stages)].model
    if len(stages) > 1 and last.mtp:
        last.embed_tokens = copy.deepcopy(last.embed_tokens)
    return stages


_defect(
    "on a V the last stage has an embedding of its own",
    lambda c: c.is_v and c.pp > 1 and c.mtp,
    (train.assemble, "build_stages", _after(_own_embedding)),
)


def _sharded(method: str) -> Callable[[Any], Any]:
    def made(before: Any) -> Any:
        def as_if_sharded(self: GradientBuckets, *args: Any) -> None:
            is_sharded, self.sharded = self.sharded, True
            before(self, *args)
            self.sharded = is_sharded

        return as_if_sharded

    return made


_defect(
    "without ZeRO the sums stay with their owner",
    lambda c: c.dp > 1 and not c.zero,
    (GradientBuckets, "reduce", _sharded("reduce")),
)
_defect(
    "without ZeRO only the own shard is divided",
    lambda c: c.dp > 1 and not c.zero,
    (GradientBuckets, "scale", _sharded("scale")),
)
_defect(
    "a micro-batch's gradient replaces those before it",
    lambda c: c.micro_batches > 1,
    (kernels.deferred, "_take_stale", _instead(lambda weight: True)),
)
_defect(
    "a step begins with the gradients of the one before",
    lambda c: c.steps > 1,
    (AdamW, "zero_grad", _instead(lambda self: None)),
)

# Experts.


def _hop(method: str, change: Callable[..., Any]) -> Replacement:
    """A change of what a hop brings, which is under way when it has been sent."""

    def arriving(sent: UnderWay, *args: Any, **named: Any) -> UnderWay:
        return replace(sent, then=lambda rows: change(sent.then(rows), *args, **named))

    return (Hop, method, _after(arriving))


def _with_experts(case: Case) -> bool:
    return case.ep > 1 and _has_moe(case)


def _two_hops(case: Case) -> bool:
    return case.hops == 2 and _has_moe(case)


def _gate_columns_swapped(received: Tensor, self: Hop, rows: Tensor, kind: str) -> Tensor:
    if kind != "routing":
        return received
    ids, gates = received.chunk(2, dim=1)
    return torch.cat((ids, gates.roll(1, dims=1)), dim=1)


def _kind_only(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Of the tensors that a hop brings, those of one kind."""
    return lambda brought, self, rows, what, **named: change(brought) if what == kind else brought


_defect("the gates' gradients are not sent back", _with_experts, _hop("back", _kind_only("gates", torch.zero_)))
_defect("gates arrive with another expert's id", _with_experts, _hop("there", _gate_columns_swapped))
_defect(
    "tokens arrive in another order than their routing",
    _with_experts,
    _hop("there", _kind_only("dispatch", lambda received: received.flip(0))),
)
_defect(
    "results come home in another order than tokens left",
    _with_experts,
    _hop("back", _kind_only("combine", lambda sums: sums.flip(0))),
)
_defect(
    "a token's sum leaves out its last rank",
    _with_experts,
    (
        parallel.hops,
        "sum_rows",
        lambda before: lambda copies, index, **named: before(copies, index[:, :-1].contiguous(), **named),
    ),
)


# Two hops.


def _only_over(axis: str, kind: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Of the tensors that a hop over one axis brings, those of one kind."""
    return lambda brought, self, rows, what, **named: (
        change(brought) if (self.axis.name, what) == (axis, kind) else brought
    )


_defect(
    "both hops go over the first one's axis",
    _two_hops,
    (Mesh, "hops", _instead(property(lambda mesh: (mesh.rail, mesh.rail)))),
)
_defect(
    "tokens of two hops are grouped as if they had come in order",
    _two_hops,
    (parallel.expert, "as_if_in_order", _instead(lambda grouping, in_order: grouping)),
)
_defect(
    "what a rank passes on is chosen as on the first node",
    _two_hops,
    (parallel.hops, "_goes", lambda before: lambda ids, ranks, *, local, first=0: before(ids, ranks, local=local)),
)
_defect(
    "inside a node tokens pass in another order than their routing",
    _two_hops,
    _hop("there", _only_over("node", "dispatch", lambda received: received.flip(0))),
)
_defect(
    "the gates' gradients stay on the node of the expert",
    _two_hops,
    _hop("back", _only_over("rail", "gates", torch.zero_)),
)
_defect(
    "a node's sums are rounded to BF16 in an FP32 run",
    lambda c: _two_hops(c) and c.precision == "fp32",
    _hop("back", _only_over("node", "combine", lambda sums: sums.bfloat16().float())),
)


def _as_dispatcher(**changes: Any) -> Replacement:
    return (
        train.stage,
        "ExpertParallelDispatcher",
        lambda before: lambda *args, **named: before(*args, **named | changes),
    )


_defect(
    "tokens travel in BF16 in an FP32 run",
    lambda c: _with_experts(c) and c.precision == "fp32",
    _as_dispatcher(wire="bf16"),
)


def _scales_of_neighbours(tokens: Any, *_: Any) -> Any:
    return replace(tokens, scale=tokens.scale.roll(1, dims=1))


_defect(
    "each token has the scales of the one before",
    lambda c: _with_experts(c) and c.precision == "fp8",
    (parallel.expert, "unpack_fp8", _after(_scales_of_neighbours)),
)
_defect(
    "the scales of a gradient's tiles are swapped",
    lambda c: _with_experts(c) and c.precision == "fp8",
    (parallel.expert, "quantize_tiles", _after(lambda q, *_, **__: replace(q, scale=q.scale.flip(0)))),
)
_defect(
    "the wire's scales are no powers of two",
    lambda c: _with_experts(c) and c.precision == "fp8",
    _as_dispatcher(power_of_two=False),
)


def _neighbours_experts(_: object, self: ExpertParallelDispatcher, *args: Any, **named: Any) -> None:
    local = len(self.experts)
    other = (self.axis.rank + 1) % self.axis.size
    self.experts = range(other * local, (other + 1) * local)


_defect(
    "each rank holds its neighbour's experts",
    _with_experts,
    (ExpertParallelDispatcher, "__init__", _after(_neighbours_experts)),
)


def _shared_twice(home: Travel[Tensor], self: MoEBlock, routed: DispatchInput, *_: object) -> Travel[Tensor]:
    out = yield from home
    return out + self.mlp.shared_experts(routed.shared)


_defect(
    "the shared expert is counted twice",
    lambda c: c.shared and _has_moe(c) and c.precision != "fp8",
    (MoEBlock, "combine", _after(_shared_twice)),
)

# Router.


def _chosen_with(change: Callable[[Tensor, dict[str, int]], tuple[Tensor, dict[str, int]]]) -> Callable[[Any], Any]:
    def made(before: Any) -> Any:
        def select(scores: Tensor, bias: Tensor, **limits: int) -> Any:
            bias, limits = change(bias, limits)
            return before(scores, bias, **limits)

        return select

    return made


_defect(
    "routing groups are ignored",
    lambda c: c.groups == 4 and _has_moe(c),
    (kernels.router, "select_experts", _chosen_with(lambda b, limits: (b, limits | {"n_group": 1, "topk_group": 1}))),
)
_defect(
    "the bias takes no part in the choice",
    _has_moe,
    (kernels.router, "select_experts", _chosen_with(lambda b, limits: (torch.zeros_like(b), limits))),
)
_defect(
    "router scores are rounded to BF16",
    _has_moe,
    (Precision, "fp32", _after(lambda scores, *_: scores.bfloat16().float())),
)
_defect("the bias is stale", _has_moe, (train.step, "update_biases", _instead(lambda *_: None)))
_defect(
    "the bias moves by the load of another expert",
    _has_moe,
    (
        train.step,
        "update_biases",
        lambda before: (
            lambda models, counts, speed: before(models, {layer: each.roll(1) for layer, each in counts.items()}, speed)
        ),
    ),
)

# Pipeline and recomputation.


def _rounded_border(output: Tensor, self: Stage, *_: Any, **__: Any) -> Tensor:
    return output if self.model.spec.is_last else output.bfloat16().to(output.dtype)


_defect(
    "hidden states cross a stage border in BF16 in an FP32 run",
    lambda c: c.pp > 1 and c.precision == "fp32",
    (Stage, "forward", _after(_rounded_border)),
)


def _receives_not_waited(case: Case, rank: int) -> list[Replacement]:
    from torch.distributed.pipelining import schedules

    return [(schedules, "_wait_batch_p2p", _instead(lambda work: None))]


_of_case("nobody waits for what another stage sends", lambda c: c.pp > 1, _receives_not_waited)
_defect(
    "a weight gradient that waits for its slot never runs",
    lambda c: c.pp > 1 and c.schedule == "ZBVZeroBubble",
    (WaitingWgrads, "add", _instead(lambda self, runner: lambda: None)),
)


def _other_latents(before: Any) -> Any:
    def attend(self: Any, latents: Tensor, *rest: Any) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        # The same operations both times, for the recomputation compares their number.
        return before(self, latents * (1.01 if in_backward else 1.0), *rest)

    return attend


_defect("recomputation sees other latents", lambda c: c.recompute, (MultiHeadLatentAttention, "attend", _other_latents))

# Updates and weights.


def _sharded_native(case: Case) -> bool:
    return bool(case.zero and case.dp > 1 and case.backend == "native" and case.bf16_weights)


def _without_waiting(before: Any) -> Any:
    def finish(bucket: Any, weights: Tensor, work: Any) -> None:
        before(bucket, weights, SimpleNamespace(wait=lambda: None))
        work.wait()

    return finish


_defect("nobody waits for the new weights", _sharded_native, (parallel.zero, "_finish_gather", _without_waiting))
_defect(
    "new weights are gathered one element late",
    _sharded_native,
    (
        parallel.zero,
        "all_gather",
        lambda before: lambda whole, own, **named: before(whole, own.clone().roll(1), **named),
    ),
)
_defect(
    "the bias correction counts updates from 0",
    lambda c: True,
    (AdamW, "step", lambda before: lambda self, *, lr, step: before(self, lr=lr, step=step - 1)),
)


def _kept_on_device(before: Any) -> Any:
    def copy_in_only(self: Staging, sources: Any, targets: Any) -> Any:
        return (
            before(self, sources, targets)
            if any(targets[0] is each[0] or targets[0]._base is each[0] for each in self._buffers)
            else None
        )

    return copy_in_only


_defect(
    "an offloaded segment is not copied back",
    lambda c: c.offload == "cpu" and c.precision != "fp32",
    (Staging, "_copy", _kept_on_device),
)


def _only_fp8(case: Case) -> bool:
    return bool(not case.bf16_weights and case.zero and case.dp > 1 and case.steps > 1)


_NO_MAXIMA = SimpleNamespace(
    all_reduce=lambda *_, **__: SimpleNamespace(wait=lambda: None), ReduceOp=dist.ReduceOp, Work=dist.Work
)
_defect("a block's scale knows one rank's part of it", _only_fp8, (parallel.fp8_weights, "dist", _instead(_NO_MAXIMA)))
_defect(
    "the transposed FP8 copy is stale",
    _only_fp8,
    (parallel.fp8_weights, "transpose_blocks", _after(lambda made, *_: made.roll(1, dims=-1))),
)
_defect(
    "FP8 copies stay those of the step before",
    lambda c: c.backend == "deepspeed" and c.precision == "fp8" and c.steps > 1,
    (torch.autograd.graph, "increment_version", _instead(lambda tensors: None)),
)
_defect(
    "DeepSpeed takes all ranks where an axis has one",
    lambda c: c.backend == "deepspeed" and (c.dp == 1 or c.ep == c.dp),
    (train.optim.deepspeed_backend, "group_of_one", _instead(lambda: dist.group.WORLD)),
)
