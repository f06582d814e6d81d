"""The training part of `make gpu` on a CPU: tokens, verdicts, planted defects, and nothing but torch needed.

The CPU stands for both devices. Another device is simulated by disturbing every product before it is rounded.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.fp8_linear
from kernels.formats import Quantized
from kernels.quantize import quantize_blocks, quantize_tiles
from kernels.router import gate_weights
from parallel.shards import LocalShard
from tests.tiny_model import TINY
from train.config import compose
from train.model.moe import Router
from train.model.precision import Precision
from train.step import Engine, StepGradients, compute_gradients
from train.studies import smoke_runs, step_parity
from train.studies.smoke_runs import PrecisionName, SmokeRun
from train.studies.step_parity import STEP_BOUNDS, StepParity

CPU = torch.device("cpu")
ABSENT = ("hydra", "omegaconf", "datasets", "wandb", "deepspeed", "plotly", "rich", "tokenizers", "pyarrow", "triton")


@pytest.fixture
def smallest() -> SmokeRun:
    """The smallest model, milliseconds a step."""
    return smoke_runs.smoke_run("tiny", sequences=4, tokens=24, model=TINY)


def test_training_imports_without_hydra_datasets_and_wandb(
    run_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))"
    run = "train.assemble, train.step, train.checkpoint.dcp, train.data.stream"
    studies = "from train.studies import bench, gpu_report, smoke_runs, step_parity; import train.studies.bench.layer"
    run_command("-c", f"{block}; import {run}; {studies}", PYTHONPATH=".")


def test_values_are_those_that_hydra_reads() -> None:
    for name, precision in (("tiny", "fp32"), ("small", "bf16"), ("small", "fp8")):
        composed = compose([f"model={name}", f"schedule={name}", f"precision={precision}"])
        run = smoke_runs.smoke_run(name, sequences=1, tokens=8)
        assert run.model == smoke_runs.model_config(name) == composed.model
        assert smoke_runs.precision_config(precision) == Precision.of(composed.precision)
        assert run.optim == composed.optim
        assert (run.peak.lr, run.peak.bias_speed) == (composed.schedule.lr_peak, composed.schedule.bias_speed)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"configs/model has no huge\.yaml"):
        smoke_runs.model_config("huge")


def test_tokens_repeat_and_each_has_four_successors() -> None:
    one, again, other = (smoke_runs.chain_batch(step, sequences=3, tokens=500, vocab_size=1024) for step in (5, 5, 6))
    assert torch.equal(one.input_ids, again.input_ids)
    assert not torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.input_ids[:, 1:], one.labels[:, :-1])
    followers: dict[int, set[int]] = {}
    for state, following in zip(one.input_ids.flatten().tolist(), one.labels.flatten().tolist(), strict=True):
        followers.setdefault(state, set()).add(following)
    assert len(followers) == smoke_runs.STATES
    assert max(map(len, followers.values())) == smoke_runs.SUCCESSORS


def test_losses_fall_and_fp8_follows_bf16(smallest: SmokeRun) -> None:
    runs = [smoke_runs.train(smallest, precision, CPU, steps=20) for precision in ("bf16", "fp8")]
    assert all(run.fall > 0.3 for run in runs)
    assert runs[0].losses != runs[1].losses
    assert abs(smoke_runs.training_gap(runs[1], runs[0])) < smoke_runs.TRAINING_GAP


def test_a_loss_that_is_not_finite_is_refused(smallest: SmokeRun) -> None:
    engine = smoke_runs.new_engine(smallest, "bf16", CPU)
    with torch.no_grad():
        engine.models[0].norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="step 0: loss nan"):
        smoke_runs.step_once(engine, smallest, 0)


class OtherSums(TorchDispatchMode):
    """Every product as another device might round it: FP64 or FP32 sums, disturbed by 2^-20, then rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(7)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm", "aten::baddbmm"):
            options = dict(kwargs or {})
            out = options.pop("out", None)
            exact = func.overloadpacket(*(value.double() for value in args), **options)
            found = self.disturb(exact.float()).to(args[0].dtype)
            return found if out is None else out.copy_(found)
        if name in ("v3fp8::gemm_tile_block", "v3fp8::grouped_gemm_tile_block"):
            *operands, dtype = args
            return self.disturb(func(*operands, torch.float32)).to(dtype)
        if name == "v3fp8::grouped_matmul":
            return self.disturb(func(args[0].float(), args[1].float(), args[2])).to(args[0].dtype)
        return func(*args, **(kwargs or {}))

    def disturb(self, x: Tensor) -> Tensor:
        return x * (1 + 2**-20 * torch.randn(x.shape, generator=self.generator))


def on_another_device(monkeypatch: pytest.MonkeyPatch, context: Callable[[], Any]) -> None:
    """Run the second of two calls of compute_gradients, the device's, inside a context."""
    calls = []

    def compute(engine: Engine, *args: Any, **kwargs: Any) -> StepGradients:
        calls.append(engine)
        with context() if len(calls) == 2 else nullcontext():
            return compute_gradients(engine, *args, **kwargs)

    monkeypatch.setattr(step_parity, "compute_gradients", compute)


@pytest.fixture
def tiny() -> SmokeRun:
    return smoke_runs.smoke_run("tiny", sequences=1, tokens=128)


