"""Two pipeline ranks against one process: what a schedule computes, how often, and what it holds meanwhile.

The bound on gradients is that of `tests/parity/test_layouts.py`; what only re-arranges is bit-equal. Splits of layers
are compared with all possible ones. `pipeline_ranks.py` says what each rank does; one spawn serves many tests.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import PipelineStage

from parallel.layout import Layout
from parallel.pipeline_stage import MessagesUnderWay, ScheduledStage, WaitingWgrads
from parallel.schedules import MOST_MESSAGES, SCHEDULES
from tests.parallel.pipeline_ranks import CASES, Calls, Walks, announced, calls_of, let_wait, send_late, walk
from tests.parity.layout_theorem import MODEL
from tests.ranks import run_ranks
from tests.studies.plan.test_orders import torch_schedule

# A gradient is a sum over at most 384 tokens, regrouped: sqrt(384) 2^-24 times 4 for cancellation (docs/numerics.md).
GRADIENT_BOUND = 5e-6
LAYOUTS = {
    "1F1B": Layout(pp=2, stage_layers=(3, 2)),
    "ZBVZeroBubble": Layout(pp=2, schedule="ZBVZeroBubble", stage_layers=(2, 1, 1, 1)),
    # A step of fewer than 4 micro-batches runs ZBVZeroBubble. Head and MTP alone on the last stage.
    "DualPipeV": Layout(pp=2, schedule="DualPipeV", stage_layers=(2, 1, 2, 0)),
}
# Of these only the operators are counted.
INTERLEAVED = {
    "Interleaved1F1B": Layout(pp=2, schedule="Interleaved1F1B", stage_layers=(2, 1, 1, 1)),
    "InterleavedZeroBubble": Layout(pp=2, schedule="InterleavedZeroBubble", stage_layers=(0, 2, 2, 1)),
}
# Which schedule object runs each of CASES: a new one whenever the number or the shape of micro-batches changes.
SCHEDULE_OF_CASE = [0, 0, 1, 2, 3, 4]


@pytest.fixture(
    scope="module",
    params=[name if name != "DualPipeV" else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS],
)
def walks(request: pytest.FixtureRequest) -> Walks:
    """Schedule, and what each of two ranks found under it."""
    return request.param, run_ranks(2, walk, LAYOUTS[request.param])


def test_any_number_of_micro_batches_gives_the_losses_and_gradients_of_one_process(walks: Walks) -> None:
    """6, 6, 4, 4 larger, 6 micro-batches, then fewer than fill the pipeline, one step after another."""
    for facts in (facts for rank in walks[1] for facts in rank.steps):
        assert facts.same_losses, "a pipeline changes no bit of the forward"
        assert facts.error[0] <= GRADIENT_BOUND, facts.error
        assert facts.pending == 0


def test_a_step_repeats_bit_for_bit_the_first_one_included(walks: Walks) -> None:
    """torch left to itself infers shapes by a forward and a backward of the first step, which stay in the gradients."""
    for rank in walks[1]:
        assert [facts.repeats for facts in rank.steps] == [True, True, None, None, True, None]
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
    ends = LAYOUTS[name].rank_of_stage(LAYOUTS[name].num_stages - 1)
    for rank, found in enumerate(ranks):
        expected = True if rank == ends else None
        assert (found.same_hidden, found.same_score) == (expected, expected)


def test_embedding_head_and_mtp_are_where_the_model_begins_and_ends(walks: Walks) -> None:
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


BLOCKS = MODEL.num_hidden_layers + MODEL.num_nextn_predict_layers
# MLA: q_kv_a, q_b, kv_b, o. A dense FFN or a shared expert: gate_up, down. Routed experts: stacks of gate_up, down.
LINEARS = 6 * BLOCKS
MOE_BLOCKS = BLOCKS - MODEL.first_k_dense_replace
STACKS = 2 * MOE_BLOCKS
# Keep SwiGLU's input, of which they make their own twice again, for dx and for dW: every down.
DOWNS = BLOCKS + MOE_BLOCKS
# Keep an input that is there anyway, in full: every o.
KEPT = BLOCKS
# Read what a norm has quantised: q_kv_a, q_b, kv_b, and gate_up of a dense FFN or a shared expert.
NORMED = 4 * BLOCKS
# One before each of them; enorm, hnorm and the depth's own for MTP; the final one.
NORMS = NORMED + 3 * MODEL.num_nextn_predict_layers + 1
PER_MICRO_BATCH = {
    # fprop and dgrad; wgrad.
    "gemm_tile_block": 2 * LINEARS,
    "gemm_tile_tile": LINEARS,
    "grouped_gemm_tile_block": 2 * STACKS,
    "grouped_gemm_tile_tile": STACKS,
    # The input by row, together with the norm before it or, of a down-projection, with SwiGLU; dy by row and by
    # column; the input by column, from what is kept of it. SwiGLU quantises the gradient of its input where it
    # is made. Experts gather what the norm has quantised, and the gradient of their sums.
    "quantize_tiles": LINEARS - (DOWNS - MOE_BLOCKS) - NORMED,
    "gather_tiles": MOE_BLOCKS,
    "gather_requantize_transposed": MOE_BLOCKS,
    "gather_quantize_both": MOE_BLOCKS,
    "swiglu_backward_quantize_both": DOWNS,
    "add_norm_quantize": NORMS,
    "norm_backward": NORMS,
    "norm_gain_gradient": NORMS,
    "swiglu_quantize": DOWNS,
    "quantize_tiles_both": LINEARS - (DOWNS - MOE_BLOCKS),
    "quantize_tiles_transposed": KEPT,
    "swiglu_quantize_transposed": DOWNS,
    # From what the norm keeps.
    "norm_again": NORMED,
}
EACH_MICRO_BATCH = Counter(PER_MICRO_BATCH)
# Each weight once, however many micro-batches use it, and not again before it changes.
ONCE = Counter(quantize_blocks=LINEARS + STACKS)
# q_b and kv_b run their fprop again, after their norms.
AGAIN = Counter(gemm_tile_block=2 * BLOCKS, add_norm_quantize=2 * BLOCKS)


def times(count: int, calls: Counter[str]) -> Counter[str]:
    return Counter({operator: count * number for operator, number in calls.items()})


def test_each_fp8_gemm_runs_exactly_once_per_micro_batch(walks: Walks) -> None:
    """Summed over ranks every operator runs as often as in one process: fprop, dgrad and wgrad of each linear."""
    check_calls([rank.calls for rank in walks[1]])


@pytest.mark.long
@pytest.mark.parametrize("name", INTERLEAVED)
def test_each_fp8_gemm_runs_once_on_interleaved_stages_too(name: str) -> None:
    check_calls(run_ranks(2, calls_of, INTERLEAVED[name]))


def check_calls(ranks: list[Calls]) -> None:
    """Of three FP8 steps on both ranks, the last one with recomputation."""
    totals: list[Counter[str]] = [sum((rank.pipeline[step] for rank in ranks), Counter()) for step in range(3)]
    # Once a bucket, and each rank has its own.
    assert all(counted.pop("sums_of_squares") for counted in (*totals, *ranks[0].alone))
    assert totals == ranks[0].alone
    count = ranks[0].micro_batches
    each = times(count, EACH_MICRO_BATCH)
    for total, expected in zip(totals, (each + ONCE, each, each + times(count, AGAIN)), strict=True):
        assert {
            operator: n
            for operator, n in total.items()
            if any(part in operator for part in ("gemm", "quantize", "norm", "gather"))
        } == expected
    # Recomputation repeats the assembly of heads and nothing else: no attention core, no wgrad. And it changes no bit.
    assert totals[2] - totals[1] == times(count, AGAIN + Counter(heads_forward=BLOCKS))
    assert all(rank.same_bits for rank in ranks)


@pytest.mark.parametrize(
    ("ranks", "played", "counts"), [(4, [0, 1, 2, 3], [1, 2, 4, 7, 8, 20]), (16, [0, 6, 15], [16, 120])]
)
def test_most_in_flight_has_the_known_values(ranks: int, played: list[int], counts: list[int]) -> None:
    """1F1B: rank r warms up with pp - r. The others have two stages a rank, half as large.

    Once these are filled, ZBV holds 2 pp on every rank, DualPipeV one more, the forward of a pair beside its backward;
    Interleaved1F1B a round on the first stage, 2 (pp - 1 - r) of warm-up and the one that runs; InterleavedZeroBubble a
    round and pp.
    """
    (found,) = run_ranks(1, announced, ranks, played, counts)
    for (name, count), held in found.items():
        whole_round = count // max(1, count // ranks)
        if name == "1F1B":
            assert held == [min(ranks - rank, count) for rank in played]
        elif name == "Interleaved1F1B":
            assert held == [min(whole_round + 2 * (ranks - 1 - rank) + 1, 2 * count) for rank in played]
        elif name == "InterleavedZeroBubble":
            assert held == [min(whole_round + ranks, 2 * count) for _ in played]
        elif name == "DualPipeV":
            assert held == [2 * ranks + 1] * len(played)
        elif count >= 2 * ranks - 1:
            assert held == [2 * ranks] * len(played)
        else:
            # All of what there is, on one stage or on both.
            assert all(count <= most <= min(2 * ranks, 2 * count) for most in held)
    assert {name for name, _ in found} == set(SCHEDULES)


def test_no_more_weight_gradients_wait_than_allowed_and_no_bit_changes() -> None:
    unlimited, *limited = zip(*run_ranks(2, let_wait, [None, 1, 0]), strict=True)
    assert max(most for most, _ in unlimited) == 3, "or the limits below bind nothing"
    for limit, ranks in zip((1, 0), limited, strict=True):
        assert max(most for most, _ in ranks) == limit
        assert [grads for _, grads in ranks] == [grads for _, grads in unlimited]


class Message:
    """A send as a backend reports it."""

    arrived = waited = False

    def is_completed(self) -> bool:
        return self.arrived

    def wait(self) -> None:
        self.waited = True


def test_a_send_is_let_go_as_soon_as_the_backend_reports_it_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract with NCCL, whose works report that they are done; gloo's never do, and are waited for by number."""
    messages = [Message() for _ in range(6)]
    # What torch's side of the stage would have sent.
    operations = [
        SimpleNamespace(op=lambda *_, message=message, **__: message, tensor=None, group=None, tag=0, group_peer=1)
        for message in messages
    ]
    monkeypatch.setattr(PipelineStage, "__init__", lambda self: None)
    monkeypatch.setattr(PipelineStage, "get_fwd_send_ops", lambda self, i: [operations[i]])
    under_way = MessagesUnderWay(3)
    stage, other = (ScheduledStage(waiting=WaitingWgrads(None), messages=under_way) for _ in range(2))
    assert stage.get_fwd_send_ops(0) == other.get_fwd_send_ops(1) == [], "nothing is left for the runtime to hold"
    messages[0].arrived = True
    stage.get_fwd_send_ops(2)
    assert [message.waited for message in messages] == [True, False, False, False, False, False]
    # The third is done before the second: it is kept until its turn comes.
    messages[2].arrived = True
    other.get_fwd_send_ops(3)
    assert [message.waited for message in messages] == [True, False, False, False, False, False]
    # With a fourth there would be four under way, of both stages: the rank waits for the oldest, and the next was done.
    stage.get_fwd_send_ops(4)
    assert [message.waited for message in messages] == [True, True, True, False, False, False]
    other.finish_sends()
    assert [message.waited for message in messages] == [True] * 5 + [False]
    mixed = ScheduledStage(waiting=WaitingWgrads(None), messages=None)
    assert mixed.get_fwd_send_ops(1) == [operations[1]], "1F1B batches and waits by itself"


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_sends_that_complete_late_are_never_more_than_the_limit_and_block_nobody(world: int) -> None:
    """Every schedule on gloo, whose sends end once the receiver is there, behind a backend that is slow to say so.

    Gradients have the same bits under each limit. Without one, all that a rank sends in a step piles up.
    """
    limits = (1, MOST_MESSAGES, 1000)
    for found in run_ranks(world, send_late, limits):
        assert found.keys() == SCHEDULES.keys() - {"1F1B"}
        for name, by_limit in found.items():
            most, gradients = zip(*by_limit, strict=True)
            assert most[0] == 1, name
            assert most[1] == MOST_MESSAGES < most[2], name
            assert len(set(gradients)) == 1, name


