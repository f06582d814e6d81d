"""A forward and a backward issued by turns: the order, and that phases change no bit, byte or launch.

Truths: torch's own chunks and one process (`overlap_ranks.py` says what each rank does; bounds of docs/numerics.md,
"Layouts"), the planner's order of a pair, and an uncut backward.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import deferred
from parallel.layout import Layout
from parallel.overlap import take_turns
from parallel.phases import Phases, Tape, border, slot_of
from tests.parallel.overlap_ranks import (
    DEFECTS,
    PP2,
    PP2_EP2,
    both,
    engine_of,
    in_small_micro_batches,
    to_one_process,
    with_defects,
)
from tests.parity.layout_theorem import MODEL, SEQUENCES, batch_of, compare, verdict, write_reference
from tests.parity.test_layouts import GRADIENT_BOUND, LOSS_BOUND
from tests.parity.test_layouts_low_precision import REGROUPING_BOUND
from tests.ranks import run_ranks
from train.losses import LossWeights
from train.model.phases import finish
from train.stage import StepMetrics
from train.studies.plan.lanes import Phase, issue
from train.studies.plan.live_bytes import LiveBytes

DENSE, MOE = ["attend", "feed"], ["attend", "route", "dispatch", "experts", "shared", "combine"]
# Of a pair on one stage each: its layers, with what comes before and after them.
CHUNKS = {
    "first": ["embed", *DENSE, *MOE, "end", "losses"],
    "dense": ["embed", *DENSE, *DENSE, "end", "losses"],
    "middle": [*MOE, *MOE, "end", "losses"],
    "last": [*MOE, "end", "join", *MOE, "norm", "join", *MOE, "norm", "losses"],
}


def anchor() -> Tensor:
    return torch.zeros((), requires_grad=True)


@pytest.mark.parametrize("backward", CHUNKS)
@pytest.mark.parametrize("forward", CHUNKS)
def test_a_pair_is_issued_in_the_order_that_the_planner_times(forward: str, backward: str) -> None:
    """Figure 4 of the report, which `train/studies/plan/lanes.py` restates for itself."""
    events: list[tuple[str, str]] = []

    def side(kind: str, phases: list[str]) -> Generator[str, None, None]:
        for phase in phases:
            events.append((kind, phase))
            if kind == "B":
                deferred.push(partial(events.append, ("W", phase)))
            yield phase

    ahead, behind = CHUNKS[forward], CHUNKS[backward][::-1]
    with deferred.deferred():
        for _ in take_turns(side("F", ahead), side("B", behind)):
            pass
        deferred.take()()
    planned = issue([Phase(name, 1.0) for name in ahead], [Phase(name, 1.0, 1.0) for name in behind])
    assert events == [(kind, phase.name) for kind, phase in planned]


def test_a_pair_of_moe_layers_is_issued_as_documented() -> None:
    turns = list(take_turns((name for name in MOE), (name for name in MOE[::-1])))
    assert " | ".join(f"{side} {phase}".strip() for side, phase in turns) == (
        "B combine | F attend | F route | B shared | B experts | F dispatch | B dispatch | W | "
        "F experts | F shared | F combine | W | B route | B attend"
    )


@dataclass(frozen=True)
class Pair:
    left: Tensor
    others: tuple[Tensor, dict[str, Tensor]]


def in_phases(run: Any, x: Tensor, w: Tensor) -> Generator[str, None, Tensor]:
    """A skip, a sum of two readers, a tensor handed through, one that nothing reads, and one that needs no gradient."""

    def first(x: Tensor) -> Pair:
        return Pair(x * w, (x.sin(), {"ids": torch.arange(3), "unread": x.exp()}))

    def second(pair: Pair) -> tuple[Pair, Tensor]:
        return pair, pair.left.square() * pair.others[0]

    pair = yield from run("first", first, x)
    pair, y = yield from run("second", second, pair)
    z = yield from run("third", lambda pair, y: y * pair.left + pair.others[0], pair, y)
    return (yield from run("fourth", lambda z, x: (z * x).sum(), z, x))


def test_phases_have_the_gradients_of_an_uncut_backward() -> None:
    x, w = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_().unbind()
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()

    def whole(_: str, phase: Any, *args: Any) -> Generator[str, None, Any]:
        yield ""
        return phase(*args)

    finish(in_phases(whole, x, w)).backward()
    expected = x.grad, w.grad
    w.grad = None
    tape, crossing = Tape(anchor()), border(x)
    out = finish(in_phases(tape.run, crossing, w))
    slot_of(out, "").add(torch.ones_like(out))
    assert list(tape.backward()) == ["fourth", "third", "second", "first"]
    assert tape.is_empty
    found = slot_of(crossing, "").take(), w.grad
    # Sums of x's three readers in another order: two roundings of 2^-53 of terms of the size of the sum.
    torch.testing.assert_close(found, expected, rtol=2**-50, atol=0)
    assert slot_of(crossing, "").is_empty


def test_slots_that_hold_the_same_gradient_do_not_see_each_others_sums() -> None:
    """A sum gives both of its terms one tensor; of a third reader only one of them hears."""
    tape, x = Tape(anchor()), border(torch.tensor([1.0, 2.0]))
    a, b = finish(tape.run("first", lambda x: (x * 2, x * 3), x))
    c = finish(tape.run("second", torch.square, a))
    out = finish(tape.run("third", lambda a, b, c: ((a + b + c) * x.detach()).sum(), a, b, c))
    slot_of(out, "").add(torch.ones(()))
    phases = tape.backward()
    assert [next(phases), next(phases)] == ["third", "second"]
    grads = [slot_of(tensor, "").take() for tensor in (a, b)]
    # d/da (a + b + a^2) x = (1 + 2 a) x at a = 2 x.
    assert [grad.tolist() for grad in grads if grad is not None] == [[5.0, 18.0], [1.0, 2.0]]


def test_what_is_computed_between_two_phases_is_refused() -> None:
    tape = Tape(anchor())
    x = finish(tape.run("first", torch.sin, border(torch.ones(3))))
    with pytest.raises(AssertionError, match="second reads what was computed between two phases"):
        finish(tape.run("second", torch.cos, x[:2]))


def test_a_phase_that_no_gradient_reaches_does_not_run() -> None:
    ran: list[str] = []
    tape, x = Tape(anchor()), border(torch.ones(3))

    def unread(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda grad: ran.append("unread"))
        return y

    finish(tape.run("unread", unread, x))
    z = finish(tape.run("read", torch.sin, x))
    slot_of(z, "").add(torch.ones(3))
    assert list(tape.backward()) == ["read", "unread"]
    assert not ran


class Launches(TorchDispatchMode):
    """Operators that compute; views and the wrappers of autograd do not."""

    VIEWS = ("detach", "view", "alias", "expand", "transpose", "slice", "select", "t", "split", "unbind", "permute")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Autograd adds in place where it alone holds a sum, a slot never does.
        name = func.overloadpacket.__name__.rstrip("_")
        if name not in self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def whole_stage(precision: str) -> tuple[Any, dict[str, Tensor]]:
    """A model as one stage, and a micro-batch."""
    engine = engine_of(None, precision)
    stage, device = engine.stages[0], engine.mesh.device
    stage.begin(LossWeights(0.3, 0.01, torch.tensor(100), SEQUENCES), StepMetrics(MODEL, device))
    inputs = {name: tensor[:2] for name, tensor in batch_of(0).inputs(device).items()}
    # What is made once: copies of weights, tables.
    uncut(stage, inputs, None)
    return stage, inputs


def uncut(stage: Any, inputs: dict[str, Tensor], live: Any) -> int:
    loss = stage(inputs["input_ids"], **inputs)
    held = settled(live)
    with deferred.deferred():
        loss.backward()
        deferred.take()()
    return held


def cut(stage: Any, inputs: dict[str, Tensor], live: Any, tape: Tape) -> int:
    loss = finish(stage.steps(tape.run, inputs["input_ids"], **inputs))
    held = settled(live)
    slot_of(loss, "").add(torch.ones_like(loss))
    with deferred.deferred():
        for _ in tape.backward():
            pass
        deferred.take()()
    return held


def settled(live: Any) -> int:
    """Bytes alive now, from where a peak is looked for."""
    if not isinstance(live, LiveBytes):
        return 0
    gc.collect()
    live.peak = live.now
    return live.now


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.long), "fp8"])
def test_cutting_costs_no_byte_and_no_launch(precision: str) -> None:
    """Held after forward, at the peak of backward, and every operator of both; with recomputation."""
    stage, inputs = whole_stage(precision)
    assert isinstance(stage, Phases)
    tape, found = Tape(anchor()), []
    # One a stage, which the first tape of it shows to whoever counts.
    own = torch.float32.itemsize
    for run in (lambda live: uncut(stage, inputs, live), lambda live: cut(stage, inputs, live, tape)):
        with LiveBytes() as live:
            held = run(live)
        with Launches() as launches:
            run(None)
        found.append((held, live.peak, launches.counts))
    (held, peak, counts), (cut_held, cut_peak, cut_counts) = found
    assert cut_held == held + own
    assert cut_peak <= peak + own
    assert cut_counts == counts
    assert peak > held > 1e6


@pytest.fixture(scope="module")
def on_four() -> list[dict[str, Any]]:
    return run_ranks(4, both, PP2_EP2, ["fp8"], 1)


def assert_same_bits(ranks: list[dict[str, Any]], precision: str) -> None:
    for plain, pairs in (rank[precision] for rank in ranks):
        assert pairs.digests == plain.digests
        assert pairs.losses == plain.losses


def test_pairs_have_every_bit_of_torchs_own_chunks(on_four: list[dict[str, Any]]) -> None:
    """FP8 over the wire with recomputation: gradients, counts, losses and norm of a step."""
    assert_same_bits(on_four, "fp8")


def test_expert_ranks_issue_the_same_order_and_meet_in_each_exchange(on_four: list[dict[str, Any]]) -> None:
    # Pipeline rank 0 is ranks 0 and 1, which are one expert group.
    for left, right in ((0, 1), (2, 3)):
        assert on_four[left]["events"] == on_four[right]["events"]
    for rank in on_four:
        # Of four micro-batches on two stages, three; five forwards and five backwards run alone.
        assert (rank["events"].count("pair"), rank["events"].count("alone")) == (3, 10)


def test_the_host_reads_counts_behind_the_experts_of_the_other_side(on_four: list[dict[str, Any]]) -> None:
    """They leave with the route phase; while the host waits for them, a device has the experts' products to do."""
    layer = "counts leave|F route|B shared|B experts|host reads|F dispatch|B dispatch|W|F experts|F shared|F combine"
    for index, rank in enumerate(on_four):
        events = "|".join(rank["events"])
        assert events.count("counts leave") == events.count("host reads") > 0
        # Pipeline rank 0 pairs its dense layer with the last stage; on rank 1 both sides of all three have MoE layers.
        assert events.count(layer) == (3 if index >= 2 else 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "precisions"), [(PP2, ["fp8"]), (PP2_EP2, ["fp32", "bf16"])], ids=["pp2", "pp2 ep2"]
)
def test_pairs_have_every_bit_in_every_precision_and_after_an_update(layout: Layout, precisions: list[str]) -> None:
    ranks = run_ranks(layout.world, both, layout, precisions, 2)
    for precision in precisions:
        assert_same_bits(ranks, precision)


