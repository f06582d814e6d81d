"""The figures of FP8 health against closed forms and an E4M3 of the test's own, each in its layer and column."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernels import deferred
from kernels import fp8_linear as fp8
from kernels.fp8_linear import fp8_linear, grouped_fp8_linear
from kernels.probe import sample, watching
from tests.tiny_model import TINY
from train.observe.fp8_health import Fp8Health
from train.observe.metrics import FP8_OPERANDS

LAYERS, PLANTED = 4, 1
Table = dict[str, dict[str, float]]


def health_of(weight: Tensor) -> tuple[Fp8Health, nn.Parameter]:
    """A probe of a model with `weight` in layer PLANTED; layers 0 and 1 and MTP layers 2 and 3 have one matrix each."""
    matrices = [nn.Parameter(w) for w in (torch.randn(4, 4), weight, torch.randn(4, 4), torch.randn(4, 4))]
    layers = [(str(layer), nn.ParameterList([matrix])) for layer, matrix in enumerate(matrices)]
    model: Any = SimpleNamespace(layers=dict(layers[:2]), mtp=dict(layers[2:]))
    return Fp8Health(TINY, [model], torch.device("cpu")), matrices[PLANTED]


def figures(health: Fp8Health) -> Table:
    """Metric -> operand -> figure of the planted layer; the others saw nothing."""
    tables = health.tables()
    neutral = {"fp8/amax": 0.0, "fp8/scale_spread_ratio": 1.0, "fp8/snr_db": math.inf}
    for name, table in tables.items():
        assert len(table) == LAYERS
        for layer in set(range(LAYERS)) - {PLANTED}:
            assert table[layer] == [neutral.get(name, 0.0)] * len(FP8_OPERANDS), name
    return {name: dict(zip(FP8_OPERANDS, table[PLANTED], strict=True)) for name, table in tables.items()}


def seen(x: Tensor, weight: Tensor, dy: Tensor, *, power_of_two: bool = False) -> Table:
    health, parameter = health_of(weight)
    with watching(health):
        y = fp8_linear(x.requires_grad_(), parameter, power_of_two=power_of_two)
    y.backward(dy)
    return figures(health)


def e4m3_numbers() -> np.ndarray:
    """Every non-negative E4M3 number from the format's definition, and one beyond that nothing rounds to."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    return np.array([*subnormal, *normal][:-1])


def snr_db(x: np.ndarray, scale: np.ndarray) -> float:
    """Of the nearest E4M3 numbers under given scales, FP64."""
    numbers, scaled = e4m3_numbers(), np.abs(x / scale)
    nearest = numbers[np.abs(scaled[..., None] - numbers).argmin(axis=-1)] * scale
    return float(10 * np.log10((x**2).sum() / ((np.abs(x) - nearest) ** 2).sum()))


def test_each_column_is_fed_by_its_operand() -> None:
    x, weight, dy = torch.ones(128, 256), torch.ones(130, 256), torch.ones(128, 130)
    x[3, 5], weight[7, 9], dy[11, 13] = -2.0, 3.0, -5.0
    amax = seen(x, weight, dy)["fp8/amax"]
    assert list(amax.values()) == [2.0, 3.0, 5.0, 3.0, 5.0, 2.0]


@pytest.mark.parametrize("operand", ["x", "dy"])
def test_an_outlier_row_spreads_the_scales_of_rows_and_drowns_the_columns(operand: str) -> None:
    outlier = torch.ones(128, 256)
    outlier[17] = 1e6
    x, dy = (outlier, torch.ones(128, 256)) if operand == "x" else (torch.ones(128, 256), outlier)
    found = seen(x, torch.ones(256, 256), dy)
    by_row, by_column = ("x.fprop", "x.wgrad") if operand == "x" else ("dy.dgrad", "dy.wgrad")
    spread, underflow = found["fp8/scale_spread_ratio"], found["fp8/underflow_ratio"]
    assert spread.pop(by_row) == pytest.approx(1e6, rel=1e-5)
    assert set(spread.values()) == {1.0}
    # Among 128 tokens one is 10^6: 448 / 10^6 lies below half the smallest subnormal, 2^-10.
    assert underflow.pop(by_column) == pytest.approx(127 / 128, rel=1e-5)
    assert set(underflow.values()) == {0.0}