Part = tuple[str, int, int]


def with_messages(name: str, pp: int, chunks: int, micro_batches: int) -> list[list[tuple[Part, ...]]]:
    """Of each rank torch's actions, sends and receives among them: (kind, stage, micro-batch) of each part."""
    by_rank = torch_schedule(name, pp, chunks, micro_batches).pipeline_order_with_comms
    return [
        [
            tuple((part.computation_type.name, part.stage_index, part.microbatch_index) for part in parts)
            for parts in (action.sub_actions or (action,) for action in by_rank[rank])
            if parts[0].microbatch_index is not None
        ]
        for rank in range(pp)
    ]


def run_to_the_end(order: list[list[tuple[Part, ...]]]) -> bool:
    """Whether every rank gets there if each send holds it up until the receiver has come to its receive."""
    remote = {part for actions in order for parts in actions for part in parts if part[0].startswith("RECV")}
    reached, at = set[Part](), [0] * len(order)

    def ends(part: Part) -> bool:
        kind, stage, micro_batch = part
        if kind.startswith("SEND"):
            return (f"RECV_{kind[-1]}", stage + (1 if kind == "SEND_F" else -1), micro_batch) in reached
        needs = {"FORWARD": ("F", stage - 1), "FULL_BACKWARD": ("B", stage + 1), "BACKWARD_INPUT": ("B", stage + 1)}
        if kind not in needs or (f"RECV_{needs[kind][0]}", stage, micro_batch) not in remote:
            return True
        direction, sender = needs[kind]
        return (f"SEND_{direction}", sender, micro_batch) in reached

    while True:
        before = sum(at)
        for rank, actions in enumerate(order):
            while at[rank] < len(actions):
                reached.update(actions[at[rank]])
                if not all(map(ends, actions[at[rank]])):
                    break
                at[rank] += 1
        if sum(at) == before:
            return at == [len(actions) for actions in order]


