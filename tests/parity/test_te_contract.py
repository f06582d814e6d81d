"""Transformer Engine as a second opinion, as far as a CPU can know it: its rule for scales and payloads, our adapter.

TE itself cannot run here. Its rule is stated in te_stand_in.py in our words (from recipe_common.cuh, named in
te_signatures.json); the adapter runs on a stand-in that has exactly TE's recorded interface. `make gpu` repeats both
comparisons with TE where it is installed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import deferred
from kernels.fp8_linear import fp8_linear, fp8_linear_of_kept, grouped_fp8_linear
from kernels.quantize import (
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_transposed,
    requantize_transposed,
)
from tests.parity import te_stand_in
from tests.parity.te_stand_in import TABLE, te_quantize
from tests.tiny_model import TINY
from train.checkpoint.dcp import save
from train.config import PretrainConfig, compose
from train.huggingface.weights import CheckpointReader
from train.model import te_linear
from train.model.precision import Precision
from train.model.te_linear import TeBrokenError, require_te, te_grouped_linear, zero_or_nan
from train.studies import gpu_sections, smoke_runs, te_parity

ADAPTER = Path(te_linear.__file__)
INPUTS = {
    "normal": lambda: torch.randn(256, 384),
    "wide exponents": lambda: torch.randn(256, 384) * torch.exp2(torch.randint(-40, 40, (256, 384))),
    "ragged": lambda: torch.randn(200, 576),
    "tiny": lambda: torch.randn(256, 384) * 1e-9,
    "zeros": lambda: torch.zeros(256, 384),
}


def in_all_uses(x: Tensor) -> dict[str, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Use -> our payload and scale, TE's payload and scale, in one layout."""
    rows, columns, blocks = (make(x, power_of_two=True) for make in
                             (quantize_tiles, quantize_tiles_transposed, quantize_blocks))  # fmt: skip
    theirs_row, theirs_column = te_quantize(x, tile_rows=1), te_quantize(x.t(), tile_rows=1)
    return {
        "1x128": ((rows.payload, rows.scale.t()), theirs_row),
        "1x128 of the transpose": ((columns.payload, columns.scale.t()), theirs_column),
        "128x128": ((blocks.payload, blocks.scale), te_quantize(x, tile_rows=128)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("use", ["1x128", "1x128 of the transpose", "128x128"])
def test_payload_and_scale_are_those_of_te_to_the_bit(use: str, name: str, dtype: torch.dtype) -> None:
    (payload, scale), (their_payload, their_scale) = in_all_uses(INPUTS[name]().to(dtype))[use]
    assert torch.equal(payload.view(torch.uint8), their_payload.view(torch.uint8))
    assert torch.equal(scale, their_scale)


@pytest.mark.parametrize("amax", [2.0**-118, 448 * 2.0**-127 * 1.001, 448 * 2.0**-127, 2.0**-126, 1e-42])
def test_scales_part_only_where_te_s_would_be_subnormal(amax: float) -> None:
    """Ours is never below 2^-126; TE's multiplier ends at 2^127. Such a tile is below 2.7e-36."""
    x = torch.full((1, 128), amax)
    ours, theirs = quantize_tiles(x, power_of_two=True).scale, te_quantize(x, tile_rows=1)[1]
    if amax > 448 * 2.0**-127:
        assert torch.equal(ours, theirs)
    else:
        assert (ours.item(), theirs.item()) == (2.0**-126, 2.0**-127)


def test_te_saturates_an_infinity_in_silence_and_ours_is_nan() -> None:
    x = torch.ones(1, 128)
    x[0, 3] = float("inf")
    payload, scale = te_quantize(x, tile_rows=1)
    assert (payload.float().max().item(), scale.item()) == (448.0, 1.0)
    assert dequantize_tiles(quantize_tiles(x, power_of_two=True)).isnan().all()
    assert zero_or_nan(x).isnan()
    assert zero_or_nan(x[:, :3]).item() == 0


@pytest.mark.parametrize("name", ["normal", "wide exponents", "ragged"])
def test_the_two_ways_to_wgrad_s_operand_part_below_e4m3_s_normal_range_only(name: str) -> None:
    """TE rounds x once, we regroup what is kept. Equal from 2^-6 of the larger scale on, within 3 x 2^-10 below."""
    x = INPUTS[name]()
    row = quantize_tiles(x, power_of_two=True)
    once, twice = quantize_tiles_transposed(x, power_of_two=True), requantize_transposed(row, power_of_two=True)
    of_row = row.scale.t().repeat_interleave(128, dim=1)[: len(x), : x.shape[1]]
    scale = torch.maximum(of_row.t(), once.scale.t().repeat_interleave(128, dim=1)[:, : len(x)])
    difference = (dequantize_tiles(once) - dequantize_tiles(twice)).abs()
    # Both tiles have power-of-two scales, so that the sum of the roundings (docs/numerics.md, eq. 1 and 2) is exact.
    assert (difference <= 3 * 2.0**-10 * scale).all()
    assert not difference[x.t().abs() >= 2.0**-6 * scale].any()
    share = (difference > 0).float().mean().item()
    # Measured: of normal numbers a few in a million, of exponents 80 apart 2.3 %.
    assert 0 < share < (0.05 if name == "wide exponents" else 1e-4)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    te_stand_in.install(monkeypatch)
    te_linear._recipe.cache_clear()
    yield
    te_linear._recipe.cache_clear()


def parameter(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(*shape, dtype=torch.bfloat16) * 0.05)
    weight.main_grad = torch.randn(shape)  # type: ignore[attr-defined]
    return weight


def outcome(layer: Callable[..., Tensor], weight: nn.Parameter, inputs: list[Tensor], late: bool) -> list[Tensor]:
    """Outputs and input gradients of some micro-batches, and `main_grad` after all of their W slots, the last first."""
    weight.main_grad.zero_()  # type: ignore[attr-defined]
    found, slots = [], []
    for x in inputs:
        x = x.clone().requires_grad_()
        if late:
            with deferred.deferred():
                y = layer(x, weight)
                y.backward(torch.sin(y.detach().float() * 9).bfloat16())
                assert deferred.pending() == 1 + len(slots)
                slots.append(deferred.take())
        else:
            y = layer(x, weight)
            y.backward(torch.sin(y.detach().float() * 9).bfloat16())
        assert x.grad is not None
        found += [y.detach(), x.grad]
    for slot in reversed(slots):
        slot()
    deferred.check_drained()
    assert weight.grad is None
    return [*found, weight.main_grad.clone()]  # type: ignore[attr-defined]


ENDS = torch.tensor([128, 128, 384], dtype=torch.int32)
GROUPED = (lambda x, w: te_grouped_linear(x, w, ENDS), lambda x, w: grouped_fp8_linear(x, w, ENDS, power_of_two=True))
LAYERS: dict[str, Any] = {
    # An input that is kept anyway is quantised from itself in both: equal to the bit, wgrad too.
    "kept": (
        lambda x, w: te_linear.te_linear(x, w, keep_input=True),
        lambda x, w: fp8_linear_of_kept(x, w, power_of_two=True),
        0.0,
    ),
    "dense": (te_linear.te_linear, lambda x, w: fp8_linear(x, w, power_of_two=True), 1e-6),
    # With an expert that got nothing and 64 padding rows at the end.
    "grouped": (*GROUPED, 1e-6),
}


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the queue"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_adapter_gives_our_linears_outputs_and_gradients(name: str, late: bool) -> None:
    ours_te, ours, bound = LAYERS[name]
    weight = parameter(*((3,) if name == "grouped" else ()), 144, 272)
    # 445 rows are no multiple of 16, as MTP's.
    rows = (448, 448) if name == "grouped" else (445, 13)
    inputs = [torch.randn(count, 272).bfloat16() for count in rows]
    *te, te_grad = outcome(ours_te, weight, inputs, late)
    *own, own_grad = outcome(ours, weight, inputs, late)
    for found, expected in zip(te, own, strict=True):
        assert torch.equal(found, expected)
    # We alone regroup x: measured 7e-8 of dW.
    assert float((te_grad - own_grad).norm() / own_grad.norm()) <= bound


@pytest.mark.usefixtures("stand_in")
def test_the_adapter_follows_a_weight_that_is_moved_changed_or_frozen() -> None:
    weight, x = parameter(3, 32, 48), torch.randn(384, 48).bfloat16()
    with torch.no_grad():
        for change in (lambda: weight.mul_(2), lambda: setattr(weight, "data", weight.data.clone() * 3)):
            te_grouped_linear(x, weight, ENDS)
            change()
            expected = grouped_fp8_linear(x, weight, ENDS, power_of_two=True)
            assert torch.equal(te_grouped_linear(x, weight, ENDS), expected)
    weight.requires_grad_(False)
    assert len(outcome(te_grouped_linear_by_ends, weight, [x], late=False)) == 3
    assert not weight.main_grad.any()  # type: ignore[attr-defined]


def te_grouped_linear_by_ends(x: Tensor, weight: Tensor) -> Tensor:
    return te_grouped_linear(x, weight, ENDS)


@pytest.mark.usefixtures("stand_in")
def test_experts_without_a_token_leave_a_way_back() -> None:
    weight, x = parameter(3, 32, 48), torch.randn(128, 48).bfloat16().requires_grad_()
    y = te_grouped_linear(x, weight, torch.zeros(3, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (128, 32)
    assert not y.any()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_a_non_finite_number_that_te_would_saturate_is_seen(where: str, poison: float) -> None:
    weight, x = parameter(32, 48), torch.randn(16, 48).bfloat16()
    dy = torch.randn(16, 32).bfloat16()
    with torch.no_grad():
        {"x": x, "weight": weight, "dy": dy}[where][3, 7] = poison
    x.requires_grad_()
    y = te_linear.te_linear(x, weight)
    y.backward(dy)
    assert x.grad is not None
    assert (x.grad if where == "dy" else y).isnan().all()


def adapter_with(old: str, new: str) -> ModuleType:
    source = ADAPTER.read_text()
    assert source.count(old) == 1, old
    module = ModuleType("changed")
    exec(compile(source.replace(old, new), "changed", "exec"), vars(module))  # noqa: S102
    return module


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"delay_wgrad_compute": True', '"delay_wgrad": True', TypeError),
        ('"fuse_wgrad_accumulation": True', '"fuse_wgrad_accumulation": False', AssertionError),
        ("save_original_input=keep_input", "save_input=keep_input", TypeError),
        ("autocast(enabled=True, recipe=", "autocast(fp8_recipe=", TypeError),
        ("module(x, *splits)", "module(x, *splits, group_ends=x)", TypeError),
        ("import autocast", "import fp8_autocasting", ImportError),
        ("module.backward_dw", "module.wgrad", AttributeError),
    ],
)
def test_a_use_that_te_does_not_publish_turns_red(old: str, new: str, error: type[Exception]) -> None:
    changed = adapter_with(old, new)
    with pytest.raises(error):
        changed.te_linear(torch.randn(16, 48).bfloat16().requires_grad_(), parameter(32, 48)).sum().backward()


def test_every_name_of_te_in_the_adapter_is_recorded_and_the_stand_in_has_no_more() -> None:
    recorded = {name for kind in ("callables", "attributes") for name in TABLE[kind]}
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(ADAPTER.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("transformer_engine")
        for alias in node.names
    }
    assert len(imported) == 6
    assert imported <= recorded
    for name in ("Linear", "GroupedLinear", "Float8BlockQuantizer"):
        full = f"{te_stand_in.PYTORCH}.{name}"
        public = {key for key in vars(getattr(te_stand_in, name)) if not key.startswith("_")}
        assert public == {key.removeprefix(f"{full}.") for key in recorded if key.startswith(f"{full}.")}
    assert str(te_stand_in.signature_of(f"{te_stand_in.PYTORCH}.Float8BlockQuantizer")).startswith("(fp8_dtype, *, row")
    assert len(inspect.signature(te_stand_in.Linear.__init__).parameters) < len(
        te_stand_in.signature_of(f"{te_stand_in.PYTORCH}.Linear").parameters
    )


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "capability", "cuda", "te", "power_of_two", "words"),
    [
        (CPU, (9, 0), "13.0", True, True, "runs on a CUDA GPU, and this run's device is cpu"),
        (GPU, (8, 9), "13.0", True, True, "compute capability 9.0 or later, this GPU has 8.9"),
        (GPU, (9, 0), "12.8", True, True, "CUDA 12.9 or later, this one's is 12.8"),
        (GPU, (9, 0), None, True, True, "CUDA 12.9 or later, this one's is none"),
        (GPU, (9, 0), "12.9", False, True, "run `pip install --no-build-isolation '.[te]'` in this repository"),
        (GPU, (9, 0), "12.9", True, False, "NVTE_FP8_BLOCK_SCALING_FP32_SCALES must be 1"),
    ],
)
def test_what_te_cannot_do_here_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, stand_in: None, device: Any, capability: Any, cuda: Any, te: Any,
    power_of_two: Any, words: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if not te:
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match="precision") as refused:
        require_te(device, power_of_two=power_of_two)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_te_s_switch_decides_which_scales_are_taken(monkeypatch: pytest.MonkeyPatch, stand_in: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    require_te(GPU, power_of_two=True)
    te_linear._recipe.cache_clear()
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    require_te(GPU, power_of_two=False)
    with pytest.raises(ValueError, match="must not be set"):
        require_te(GPU, power_of_two=True)
    te_linear._recipe.cache_clear()
    monkeypatch.delattr("transformer_engine.common.recipe.Float8BlockScaling")
    with pytest.raises(TeBrokenError, match=r"installed but cannot be imported \(cannot import name"):
        require_te(GPU, power_of_two=True)


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return compose(["experiment=tiny", "precision=fp8_te"])


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("run", {"device": "cpu"}, "run.device=cpu does not go with precision=fp8_te"),
        ("layout", {"max_expert_rows": 128}, "layout.max_expert_rows does not go with precision=fp8_te"),
        ("run", {"recompute": True}, "set run.recompute=false"),
        (None, {"dry_run": True}, "plan with precision=fp8"),
        ("precision", {"cache_swiglu_input": True}, "set precision.cache_swiglu_input=false"),
        ("model", {"moe_intermediate_size": 200}, "sides are multiples of 16, and shared_experts of this model"),
        ("model", {"kv_lora_rank": 24}, "change the model's widths, or use precision=fp8"),
    ],
)
def test_a_configuration_that_te_cannot_compute_is_refused(
    config: PretrainConfig, section: str | None, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="fp8_te") as refused:
        replace(config, **({section: replace(getattr(config, section), **change)} if section else change))
    assert words in str(refused.value)