def test_a_cpu_against_itself_differs_in_nothing(smallest: SmokeRun) -> None:
    found = step_parity.compare_step(smallest, "fp8", CPU)
    assert found.loss_error == 0.0
    assert found.flipped_tokens == 0
    assert set(found.errors.values()) == {0.0}
    # Two MTP depths and one main layer route 4 x (24, 23, 22) tokens.
    assert found.routed_tokens == 4 * (24 + 23 + 22)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_another_order_of_sums_is_within_half_the_bounds(
    precision: PrecisionName, tiny: SmokeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bounds' own origin, measured again; half, for what this simulation leaves out."""
    on_another_device(monkeypatch, OtherSums)
    found = step_parity.compare_step(tiny, precision, CPU)
    bounds = STEP_BOUNDS[precision]
    assert found.green
    assert 0 < found.worst_error[0] <= bounds.error / 2, found.worst_error
    assert found.worst_turn[0] <= bounds.turn / 2, found.worst_turn
    assert found.loss_error <= bounds.loss / 2


def shifted_scales(x: Tensor, *, power_of_two: bool) -> Quantized:
    q = quantize_tiles(x, power_of_two=power_of_two)
    return Quantized(q.payload, q.scale.roll(1, dims=1))


def coarse_weights(w: Tensor, *, power_of_two: bool) -> Quantized:
    return quantize_blocks(w.to(torch.float8_e5m2).to(w.dtype), power_of_two=power_of_two)


def lost_weight_gradients(a: Quantized, b: Quantized, *, out: Tensor, accumulate: bool) -> None:
    """Adds nothing."""


DEFECTS = {shifted_scales: "quantize_tiles", coarse_weights: "quantize_blocks", lost_weight_gradients: "gemm_tile_tile"}


@pytest.mark.parametrize(("defect", "name"), DEFECTS.items())
def test_a_defect_of_the_device_turns_the_step_red(
    defect: Callable[..., Any], name: str, tiny: SmokeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_another_device(monkeypatch, lambda: patch.object(kernels.fp8_linear, name, defect))
    assert not step_parity.compare_step(tiny, "fp8", CPU).green


def test_nan_is_never_green() -> None:
    fine, nan = StepParity("bf16", 0.0, {"a": 0.0}, {"a": 0.0}, 0, 1), float("nan")
    assert fine.green
    assert not replace(fine, loss_error=nan).green
    assert not replace(fine, errors={"a": nan, "b": 0.0}).green
    assert not replace(fine, turns={"a": 0.0, "b": nan}).green


def test_forced_choices_get_the_gates_of_eq_13_and_others_keep_theirs() -> None:
    router = Router(TINY, Precision("fp32"))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(1, 9, TINY.hidden_size)
    routing = router(x)
    ids = routing.topk_ids.clone()
    ids[4] = torch.tensor([0, 3])
    marked = replace(routing, gates=routing.gates + 1.0)
    forced, flipped = step_parity.with_choice(router, x, marked, ids)
    kept = (ids == routing.topk_ids).all(dim=1)
    others = ~kept
    assert int(flipped) == int(others.sum())
    assert torch.equal(forced.gates[kept], marked.gates[kept])
    scores = (x[0] @ router.weight.T).sigmoid()
    expected = gate_weights(scores, ids, scale=TINY.routed_scaling_factor, normalize=True)
    torch.testing.assert_close(forced.gates[others], expected[others])
    assert forced.counts.tolist() == torch.bincount(ids.flatten(), minlength=4).tolist()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(
    precision: PrecisionName, smallest: SmokeRun, tmp_path: Path
) -> None:
    found = smoke_runs.resume(smallest, precision, CPU, steps=2, directory=tmp_path / "saved")
    assert found.bit_equal
    assert found.difference == 0.0
    assert found.green
    assert not (tmp_path / "saved").exists()


def test_a_checkpoint_that_loses_the_moments_is_seen_on_any_device(
    smallest: SmokeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = smoke_runs.load

    def forgetful(path: Path, tensors: dict[str, Tensor | LocalShard]) -> dict[str, Any]:
        state = load(path, tensors)
        for name, value in tensors.items():
            if "exp_avg" in name:
                assert isinstance(value, LocalShard)
                value.tensor.zero_()
        return state

    monkeypatch.setattr(smoke_runs, "load", forgetful)
    found = smoke_runs.resume(smallest, "bf16", CPU, steps=3, directory=tmp_path / "saved")
    assert not found.green
    assert not replace(found, on_cpu=False).green, "beyond the bound of a device without a fixed order of sums"
    assert any("exp_avg" in name for name in found.differing)


def test_large_steps_start_from_the_same_weights(smallest: SmokeRun) -> None:
    bf16, fp8 = smoke_runs.big_steps(smallest, CPU)
    assert (bf16.precision, fp8.precision) == ("bf16", "fp8")
    alone = smoke_runs.step_once(smoke_runs.new_engine(smallest, "fp8", CPU), smallest, 0)
    assert fp8.loss == float(alone.loss_main)
    assert fp8.loss != bf16.loss
    assert abs(fp8.loss / bf16.loss - 1) < smoke_runs.BIG_STEP_GAP
    assert bf16.peak_bytes is None
