"""Every member of the family against the class of `transformers` that is its own, at tiny sizes in FP32.

Kimi-K2 and JoyAI-LLM-Flash have no class there: they are DeepSeek-V3's under another `model_type`, and compared so.
Bounds are those of `tests/model/test_oracle.py`: 1e-5 of logits, 1e-4 of gradients.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from kernels.config import YarnScaling
from tests.hf_names import from_hf
from tests.huggingface.hf_folders import BF16, CPU, FP8, FP32, RAGGED, lively, saved
from tests.model.test_oracle import relative, released_names
from train.huggingface.export import ExportOptions, export
from train.huggingface.names import Format
from train.huggingface.reader import HfReader
from train.huggingface.weights import load_model, open_weights
from train.model.config import FAMILY, ModelConfig
from train.model.transformer import Transformer

LOGITS, GRADIENTS = 1e-5, 1e-4
ONE_GROUP = {"n_group": 1, "topk_group": 1}
YARN = YarnScaling(40.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
# What each has otherwise than V3 (docs/family.md), on the shapes of `RAGGED`.
MEMBERS: dict[str, ModelConfig] = {
    "kimi_k2": replace(
        RAGGED,
        model_type="kimi_k2",
        routed_scaling_factor=2.827,
        rope_theta=5e4,
        rope_scaling=YarnScaling(32.0, 16, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
        num_nextn_predict_layers=0,
        **ONE_GROUP,
    ),
    "moonlight": replace(
        RAGGED,
        q_lora_rank=None,
        n_shared_experts=2,
        num_experts_per_tok=3,
        routed_scaling_factor=2.446,
        rope_theta=5e4,
        rms_norm_eps=1e-5,
        num_nextn_predict_layers=0,
        **ONE_GROUP,
    ),
    "joyai_llm_flash": replace(RAGGED, model_type="joyai_llm_flash", rope_theta=3.2e7, **ONE_GROUP),
    "glm4_moe_lite": replace(
        RAGGED,
        model_type="glm4_moe_lite",
        first_k_dense_replace=2,
        qk_nope_head_dim=18,
        v_head_dim=24,
        routed_scaling_factor=1.8,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        **ONE_GROUP,
    ),
    "deepseek_v2": replace(
        RAGGED,
        model_type="deepseek_v2",
        # Its class asks for heads that divide the hidden size.
        num_attention_heads=4,
        q_lora_rank=None,
        n_shared_experts=2,
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        rope_scaling=YARN,
        num_nextn_predict_layers=0,
        **ONE_GROUP,
    ),
}
WHOLE_BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 2,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 128,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
members = pytest.mark.parametrize("config", MEMBERS.values(), ids=MEMBERS.keys())


def exported(model: Transformer, root: Path, format: Format = "fp32") -> Path:
    export(saved(model, root), root / "hf", ExportOptions(format))
    return root / "hf"


def renamed(folder: Path, model_type: str) -> str:
    """Give a folder's config.json another `model_type`; returns the one that it had."""
    values = json.loads((folder / "config.json").read_text())
    had: str = values["model_type"]
    (folder / "config.json").write_text(json.dumps(values | {"model_type": model_type}))
    return had


def their_own(folder: Path, **options: Any) -> Any:
    """The model of `transformers` that reads a folder."""
    if json.loads((folder / "config.json").read_text())["model_type"] in ("kimi_k2", "joyai_llm_flash"):
        renamed(folder, "deepseek_v3")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager", **options)


def test_every_member_has_a_case() -> None:
    assert {config.model_type for config in MEMBERS.values()} == set(FAMILY)


@members
def test_logits_and_every_gradient_agree_with_their_own_class(config: ModelConfig, tmp_path: Path) -> None:
    ours = lively(config, FP32).requires_grad_().train()
    oracle = their_own(exported(ours, tmp_path))
    # Not the defaults of an unknown class.
    assert (
        type(oracle)
        .__name__.lower()
        .startswith({"deepseek_v2": "deepseekv2", "glm4_moe_lite": "glm4moelite"}.get(config.model_type, "deepseekv3"))
    )
    ids = torch.randint(0, config.vocab_size, (2, 37), generator=torch.Generator().manual_seed(3))
    weight = torch.randn(2, 37, config.vocab_size, generator=torch.Generator().manual_seed(4))
    expected, actual = oracle(input_ids=ids).logits, ours.logits(ours(ids).hidden)
    assert relative(actual, expected) < LOGITS
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    theirs = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    wanted = from_hf(released_names(theirs), config)
    mine = {n: p.grad for n, p in ours.named_parameters() if not n.startswith("mtp.") and p.grad is not None}
    assert mine.keys() == wanted.keys()
    errors = {name: relative(mine[name], wanted[name]) for name in mine}
    assert {name: error for name, error in errors.items() if not error < GRADIENTS} == {}


@members
def test_what_transformers_saved_is_read(config: ModelConfig, tmp_path: Path) -> None:
    folder = exported(lively(config, FP32), tmp_path)
    assert HfReader(folder).config == config
    oracle = their_own(folder)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(1.25)
    oracle.save_pretrained(tmp_path / "saved")
    if config.model_type in ("kimi_k2", "joyai_llm_flash"):
        renamed(tmp_path / "saved", config.model_type)
    source = open_weights(tmp_path / "saved")
    assert source.config == replace(config, num_nextn_predict_layers=0)
    ids = torch.randint(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        model = load_model(source, device=CPU)
        assert relative(model.logits(model.next_token_hidden(ids)), oracle(input_ids=ids).logits) < LOGITS


@members
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_exports_in_bf16_and_fp8_are_the_same_model_to_both(
    config: ModelConfig, format: Format, tmp_path: Path
) -> None:
    """Rounded weights, computed in FP32 on either side: what is compared is what the files hold.

    In FP8 on whole blocks: `transformers` 5.23 takes a block to be rows over scales, and ragged ones for smaller.
    """
    if format == "fp8":
        config = replace(config, **WHOLE_BLOCKS, q_lora_rank=config.q_lora_rank and 128)
    folder = exported(lively(config, BF16 if format == "bf16" else FP8), tmp_path, format)
    ours = load_model(HfReader(folder), precision=FP32, device=CPU)
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if format == "fp8" else {}
    oracle = their_own(folder, **options).float()
    ids = torch.randint(0, config.vocab_size, (2, 33))
    with torch.no_grad():
        assert relative(ours.logits(ours.next_token_hidden(ids)), oracle(input_ids=ids).logits) < LOGITS