def received_late(actions: list[tuple[Part, ...]]) -> list[tuple[Part, ...]]:
    """The same with each receive directly before what needs it."""
    waiting = {parts[0] for parts in actions if parts[0][0].startswith("RECV")}
    late: list[tuple[Part, ...]] = []
    for parts in (parts for parts in actions if parts[0] not in waiting):
        for kind, stage, micro_batch in parts:
            needed = ("RECV_F" if kind == "FORWARD" else "RECV_B", stage, micro_batch)
            if kind in ("FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT") and needed in waiting:
                late.append((needed,))
        late.append(parts)
    return late


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "1F1B"])
def test_a_rank_may_wait_for_any_of_its_sends(name: str) -> None:
    """Even for each at once: why a bound on messages under way is free of deadlocks. Later receives would not be."""
    facts, stuck = SCHEDULES[name], 0
    for pp in (2, 3, 4, 6):
        for micro_batches in (m for m in (1, 2, pp, 2 * pp, 3 * pp, 4 * pp + 1) if facts.takes(pp, m)):
            for chunks in (facts.chunks,) if facts.chunks else (2, 3):
                order = with_messages(name, pp, chunks, micro_batches)
                assert run_to_the_end(order), (pp, chunks, micro_batches)
                stuck += not run_to_the_end([received_late(actions) for actions in order])
    assert stuck > 0, "or nothing was simulated"
