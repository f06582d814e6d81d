"""Expert parallelism over 2 and 4 ranks against one process: values, gradients, bytes on the wire, one host read.

One spawn per number of ranks runs everything (`moe_ranks.py`); each test here reads one promise from its results.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.formats import E4M3_MAX, TILE, Quantized, ceil_div
from kernels.quantize import dequantize_tiles, quantize_tiles, requantize_transposed
from kernels.tiles import decode_e4m3
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher, Wire, pack_fp8
from parallel.layout import Layout
from parallel.mesh import Axis, init_processes, make_mesh
from tests.parallel.moe_ranks import (
    EXPERTS,
    KINDS,
    case,
    identity_experts,
    measure,
    over_the_wire,
    relative,
    routed_experts,
)
from tests.ranks import run_ranks
from train.model.moe import LocalDispatcher
from train.model.phases import arrived

WIRES: tuple[Wire, ...] = get_args(Wire)
ALONE = Axis("ep", 1, 0, None)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, measure)


@pytest.mark.parametrize("kind", KINDS)
def test_routed_experts_in_fp32_equal_one_process(ranks: list[dict[str, Any]], kind: str) -> None:
    parts = [result["squares"][kind, "fp32"] for result in ranks]
    # Each expert sees the same rows in the same order, so its GEMMs are the same; each gate is used once.
    for key in ("gates", "gate_up_proj", "down_proj"):
        assert relative(parts, key) == 0, key
    # A token's three terms are added per rank first: at most three roundings of 2^-24.
    for key in ("y", "x"):
        assert relative(parts, key) < 3 * 2**-24, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_routed_experts_in_bf16_and_fp8_equal_one_process_but_for_the_wire(
    ranks: list[dict[str, Any]], kind: str, wire: str
) -> None:
    parts = [result["squares"][kind, wire] for result in ranks]
    assert relative(parts, "gates") == 0
    for key in ("gate_up_proj", "down_proj"):
        # BF16 is exact on its wire. Power-of-two scales round to four bits wherever the tile's scale lies, so FP8 on
        # the wire and in the linear is the same rounding, but for elements 2^-13.8 below their tile's largest: about
        # 2e-4 of normal data, each changed by 2^-10 of its scale, 1.5e-5 of the standard deviation: together 2e-7.
        assert relative(parts, key) <= (0 if wire == "bf16" else 1e-6), key
    # Sums per rank rounded to BF16, then the total, here and in the reference: three roundings of 2^-8 / sqrt(3) at
    # most (0.7 of it for mantissas spread evenly): sqrt(3) * 0.7 * 2^-8 / sqrt(3). Measured: 1.7e-3 to 2.4e-3.
    for key in ("y", "x"):
        assert relative(parts, key) < 2**-8, key


def test_a_limit_on_rows_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    """FP32, BF16 and FP8; outputs and every gradient; some ranks beyond the limit and others not."""
    assert [result["limited"] for result in ranks] == [[]] * len(ranks)


@pytest.mark.parametrize("wire", WIRES)
def test_dispatch_then_combine_is_the_identity_for_unit_gates(ranks: list[dict[str, Any]], wire: str) -> None:
    """One gate is 1, the others 0, experts are the identity: y = x and dx = dy to the bit; fp8: both quantised once."""
    assert [result["identity"][wire] for result in ranks] == [[]] * len(ranks)


def test_gates_that_sum_to_one_give_the_token_back_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    """FP32 wire, gates 1/2, 1/4, 1/4, tokens of 8 significant bits: every partial sum is exact."""
    assert all(result["dyadic"] for result in ranks)


def test_no_token_anywhere_is_legal_and_backward_still_runs_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["no tokens"] == {"rows": 0, "y": (0, 160), "exchanges": 7}


def test_everything_repeats_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    assert all(result["repeats"] for result in ranks)


@pytest.mark.parametrize("hidden", [160, 7168])
def test_bytes_on_the_wire_are_those_of_the_formula(ranks: list[dict[str, Any]], hidden: int) -> None:
    """Counted from the tensors handed to all_to_all_single; pairs (token, rank) from the ids, in plain Python."""
    for result in ranks:
        wire = result["bytes"][hidden]
        pairs, slots, arrived = wire["pairs"], wire["slots"], wire["arrived"]
        # A token with several experts on one rank goes there once.
        assert 0 < pairs < slots or wire["tokens"] == 0
        packet = hidden + 4 * -(-hidden // 128)
        assert packet == {160: 168, 7168: 7392}[hidden]
        ep, local, topk = len(ranks), EXPERTS // len(ranks), 3
        expected = [
            ("int64", ep * 8 * (1 + local)),
            ("int32", pairs * 8 * topk),
            ("uint8", pairs * packet),
            ("bfloat16", arrived * 2 * hidden),
            # Backward: the token's gradient goes out as the token did; its sums and the gates' gradients come back.
            ("uint8", pairs * packet),
            ("bfloat16", arrived * 2 * hidden),
            ("float32", arrived * 4 * topk),
        ]
        assert wire["handed over"] == expected
        totals = {"counts": 0, "dispatch": 0, "routing": 0, "combine": 0, "gates": 0}
        names = ("counts", "routing", "dispatch", "combine", "dispatch", "combine", "gates")
        for name, (_, size) in zip(names, expected, strict=True):
            totals[name] += size
        assert wire["traffic"] == totals


def test_the_host_reads_once_per_layer_and_micro_batch(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["host reads"] == {"dispatch": ["tolist"], "combine": [], "backward": []}


def test_dgrad_of_down_proj_computes_on_the_payload_that_was_sent(ranks: list[dict[str, Any]]) -> None:
    """The operand equals that of one process (the token's own gradient, quantised once) bit for bit."""
    for result in ranks:
        assert result["dgrad"]["different"] == 0
    assert sum(result["dgrad"]["tiles"] for result in ranks) > 500


@pytest.mark.parametrize("wire", WIRES)
def test_an_axis_of_one_rank_equals_the_local_dispatcher(wire: Wire) -> None:
    tokens = case("random", 4, torch.float32 if wire == "fp32" else torch.bfloat16)
    traffic = Traffic()
    alone = ExpertParallelDispatcher(EXPERTS, ALONE, wire=wire, power_of_two=True, traffic=traffic)
    expected, actual = (routed_experts(tokens, each, wire) for each in (LocalDispatcher(EXPERTS), alone))
    for key in ("y", "x", "gates"):
        assert torch.equal(actual[key], expected[key]), key
    for key in ("gate_up_proj", "down_proj"):
        error = (actual[key] - expected[key]).norm() / expected[key].norm()
        # Underflow in FP8, as above.
        assert float(error) <= (1e-6 if wire == "fp8" else 0), key
    assert sum(traffic.to_others.values()) == 0


def wide_numbers(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers; each row and each column scaled by powers of two and more over 2^20, some zeros."""
    spread = torch.randn(rows, cols) * torch.randn(rows, 1).mul(4).exp2() * torch.randn(1, cols).mul(3).exp2()
    return spread.mul(torch.rand(rows, cols) > 0.05).to(dtype)


@pytest.mark.parametrize("cols", [1, 127, 128, 160, 384])
def test_power_of_two_values_are_exact_in_bf16_and_quantise_again_to_themselves(cols: int) -> None:
    x = wide_numbers(129, cols, torch.bfloat16)
    sent = over_the_wire(x, power_of_two=True)
    assert torch.equal(sent, dequantize_tiles(quantize_tiles(x, power_of_two=True)))
    assert not torch.equal(sent, x.float())
    received = sent.bfloat16()
    assert torch.equal(received.float(), sent)
    again = quantize_tiles(received, power_of_two=True)
    assert torch.equal(dequantize_tiles(again), sent)


@pytest.mark.parametrize("cols", [1, 127, 128, 160, 384])
def test_fp32_scales_find_payload_and_scale_again_but_round_twice_for_wgrad(cols: int) -> None:
    x = wide_numbers(129, cols, torch.bfloat16)
    first = quantize_tiles(x, power_of_two=False)
    received = over_the_wire(x, power_of_two=False).bfloat16()
    again = quantize_tiles(received, power_of_two=False)
    assert torch.equal(decode_e4m3(again.payload), decode_e4m3(first.payload))
    assert torch.equal(again.scale, first.scale)
    # Normal numbers alike in size: nothing underflows, and powers of two would change nothing.
    first = quantize_tiles(torch.randn(256, cols).abs() + 0.1, power_of_two=False)
    before, after = dequantize_tiles(first), dequantize_tiles(requantize_transposed(first, power_of_two=False)).t()
    changed = (after - before).abs() / before
    # Half an E4M3 step: docs/numerics.md, eq. 1.
    assert 2**-6 < float(changed.max()) <= 1.0001 * 2**-4


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("hidden", [1, 127, 129, 300])
def test_few_tokens_and_odd_widths_survive_the_packet(tokens: int, hidden: int) -> None:
    x = wide_numbers(tokens, hidden, torch.float32)
    expected = dequantize_tiles(quantize_tiles(x, power_of_two=True))
    assert torch.equal(over_the_wire(x, power_of_two=True), expected)


def test_regrouping_for_wgrad_changes_exactly_the_elements_that_underflow() -> None:
    """1x128 -> 128x1: with v the element over its new scale, changed if and only if |v| < 2^-6 and 2^9 v is no integer.

    The change is then at most 2^-10 of the scale.
    """
    q = quantize_tiles(wide_numbers(300, 200, torch.bfloat16), power_of_two=True)
    before = dequantize_tiles(q).t().double()  # [cols, rows]
    regrouped = requantize_transposed(q, power_of_two=True)
    after = dequantize_tiles(regrouped).double()
    scale = regrouped.scale.t().double().repeat_interleave(TILE, 1)[:, : before.shape[1]]
    amax = torch.stack([part.abs().amax(1) for part in before.split(TILE, dim=1)], dim=1)
    new_scale = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).log2().ceil().exp2()).repeat_interleave(TILE, 1)
    assert torch.equal(scale, new_scale[:, : before.shape[1]])
    v = before / scale
    underflows = (v.abs() < 2**-6) & (v * 2**9 != (v * 2**9).round())
    assert torch.equal(after != before, underflows)
    assert bool(((after - before).abs() <= 2**-10 * scale).all())
    # Both sides of the condition are met many times: small elements that stay exact, and elements that change.
    assert int(underflows.sum()) > 100
    assert int(((v != 0) & (v.abs() < 2**-6) & ~underflows).sum()) > 100


def test_a_tile_of_nan_or_infinity_arrives_as_nan() -> None:
    x = torch.ones(3, 300)
    x[0, 5], x[1, 140] = float("nan"), float("inf")
    received = over_the_wire(x, power_of_two=True)
    assert bool(received[0, :128].isnan().all())
    assert bool(received[1, 128:256].isnan().all())
    assert torch.equal(received[2], x[2])


def test_experts_that_cannot_be_shared_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.n_routed_experts=8 .* layout\.ep=3"):
        ExpertParallelDispatcher(8, SimpleNamespace(size=3, rank=0), wire="fp32", power_of_two=True)  # type: ignore[arg-type]


@pytest.fixture
def rank_130_of_2048() -> Iterator[Axis]:
    init_processes(rank=130, world=2048, backend="fake", store=None)
    try:
        layout = Layout(pp=16, dp=128, ep=64)
        yield make_mesh(layout, device=torch.device("cpu"), tied_embedding=True).ep
    finally:
        dist.destroy_process_group()


def test_one_rank_of_2048_is_planned_with_fake_tensors(rank_130_of_2048: Axis) -> None:
    traffic = Traffic()
    dispatcher = ExpertParallelDispatcher(
        256, rank_130_of_2048, wire="fp8", power_of_two=True, assume_balanced=True, traffic=traffic
    )
    assert dispatcher.experts == range(8, 12)
    with FakeTensorMode():
        x = torch.empty(4096, 7168, dtype=torch.bfloat16, requires_grad=True)
        gates = torch.empty(4096, 8, requires_grad=True)
        ids, counts = torch.empty(4096, 8, dtype=torch.int64), torch.empty(256, dtype=torch.int64)
        dispatched = arrived(dispatcher.dispatch(x, SimpleNamespace(topk_ids=ids, gates=gates, counts=counts)))
        # 4096 tokens x 8 experts from each of 64 ranks, over 64 ranks: 32,768 rows, 8,192 for each of four experts.
        assert dispatched.tokens.shape == (32768, 7168)
        assert dispatched.grouping.num_rows == 32768
        assert dispatched.gates.shape == (32768,)
        assert dispatched.grouping.group_ends.shape == (4,)
        y = arrived(dispatcher.combine(identity_experts(dispatched), dispatched))
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        y.sum().backward()
        assert (x.grad.shape, gates.grad.shape) == (x.shape, gates.shape)
    copies = 4096 * 8
    assert traffic.sent["dispatch"] == 2 * copies * 7392
    assert traffic.sent["combine"] == 2 * copies * 14336
    assert traffic.to_others["combine"] == 2 * copies * 14336 * 63 // 64


def test_balanced_splits_round_up() -> None:
    """5 tokens, 3 experts each, one rank: the assumed rows are what the routing needs when it is balanced."""
    dispatcher = ExpertParallelDispatcher(EXPERTS, ALONE, wire="fp32", power_of_two=True, assume_balanced=True)
    counts = torch.tensor([2, 2, 2, 2, 2, 2, 2, 1])
    ids = torch.repeat_interleave(torch.arange(EXPERTS), counts).view(3, 5).t().contiguous()
    x = torch.randn(5, 4)
    dispatched = arrived(dispatcher.dispatch(x, SimpleNamespace(topk_ids=ids, gates=torch.ones(5, 3), counts=counts)))
    assert dispatched.grouping.num_rows == EXPERTS * TILE
    torch.testing.assert_close(arrived(dispatcher.combine(identity_experts(dispatched), dispatched)), 3 * x)


def test_packets_hold_payload_and_scales_of_each_token() -> None:
    x = wide_numbers(63, 300, torch.float32)
    packets = pack_fp8(quantize_tiles(x, power_of_two=True))
    assert packets.shape == (63, 300 + 4 * ceil_div(300, TILE))
    q = quantize_tiles(x, power_of_two=True)
    for token in (0, 1, 62):
        payload = packets[token, :300].contiguous().view(torch.float8_e4m3fn)
        scale = packets[token, 300:].contiguous().view(torch.float32)
        one = Quantized(payload[None], scale[:, None])
        assert torch.equal(decode_e4m3(payload), decode_e4m3(q.payload[token]))
        assert torch.equal(dequantize_tiles(one)[0], dequantize_tiles(q)[token])
