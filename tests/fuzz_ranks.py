"""What `fuzz_layouts.py` asks of processes: one process's answer to a case, and a rank's comparison with it.

    state      initial weights; random biases and moments, so that no part of the state is zero
    step 0     losses, gradients, norm, counts                          within the bounds
    update     with the reference's gradients: the new state            bit-equal, but for moments in FP8
    step 1     in some cases, on other tokens, from the new weights     within the bounds, and another update

Both choices of experts are forced, that of the router and the plain one that the balance loss counts
(`tests/parity/layout_theorem.py` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import kernels.router
from parallel.mesh import Mesh, group_of_one, make_mesh, single
from tests.fuzz_cases import Case
from tests.fuzz_defects import planted
from tests.parity.layout_theorem import (
    Comparison,
    PartialSums,
    RouterBook,
    compare_step,
    facts_of,
    force,
    gradient_pieces,
    local_part,
    named_gradients,
    state_of,
)
from train.assemble import assemble, build_engine
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import fp8_weights
from train.optim import deepspeed_backend
from train.stage import build_stages
from train.step import Engine, StepGradients, apply_update, compute_gradients

CPU = torch.device("cpu")
# Of this update the moments are corrected for their start; any number above 1.
UPDATE = 5


class ForcedRouters(RouterBook):
    """`RouterBook` that also forces the balance loss's own choice, and puts everything back at the end."""

    @contextmanager
    def watching(self, engine: Engine) -> Iterator[None]:
        """Inside, routers of this process are watched."""
        best = kernels.router._best

        def chosen(values: Tensor, count: int) -> Tensor:
            own = best(values, count)
            # The balance loss has a dim for sequences, and comes after the router's choice of the same layer.
            return self._balance(own, values) if values.ndim == 3 else own

        with (
            patch.object(kernels.router, "_best", chosen),
            patch.object(kernels.router, "select_experts", kernels.router.select_experts),
        ):
            self.watch(engine)
            yield

    def _balance(self, own: Tensor, scores: Tensor) -> Tensor:
        key = f"balance.{self.layer}.{self.first_micro_batch + self.seen[self.layer] - 1}"
        if not self.known:
            self.written[key] = own.clone()
            return own
        theirs = self.known[key]
        differs = (own.sort(-1).values != theirs.sort(-1).values).any(-1)
        ranked = scores[differs].sort(-1, descending=True).values
        count = own.shape[-1]
        self.flips += (ranked[:, count - 1] - ranked[:, count]).tolist()
        return theirs


@dataclass
class RankAnswer:
    """One rank's comparison; `state` names what was not as it must be after the update."""

    steps: Comparison = field(default_factory=Comparison)
    state: list[str] = field(default_factory=list)


def gradients(engine: Engine, case: Case, step: int) -> StepGradients:
    """This rank's share of a step."""
    share = case.batch(step).share(engine.mesh.dp.rank, engine.mesh.dp.size)
    return compute_gradients(engine, share, num_micro_batches=case.micro_batches, now=case.now)


def write_reference(rank: int, world: int, case: Case, folder: Path) -> None:
    """The case in one process, native and without any saving of memory; files of a folder."""
    mesh = single(CPU)
    config = case.precision_config
    numbers = Precision(config.name, cache_swiglu_input=config.cache_swiglu_input, attention_output=case.attention)  # type: ignore[arg-type]
    sums = (
        PartialSums(case.ep, case.experts, case.node if case.hops == 2 else None)
        if case.ep > 1 and case.precision != "fp32"
        else None
    )
    stages = build_stages(case.model, numbers, mesh, sums)
    initialize(stages[0].model, seed=case.seed, std=case.model.initializer_range)
    optim = type(case.optim)(clip_norm=case.optim.clip_norm, moments_dtype=case.moments)
    engine = assemble(stages, optim, mesh)
    _fill_state(engine, case.seed)
    book = ForcedRouters(first_micro_batch=0)
    one_rank = Case(**{**vars(case), "pp": 1, "dp": 1, "ep": 1, "stages": ""})
    with book.watching(engine):
        _save_state(engine, folder / "state_0")
        for step in range(case.steps):
            book.begin({})
            result = gradients(engine, one_rank, step)
            save_file(facts_of(result) | book.written | named_gradients(engine), folder / f"step_{step}")
            apply_update(engine, result, now=case.now, update=UPDATE)
            _save_state(engine, folder / f"state_{step + 1}")


def _save_state(engine: Engine, path: Path) -> None:
    save_file({name: local_part(value).clone() for name, value in state_of(engine).items()}, path)


