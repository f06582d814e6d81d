"""The layer bench on a CPU: what it counts, that parity comes first, what the command prints; never how fast it is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.operators import FLOP_FORMULAS
from train.model.config import ModelConfig
from train.studies.bench import layer as bench_layer
from train.studies.bench.layer import PRECISIONS, Sizes

CPU = torch.device("cpu")


@pytest.fixture
def sizes() -> Sizes:
    return replace(bench_layer.tiny_sizes(), repeats=1)


def test_the_measured_blocks_have_the_width_of_v3() -> None:
    model, v3 = bench_layer.v3_sizes().model, bench_layer.model_config("v3_671b")
    changed = {name for name in vars(v3) if getattr(model, name) != getattr(v3, name)}
    assert changed == {
        "num_hidden_layers",
        "first_k_dense_replace",
        "n_routed_experts",
        "n_group",
        "topk_group",
        "num_nextn_predict_layers",
    }
    assert model.n_routed_experts == model.num_experts_per_tok == 8
    assert all(model.is_moe(layer) for layer in model.layer_ids)
    assert bench_layer.v3_sizes().tokens == 4096


def test_routing_is_balanced(sizes: Sizes) -> None:
    layers = bench_layer.make(sizes, "bf16", CPU)
    counts = []
    for block in layers.blocks:
        block.mlp.gate.register_forward_hook(lambda *call: counts.append(call[2].counts.tolist()))
    layers.step()
    assert counts == [[sizes.tokens] * 8] * 2


def counted_flops(config: ModelConfig, tokens: int) -> float:
    """By torch's counter, for one layer; grouped products multiply padding rows too, which are taken off."""
    layers = bench_layer.make(Sizes(config, tokens), "bf16", CPU)
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        layers.step()
    slots = tokens * config.num_experts_per_tok
    num_rows = (slots + config.n_routed_experts * 127) // 128 * 128
    counted = counter.get_flop_counts()["Global"].items()
    total = sum(flops * (slots / num_rows if "grouped" in str(name) else 1.0) for name, flops in counted)
    return total / config.num_hidden_layers


@pytest.mark.parametrize("tokens", [64, 96])
def test_flops_in_closed_form_are_those_that_torch_counts(tokens: int) -> None:
    config = bench_layer.tiny_sizes().model
    expected = counted_flops(config, tokens)
    # A norm's backward projects with one product of a matrix and a vector, which torch counts and we do not: 0.1 %.
    assert bench_layer.flops_per_layer(config, tokens) == pytest.approx(expected, rel=2e-3)


def test_every_gradient_and_the_output_are_compared(sizes: Sizes) -> None:
    layers = {precision: bench_layer.make(sizes, precision, CPU) for precision in PRECISIONS}
    found = bench_layer.parity(layers)
    names = {name for name, _ in layers["fp8"].blocks.named_parameters()}
    assert set(found.errors) == set(found.turns) == names | {"output", "input gradient"}
    assert found.green
    # FP8 rounds: equality would mean that both ran in one precision.
    assert all(error > 0.01 for error in found.errors.values())
    assert all(parameter.main_grad.dtype == torch.float32 for parameter in layers["fp8"].blocks.parameters())


def test_a_step_repeats_to_the_bit(sizes: Sizes) -> None:
    layers = bench_layer.make(sizes, "fp8", CPU)
    first, second = layers.step(), layers.step()
    assert torch.equal(first, second)


def test_red_parity_gives_no_time(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layer, "ERROR_LIMIT", 0.01)
    monkeypatch.setattr(bench_layer, "measure", lambda *_: pytest.fail("timed although parity is red"))
    found = bench_layer.run(sizes, CPU)
    assert found.times == ()
    assert "no time is given" in bench_layer.markdown(found)


def test_what_would_begin_after_the_budget_is_not_measured(sizes: Sizes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layer, "measure", lambda *_: pytest.fail("timed although the budget is spent"))
    found = bench_layer.run(sizes, CPU, budget_s=-1.0)
    assert found.times == ()
    assert "Not measured, the budget was spent." in bench_layer.markdown(found)


def test_nan_is_never_green() -> None:
    assert bench_layer.Parity({"a": 0.0}, {"a": 0.0}).green
    assert not bench_layer.Parity({"a": float("nan")}, {"a": 0.0}).green
    assert not bench_layer.Parity({"a": 0.0}, {"a": float("nan")}).green


def test_both_precisions_are_measured_alike_with_and_without_determinism(sizes: Sizes) -> None:
    found = bench_layer.run(sizes, CPU)
    modes = [(time.precision, time.deterministic) for time in found.times]
    assert modes == [("bf16", False), ("bf16", True), ("fp8", False), ("fp8", True)]
    assert torch.are_deterministic_algorithms_enabled(), "as it was before"
    for time in found.times:
        assert time.tokens_per_s * time.time_ms == pytest.approx(1e3 * sizes.tokens)
        flops = bench_layer.flops_per_layer(sizes.model, sizes.tokens)
        assert time.tflop_per_s * 1e9 * time.time_ms == pytest.approx(flops)
        assert (time.peak_bytes, time.kernels) == (None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here, so the bench runs; `make test` hides it")
def test_without_a_gpu_the_command_says_so(run_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_command("-m", "launch.bench", "layer", check=False)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert "needs a CUDA GPU" in sentence
    assert not done.stdout


def test_a_tiny_layer_runs_anywhere(run_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = run_command("-m", "launch.bench", "layer", "--tiny").stdout
    assert shown.index("green") < shown.index("| bf16 |") < shown.index("| fp8 |")
