"""Exchanges of a pair in flight: started, the other side's phases issued, then waited for; and no bit moves.

On ranks every collective of a pair is late: its result is NaN until somebody waits (`flight_trace.py`). Truths: the
same chunks one after the other, and the documented order. Nothing here measures time. Of CUDA's streams an account is
kept (`streams.py`); none runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parallel.flight
from parallel.flight import Exchange, Lane, Started
from tests.parallel.flight_ranks import PRECISIONS, measure
from tests.parallel.flight_trace import Record, faults_of, hidden_behind
from tests.parallel.streams import Stream, accounted, in_flight
from tests.ranks import run_ranks

CASES = [f"{dispatch} {precision}" for dispatch in ("direct", "node") for precision in PRECISIONS]
AXES = {"direct": {"ep"}, "node": {"ep", "rail", "node"}}
# Of two layers, what the other side issues while the first hop of an exchange is under way; the last pair of turns of
# combine has no layer of the backward behind it.
BEHIND = {
    ("B", "dispatch"): [["F attend", "F route"]] * 2,
    ("F", "counts"): [["B shared", "B experts"]] * 2,
    ("F", "routing"): [["B dispatch", "W"]] * 2,
    ("F", "dispatch"): [["B dispatch", "W"]] * 2,
    ("B", "combine"): [["W", "F experts", "F shared", "F combine", "W"]] * 2,
    ("B", "gates"): [["W", "F experts", "F shared", "F combine", "W"]] * 2,
    ("F", "combine"): [["W", "B route", "B attend", "B combine"], ["W", "B route", "B attend"]],
}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """Four ranks, for `node` as two nodes of two."""
    return run_ranks(4, measure)


@pytest.mark.parametrize("case", CASES)
def test_an_exchange_in_flight_changes_no_bit(ranks: list[dict[str, Any]], case: str) -> None:
    """Outputs and every gradient of two MoE layers; BF16 and FP8 with recomputation."""
    for rank in ranks:
        different, _ = rank["compared"][case]
        assert different == []


@pytest.mark.parametrize("case", CASES)
def test_the_other_side_computes_between_start_and_wait(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        record: Record = rank["compared"][case][1]
        (pair,) = record.pairs
        assert faults_of(pair) == []
        found = hidden_behind(pair)
        # A second hop starts where the exchange is waited for: on CUDA behind the first, on its own stream.
        assert {key: [each for each in behind if each] for key, behind in found.items()} == BEHIND


@pytest.mark.parametrize("case", CASES)
def test_every_communicator_sees_one_order_on_all_of_its_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    first: Record = ranks[0]["compared"][case][1]
    assert first.by_axis.keys() == AXES[case.split(maxsplit=1)[0]]
    for rank in ranks:
        assert rank["compared"][case][1].by_axis == first.by_axis


def test_who_does_not_wait_finds_no_number_and_is_named(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["without a wait"]
        finite, record, _ = found["a collective is not waited for"]
        assert not finite
        faults = faults_of(record.pairs[0])
        # All of a pair of two layers, but for the counts.
        assert len(faults) == 2 * (len(BEHIND) - 1)
        assert all(fault.endswith(": 0 waits") for fault in faults)
        finite, _, said = found["a gradient is read before it landed"]
        # The backward's two of each layer.
        assert (finite, said.partition(":")[0]) == (False, "nobody has waited for 4 exchanges of a pair")


def test_a_wait_behind_its_reader_is_found(ranks: list[dict[str, Any]]) -> None:
    """Of each exchange of a recorded pair the wait moves behind the pair."""
    (pair,) = ranks[0]["compared"]["direct fp8"][1].pairs
    for event in [event for event in pair if event.what == "wait"]:
        late = [each for each in pair if each != event] + [event]
        (fault,) = faults_of(late)
        assert fault.startswith(f"{event.side} {event.name}: read in "), fault


def test_expert_ranks_that_would_issue_other_orders_are_refused_before_the_step(ranks: list[dict[str, Any]]) -> None:
    said = [rank["other order"] for rank in ranks]
    for one in said:
        assert one.startswith(
            "ranks 0 and 1 of an expert group issue their exchanges in different orders: turns end with"
        )
        assert "route/dispatch/combine" in one
        assert one.endswith("start all ranks with the same code and configuration")


def test_exchanges_in_flight_hold_no_more_than_their_buffers(ranks: list[dict[str, Any]]) -> None:
    """One exchange of each side at once, each with what it sends and receives."""
    for rank in ranks:
        at_once, flown, exchange = rank["peaks"]
        assert at_once <= flown <= at_once + 2 * exchange
        assert exchange > 1e4


def test_a_lane_of_cuda_orders_streams_and_keeps_memory() -> None:
    with accounted() as account:
        in_flight(account)
    assert account.faults == []


def without_events(self: Lane, result: Any, event: Any) -> None:
    for tensor in parallel.flight.tensors_in(result):
        tensor.record_stream(torch.cuda.current_stream(self.device))


PLANTED: dict[str, tuple[tuple[Any, str, Any], str]] = {
    "the lane does not wait for the computation": (
        (Stream, "wait_stream", lambda self, other: None),
        "exchanges reads tokens before it is written",
    ),
    "the computation does not wait for the lane": (
        (Lane, "hand_over", without_events),
        "computation reads rows before it is written",
    ),
    "the result is not recorded": (
        (parallel.flight, "tensors_in", lambda result: iter(())),
        "rows is given away while computation reads it",
    ),
    "what an exchange reads is not held": (
        (Exchange, "__init__", lambda self, journey, *reads: vars(self).update(journey=journey, reads=())),
        "tokens is given away while exchanges reads it",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_missing_event_or_record_stream_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake, fault = PLANTED[name]
    monkeypatch.setattr(*mistake)
    with accounted() as account:
        in_flight(account)
    assert fault in account.faults


def test_a_lane_that_closes_says_what_nobody_waited_for() -> None:
    lane, works = Lane(torch.device("cpu")), []

    class Summed(Started):
        def wait(self) -> None:
            works.append("waited")

    def journey() -> parallel.flight.Journey[torch.Tensor]:
        return (yield parallel.flight.UnderWay(torch.zeros(1), Summed(), lambda rows: rows + 1))

    with pytest.raises(AssertionError, match="nobody has waited for 1 exchanges"), lane.open():
        flight = Exchange(journey()).depart()
    assert works == []
    assert flight.wait() == flight.wait() == 1
    assert works == ["waited"]
    # Without a lane it ends where it starts, and the next pair may come.
    assert lane.in_flight == 0
    with lane.open():
        pass
