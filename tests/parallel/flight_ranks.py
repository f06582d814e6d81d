"""What each rank does for `test_flight.py`: two MoE layers, three micro-batches, the middle ones as a pair."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.flight
import parallel.overlap
from kernels import deferred
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher, Wire
from parallel.flight import Lane
from parallel.layout import Layout
from parallel.mesh import Mesh, make_mesh
from parallel.phases import Slot, Tape, border, slot_of
from tests.parallel.flight_trace import Record, recording
from tests.parallel.overlap_ranks import PP2_EP2, digest, engine_of, take
from tests.parity.layout_theorem import MODEL
from train.model.config import StageSpec
from train.model.init import initialize
from train.model.phases import finish
from train.model.precision import Precision
from train.model.transformer import Transformer, recompute_up_projections
from train.studies.plan.live_bytes import LiveBytes

CPU = torch.device("cpu")
PRECISIONS: tuple[Wire, ...] = ("fp32", "bf16", "fp8")
SEQUENCES, TOKENS = 2, 24


class Chunks:
    """Two MoE layers of a stage in the middle; a rank's tokens depend on its rank."""

    def __init__(self, mesh: Mesh, name: Wire) -> None:
        self.precision = Precision(name)
        dispatcher = ExpertParallelDispatcher(
            MODEL.n_routed_experts,
            mesh.ep,
            hops=mesh.hops,
            wire=self.precision.wire,
            power_of_two=True,
            traffic=(traffic := Traffic()),
        )
        self.traffic = traffic
        self.model = Transformer(
            MODEL, self.precision, dispatcher, StageSpec(range(1, 3), is_first=False, is_last=False)
        )
        initialize(self.model, seed=7, std=MODEL.initializer_range)
        if name != "fp32":
            recompute_up_projections(self.model)
        for weight in self.model.parameters():
            weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
        self.generator = torch.Generator().manual_seed(100 + mesh.rank)
        self.anchor = torch.zeros((), requires_grad=True)
        self.found: dict[str, str] = {}

    def values(self) -> Tensor:
        return torch.randn(SEQUENCES, TOKENS, MODEL.hidden_size, generator=self.generator).to(self.precision.dtype)

    def forward(self, tape: Tape, inbound: Tensor, outputs: list[Tensor]) -> Generator[str, None, None]:
        ids = torch.zeros(SEQUENCES, TOKENS, dtype=torch.int64)
        output = yield from self.model.steps(tape.run, ids, None, inbound)
        outputs.append(output.hidden)

    def run(self, *, lane: Lane | None, turns: bool = True) -> dict[str, str]:
        """SHA-256 of outputs and of every gradient; with a lane the pair's exchanges are in flight.

        Without turns the forward ends before the backward begins, as torch's own chunks do.
        """
        tapes = [Tape(self.anchor) for _ in range(2)]
        inbound = [border(self.values()) for _ in tapes]
        outputs: list[Tensor] = []
        with deferred.deferred():
            finish(self.forward(tapes[0], inbound[0], outputs))
            slot_of(outputs[0], "").add(self.values())
            ahead, behind = self.forward(tapes[1], inbound[1], outputs), tapes[0].backward()
            with nullcontext() if lane is None else lane.open():
                if not turns:
                    finish(ahead)
                for _ in parallel.overlap.take_turns(ahead, behind):
                    pass
            slot_of(outputs[1], "").add(self.values())
            finish(tapes[1].backward())
            deferred.take()()
        found = {f"output {i}": digest(each.detach()) for i, each in enumerate(outputs)}
        grads = (slot_of(each, "").take() for each in inbound)
        found |= {f"input {i}": digest(each) for i, each in enumerate(grads) if each is not None}
        return found | {name: digest(grad_of(weight)) for name, weight in self.model.named_parameters()}


def grad_of(weight: Tensor) -> Tensor:
    """What arrived in `main_grad`, or by autograd alone."""
    main: Tensor = weight.main_grad  # type: ignore[attr-defined]
    return main if weight.grad is None else main + weight.grad


def mesh_of(world: int, dispatch: Any) -> Mesh:
    layout = Layout(dp=world, ep=world, ranks_per_node=world // 2, dispatch=dispatch)
    return make_mesh(layout, device=CPU, tied_embedding=False)


def compared(rank: int, world: int) -> dict[str, Any]:
    """Dispatch -> precision -> which digests differ from those without a lane, and the record."""
    found: dict[str, Any] = {}
    for dispatch in ("direct", "node"):
        mesh = mesh_of(world, dispatch)
        for name in PRECISIONS:
            plain = Chunks(mesh, name).run(lane=None, turns=False)
            with recording() as record:
                flown = Chunks(mesh, name).run(lane=Lane(CPU))
            assert len(plain) > 20
            found[f"{dispatch} {name}"] = [key for key in plain if flown[key] != plain[key]], record
    return found


def peaks(rank: int, world: int) -> tuple[int, int, int]:
    """The most bytes alive in BF16 over two hops, waiting at once and in flight; and of one exchange's buffers."""
    mesh, found = mesh_of(world, "node"), []
    for lane in (None, Lane(CPU)):
        chunks = Chunks(mesh, "bf16")
        # What is made once: tables.
        chunks.run(lane=lane)
        gc.collect()
        with LiveBytes() as live:
            chunks.run(lane=lane)
        found.append(live.peak)
    return found[0], found[1], chunks.traffic.largest_exchange


def nobody_waits(self: Lane, work: Any) -> None:
    pass


def not_landed(self: Slot) -> Tensor | None:
    grad, self._grad = self._grad, None
    return grad


# What each replaces, and by what.
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "a collective is not waited for": (Lane, "wait", nobody_waits),
    "a gradient is read before it landed": (Slot, "take", not_landed),
}


def without_a_wait(rank: int, world: int) -> dict[str, tuple[bool, Record, str]]:
    """Mistake -> whether all gradients are numbers, the record, and who complains."""
    found = {}
    mesh = mesh_of(world, "direct")
    for name, mistake in MISTAKES.items():
        chunks, said = Chunks(mesh, "bf16"), ""
        with recording() as record, pytest.MonkeyPatch.context() as patch:
            patch.setattr(*mistake)
            # Counts are integers: none of theirs is a NaN.
            patch.setattr(ExpertParallelDispatcher, "begin", counts_at_once)
            try:
                chunks.run(lane=Lane(CPU))
            except AssertionError as error:
                said = str(error)
        finite = all(bool(grad_of(weight).isfinite().all()) for weight in chunks.model.parameters())
        found[name] = finite, record, said
        torch.distributed.barrier()
    return found


def other_order(rank: int, world: int) -> str:
    """What a step of a pipeline says on whose odd ranks, one in each expert group, turns end with other phases."""
    engine = engine_of(PP2_EP2, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        if rank % 2:
            patch.setattr(parallel.overlap, "FORWARD_TURNS", ("dispatch", "combine"))
        try:
            take(engine, 0)
        except ValueError as error:
            return str(error)
    return ""


def measure(rank: int, world: int) -> dict[str, Any]:
    """All measurements of one spawn of ranks."""
    return {
        "compared": compared(rank, world),
        "peaks": peaks(rank, world),
        "without a wait": without_a_wait(rank, world),
        "other order": other_order(rank, world),
    }


def counts_at_once(self: ExpertParallelDispatcher, routing: Any) -> object:
    lane, Lane.current = Lane.current, None
    try:
        return parallel.flight.Exchange(self._planner.begin(routing)).depart()
    finally:
        Lane.current = lane
