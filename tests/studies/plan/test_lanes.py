"""The order of issue of an overlapped pair, its time against a second way to compute it, and that it is monotone."""

from __future__ import annotations

import random
from collections import deque

import pytest

from train.studies.plan.lanes import Overlapped, Phase, in_line, issue, overlapped

Chunk = list[Phase]
# One MoE layer in both directions; no two phases take the same time.
FORWARD = [Phase("attend", 1.0), Phase("dispatch", 2.0), Phase("experts", 3.0), Phase("combine", 4.0)]
BACKWARD = [Phase("combine", 5.0), Phase("experts", 6.0, 0.5), Phase("dispatch", 7.0), Phase("attend", 8.0, 0.25)]


def words(forward: Chunk, backward: Chunk) -> str:
    return ", ".join(f"{kind} {phase.name}" for kind, phase in issue(forward, backward))


def test_a_pair_of_moe_layers_is_issued_as_in_figure_4() -> None:
    """arXiv:2412.19437 figure 4: each exchange stands beside computation of the other chunk."""
    layer = "B combine, F attend, B experts, F dispatch, B dispatch, W experts, F experts, F combine, B attend"
    assert words(FORWARD, BACKWARD) == f"{layer}, W attend"
    # The weight gradients of attention wait for the next layer's dispatch.
    second = layer.replace("W experts", "W attend, W experts")
    assert words(2 * FORWARD, 2 * BACKWARD) == f"{layer}, {second}, W attend"


def test_layers_of_other_numbers_and_kinds_take_turns_as_long_as_both_last() -> None:
    head = Phase("head", 1.0, 1.0)
    dense = Phase("dense", 1.0)
    assert words([dense, *FORWARD], [head, *BACKWARD]) == (
        "B head, B combine, F dense, F attend, B experts, F dispatch, B dispatch, W head, W experts, "
        "F experts, F combine, B attend, W attend"
    )
    # Forward has nothing to exchange: all of it covers the first combine, weight gradients what is left.
    assert words([dense, dense], 2 * BACKWARD) == (
        "B combine, F dense, F dense, B experts, W experts, B dispatch, B attend, B combine, W attend, "
        "B experts, W experts, B dispatch, B attend, W attend"
    )
    assert words(2 * FORWARD, [head]) == (
        "B head, F attend, F dispatch, W head, F experts, F combine, F attend, F dispatch, F experts, F combine"
    )


def test_a_pair_by_hand() -> None:
    """One layer: B combine 0-5 beside F attend 0-1, B experts 5-11, its W to 11.5, F dispatch 5-7, and so on."""
    found = overlapped(FORWARD, BACKWARD)
    assert [(span.kind, span.name, span.start_s, span.end_s) for span in found.spans] == [
        ("B", "combine", 0, 5),
        ("F", "attend", 0, 1),
        ("B", "experts", 5, 11),
        ("F", "dispatch", 5, 7),
        ("B", "dispatch", 11, 18),
        ("W", "experts", 11, 11.5),
        ("F", "experts", 11.5, 14.5),
        ("F", "combine", 18, 22),
        ("B", "attend", 18, 26),
        ("W", "attend", 26, 26.25),
    ]
    assert found.seconds == 26.25


def test_an_action_alone_takes_the_sum_of_its_phases() -> None:
    assert [in_line(kind, BACKWARD) for kind in "BIW"] == [26.75, 26.0, 0.75]
    assert in_line("F", FORWARD) == overlapped(FORWARD, []).seconds == 10.0
    # With nothing beside it, weight gradients hide behind dispatch: of experts, here all of them.
    assert overlapped([], BACKWARD).seconds == 26.25
    assert overlapped([], []) == Overlapped(0.0, ())