@torch.no_grad()
def _fill_state(engine: Engine, seed: int) -> None:
    """Biases and moments as a run in its middle has them: none is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in state_of(engine).items():
        tensor = local_part(value)
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(0.02 * noise - 0.01)
        elif name.startswith("exp_avg."):
            tensor.copy_(2e-3 * noise - 1e-3)
        elif name.startswith("exp_avg_sq."):
            tensor.copy_(1e-6 * (noise + 0.5))


def compare_case(rank: int, world: int, case: Case, folder: Path, defect: str | None = None) -> RankAnswer:
    """This rank's part of a case against the files of `write_reference`, with a planted defect if one is named."""
    answer = RankAnswer()
    plant: AbstractContextManager[object] = nullcontext() if defect is None else planted(defect, case, rank)
    with ExitStack() as stack:
        single_groups: list[dist.ProcessGroup] = []
        stack.enter_context(patch.object(deepspeed_backend, "group_of_one", _kept(group_of_one, single_groups)))
        stack.enter_context(plant)
        mesh = make_mesh(case.layout, device=CPU, tied_embedding=case.mtp > 0)
        stack.callback(_close, mesh, single_groups)
        _compare(answer, mesh, case, folder)
    return answer


def _compare(answer: RankAnswer, mesh: Mesh, case: Case, folder: Path) -> None:
    engine = build_engine(
        case.model, case.precision_config, case.optim, mesh, seed=case.seed, recompute=bool(case.recompute)
    )
    book = ForcedRouters(first_micro_batch=mesh.dp.rank * case.micro_batches)
    with engine.optimizer.whole_weights():
        force(engine, load_file(folder / "state_0"))
    with book.watching(engine):
        for step in range(case.steps):
            reference = load_file(folder / f"step_{step}")
            book.begin(reference)
            result = gradients(engine, case, step)
            compare_step(answer.steps, engine, result, reference)
            _update(engine, case, result, reference)
            # Before another step weights in FP8 only must stay as the update has made them.
            weights = engine.optimizer.whole_weights() if step + 1 == case.steps else nullcontext()
            with weights:
                answer.state += _changed(engine, case, load_file(folder / f"state_{step + 1}"))
    answer.steps.score_error, answer.steps.flips = book.score_error, book.flips


@torch.no_grad()
def _update(engine: Engine, case: Case, result: StepGradients, reference: dict[str, Tensor]) -> None:
    """Take the update with the reference's gradients."""
    for name, piece in gradient_pieces(engine).items():
        start = piece.shard.offsets[0]
        piece.tensor.copy_(reference[f"grad.{name}"][start : start + len(piece.tensor)])
    apply_update(engine, result, now=case.now, update=UPDATE)


def _changed(engine: Engine, case: Case, expected: dict[str, Tensor]) -> list[str]:
    """Names of what is not as one process's update has left it; weights that have no values now are left out."""
    wrong = []
    for name, value in state_of(engine).items():
        ours, theirs = local_part(value), expected[name]
        if not case.bf16_weights and name in fp8_names(engine) and ours.isnan().all():
            continue
        if not isinstance(value, Tensor):
            for dim, (offset, length) in enumerate(zip(value.shard.offsets, value.tensor.shape, strict=True)):
                theirs = theirs.narrow(dim, offset, length)
        is_quantised = case.moments == "fp8" and name.startswith("exp_avg")
        if not (_as_near_as_e4m3(ours, theirs, expected[name]) if is_quantised else torch.equal(ours, theirs)):
            wrong.append(name)
    return wrong


def fp8_names(engine: Engine) -> set[str]:
    """Names of the weights that FP8 products read."""
    return {name for model in engine.models for name in fp8_weights(model, model.precision)}


def _as_near_as_e4m3(ours: Tensor, theirs: Tensor, whole: Tensor) -> bool:
    """Whether two roundings of the same numbers under different tiles may be so far apart (docs/numerics.md)."""
    # 2^-4 each; below the normal range 2^-10 of a scale that is less than 2 amax / 448.
    allowed = 2**-3 * torch.maximum(ours.abs(), theirs.abs()) + 2**-8 * whole.abs().max() / 448
    return bool(((ours - theirs).abs() <= allowed).all())


def _kept(make: Callable[[], dist.ProcessGroup], made: list[dist.ProcessGroup]) -> Callable[[], dist.ProcessGroup]:
    def kept() -> dist.ProcessGroup:
        made.append(make())
        return made[-1]

    return kept


def _close(mesh: Mesh, single_groups: list[dist.ProcessGroup]) -> None:
    """Destroy the groups of a case; that of all ranks stays."""
    # torch names a group of one by how many groups there are: one that stayed would meet its own name again.
    for group in single_groups:
        dist.destroy_process_group(group)
    axes = (mesh.pp, mesh.dp, mesh.edp, mesh.ep, mesh.rail, mesh.node, mesh.tied)
    groups = {id(axis.group): axis.group for axis in axes if axis.group not in (None, dist.group.WORLD)}
    for group in groups.values():
        dist.destroy_process_group(group)