def test_saturation_counts_all_but_one_of_a_tile() -> None:
    x = torch.full((128, 256), 0.25)
    x[:, :5] = 1.0
    weight, dy = torch.full((128, 256), 0.25), torch.full((128, 128), 0.25)
    weight[:3, :2], dy[0, 0] = -1.0, 1.0
    found = seen(x, weight, dy)["fp8/saturated_ratio"]
    # Constant tiles of x, and of dy's columns, sit at 448 throughout; 0.25 beside 1 does not.
    expected = {
        "x.fprop": (128 * 4 + 128 * 127) / (128 * 256),
        "w.fprop": (5 + 128 * 128 - 1) / (128 * 256),
        "dy.dgrad": 127 * 127 / 128**2,
        "w.dgrad": (5 + 128 * 128 - 1) / (128 * 256),
        "dy.wgrad": 127 * 127 / 128**2,
        "x.wgrad": 127 / 128,
    }
    assert found == pytest.approx(expected, rel=1e-5)
    # Rounded up to powers of two 448 * 2^-8 = 1.75 stands for the top, and 1 and 0.25 for less.
    powers = seen(x, weight, dy, power_of_two=True)["fp8/saturated_ratio"]
    assert set(powers.values()) == {0.0}


def test_tiles_of_zeros_do_not_spread_the_scales() -> None:
    x = torch.full((128, 256), 2.0**-20)
    x[64:] = 0.0
    found = seen(x, torch.ones(128, 256), torch.zeros(128, 128))
    assert found["fp8/scale_spread_ratio"]["x.fprop"] == 1.0
    assert found["fp8/amax"]["dy.dgrad"] == 0.0
    assert found["fp8/snr_db"]["dy.wgrad"] == math.inf


def test_snr_of_normal_data_is_that_of_e4m3() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(128, 256, generator=generator) for _ in range(2))
    weight = torch.randn(256, 256, generator=generator)
    found = seen(x, weight, dy)["fp8/snr_db"]
    rows, columns = x.detach().double().numpy(), dy.double().numpy()
    blocks = weight.double().numpy()[128:].reshape(128, 2, 128)
    scale = np.abs(rows.reshape(128, 2, 128)).max(-1, keepdims=True).repeat(128, -1).reshape(128, 256) / 448
    # The scale is FP32 and so is the quotient: ties fall either way, six digits are logged.
    assert found["x.fprop"] == pytest.approx(snr_db(rows, scale), abs=1e-3)
    assert found["dy.wgrad"] == pytest.approx(snr_db(columns, np.abs(columns).max(0, keepdims=True) / 448), abs=1e-3)
    expected = snr_db(blocks, np.abs(blocks).max((0, 2), keepdims=True) / 448)
    assert found["w.fprop"] == found["w.dgrad"] == pytest.approx(expected, abs=1e-3)
    # docs/numerics.md: one rounding has 0.0257 of the norm; twice rounded, sqrt(2) times that.
    assert found["x.fprop"] == pytest.approx(-20 * math.log10(0.0257), abs=0.1)
    assert found["x.wgrad"] == pytest.approx(-20 * math.log10(0.0257 * math.sqrt(2)), abs=0.1)


def test_the_transposed_copy_of_a_weight_is_looked_at_itself() -> None:
    health, weight = health_of(torch.randn(130, 256))
    fp8.weight_fp8(weight, power_of_two=True).payload_t.zero_()
    with watching(health):
        y = fp8_linear(torch.randn(128, 256, requires_grad=True), weight, power_of_two=True)
    y.sum().backward()
    found = figures(health)
    assert found["fp8/underflow_ratio"]["w.dgrad"] == 1.0
    assert found["fp8/underflow_ratio"]["w.fprop"] == 0.0
    assert abs(found["fp8/snr_db"]["w.dgrad"]) < 1e-6
    assert found["fp8/snr_db"]["w.fprop"] > 30