def some_chunk(rng: random.Random, *, backward: bool) -> Chunk:
    """Up to five layers, dense or MoE, and perhaps a head at the model's end, of any seconds."""
    layers: list[list[str]] = []
    for _ in range(rng.randint(0, 5)):
        moe = ["combine", "experts", "dispatch", "attend"] if backward else ["attend", "dispatch", "experts", "combine"]
        layers.append(rng.choice([["dense"], moe, moe, moe]))
    if rng.random() < 0.3:
        layers.insert(0 if backward else len(layers), ["head"])
    return [
        Phase(name, rng.random(), rng.random() if backward and name not in ("dispatch", "combine") else 0.0)
        for layer in layers
        for name in layer
    ]


def faster(rng: random.Random, chunk: Chunk, names: tuple[str, ...] | None) -> Chunk:
    """Some phases shortened: those of `names` all by one factor (a faster link), or any by any factor."""
    link = rng.random()
    less = [1, 1, 1, link]

    def shorter(phase: Phase) -> Phase:
        if names:
            return phase._replace(seconds=phase.seconds * link) if phase.name in names else phase
        return Phase(phase.name, phase.seconds * rng.choice(less), phase.weight_s * rng.choice(less))

    return [shorter(phase) for phase in chunk]


def whoever_is_ready(forward: Chunk, backward: Chunk) -> float:
    """The seconds of a pair when a lane takes the phase that can start first, of two the chunk with more left."""
    queues = [deque(forward), deque(backward)]
    ready, free = [0.0, 0.0], {"computation": 0.0, "exchange": 0.0}
    while any(queues):
        _, _, i = min(
            (max(ready[i], free[queue[0].lane]), -sum(phase.seconds for phase in queue), i)
            for i, queue in enumerate(queues)
            if queue
        )
        phase = queues[i].popleft()
        ready[i] = free[phase.lane] = max(ready[i], free[phase.lane]) + phase.seconds
    return max(free.values())


@pytest.mark.parametrize("names", [None, ("dispatch", "combine")], ids=["any phase", "the link"])
def test_a_shorter_phase_never_makes_a_pair_slower(names: tuple[str, ...] | None) -> None:
    rng = random.Random(20241227)
    slower = 0
    for _ in range(2000):
        pair = some_chunk(rng, backward=False), some_chunk(rng, backward=True)
        shorter = faster(rng, pair[0], names), faster(rng, pair[1], names)
        # 1e-12: rounding of some forty sums of seconds.
        assert overlapped(*shorter).seconds <= overlapped(*pair).seconds + 1e-12
        slower += whoever_is_ready(*shorter) > whoever_is_ready(*pair) + 1e-12
    assert slower >= 5, "without a fixed order of issue it does: else this test proves nothing"


def test_no_lane_runs_two_phases_and_none_is_early_or_late() -> None:
    """Each phase starts at the later of its lane's and its chunk's last end; the pair is within its bounds."""
    rng = random.Random(7)
    for _ in range(500):
        forward, backward = some_chunk(rng, backward=False), some_chunk(rng, backward=True)
        found = overlapped(forward, backward)
        last: dict[str, float] = {}
        for span in found.spans:
            chain = [span.lane] if span.kind == "W" else [span.lane, span.kind]
            assert span.start_s == max(last.get(each, 0.0) for each in chain)
            last |= dict.fromkeys(chain, span.end_s)
        for kind, chunk in (("F", forward), ("B", backward)):
            ran = [(span.name, span.end_s - span.start_s) for span in found.spans if span.kind == kind]
            assert ran == [(name, pytest.approx(seconds, abs=1e-12)) for name, seconds, _ in chunk]
        weights = [span.end_s - span.start_s for span in found.spans if span.kind == "W"]
        assert sum(weights) == pytest.approx(in_line("W", backward), abs=1e-12)
        lanes = [
            sum(s.end_s - s.start_s for s in found.spans if s.lane == lane) for lane in ("computation", "exchange")
        ]
        least = max(*lanes, in_line("F", forward), in_line("I", backward))
        assert least - 1e-12 <= found.seconds <= in_line("F", forward) + in_line("B", backward) + 1e-12
