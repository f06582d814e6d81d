"""The device code of attention's heads in Triton's interpreter: bit-equal to the chain of separate operations.

Only the shared key's gradient, a sum over heads in another order, has a bound instead. The interpreter contracts no
product and sum to one operation; on a GPU `enable_fp_fusion=False` says the same, and the compiled code is searched for
such instructions (`tests/kernels/test_hopper_codegen.py`).

Sizes are those where something ends: one token, an odd number, a whole tile, one more, many programs and one token;
heads of V3 and of small models, one program of heads and several; sequences of one length and of several. Outputs are
NaN before they are written (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch

from kernels import heads
from kernels.gpu import heads as gpu
from kernels.quantize import quantize_tiles_both_reference
from kernels.rope import apply_rope, rope_tables
from tests.kernels.gemm_inputs import assert_same_bits

BF16, FP32 = torch.bfloat16, torch.float32
# Sequences, tokens of each, heads, nope, rope, v.
V3 = (128, 64, 128)
SIZES = [(1, 1, 5, *V3), (1, 63, 3, 64, 32, 64), (2, 64, 2, *V3), (3, 43, 5, 32, 64, 40), (17, 241, 2, *V3)]
sizes = pytest.mark.parametrize("shape", SIZES, ids=lambda shape: f"{shape[0] * shape[1]}-{shape[2:]}")
# 4097 tokens of so few heads that either of the two functions takes them.
TILED = [(1, 1, 2, *V3), (1, 63, 2, *V3), (2, 64, 2, *V3), (3, 43, 2, *V3), (17, 241, 1, *V3), (17, 241, 1, 64, 64, 64)]
Shape = tuple[int, int, int, int, int, int]


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    sequences, tokens = request.node.callspec.params["shape"][:2]
    other = {"TOKENS": 512, "HEADS": 2, "KEY_TOKENS": 512, "KEY_HEADS": 2, "ROWS": 128, "COLS_OF_Q": 64}
    # The two smallest cases as on a GPU, but for the number of programs; others with several programs, and one.
    small = {1: {"HEADS": 2}, 63: {"TOKENS": 16}, 129: other | {"TOKENS": 64, "KEY_TOKENS": 64}}
    for name, value in small.get(sequences * tokens, other).items():
        monkeypatch.setattr(gpu, name, value)


class Example:
    """Inputs in BF16, or FP32, of one shape, what the separate operations make of them, and their gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype = BF16) -> None:
        sequences, positions, num_heads, nope, rope, v = shape
        tokens = sequences * positions
        self.cos, self.sin = rope_tables(positions, rope, 10000.0, yarn=None)
        self.q = torch.randn(tokens, num_heads, nope + rope).to(dtype)
        self.kv = torch.randn(tokens, num_heads, nope + v).to(dtype)
        # The last columns of wider rows.
        self.k_rope = torch.randn(tokens, 32 + rope).to(dtype)[:, 32:]
        inputs = [each.clone().requires_grad_() for each in (self.q, self.kv, self.k_rope)]
        heads_of = [each.view(sequences, positions, -1, each.shape[-1]).transpose(1, 2) for each in inputs]
        q_nope, q_rope = heads_of[0].split((nope, rope), dim=-1)
        k_nope, values = heads_of[1].split((nope, v), dim=-1)
        key = apply_rope(heads_of[2], self.cos, self.sin).expand(-1, num_heads, -1, -1)
        outputs = (
            torch.cat((q_nope, apply_rope(q_rope, self.cos, self.sin)), -1), torch.cat((k_nope, key), -1), values
        )  # fmt: skip
        grads = [torch.randn_like(each) for each in outputs]
        self.outputs = [each.detach().transpose(1, 2).flatten(0, 1) for each in outputs[:2]]
        self.dq, self.dk, self.dv = (each.transpose(1, 2).flatten(0, 1) for each in grads)
        self.d_q, self.d_kv, self.d_k_rope = torch.autograd.grad(outputs, inputs, grads)


@sizes
def test_queries_and_keys_have_the_bits_of_rope_and_cat(shape: Shape) -> None:
    case = Example(shape, FP32 if shape[1] == 63 else BF16)
    k = gpu.heads_forward(case.q, case.kv, case.k_rope, case.cos, case.sin)
    assert_same_bits((case.q, k), tuple(case.outputs))