GATES, ENDS = torch.linspace(0.5, 1.5, 640), torch.tensor([256, 256, 512], dtype=torch.int32)
# Name -> the call on rows [640, 256]; of the grouped ones the last 128 are padding rows.
LINEARS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": ((130, 256), lambda x, w: fp8_linear(x, w, power_of_two=True)),
    "kept": ((130, 256), lambda x, w: fp8.fp8_linear_of_kept(x, w, power_of_two=True)),
    "e5m6": ((130, 256), lambda x, w: fp8.fp8_linear_e5m6(x, w, power_of_two=True, give_back=lambda x: None)),
    "swiglu": ((130, 128), lambda x, w: fp8.fp8_swiglu_linear(x, w, power_of_two=True)),
    "grouped": ((3, 130, 256), lambda x, w: grouped_fp8_linear(x, w, ENDS, power_of_two=True)),
    "grouped swiglu": ((3, 130, 128), lambda x, w: fp8.grouped_fp8_swiglu_linear(x, GATES, w, ENDS, power_of_two=True)),
}


@pytest.mark.parametrize("name", LINEARS)
def test_every_linear_shows_all_operands_and_x_again_when_its_wgrad_runs(name: str) -> None:
    shape, call = LINEARS[name]
    health, weight = health_of(torch.randn(shape))
    x = torch.randn(640, 256)
    x[512:] = 0.0
    with deferred.deferred():
        with watching(health):
            y = call(x.requires_grad_(), weight)
        y.backward(torch.randn_like(y))
        waiting = figures(health)["fp8/snr_db"]
        assert waiting.pop("x.wgrad") == math.inf
        # SwiGLU's input is kept in E4M3, so its output has one rounding more by then.
        assert all(30.5 < snr < 33 for snr in waiting.values()), waiting
        deferred.take()()
    found = figures(health)["fp8/snr_db"]
    assert found["x.wgrad"] < 33
    # Gate, up and product rounded once each, the gate's error times silu's slope on a log scale, at most 1.28: 25.9 dB.
    assert found["x.wgrad"] > (25.5 if "swiglu" in name else 30.5)


def test_only_the_forward_under_the_probe_reports() -> None:
    health, weight = health_of(torch.randn(130, 256))
    x = torch.randn(2, 128, 256)
    with watching(health):
        first = fp8_linear(x[0], weight, power_of_two=True)
    second = fp8_linear(7 * x[1].requires_grad_(), weight, power_of_two=True)
    (first + second).backward(torch.ones(128, 130))
    found = figures(health)["fp8/amax"]
    assert found["x.fprop"] == found["x.wgrad"] == pytest.approx(float(x[0].abs().max()), rel=1e-5)


UNGROUPED = [(640, None, [1, 3]), (650, None, [1, 3]), (100, None, [0])]
GROUPED = [(640, [128, 512], [1, 3]), (640, [128, 128], [0, 0]), (640, [0, 0], [0, 0])]


@pytest.mark.parametrize(("rows", "ends", "expected"), [*UNGROUPED, *GROUPED])
def test_whole_blocks_inside_the_groups_are_sampled(rows: int, ends: list[int] | None, expected: list[int]) -> None:
    x = torch.arange(rows, dtype=torch.float32)[:, None]
    group_ends = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    found = sample(lambda index: x[index], x, group_ends, num_blocks=2)
    assert found.blocks.tolist() == expected
    wanted = [row for block in expected for row in range(128 * block, min(128 * block + 128, rows))]
    assert found.rows.tolist() == found.values[:, 0].tolist() == wanted


def test_a_rank_whose_experts_got_no_token_shows_nothing_and_goes_on() -> None:
    health, weight = health_of(torch.randn(2, 128, 256))
    x = torch.zeros(0, 256, requires_grad=True)
    with watching(health):
        y = grouped_fp8_linear(x, weight, torch.zeros(2, dtype=torch.int32), power_of_two=True)
    y.sum().backward()
    assert x.grad.shape == (0, 256)
    assert set(figures(health)["fp8/amax"].values()) == {0.0}
