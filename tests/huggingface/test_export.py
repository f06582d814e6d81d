"""What an export writes is the model: for another implementation, for an independent name mapping, for us again.

Blocks of FP8 are compared with the definition, worked out here in FP64 over all 254 finite E4M3 values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.fp8_linear import weight_fp8
from kernels.quantize import dequantize_blocks
from tests.hf_names import from_hf
from tests.huggingface.hf_folders import (
    BF16,
    CPU,
    FP8,
    FP8_ANY_SCALE,
    FP32,
    RAGGED,
    SHARD_BYTES,
    Made,
    lively,
    name_of,
    saved,
    tensors_of,
)
from train.checkpoint.dcp import load
from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.names import BIAS, ExportPlan, ReleasedTensor
from train.huggingface.reader import HfReader
from train.huggingface.weights import CheckpointReader, load_model, open_weights
from train.model.precision import Precision
from train.model.transformer import Transformer

# Two FP32 implementations of three layers: 1.5e-7 was seen; the bound is the oracle test's.
LOGITS = 1e-5


@torch.no_grad()
def logits_gap(model: Transformer, oracle: Any) -> float:
    """Relative, between our model and another one."""
    ids = torch.randint(0, RAGGED.vocab_size, (2, 33))
    expected = oracle(input_ids=ids).logits
    return float((model.logits(model.next_token_hidden(ids)) - expected).norm() / expected.norm())


def exported(model: Transformer, root: Path, **options: Any) -> Path:
    export(saved(model, root), root / "hf", ExportOptions(**{"shard_bytes": SHARD_BYTES, **options}))
    return root / "hf"


@pytest.mark.parametrize("case", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}], ids=str)
def test_transformers_computes_the_same_logits_from_an_export(case: dict[str, Any], tmp_path: Path) -> None:
    model = lively(replace(RAGGED, **case), FP32)
    oracle = AutoModelForCausalLM.from_pretrained(exported(model, tmp_path, format="fp32")).eval()
    assert logits_gap(model, oracle) < LOGITS


def test_we_compute_the_same_logits_from_what_transformers_saved(made: Made, tmp_path: Path) -> None:
    """Its file is one, spells RoPE its own way and has no MTP layer."""
    oracle = AutoModelForCausalLM.from_pretrained(made.folder(FP32, "fp32")).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(1.25)
    oracle.save_pretrained(tmp_path / "saved")
    source = open_weights(tmp_path / "saved")
    assert isinstance(source, HfReader)
    assert source.config == replace(RAGGED, num_nextn_predict_layers=0)
    assert source.notes == [f"{tmp_path / 'saved'} holds 0 MTP layers, though its config.json says 1"]
    assert logits_gap(load_model(source, device=CPU), oracle) < LOGITS


def test_experts_that_transformers_stacked_are_read(made: Made, tmp_path: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(made.folder(FP32, "fp32"))
    oracle.save_pretrained(tmp_path / "saved", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "saved")
    source, expected = open_weights(tmp_path / "saved"), made.model(FP32).state_dict()
    assert all(torch.equal(source.read(name), expected[name]) for name in source.names())
    imported = CheckpointReader(import_hf(HfReader(tmp_path / "saved"), tmp_path / "run").path)
    assert all(torch.equal(imported.read(name), expected[name]) for name in source.names())


@pytest.mark.parametrize("shard_bytes", [10**5, 10**9])
def test_ours_to_hf_to_ours_is_bit_equal_for_every_tensor(made: Made, tmp_path: Path, shard_bytes: int) -> None:
    """MTP layer and router biases too; by our reader and by DCP, whose files may cut a matrix or a stack of experts."""
    hf = HfReader(made.folder(FP32, "fp32"))
    imported = import_hf(hf, tmp_path / "run", shard_bytes=shard_bytes).path
    reader, expected = open_weights(tmp_path / "run"), made.model(FP32).state_dict()
    assert reader.path == imported
    assert (reader.config, reader.precision.name) == (RAGGED, "fp32")
    assert set(reader.names()) == set(expected)
    blank = {f"model.{name}": torch.full_like(tensor, 7.0) for name, tensor in expected.items()}
    load(imported, blank)
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(blank[f"model.{name}"], tensor), name


def test_an_import_is_not_taken_for_a_run_to_resume(made: Made, tmp_path: Path) -> None:
    """What the trainer asks for, an optimizer's state, is not there; its own weights stay as they were."""
    imported = import_hf(HfReader(made.folder(FP32, "fp32")), tmp_path / "run").path
    tensors = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in made.model(FP32).state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit: it lacks optim\.exp_avg\.norm\.weight"):
        load(imported, {**tensors, "optim.exp_avg.norm.weight": torch.zeros(136)})
    assert not any(tensor.any() for tensor in tensors.values())


def test_an_independent_mapping_finds_every_tensor_where_it_belongs(made: Made) -> None:
    """`from_hf` knows the names by pattern, not by the plan."""
    found, state = tensors_of(made.folder(FP32, "fp32")), made.model(FP32).state_dict()
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(found[f"model.layers.3.{copy}.weight"], found[f"{original}.weight"])
    back = from_hf(found, RAGGED)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_bf16_rounds_everything_once_but_the_router_bias(made: Made) -> None:
    back = from_hf(tensors_of(made.folder(FP32, "bf16")), RAGGED)
    for name, tensor in made.model(FP32).state_dict().items():
        expected = tensor if name.endswith(BIAS) else tensor.bfloat16()
        assert back[name].dtype == expected.dtype, name
        assert torch.equal(back[name], expected), name


