"""The plan of an export has the released names, dtypes, counts and files, before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.huggingface.hf_folders import RAGGED
from train.huggingface.names import ExportPlan, export_plan
from train.model.config import ModelConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs/model"
GB = 10**9


@pytest.fixture(scope="module")
def v3() -> ExportPlan:
    config = ModelConfig(**yaml.safe_load((CONFIGS / "v3_671b.yaml").read_text()))
    return export_plan(config, format="fp8", shard_bytes=5 * GB)


def released_linears() -> Iterator[tuple[str, int, int]]:
    """Every FP8 weight of DeepSeek-V3 with its rows and columns, written down from the report's sizes."""
    for layer in range(62):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        yield f"{attention}q_a_proj.weight", 1536, 7168
        yield f"{attention}q_b_proj.weight", 128 * 192, 1536
        yield f"{attention}kv_a_proj_with_mqa.weight", 576, 7168
        yield f"{attention}kv_b_proj.weight", 128 * 256, 512
        yield f"{attention}o_proj.weight", 7168, 128 * 128
        ffns = [(mlp, 18432)] if layer < 3 else [(f"{mlp}experts.{e}.", 2048) for e in range(256)]
        for stem, width in ffns if layer < 3 else [*ffns, (f"{mlp}shared_experts.", 2048)]:
            yield f"{stem}gate_proj.weight", width, 7168
            yield f"{stem}up_proj.weight", width, 7168
            yield f"{stem}down_proj.weight", 7168, width


def released_others() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Everything else of DeepSeek-V3."""
    yield "model.embed_tokens.weight", "BF16", (129280, 7168)
    yield "lm_head.weight", "BF16", (129280, 7168)
    yield "model.norm.weight", "BF16", (7168,)
    for layer in range(62):
        stem = f"model.layers.{layer}."
        gains = {"input_layernorm": 7168, "post_attention_layernorm": 7168}
        gains |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
        yield from ((f"{stem}{name}.weight", "BF16", (size,)) for name, size in gains.items())
        if layer >= 3:
            yield f"{stem}mlp.gate.weight", "BF16", (256, 7168)
            yield f"{stem}mlp.gate.e_score_correction_bias", "F32", (256,)
    stem = "model.layers.61."
    yield from ((f"{stem}{name}.weight", "BF16", (7168,)) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield f"{stem}eh_proj.weight", "BF16", (7168, 14336)
    yield f"{stem}embed_tokens.weight", "BF16", (129280, 7168)
    yield f"{stem}shared_head.head.weight", "BF16", (129280, 7168)


def test_v3_has_exactly_the_elements_of_the_released_checkpoint(v3: ExportPlan) -> None:
    assert v3.elements() == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}


def test_v3_has_exactly_the_names_dtypes_and_shapes_of_the_released_checkpoint(v3: ExportPlan) -> None:
    expected = {name: (dtype, shape) for name, dtype, shape in released_others()}
    for name, rows, cols in released_linears():
        expected[name] = ("F8_E4M3", (rows, cols))
        expected[f"{name}_scale_inv"] = ("F32", (math.ceil(rows / 128), math.ceil(cols / 128)))
    planned = {spec.name: (spec.dtype, spec.shape) for shard in v3.shards for spec in shard.tensors}
    assert planned == expected


def test_the_index_names_every_tensor_once_and_sums_the_bytes(v3: ExportPlan) -> None:
    index = v3.index()
    assert index["metadata"]["total_size"] == 680_571_043_840 + 2 * 3_918_786_560 + 4 * 41_555_600
    assert len(index["weight_map"]) == sum(len(shard.tensors) for shard in v3.shards)
    assert next(iter(v3.files)) == f"model-00001-of-{len(v3.files):05d}.safetensors"


def test_files_keep_to_their_size_and_a_weight_to_its_scales(v3: ExportPlan) -> None:
    weight_map, item_bytes = v3.index()["weight_map"], {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    for name, file in weight_map.items():
        assert weight_map.get(f"{name}_scale_inv", file) == file
    for shard in v3.shards:
        assert sum(item_bytes[spec.dtype] * math.prod(spec.shape) for spec in shard.tensors) <= 5 * GB


def test_blocks_that_training_cut_elsewhere_are_named(v3: ExportPlan) -> None:
    """Rows of q_a and of a gate are multiples of 128 in V3, so fused and released blocks are the same."""
    assert v3.cut_blocks == ()
    cut = set(export_plan(RAGGED, format="fp8", shard_bytes=GB).cut_blocks)
    layer = "model.layers.1.mlp."
    assert {f"{layer}experts.0.gate_proj.weight", f"{layer}shared_experts.up_proj.weight"} <= cut
    assert not {name for name in cut if "self_attn" in name or "down_proj" in name}
    assert export_plan(RAGGED, format="bf16", shard_bytes=GB).cut_blocks == ()


def test_another_source_of_sizes_is_another_plan() -> None:
    plans = [export_plan(RAGGED, format=f, shard_bytes=size) for f in ("bf16", "fp8") for size in (10**5, 10**6)]
    assert len({plan.sha256() for plan in plans}) == 4
    with pytest.raises(ValueError, match="shard size 0 must be at least 1 byte"):
        export_plan(RAGGED, format="bf16", shard_bytes=0)