@sizes
def test_queries_gradients_are_turned_back_with_the_bits_of_autograd(shape: Shape) -> None:
    case = Example(shape, FP32 if shape[1] == 63 else BF16)
    whole = torch.empty(len(case.q), case.d_q[0].numel() + 64, dtype=case.q.dtype)
    # Head after head.
    gpu.turn_back(case.dq.transpose(0, 1).contiguous().transpose(0, 1), case.cos, case.sin, whole[:, :-64])
    assert_same_bits(whole[:, :-64].contiguous(), case.d_q.flatten(1))
    assert bool(whole[:, -64:].isnan().all())


@pytest.mark.parametrize("shape", TILED, ids=lambda shape: f"{shape[0] * shape[1]}-{shape[2:]}")
def test_gradients_in_both_groupings_are_those_that_a_quantiser_makes_of_autograds(shape: Shape) -> None:
    case, power_of_two = Example(shape), shape[1] != 63
    if heads.turns_into_tiles(*shape[2:5]):
        found = gpu.turn_back_quantize_both(case.dq, case.cos, case.sin, power_of_two)
        assert_same_bits(found, quantize_tiles_both_reference(case.d_q.flatten(1), power_of_two))
    if heads.joins_into_tiles(shape[3], shape[5]):
        # Head after head, as some attention gives them.
        apart = case.dk.transpose(0, 1).contiguous().transpose(0, 1)
        found = gpu.heads_quantize_both(apart, case.dv, shape[3], power_of_two)
        assert_same_bits(found, quantize_tiles_both_reference(case.d_kv.flatten(1), power_of_two))


@sizes
def test_the_shared_keys_gradient_is_within_its_two_roundings_of_fp64(shape: Shape) -> None:
    case, nope = Example(shape), shape[3]
    whole = torch.empty(len(case.q), 64 + shape[4], dtype=BF16)
    out = whole[:, 64:]
    gpu.rope_key_backward(case.dk, case.cos, case.sin, out)
    assert bool(whole[:, :64].isnan().all())
    # Another order of FP32 sums changes the first rounding of one number in some thousands, by one step.
    assert int((out != case.d_k_rope).sum()) <= max(2, out.numel() // 1000)
    total = case.dk[..., nope:].double().sum(1)
    cos, sin = (torch.cat([table] * shape[0]).double() for table in (case.cos, case.sin))
    first, second = total[:, 0::2], total[:, 1::2]
    exact = torch.stack((first * cos + second * sin, second * cos - first * sin), -1).flatten(1)
    # Of the sum, either of a pair's numbers, and of the result; FP32 sums of that many heads.
    of_pair = total.abs().unflatten(1, (-1, 2)).sum(-1).repeat_interleave(2, 1)
    terms = case.dk[..., nope:].double().abs().sum(1).unflatten(1, (-1, 2)).sum(-1).repeat_interleave(2, 1)
    assert bool(((out.double() - exact).abs() <= 2**-8 * (of_pair + exact.abs()) + 2**-17 * terms).all())


@pytest.mark.parametrize("shape", [(1, 5, 2, *V3)])
def test_expanded_gradients_are_read_as_what_they_show_and_no_tokens_are_none(shape: Shape) -> None:
    case = Example(shape)
    one = torch.ones(1, 1, 1, dtype=BF16)
    dq, dv = one.expand(case.dq.shape), one.expand(case.dv.shape)
    for found, expected in (
        (gpu.turn_back_quantize_both(dq, case.cos, case.sin, True),
         gpu.turn_back_quantize_both(dq.contiguous(), case.cos, case.sin, True)),
        (gpu.heads_quantize_both(dq, dv, 128, True),
         gpu.heads_quantize_both(dq.contiguous(), dv.contiguous(), 128, True)),
    ):  # fmt: skip
        assert_same_bits(found, expected)
    none = [each[:0] for each in (case.q, case.kv, case.k_rope)]
    assert gpu.heads_forward(*none, case.cos, case.sin).shape == (0, 2, 192)
    assert [tuple(t.shape) for t in gpu.turn_back_quantize_both(none[0], case.cos, case.sin, True)] == [
        (0, 384), (3, 0), (384, 0), (0, 384)
    ]  # fmt: skip
