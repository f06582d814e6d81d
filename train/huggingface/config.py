"""`config.json` and its neighbours <-> our configuration: model, precision, tokeniser, generation.

    released_config(ModelConfig) -> dict       every field of the released file that describes the model
    model_config(dict) -> ModelConfig          the reverse, also from what `transformers` 5 saves

RoPE is spelled `rope_theta` + `rope_scaling` in released files and `rope_parameters` in those of `transformers` 5; both
are read, the released spelling is written. What our model cannot do is refused with one sentence, never dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kernels.formats import TILE
from kernels.rope import YarnScaling
from train.data.store import SpecialIds
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from train.data.trained_on import TrainedOn
from train.model.config import ModelConfig

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}
# Fields that our model has one value of: field -> (that value, values that mean the same).
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "rope_interleave": (True, None),
}
_RENAMED = {"num_nextn_predict_layers": "num_mtp_layers"}
_NOT_RELEASED = ("embedding_initializer_range", "rope_scaling")
_YARN_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
_ROPE_WORDS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}


def released_config(config: ModelConfig, *, format: str, ids: SpecialIds | None) -> dict[str, Any]:
    """The content of `config.json`; without `ids`, bos and eos are V3's, 0 and 1.

    Source: the fields of the released DeepSeek-V3 file.
    """
    ours = dataclasses.asdict(config)
    values = {name: value for name, value in ours.items() if name not in _NOT_RELEASED}
    values |= {name: value for name, (value, *_) in _FIXED.items() if name != "rope_interleave"}
    values |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "num_key_value_heads": config.num_attention_heads,
        "bos_token_id": 0 if ids is None else ids.bos,
        "eos_token_id": 1 if ids is None else ids.eos,
        "ep_size": 1,
        "use_cache": True,
        "torch_dtype": "float32" if format == "fp32" else "bfloat16",
        "rope_scaling": None if config.rope_scaling is None else {"type": "yarn", **ours["rope_scaling"]},
    }
    if config.embedding_initializer_range is not None:
        values["embedding_initializer_range"] = config.embedding_initializer_range
    if format == "fp8":
        values["quantization_config"] = QUANTIZATION
    return dict(sorted(values.items()))


def model_config(values: Mapping[str, Any], *, origin: str) -> ModelConfig:
    """Read the content of the `config.json` at `origin`; its MTP depth is a claim that only the weights can confirm.

    Raises:
        ValueError: another architecture, a field that is missing, or a value that our model does not have.
    """
    architecture = (values.get("architectures") or [ARCHITECTURE])[0]
    if values.get("model_type") != MODEL_TYPE or architecture != ARCHITECTURE:
        raise ValueError(
            f"{origin} describes {architecture} (model_type {values.get('model_type')}), not {ARCHITECTURE}: "
            "only models of the DeepSeek-V3 kind can be read"
        )
    for name, allowed in _FIXED.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{origin} has {name}={values[name]}, but this model knows {allowed[0]} only")
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(f"{origin} has num_key_value_heads={kv_heads}, but MLA has one for each of its {heads} heads")
    # Both spellings of RoPE as one.
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    ours: dict[str, Any] = {
        "rope_scaling": _yarn(rope, values.get("max_position_embeddings"), origin),
        "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
    }
    for field in dataclasses.fields(ModelConfig):
        spelling = field.name if field.name in values else _RENAMED.get(field.name, field.name)
        if field.name in ours:
            continue
        if spelling in values:
            ours[field.name] = _checked(values[spelling], str(field.type), f"{origin}: {spelling}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{origin} lacks {field.name}: it is no complete configuration; fetch it again")
    return ModelConfig(**ours)


def _checked(value: Any, kind: str, what: str) -> Any:
    """The value of a field whose type is written 'int', 'float', 'bool' or '... | None'."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}
    wanted = tuple(word for part in kind.split(" | ") for word in kinds[part])
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ValueError(f"{what} is {json.dumps(value)}, not {kind}; fetch it again")
    return value


def _yarn(rope: Mapping[str, Any], max_position_embeddings: Any, origin: str) -> YarnScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"{origin} scales RoPE by {kind!r}, but this model knows 'yarn' only")
    fields = {field.name for field in dataclasses.fields(YarnScaling)}
    unknown = sorted(rope.keys() - fields - _ROPE_WORDS)
    usual = {"attention_factor": None, "truncate": True}
    changed = [name for name, value in usual.items() if rope.get(name, value) != value]
    if unknown or changed:
        raise ValueError(f"{origin} has the YaRN setting {(unknown + changed)[0]}, which this model does not have")
    if "factor" not in rope:
        raise ValueError(f"{origin} lacks rope_scaling.factor: it is no complete configuration; fetch it again")
    # `transformers` takes the model's own length where the original one is not given.
    known = {"original_max_position_embeddings": max_position_embeddings, **_YARN_OPTIONAL}
    return YarnScaling(**known | {name: value for name, value in rope.items() if name in fields})


def is_fp8(values: Mapping[str, Any], *, origin: str) -> bool:
    """Whether the `config.json` at `origin` announces block-scaled E4M3 weights.

    Raises:
        ValueError: they are quantised in another way.
    """
    found = values.get("quantization_config")
    if not found:
        return False
    for name in ("quant_method", "fmt", "weight_block_size"):
        value = found.get(name, QUANTIZATION[name] if name == "fmt" else None)
        if value != QUANTIZATION[name]:
            raise ValueError(f"{origin} is quantised with {name}={value}, but only {QUANTIZATION[name]} can be read")
    return True


def small_files(
    config: ModelConfig, *, format: str, tokenizer: TextTokenizer | None, trained_on: TrainedOn
) -> dict[str, str]:
    """Name -> text of all files but weights and index; `config.json`, which makes the folder a model, is the last."""
    ids = None if tokenizer is None else tokenizer.special_ids
    values = {**released_config(config, format=format, ids=ids), **trained_on.to_json()}
    generation = {name: values[name] for name in ("bos_token_id", "eos_token_id")}
    files = {"generation_config.json": json.dumps(generation, indent=2)}
    if tokenizer is not None:
        tokens = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos", "pad")}
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **tokens,
        }
        files["tokenizer.json"] = tokenizer.json_text
        files["tokenizer_config.json"] = json.dumps(described, indent=2, ensure_ascii=False)
        files["special_tokens_map.json"] = json.dumps(tokens, indent=2, ensure_ascii=False)
    return {**files, "config.json": json.dumps(values, indent=2)}
