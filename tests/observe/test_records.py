"""Numbers that the trainer derives: the share of a device's peak, and which experts are idle."""

from __future__ import annotations

import pytest
import torch
from train.observe.records import dead_experts, dense_bf16_peak, step_record

from train.config import compose
from train.model.sizes import model_flops_per_token
from train.observe.sinks import ObserveConfig
from train.schedules import at
from train.state import TrainState


def test_v3_at_its_published_speed_has_its_published_mfu() -> None:
    model = compose(["model=v3_671b"]).model
    flops = model_flops_per_token(model, sequence_length=4096)
    # arXiv:2505.09343 tables 2 and 4: 250 GFLOP a token, 38.94 % of an H800 at 62,914,560 tokens in 19.926 s on 2048.
    assert flops == pytest.approx(250e9, rel=2e-3)
    peak = dense_bf16_peak("NVIDIA H800")
    assert peak is not None
    assert 62_914_560 / 19.926 * flops / (2048 * peak) == pytest.approx(0.3894, rel=2e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_of_known_devices_only(device: str, peak: float | None) -> None:
    assert dense_bf16_peak(device) == peak


def test_idle_experts_are_named_by_layer_id() -> None:
    counts = {4: torch.tensor([0, 3, 0]), 1: torch.tensor([1, 1, 0])}
    assert dead_experts(counts) == [(1, 2), (4, 0), (4, 2)]
    assert dead_experts({}) == []


def test_the_first_step_and_every_nth_after_it_are_due() -> None:
    assert [step for step in range(1, 12) if ObserveConfig.due(step, 5)] == [1, 6, 11]
    assert not [step for step in range(1, 12) if ObserveConfig.due(step, 0)]


@pytest.mark.parametrize(
    "override", ["observe.fp8_health_every_steps=-1", "observe.dead_expert_steps=-2", "observe.peak_flops=0"]
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    with pytest.raises(ValueError, match=override.split("=", maxsplit=1)[0]):
        compose([override])


def test_a_load_is_never_rounded_to_none() -> None:
    now = at(compose([]).schedule, step=0, tokens_seen=0)
    counts = torch.full((256,), 32768)
    counts[7] = 1
    record = step_record(TrainState(), now, {"loss/main": torch.tensor(1.0)}, {0: counts})
    assert record["moe/dead_experts"] == 0
    assert record["moe/expert_load"][0][7] == pytest.approx(1 / counts.double().mean().item(), rel=1e-3)
