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
from train.chat.template import RESPONSE_TEMPLATE, TEMPLATE_NAME, chat_template, missing_marks
from train.data.store import SpecialIds
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from train.data.trained_on import TrainedOn
from train.model.config import ModelConfig
from train.model.published import architecture_of, fixed_of, shown

QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}
# As published in DeepSeek-V3.1's generation_config.json.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
V3_IDS = SpecialIds(bos=0, eos=1, pad=2, fim_hole=128800, fim_begin=128801, fim_end=128802)
_NOT_RELEASED = ("embedding_initializer_range", "rope_scaling")


def released_config(config: ModelConfig, *, format: str, first_id: int = 0, eos_id: int = 1) -> dict[str, Any]:
    """The content of `config.json`; `bos_token_id`, by default V3's, is the token that begins a sequence.

    Source: the fields of the released DeepSeek-V3 file.
    """
    ours = dataclasses.asdict(config)
    values = {name: value for name, value in ours.items() if name not in _NOT_RELEASED}
    values |= {name: value for name, (value, *_) in fixed_of(config.model_type).items() if name != "rope_interleave"}
    values |= {
        "architectures": [architecture_of(config.model_type)],
        "num_key_value_heads": config.num_attention_heads,
        "bos_token_id": first_id,
        "eos_token_id": eos_id,
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
    ids = V3_IDS if tokenizer is None else tokenizer.special_ids
    first_id = trained_on.first_id(ids)
    values = {**released_config(config, format=format, first_id=first_id, eos_id=ids.eos), **trained_on.to_json()}
    generation = {"bos_token_id": first_id, "eos_token_id": ids.eos, "pad_token_id": ids.pad, **SAMPLING}
    files = {"generation_config.json": json.dumps(generation, indent=2)}
    if tokenizer is not None:
        files |= _tokenizer_files(tokenizer, trained_on, max_length=config.max_position_embeddings)
    return {**files, "config.json": json.dumps(values, indent=2)}


def _tokenizer_files(tokenizer: TextTokenizer, trained_on: TrainedOn, *, max_length: int) -> dict[str, str]:
    """The tokeniser, which begins a text with the first token of a sample, and the chat template where it has marks."""
    tokens = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos", "pad")}
    tokens["bos_token"] = SPECIAL_TOKENS[trained_on.first_token]
    described: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        **tokens,
    }
    files = {
        "tokenizer.json": tokenizer.file_beginning_with(trained_on.first_id(tokenizer.special_ids)),
        "special_tokens_map.json": json.dumps(tokens, indent=2, ensure_ascii=False),
    }
    if not missing_marks(tokenizer):
        described["response_template"] = RESPONSE_TEMPLATE
        files[TEMPLATE_NAME] = chat_template()
    return {**files, "tokenizer_config.json": json.dumps(described, indent=2, ensure_ascii=False)}
