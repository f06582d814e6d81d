"""`config.json` and its neighbours <-> our configuration: model, precision, tokeniser, generation.

`released_config` writes every field of the released file that describes the model; `train.model.published.model_config`
is the reverse, also from what `transformers` 5 saves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kernels.formats import TILE
from train.data.store import SpecialIds
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from train.data.trained_on import TrainedOn
from train.model.config import ModelConfig
from train.model.published import architecture_of, fixed_of, shown

QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}
_NOT_RELEASED = ("embedding_initializer_range", "rope_scaling")


def released_config(config: ModelConfig, *, format: str, ids: SpecialIds | None) -> dict[str, Any]:
    """The content of `config.json`; without `ids`, bos and eos are V3's, 0 and 1.

    Source: the fields of the released DeepSeek-V3 file.
    """
    ours = dataclasses.asdict(config)
    values = {name: value for name, value in ours.items() if name not in _NOT_RELEASED}
    values |= {name: value for name, (value, *_) in fixed_of(config.model_type).items() if name != "rope_interleave"}
    values |= {
        "architectures": [architecture_of(config.model_type)],
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
    if config.model_type == "glm4_moe_lite":
        values["mlp_layer_types"] = ["sparse" if config.is_moe(i) else "dense" for i in config.layer_ids]
    if format == "fp8":
        values["quantization_config"] = QUANTIZATION
    return dict(sorted(values.items()))


def is_fp8(values: Mapping[str, Any], *, origin: str) -> bool:
    """Whether the `config.json` at `origin` announces block-scaled E4M3 weights.

    Raises:
        ValueError: they are quantised in another way.
    """
    found = values.get("quantization_config")
    if found is None or found == {}:
        return False
    if not isinstance(found, dict):
        raise ValueError(f"{origin}: quantization_config is {shown(found)}, not an object; fetch it again")
    for name in ("quant_method", "fmt", "weight_block_size"):
        value = found.get(name, QUANTIZATION[name] if name == "fmt" else None)
        if value != QUANTIZATION[name]:
            raise ValueError(
                f"{origin} is quantised with {name}={shown(value)}, but only {QUANTIZATION[name]} can be read"
            )
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
