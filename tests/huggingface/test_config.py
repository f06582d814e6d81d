"""config.json says the same model to us, to `transformers`, and back; what we cannot compute is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, DeepseekV3Config

from kernels.rope import YarnScaling
from tests.huggingface.hf_folders import RAGGED
from train.data.tokenizer import SPECIAL_TOKENS, train_byte_level_bpe
from train.data.trained_on import KEY, TrainedOn
from train.huggingface.config import is_fp8, model_config, released_config, small_files
from train.model.config import ModelConfig

YARN = YarnScaling(
    factor=40.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)
CASES = {
    "plain": RAGGED,
    "YaRN": dataclasses.replace(RAGGED, rope_scaling=YARN, rope_theta=50000.0),
    "no query latent, no MTP": dataclasses.replace(RAGGED, q_lora_rank=None, num_nextn_predict_layers=0),
    "spread of its own": dataclasses.replace(RAGGED, embedding_initializer_range=0.3),
}


def released(**fields: Any) -> dict[str, Any]:
    return {**released_config(RAGGED, format="bf16", ids=None), **fields}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_our_file_comes_back_as_it_was(config: ModelConfig) -> None:
    assert model_config(released_config(config, format="bf16", ids=None), origin="config.json") == config


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_what_transformers_makes_of_our_file_comes_back_as_it_was(config: ModelConfig, tmp_path: Path) -> None:
    """It spells RoPE as `rope_parameters` when it saves; only what it does not know at all may be lost."""
    theirs = DeepseekV3Config(**released_config(config, format="bf16", ids=None))
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    saved = theirs.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    assert "rope_scaling" not in saved
    assert model_config(saved, origin="config.json") == config


def test_fp8_says_how_it_is_quantised() -> None:
    values = released_config(RAGGED, format="fp8", ids=None)
    assert values["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert is_fp8(values, origin="config.json")
    assert not is_fp8(released(), origin="config.json")


REFUSED: dict[str, dict[str, Any]] = {
    r"describes LlamaForCausalLM": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    r"attention_bias=True": {"attention_bias": True},
    r"tie_word_embeddings=True": {"tie_word_embeddings": True},
    r"hidden_act=gelu": {"hidden_act": "gelu"},
    r"scoring_func=softmax": {"scoring_func": "softmax"},
    r"topk_method=greedy": {"topk_method": "greedy"},
    r"moe_layer_freq=2": {"moe_layer_freq": 2},
    r"num_key_value_heads=1": {"num_key_value_heads": 1},
    r"scales RoPE by 'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    r"the YaRN setting attention_factor": {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.0}},
    r"lacks rope_scaling\.factor": {"rope_scaling": {"type": "yarn"}},
    r"hidden_size is \"wide\", not int": {"hidden_size": "wide"},
    r"n_routed_experts is true, not int": {"n_routed_experts": True},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items())
def test_what_this_model_cannot_compute_is_refused(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json.* {message}"):
        model_config(released(**fields), origin="config.json")


def test_another_quantisation_is_refused() -> None:
    for field, value in (("quant_method", "gptq"), ("fmt", "e5m2"), ("weight_block_size", [64, 64])):
        settings = {**released_config(RAGGED, format="fp8", ids=None)["quantization_config"], field: value}
        with pytest.raises(ValueError, match=f"quantised with {field}="):
            is_fp8(released(quantization_config=settings), origin="config.json")


def test_how_samples_looked_survives_our_file_and_that_of_transformers() -> None:
    trained_on = TrainedOn("eos", 256, mask_documents=True, tokenizer_sha256="ab" * 32)
    ours = json.loads(small_files(RAGGED, format="bf16", tokenizer=None, trained_on=trained_on)["config.json"])
    assert TrainedOn.from_json(ours, origin="config.json") == trained_on
    theirs = DeepseekV3Config(**ours).to_dict()
    assert TrainedOn.from_json(theirs, origin="config.json") == trained_on


def test_a_released_model_begins_with_bos_and_gets_no_mark() -> None:
    values = json.loads(small_files(RAGGED, format="bf16", tokenizer=None, trained_on=TrainedOn())["config.json"])
    assert KEY not in values
    assert TrainedOn.from_json(values, origin="config.json") == TrainedOn("bos", None, mask_documents=False)


@pytest.mark.parametrize(
    "mark", [5, {"first_token": "pad"}, {"sequence_length": "long"}, {"mask_documents": None}, {"new_field": 1}]
)
def test_a_mark_of_another_kind_is_refused(mark: Any) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json has {KEY}=.*export the model again"):
        TrainedOn.from_json({KEY: mark}, origin="config.json")


def test_a_missing_field_is_named() -> None:
    values = released()
    del values["kv_lora_rank"]
    with pytest.raises(ValueError, match=r"config\.json lacks kv_lora_rank"):
        model_config(values, origin="config.json")


def test_the_tokeniser_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    texts = ["In the beginning", "the earth was without form, and void\n\n", "naïve 漢字 \t", "", " a  b "]
    ours = train_byte_level_bpe(texts * 3, vocab_size=290)
    for name, text in small_files(RAGGED, format="bf16", tokenizer=ours, trained_on=TrainedOn()).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts)["input_ids"] == ours.encode_batch(texts)
    assert [theirs.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.special_ids.bos, ours.special_ids.eos)
    # A text that spells a control token: `transformers` reads the token, unless told that text is data.
    spelled = f"a {SPECIAL_TOKENS['eos']} b"
    careful = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert careful(spelled)["input_ids"] == ours.encode_batch([spelled])[0]
    assert ours.special_ids.eos in theirs(spelled)["input_ids"]
