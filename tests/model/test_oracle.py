"""Ours against `transformers`' independent DeepSeek-V3, FP32: logits, every parameter's gradient, and MTP.

Both models hold the same weights (moved by `train.huggingface.names`, so the name mapping is proved on the way).
Tolerances are the issue's: 1e-5 on logits and 1e-4 on gradients, relative Frobenius. FP32 rounding alone explains
about sqrt(depth of the longest sum) * 6e-8 < 1e-6; the slack is for the different order of sums.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from kernels.config import YarnScaling
from tests.hf_names import from_hf
from tests.tiny_model import DISTINCT
from train.generate.latent_cache import Decoder, Span
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import Transformer

BASE: dict[str, Any] = vars(
    replace(DISTINCT, n_routed_experts=8, n_group=4, topk_group=2, max_position_embeddings=4096)
)
YARN = YarnScaling(40.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
CASES: dict[str, dict[str, Any]] = {
    "groups 4, top 2": {},
    "no query latent": {"q_lora_rank": None},
    # A single normalised gate is the constant 1: the router's true gradient is 0 and rounding noise would be compared.
    "one group, top 1": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "one group, top 4": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4},
    "groups 4, top 3, two shared, gates not normalised": {
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "YaRN": {"rope_scaling": YARN},
    # The latents' norms keep 1e-6: with 1e-3 in them logits were 1.5e-3 off.
    "another eps": {"rms_norm_eps": 1e-3},
    "dense only": {"first_k_dense_replace": 3},
    "experts everywhere": {"first_k_dense_replace": 0},
}


def hf_config(config: ModelConfig) -> DeepseekV3Config:
    """The same model as a `transformers` config."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {"rope_theta": config.rope_theta, "rope_type": "yarn", **vars(config.rope_scaling)}
    same = {name: getattr(config, name) for name in BASE if not name.startswith("rope_")}
    return DeepseekV3Config(
        **same,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="eager",
        experts_implementation="eager",
        tie_word_embeddings=False,
    )


def released_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`transformers` stacks experts in memory; the released layout has one tensor per expert and half."""
    out = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*mlp\.experts\.)(gate_up|down)_proj", name):
            halves = match[2].split("_")
            for expert, stacked in enumerate(tensor.unbind(0)):
                parts = zip(halves, stacked.chunk(len(halves)), strict=True)
                out |= {f"{match[1]}{expert}.{half}_proj.weight": part for half, part in parts}
        else:
            out[name] = tensor
    return out


@torch.no_grad()
def enliven(oracle: torch.nn.Module) -> None:
    """Random weights, norm gains and router biases, none of them at a value that hides a mistake."""
    for name, tensor in oracle.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "e_score" in name:
            tensor.uniform_(-0.2, 0.2)
        else:
            tensor.normal_(std=0.15)


def pair(case: dict[str, Any]) -> tuple[DeepseekV3ForCausalLM, Transformer]:
    """An oracle with lively random weights and ours with the same."""
    config = ModelConfig(**{**BASE, **case})
    oracle = DeepseekV3ForCausalLM(hf_config(config))
    enliven(oracle)
    ours = Transformer(config, Precision("fp32"))
    initialize(ours, seed=0, std=0.15)
    # Their model has no MTP layer.
    result = ours.load_state_dict(from_hf(released_names(oracle.state_dict()), config), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("mtp.") for name in result.missing_keys)
    return oracle, ours


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_and_every_gradient_agree_with_transformers(case: dict[str, Any]) -> None:
    oracle, ours = pair(case)
    ids = torch.randint(0, BASE["vocab_size"], (2, 37))
    weight = torch.randn(2, 37, BASE["vocab_size"])

    expected = oracle(input_ids=ids).logits
    actual = ours.logits(ours(ids).hidden)
    assert relative(actual, expected) < 1e-5

    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    grads = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    wanted = from_hf(released_names(grads), ours.config)
    mine = {n: p.grad for n, p in ours.named_parameters() if not n.startswith("mtp.") and p.grad is not None}
    assert mine.keys() == wanted.keys()
    errors = {name: relative(mine[name], wanted[name]) for name in mine}
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


# V3's rotary key over one layer; as wide as values, so that torch's CPU kernel takes the oracle's 16K in little memory.
LONG: dict[str, Any] = {
    "rope_scaling": replace(YARN, original_max_position_embeddings=4096),
    "max_position_embeddings": 163840,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 1,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 64,
    "v_head_dim": 72,
}


@torch.no_grad()
def long_pair(length: int) -> tuple[Transformer, Tensor, Tensor]:
    """A model with YaRN, token ids and the logits that `transformers` has for them."""
    oracle, ours = pair(LONG)
    oracle.config._attn_implementation = "sdpa"
    ids = torch.randint(0, BASE["vocab_size"], (1, length))
    return ours, ids, oracle(input_ids=ids, use_cache=False).logits[0]


def far(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a position: a mean would hide the far ones."""
    return float(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# FP32 sums in another order: measured 6e-6 at 16K, where an angle itself rounds to 16384 * 2^-24 = 1e-3.
FAR = 3e-5


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 129, 4097, pytest.param(16384, marks=pytest.mark.long)])
def test_logits_of_an_extended_context_agree_with_transformers_at_every_position(length: int) -> None:
    """Below and beyond the original 4096."""
    ours, ids, expected = long_pair(length)
    assert far(ours.logits(ours(ids).hidden)[0], expected) < FAR


