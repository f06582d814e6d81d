"""The layer bench on a CPU: what it counts, that parity comes first, what the command prints; never how fast it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.fp8_linear import has_numbers
from kernels.operators import FLOP_FORMULAS
from launch import bench as launch_bench
from parallel.layout import Layout
from train.model.config import ModelConfig
from train.model.sizes import Held, weights
from train.model.transformer import recompute_up_projections
from train.studies.bench import layer as bench_layer
from train.studies.bench.layer import PRECISIONS, LayerBench, Sizes
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.state_bytes import StateBytes, state_bytes
from train.studies.smoke_runs import PrecisionName, precision_config

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "kernels.md"
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
    found = bench_layer.check(sizes, CPU)
    names = {name for name, _ in bench_layer.make(sizes, "fp8", CPU).blocks.named_parameters()}
    assert [each.precision for each in found] == ["fp8", "fp8_v3"]
    for each in found:
        assert set(each.errors) == set(each.turns) == names | {"output", "input gradient"}
        assert each.green
        # FP8 rounds: equality would mean that both ran in one precision.
        assert all(error > 0.01 for error in each.errors.values())


def test_without_bf16_weights_output_and_gradients_have_the_bits_of_training_with_them(sizes: Sizes) -> None:
    """Attention's output in 12 bits changes gradients only: kept in BF16 they have the same bits too."""
    kept, released = (bench_layer.make(sizes, precision, CPU) for precision in ("fp8", "fp8_v3"))
    expected, found = bench_layer.results(kept), bench_layer.results(released)
    assert torch.equal(found["output"], expected["output"])
    # What no attention's backward has touched.
    assert torch.equal(found["1.mlp.experts.down_proj"], expected["1.mlp.experts.down_proj"])
    assert not torch.equal(found["1.self_attn.o_proj.weight"], expected["1.self_attn.o_proj.weight"])
    linears = [w for w in released.blocks.parameters() if w.dtype == torch.bfloat16 and w.dim() > 1]
    assert len(linears) == 16
    assert not any(map(has_numbers, linears))
    assert all(map(has_numbers, kept.blocks.parameters()))


def closed_form(config: ModelConfig, precision: PrecisionName) -> StateBytes:
    """Of all layers; the bench has no optimizer."""
    recipe, held = precision_config(precision), Held((*config.layer_ids,), embedding=False, head=False)
    table, kept = weights(config, held, ep=1), recipe.keep_bf16_weights
    return state_bytes(table, Layout(), precision=recipe.name, dp_rank=0, keep_bf16_weights=kept)


# Eight linears a layer: without numbers each has one NaN in BF16.
NANS = {"bf16": 0, "fp8": 0, "fp8_v3": 2 * 2 * 8}


def counted(precision: PrecisionName, *, recompute: bool) -> tuple[int, int]:
    """Bytes of layers at V3's size, and the peak of a step, on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        layers = bench_layer.make(bench_layer.v3_sizes(), precision, CPU)
        if recompute:
            recompute_up_projections(layers)
        # The first makes FP8 copies.
        layers.step()
        live.peak = live.now
        layers.step()
        return layers.counted_bytes(), live.peak


def test_the_document_says_what_is_counted_at_the_size_of_v3_and_the_state_is_the_closed_form() -> None:
    config, document = bench_layer.v3_sizes().model, DOCUMENT.read_text(encoding="utf-8")
    for precision in PRECISIONS:
        closed = closed_form(config, precision)
        state, peak = counted(precision, recompute=False)
        assert state == closed.weights + closed.fp8_copies + closed.gradients + NANS[precision]
        figures = (closed.weights, closed.fp8_copies, closed.gradients, state, peak)
        assert f"| `{precision}` | {' | '.join(f'{figure / 1e9:.2f}' for figure in figures)} |" in document
    _, peak = counted("fp8_v3", recompute=True)
    assert f"peak falls to {peak / 1e9:.2f} GB" in document


def test_a_step_repeats_to_the_bit(sizes: Sizes) -> None:
    layers = bench_layer.make(sizes, "fp8_v3", CPU)
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
    good, bad = {"a": 0.0}, {"a": float("nan")}
    assert bench_layer.Parity("fp8", good, good).green
    assert not bench_layer.Parity("fp8", bad, good).green
    assert not bench_layer.Parity("fp8", good, bad).green
    assert not LayerBench((bench_layer.Parity("fp8", good, good), bench_layer.Parity("fp8_v3", bad, good)), ()).green


def test_all_precisions_are_measured_alike_with_and_without_determinism(sizes: Sizes) -> None:
    found = bench_layer.run(sizes, CPU)
    modes = [(time.precision, time.deterministic) for time in found.times]
    assert modes == [
        ("bf16", False),
        ("bf16", True),
        ("fp8", False),
        ("fp8", True),
        ("fp8_v3", False),
        ("fp8_v3", True),
    ]
    assert torch.are_deterministic_algorithms_enabled(), "as it was before"
    bf16, _, fp8, _, least, _ = (time.counted_bytes for time in found.times)
    closed = closed_form(sizes.model, "fp8")
    assert fp8 - bf16 >= closed.fp8_copies  # on a CPU padding too
    assert fp8 - least == closed.weights - closed_form(sizes.model, "fp8_v3").weights - NANS["fp8_v3"]
    for time in found.times:
        assert time.tokens_per_s * time.time_ms == pytest.approx(1e3 * sizes.tokens)
        flops = bench_layer.flops_per_layer(sizes.model, sizes.tokens)
        assert time.tflop_per_s * 1e9 * time.time_ms == pytest.approx(flops)
        assert (time.peak_bytes, time.kernels) == (None, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here, so the bench runs; `make test` hides it")
def test_without_a_gpu_the_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "layer"])
    assert launch_bench.main() == 2
    shown = capsys.readouterr()
    (sentence,) = shown.err.strip().splitlines()
    assert "needs a CUDA GPU" in sentence
    assert not shown.out


def test_a_tiny_layer_runs_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "layer", "--tiny"])
    assert launch_bench.main() == 0
    shown = capsys.readouterr().out
    assert "RED" not in shown
    places = [shown.index(words) for words in ("green", "| bf16 |", "| fp8 |", "| fp8_v3 |")]
    assert places == sorted(places)
