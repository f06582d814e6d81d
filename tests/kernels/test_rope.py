"""RoPE turns interleaved pairs as transformers does, with its YaRN tables and softmax factor."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    yarn_apply_mscale,
)

from kernels.config import YarnScaling
from kernels.rope import apply_rope, apply_rope_reference, rope_tables, yarn_softmax_factor

V3_YARN = YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)


def transformers_config(dim: int, theta: float, yarn: YarnScaling | None) -> DeepseekV3Config:
    parameters = {"rope_type": "default"} if yarn is None else {"rope_type": "yarn", **asdict(yarn)}
    parameters["rope_theta"] = theta
    return DeepseekV3Config(qk_rope_head_dim=dim, max_position_embeddings=8192, rope_parameters=parameters)


@pytest.mark.parametrize(
    ("dim", "theta", "yarn"),
    [
        (64, 10000.0, None),
        (2, 10000.0, None),
        (64, 10000.0, V3_YARN),
        (32, 500.0, YarnScaling(4.0, 256, 32.0, 1.0, 1.0, 1.0)),
        # The blend ends beyond the last pair.
        (32, 500.0, YarnScaling(4.0, 4096, 32.0, 1.0, 1.0, 1.0)),
        (32, 10000.0, YarnScaling(8.0, 128, 16.0, 2.0, 1.0, 0.5)),
        (16, 10000.0, YarnScaling(8.0, 128, 32.0, 1.0, 1.0, 0.0)),
    ],
)
def test_tables_and_softmax_factor_are_those_of_transformers(dim: int, theta: float, yarn: YarnScaling | None) -> None:
    config = transformers_config(dim, theta, yarn)
    positions = torch.arange(300)[None]
    expected_cos, expected_sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), positions)
    cos, sin = rope_tables(300, dim, theta, yarn=yarn)
    # Angles reach 300 rad; a frequency off by one fp32 rounding (2^-24) moves them by 300 * 2^-24 = 1.8e-5.
    torch.testing.assert_close(cos, expected_cos[0, :, : dim // 2], rtol=0, atol=2e-5)
    torch.testing.assert_close(sin, expected_sin[0, :, : dim // 2], rtol=0, atol=2e-5)
    if yarn is not None:
        expected_factor = yarn_apply_mscale(config.rope_parameters, 1.0)
        assert yarn_softmax_factor(yarn) == pytest.approx(expected_factor, rel=1e-15)


def test_v3_tables_are_those_of_transformers_at_every_position_it_serves() -> None:
    """All 163,840 = 40 x 4096 positions of the released file; a table of fewer is the beginning of a longer one."""
    length = 40 * 4096
    expected = DeepseekV3RotaryEmbedding(transformers_config(64, 10000.0, V3_YARN))(
        torch.zeros(1), torch.arange(length)[None]
    )
    tables = rope_tables(length, 64, 10000.0, yarn=V3_YARN)
    # Their frequencies differ by up to two fp32 roundings and the angle is rounded once more: 3 * 2^-24 of the angle,
    # which 2^-22 covers, and a rounding of cos and sin. Measured 5e-4 at angles of 1.6e5.
    angles = torch.arange(length)[:, None] * torch.atan2(tables[1][1], tables[0][1])
    bound = angles * 2.0**-22 + 2.0**-23
    for ours, theirs in zip(tables, expected, strict=True):
        assert bool(((ours - theirs[0, :, :32]).abs() <= bound).all())
    for shorter in (1, 129, 4096, 4097, 16384, 32768, 131072):
        pairs = zip(rope_tables(shorter, 64, 10000.0, yarn=V3_YARN), tables, strict=True)
        assert all(torch.equal(short, table[:shorter]) for short, table in pairs)


def test_v3_yarn_keeps_fast_pairs_slows_slow_pairs_and_sharpens_the_softmax() -> None:
    plain_cos, plain_sin = rope_tables(2, 64, 10000.0, yarn=None)
    cos, sin = rope_tables(2, 64, 10000.0, yarn=V3_YARN)
    # The angle of position 1 is the frequency itself: pairs up to 10 unchanged, from 23 on divided by 40.
    ratio = torch.atan2(sin[1], cos[1]) / torch.atan2(plain_sin[1], plain_cos[1])
    # fp32 sine, cosine and atan2 of small angles: a few roundings of 2^-24 relative.
    torch.testing.assert_close(ratio[:11], torch.ones(11), rtol=1e-6, atol=0)
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40), rtol=1e-6, atol=0)
    assert bool((ratio[11:23].diff() < 0).all())
    assert bool((ratio[11:23] < 1).all())
    # (0.1 ln 40 + 1)^2, given as 1.873854 by the released model's code.
    assert yarn_softmax_factor(V3_YARN) == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-15)
    assert yarn_softmax_factor(V3_YARN) == pytest.approx(1.873854, abs=1e-6)


def test_rotation_and_its_gradient_are_those_of_transformers() -> None:
    config = transformers_config(64, 10000.0, V3_YARN)
    x = torch.randn(3, 5, 129, 64)
    hf_cos, hf_sin = DeepseekV3RotaryEmbedding(config)(x, torch.arange(129)[None])
    theirs = x.clone().requires_grad_()
    expected, _ = apply_rotary_pos_emb_interleave(theirs, theirs, hf_cos, hf_sin)
    # transformers returns all first members of the pairs, then all second ones; ours keeps them adjacent.
    expected = expected.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    ours = x.clone().requires_grad_()
    y = apply_rope(ours, *rope_tables(129, 64, 10000.0, yarn=V3_YARN))
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    # Two products and a sum of values up to about 5, and tables up to 129 * 2^-24 = 8e-6 apart.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4)


def test_scores_depend_only_on_the_distance_of_positions() -> None:
    cos, sin = rope_tables(64, 32, 10000.0, yarn=None)
    q, k = torch.randn(2, 1, 32).expand(2, 64, 32)
    scores = apply_rope(q, cos, sin) @ apply_rope(k, cos, sin).T
    # A sum of 32 products of size about 1, angles up to 64 with fp32 error 64 * 2^-24: below 1e-4.
    torch.testing.assert_close(scores[:-9, :-9], scores[9:, 9:], rtol=0, atol=1e-4)
    assert float((scores[0] - scores[1]).abs().max()) > 0.1


@pytest.mark.parametrize("tokens", [1, 63, 129])
def test_bf16_is_the_fp32_rotation_rounded_once(tokens: int) -> None:
    cos, sin = rope_tables(tokens, 32, 10000.0, yarn=None)
    x = torch.randn(2, tokens, 32).bfloat16()
    y = apply_rope(x, cos, sin)
    assert y.dtype == torch.bfloat16
    # One rounding to bf16, 2^-8 relative at most; 1e-6 where two products cancel.
    torch.testing.assert_close(y.float(), apply_rope_reference(x.float(), cos, sin), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("first_column", [1, 2, 33])
def test_columns_of_a_wider_row_turn_wherever_they_begin(first_column: int) -> None:
    cos, sin = rope_tables(1, 32, 10000.0, yarn=None)
    # One token: contiguous, whatever column it begins at.
    x = torch.randn(1, 70)[:, first_column : first_column + 32]
    # Two products and one sum of numbers of size about 1, in another order: 2^-22.
    torch.testing.assert_close(apply_rope(x, cos, sin), apply_rope_reference(x, cos, sin), rtol=0, atol=2**-22)


def test_gradient_in_fp64() -> None:
    cos, sin = (t.double() for t in rope_tables(5, 6, 100.0, yarn=None))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_rope(t, cos, sin), x)


def test_odd_dim_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="qk_rope_head_dim=31"):
        rope_tables(4, 31, 10000.0, yarn=None)