E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
FINITE_E4M3 = E4M3[E4M3.isfinite()].sort().values  # [254]


def distance_to_grid(values: Tensor, grid: Tensor) -> Tensor:
    """From each value to the nearest of an ascending grid."""
    above = torch.bucketize(values.contiguous(), grid).clamp(1, len(grid) - 1)
    return torch.minimum((grid[above] - values).abs(), (grid[above - 1] - values).abs())


def fp8_tensors(plan: ExportPlan) -> Iterator[ReleasedTensor]:
    """What the plan stores in E4M3."""
    for tensors in plan.files.values():
        yield from (tensor for tensor in tensors if plan.dtypes[tensor.source] == "F8_E4M3")


@pytest.mark.parametrize("precision", [FP8, FP8_ANY_SCALE, FP32], ids=name_of)
def test_fp8_values_are_the_nearest_of_their_block(made: Made, precision: Precision) -> None:
    """With FP32 scales unless the run has powers of two."""
    out, done = made.exported(precision, "fp8")
    found, state, power_of_two = tensors_of(out), made.model(precision).state_dict(), precision == FP8
    weights = {tensor.name: tensor.of(state[tensor.source]).double() for tensor in fp8_tensors(done.plan)}
    assert set(weights) == {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn}
    for name, w in weights.items():
        scale, payload = found[f"{name}_scale_inv"], found[name].double()
        for i, rows in enumerate(w.split(128)):
            for j, block in enumerate(rows.split(128, dim=1)):
                s = scale[i, j].double()
                # FP32 division: half a unit in the last place.
                least = block.abs().max() / 448
                if power_of_two:
                    assert s == torch.exp2(torch.log2(least).ceil()), name
                else:
                    assert abs(s / least - 1) <= 2.0**-24, name
                stored = payload[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] * s
                nearest = distance_to_grid(block, FINITE_E4M3 * s)
                # Quotients are rounded to FP32 before they are rounded to E4M3: 2^-24 of the value on a tie.
                assert ((stored - block).abs() <= nearest + 2.0**-23 * block.abs()).all(), name
    assert HfReader(out).precision == Precision("fp8", power_of_two_scales=power_of_two)


def test_payloads_are_those_that_training_multiplies(made: Made) -> None:
    """Of every fused weight whose released tensors begin and end with a block; the plan names the others."""
    out, done = made.exported(FP8, "fp8")
    found, state, compared = tensors_of(out), made.model(FP8).state_dict(), 0
    for tensor in fp8_tensors(done.plan):
        training = weight_fp8(state[tensor.source], power_of_two=True)
        same = torch.equal(found[tensor.name].view(torch.uint8), tensor.of(training.payload.view(torch.uint8)))
        assert same or tensor.name in done.plan.cut_blocks, tensor.name
        compared += tensor.name not in done.plan.cut_blocks
    # Of 3 + 1 layers: five projections of attention, every down projection.
    assert compared == 4 * 5 + 1 + 3 * (RAGGED.n_routed_experts + 1)


def test_fp8_is_read_back_as_payload_times_scale_exactly(made: Made) -> None:
    out = made.folder(FP8, "fp8")
    stored, values = tensors_of(out), {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            values[name] = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            values[name] = tensor.float()
    reader = HfReader(out)
    for name, expected in from_hf(values, RAGGED).items():
        assert torch.equal(reader.read(name).float(), expected), name
        rows = range(1, reader.shape(name)[0] - 1)
        assert torch.equal(reader.read(name, rows).float(), expected[rows.start : rows.stop]), name


def test_an_fp8_model_multiplies_the_same_weights_after_the_round_trip(made: Made, tmp_path: Path) -> None:
    """With power-of-two scales payload x scale is exact in BF16, and quantising it again gives the same values."""
    imported = import_hf(HfReader(made.folder(FP8, "fp8")), tmp_path / "run").path
    again = load_model(CheckpointReader(imported), device=CPU)
    assert again.precision == FP8
    for name, before in made.model(FP8).state_dict().items():
        if name.endswith(("down_proj", "o_proj.weight")):
            one, two = weight_fp8(before, power_of_two=True), weight_fp8(again.state_dict()[name], power_of_two=True)
            assert torch.equal(dequantize_blocks(one), dequantize_blocks(two)), name


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = lively(RAGGED, BF16)
    model.get_parameter("layers.1.mlp.experts.down_proj")[2, 135, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in layers\.1\.mlp\.experts\.down_proj"):
        exported(model, tmp_path)
    assert not (tmp_path / "hf/config.json").exists()


def test_a_source_without_all_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = lively(replace(RAGGED, n_routed_experts=2, n_group=1), BF16)
    model.config = RAGGED
    with pytest.raises(
        ValueError, match=r"holds layers\.1\.mlp\.gate\.weight as \[2, 136\], which has no model\.layers\.1"
    ):
        exported(model, tmp_path)
    assert not (tmp_path / "hf").exists()