@pytest.mark.parametrize("layout", [pytest.param(PP2, marks=pytest.mark.long), PP2_EP2], ids=["pp2", "pp2 ep2"])
def test_a_step_in_pairs_has_the_losses_and_gradients_of_one_process(layout: Layout) -> None:
    for loss, gradient, name in run_ranks(layout.world, to_one_process, layout):
        assert loss <= LOSS_BOUND
        assert gradient <= GRADIENT_BOUND, name


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_teacher_forced_step_in_pairs_differs_from_one_process_by_fp32_sums(precision: str, tmp_path: Path) -> None:
    """Choices forced, against one process that sums a token's experts as two ranks do: `layout_theorem.py`."""
    run_ranks(1, in_small_micro_batches, write_reference, tmp_path, precision, 2, 1)
    teacher_forced = partial(compare, steps=range(1))
    found = run_ranks(4, in_small_micro_batches, teacher_forced, PP2_EP2, precision, tmp_path)
    result = verdict(found)
    assert max(result.losses) <= LOSS_BOUND
    assert result.norm <= LOSS_BOUND
    assert result.gradient[0] <= (REGROUPING_BOUND if precision == "fp8" else GRADIENT_BOUND), result.gradient
    assert result.counts_equal


@pytest.mark.long
def test_equal_bits_have_power() -> None:
    ranks = run_ranks(4, with_defects, PP2_EP2)
    differ = {defect: sum(rank[defect] for rank in ranks) for defect in ranks[0]}
    assert differ.pop("none") == 0
    assert differ.keys() == DEFECTS.keys()
    assert all(differ.values()), differ