@torch.no_grad()
@pytest.mark.parametrize("length", [4097, pytest.param(16384, marks=pytest.mark.long)])
def test_generation_in_an_extended_context_agrees_with_transformers_at_every_position(length: int) -> None:
    ours, ids, expected = long_pair(length)
    decoder = Decoder(ours)
    cache, hidden = decoder.new_cache(sequences=1, slots=length, drafting=False), []
    for start in range(0, length, 4096):
        tokens = ids[0, start : start + 4096].tolist()
        hidden.append(decoder.advance(tokens, [Span(0, start, len(tokens))], cache))
    assert far(ours.logits(torch.cat(hidden)), expected) < FAR


@torch.no_grad()
@pytest.mark.parametrize("wrong", [None, replace(LONG["rope_scaling"], mscale=0.0, mscale_all_dim=0.0)])
def test_without_yarn_or_its_softmax_factor_logits_are_others(wrong: YarnScaling | None) -> None:
    ours, ids, expected = long_pair(129)
    other = Transformer(replace(ours.config, rope_scaling=wrong), ours.precision)
    other.load_state_dict(ours.state_dict())
    assert relative(other.logits(other(ids).hidden)[0], expected) > 1e-3


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_depths_agree_with_transformers(depth: int) -> None:
    # transformers numbers MTP layers from 0, so experts must start at layer 0 for its MTP block to have any.
    oracle, ours = pair({"first_k_dense_replace": 0, "num_nextn_predict_layers": depth})
    mtp = MtpModel(oracle, depth)
    enliven(mtp)
    released = dict(oracle.state_dict())
    for k in range(depth):
        layer = f"model.layers.{ours.config.num_hidden_layers + k}."
        for name, tensor in mtp.layers[k].state_dict().items():
            renamed = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            released[layer + renamed] = tensor
    ours.load_state_dict(from_hf(released_names(released), ours.config))

    ids = torch.randint(0, BASE["vocab_size"], (2, 23))
    hidden = oracle.model(input_ids=ids).last_hidden_state
    output = ours(ids)
    assert len(output.mtp_hidden) == depth
    for k, mine in enumerate(output.mtp_hidden, start=1):
        positions = torch.arange(ids.shape[1] - k)[None]
        hidden = mtp.forward_layer(k - 1, hidden[:, : ids.shape[1] - k], positions, None, input_ids=ids[:, k:])
        assert relative(ours.logits(mine), mtp._project_to_logits(hidden)) < 1e-5
    weight = torch.randn_like(hidden)
    (hidden * weight).sum().backward()
    (output.mtp_hidden[-1] * weight).sum().backward()
    compared = [(ours.embed_tokens.weight, oracle.get_input_embeddings().weight)]
    for k, layer in enumerate(mtp.layers, start=ours.config.num_hidden_layers):
        compared.append((ours.get_parameter(f"mtp.{k}.eh_proj.weight"), layer.get_parameter("eh_proj.weight")))
    for mine, theirs in compared:
        assert relative(mine.grad, theirs.grad) < 1e-4
