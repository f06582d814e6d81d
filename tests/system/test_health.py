"""FP8 health in a training run: it changes no bit, every layout sees the same, and the rest of the record is there.

The model is small, its widths are not: 128 tokens a sequence, so that a micro-batch is at least one block of 128 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.probe import Watch
from parallel.layout import Layout
from tests.ranks import run_ranks
from tests.system.lives import copied_state, losses, trainer_on
from train.config import PretrainConfig, compose
from train.observe.fp8_health import Fp8Health
from train.observe.metrics import FP8_OPERANDS
from train.observe.sinks import read_events, read_run
from train.optim.balance import routers
from train.trainer import Trainer

STEPS, LENGTH, SEQUENCES = 2, 128, 2
NARROW = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
TABLES = ("fp8/amax", "fp8/scale_spread_ratio", "fp8/saturated_ratio", "fp8/underflow_ratio", "fp8/snr_db")
# A dense one, two with experts, one of MTP.
LAYERS = 4


def configured(small_run: Callable[..., list[str]], folder: Path) -> PretrainConfig:
    changes = {
        "precision": "fp8",
        "model.num_hidden_layers": 3,
        "model.num_attention_heads": 2,
        "model.qk_nope_head_dim": 16,
        "model.qk_rope_head_dim": 16,
        "model.v_head_dim": 32,
        **{f"model.{name}": 64 for name in NARROW},
        "data.heldout": "null",
        "data.sequence_length": LENGTH,
        "schedule.total_tokens": STEPS * LENGTH * SEQUENCES,
        "schedule.batch_start_sequences": SEQUENCES,
        "schedule.batch_full_sequences": SEQUENCES,
        "run.micro_batch_sequences": 1,
        "checkpoint.every_steps": 1000,
        "observe.fp8_health_every_steps": 2,
        "observe.bias_every_steps": 3,
        "run.directory": folder,
        "run.name": "run",
    }
    return compose(small_run(*(f"{name}={value}" for name, value in changes.items())))


@pytest.fixture
def config(small_run: Callable[..., list[str]], tmp_path: Path) -> PretrainConfig:
    return configured(small_run, tmp_path)


@pytest.fixture(scope="module")
def four_steps(small_run: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """After a run of four steps."""
    config = configured(small_run, tmp_path_factory.mktemp("four"))
    longer = replace(config.schedule, total_tokens=2 * config.schedule.total_tokens)
    return trained(replace(config, schedule=longer), "run")


def watched(config: PretrainConfig, **observe: Any) -> PretrainConfig:
    return replace(config, observe=replace(config.observe, **observe))


def trained(config: PretrainConfig, name: str) -> Trainer:
    """The trainer after a run of one micro-batch a step."""
    trainer = trainer_on(replace(config, run=replace(config.run, name=name, micro_batch_sequences=SEQUENCES)), 1)
    trainer.fit()
    return trainer


@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_bit_equal_with_and_without_the_probe(config: PretrainConfig, recompute: bool) -> None:
    config = replace(config, run=replace(config.run, recompute=recompute))
    on = trained(watched(config, fp8_health_every_steps=1), "on")
    off = trained(watched(config, fp8_health_every_steps=0), "off")
    expected, actual = copied_state(off), copied_state(on)
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    logs = [read_run(t.directory) for t in (on, off)]
    assert losses(on.directory) == losses(off.directory)
    assert all(name in r for r in logs[0] for name in TABLES)
    assert not [name for r in logs[1] for name in r if name.startswith("fp8/")]
    for table in (r[name] for r in logs[0] for name in TABLES):
        assert [len(row) for row in table] == [len(FP8_OPERANDS)] * LAYERS
    # With recomputed up-projections too, no operand of a layer goes unseen.
    assert all(0 < x < math.inf for r in logs[0] for row in r["fp8/amax"] for x in row)
    assert all(10 < x < 60 for r in logs[0] for row in r["fp8/snr_db"] for x in row)


def test_tables_come_on_the_steps_that_are_due(four_steps: Trainer) -> None:
    records = read_run(four_steps.directory)
    assert [r["step"] for r in records if "fp8/amax" in r] == [1, 3]
    assert [r["step"] for r in records if "moe/expert_bias" in r] == [1, 4]


def test_a_bf16_run_logs_no_fp8_health(config: PretrainConfig) -> None:
    config = replace(config, precision=replace(config.precision, name="bf16"))
    records = read_run(trained(watched(config, fp8_health_every_steps=1), "bf16").directory)
    assert len(records) == STEPS
    assert not [name for r in records for name in r if name.startswith("fp8/")]


def test_logged_biases_are_those_of_the_routers(four_steps: Trainer) -> None:
    last = read_run(four_steps.directory)[-1]["moe/expert_bias"]
    biases = [r.e_score_correction_bias for _, r in sorted(routers(four_steps.engine.models).items())]
    assert torch.stack(biases).abs().max() > 0
    # Six digits are logged.
    torch.testing.assert_close(torch.tensor(last), torch.stack(biases), rtol=1e-5, atol=0)


def test_an_expert_without_tokens_is_counted_and_told_of_once(config: PretrainConfig) -> None:
    config = replace(config, schedule=replace(config.schedule, total_tokens=3 * LENGTH * SEQUENCES))
    trainer = trainer_on(watched(config, dead_expert_steps=2), 1)
    router = routers(trainer.engine.models)[1]
    # Scores are below 1: no token chooses expert 5 of layer 1.
    router.e_score_correction_bias[5] = -9.0
    trainer.fit()
    records, events = read_run(trainer.directory), read_events(trainer.directory)
    assert all(r["moe/dead_experts"] >= 1 for r in records)
    assert [r["moe/dead_experts"] for r in records] == [
        sum(load == 0 for layer in r["moe/expert_load"] for load in layer) for r in records
    ]
    logged = [(e["step"], expert) for e in events if e["event"] == "dead_experts" for expert in e["experts"]]
    assert [step for step, expert in logged if expert == [1, 5]] == [2]


def one_step(rank: int, world: int, config: PretrainConfig) -> None:
    trainer = trainer_on(config, world)
    with trainer.open_sinks() as sinks:
        trainer.take_step(sinks)


def test_every_layout_sees_the_same(config: PretrainConfig, tmp_path: Path) -> None:
    split = {"pp2": Layout(pp=2, schedule="ZBVZeroBubble"), "dp2": Layout(dp=2), "ep2": Layout(dp=2, ep=2)}
    config = replace(config, model=replace(config.model, num_hidden_layers=4))
    tables: dict[str, dict[str, torch.Tensor]] = {}
    for name, layout in {"one": Layout(), **split}.items():
        here = replace(config, layout=layout, run=replace(config.run, name=name))
        if layout.world == 1:
            one_step(0, 1, here)
        else:
            run_ranks(layout.world, one_step, here)
        (record,) = read_run(tmp_path / name)
        tables[name] = {table: torch.tensor(record[table], dtype=torch.float64) for table in TABLES}
    one = tables.pop("one")
    weights = [FP8_OPERANDS.index("w.fprop"), FP8_OPERANDS.index("w.dgrad")]
    for name, found in tables.items():
        for table, expected in one.items():
            if name == "pp2":
                # The same rows of the same micro-batch. Forward is the same arithmetic; backward sums a few gradients
                # in another order, which moves a BF16 number by 2^-8 now and then.
                forward = expected.new_tensor([operand.endswith("fprop") for operand in FP8_OPERANDS]).bool()
                assert torch.equal(found[table][:, forward], expected[:, forward]), table
                torch.testing.assert_close(found[table], expected, rtol=2**-6, atol=1e-4, msg=f"{name} {table}")
            # Layer 0 has no experts: every rank of dp holds its weights whole.
            assert torch.equal(found[table][:1, weights], expected[:1, weights]), f"{name} {table}"
        # Two data ranks look at twice the rows, other ones: 2 dB is a factor of 1.6 in noise, a lost operand is more.
        assert ((found["fp8/snr_db"] - one["fp8/snr_db"]).abs() < 2.0).all(), name
        assert (found["fp8/amax"] >= 0.3 * one["fp8/amax"]).all(), name


def test_only_the_first_micro_batch_is_looked_at(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    watch = Fp8Health.watch

    def counted(self: Fp8Health, weight: torch.Tensor) -> Watch | None:
        looked_at.append(id(weight))
        return watch(self, weight)

    monkeypatch.setattr(Fp8Health, "watch", counted)
    assert config.run.micro_batch_sequences < SEQUENCES
    one_step(0, 1, config)
    # Six in the dense layer; with experts a shared gate-up and down more.
    assert len(looked_at) == len(set(looked_at)) == 6 + (LAYERS - 1) * 8