def test_a_run_on_te_is_read_again_on_our_kernels(config: PretrainConfig, tmp_path: Path) -> None:
    """Scores, generation and export of it need neither TE nor a GPU."""
    stored = {"model": asdict(config.model), "precision": asdict(config.precision), "data": {"store": "none"}}
    save(tmp_path / "step_00000001", tensors={"model.norm.weight": torch.ones(3)}, state={"config": stored})
    read = CheckpointReader(tmp_path / "step_00000001").precision
    assert (config.precision.wire, read) == ("bf16", Precision.of(replace(config.precision, name="fp8")))


def test_make_gpu_says_aloud_that_te_is_absent() -> None:
    section = gpu_sections.transformer_engine(gpu_sections.Options(CPU, tiny=True), 60.0)
    assert (section.status, section.reason) == ("left out", "transformer-engine not installed, skipped")


WIDTHS = {"hidden_size": 64, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODEL = replace(TINY, **WIDTHS, qk_rope_head_dim=16, intermediate_size=96, moe_intermediate_size=32)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("defect", ["none", "wgrad"])
def test_make_gpu_compares_payloads_and_one_step(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    """With the stand-in in TE's place: green, and red where a gradient is lost."""
    run = smoke_runs.smoke_run("tiny", sequences=2, tokens=32, model=MODEL)
    monkeypatch.setattr(gpu_sections, "tiny_run", lambda options: run)
    monkeypatch.setattr(te_parity, "require_te", lambda device, power_of_two: None)
    if defect == "wgrad":
        monkeypatch.setattr(te_stand_in, "gemm_tile_tile", lambda *operands, **named: None)
    section = gpu_sections.transformer_engine(gpu_sections.Options(CPU, tiny=True), 60.0)
    assert section.status == ("green" if defect == "none" else "red"), section.markdown
    payloads, worst = section.data["payloads"], max(section.data["step"]["errors"].values())
    assert [each for each in payloads if each["payload_bytes"] or each["scales"]] == []
    assert len(payloads) == 40
    # Forward is the same bits; gradients part where wgrad's operand is regrouped, or as planted.
    assert section.data["step"]["loss_error"] == 0
    assert 0 < worst < 1e-5 if defect == "none" else worst >= 1


@pytest.mark.usefixtures("stand_in")
def test_a_payload_of_another_scale_turns_make_gpu_red(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplier = te_stand_in.te_multiplier
    monkeypatch.setattr(te_stand_in, "te_multiplier", lambda amax, dtype: multiplier(amax, dtype) / 2)
    opinion = te_parity.SecondOpinion("", tuple(te_parity.compare_payloads(CPU)))
    assert not opinion.green
    assert {each.tensor for each in opinion.payloads if each.scales} == {each.tensor for each in opinion.payloads}
