"""`config.json` and its neighbours <-> our configuration: model, precision, tokeniser, generation.

    released_config(ModelConfig) -> dict       every field of the released file that describes the model
    model_config(dict) -> ModelConfig          the reverse, also from what `transformers` 5 saves

RoPE is spelled `rope_theta` + `rope_scaling` in released files and `rope_parameters` in those of `transformers` 5; both
are read, the released spelling is written. Of a file that has both, `rope_scaling` is read, as by `transformers`; where
the other says something else the file is refused. What our model cannot do is refused in one sentence, never dropped.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kernels.config import YarnScaling
from kernels.formats import TILE
from train.chat.template import RESPONSE_TEMPLATE, TEMPLATE_NAME, chat_template, missing_marks
from train.data.store import SpecialIds
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from train.data.trained_on import TrainedOn
from train.model.config import ModelConfig

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}
# As published in DeepSeek-V3.1's generation_config.json.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
V3_IDS = SpecialIds(bos=0, eos=1, pad=2, fim_hole=128800, fim_begin=128801, fim_end=128802)
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
# Ours -> another spelling that `transformers` knows.
_RENAMED = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
_NOT_RELEASED = ("embedding_initializer_range", "rope_scaling")
_YARN_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
_YARN_KINDS = {field.name: str(field.type) for field in dataclasses.fields(YarnScaling)}
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0, None),
    "attention_factor": (None,),
    "truncate": (True, None),
}


def released_config(config: ModelConfig, *, format: str, first_id: int = 0, eos_id: int = 1) -> dict[str, Any]:
    """The content of `config.json`; `bos_token_id`, by default V3's, is the token that begins a sequence.

    Source: the fields of the released DeepSeek-V3 file.
    """
    ours = dataclasses.asdict(config)
    values = {name: value for name, value in ours.items() if name not in _NOT_RELEASED}
    values |= {name: value for name, (value, *_) in _FIXED.items() if name != "rope_interleave"}
    values |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
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
    if format == "fp8":
        values["quantization_config"] = QUANTIZATION
    return dict(sorted(values.items()))


def model_config(values: Mapping[str, Any], *, origin: str) -> ModelConfig:
    """Read the content of the `config.json` at `origin`; its MTP depth is a claim that only the weights can confirm.

    Raises:
        ValueError: another architecture, a field that is missing, or a value that our model does not have.
    """
    listed = values.get("architectures") or [ARCHITECTURE]
    architecture = listed[0] if isinstance(listed, list) else listed
    if values.get("model_type") != MODEL_TYPE or architecture != ARCHITECTURE:
        raise ValueError(
            f"{origin} describes {shown(architecture)} (model_type {shown(values.get('model_type'))}), not "
            f"{ARCHITECTURE}: only models of the DeepSeek-V3 kind can be read"
        )
    _check_fixed(values, _FIXED | {"partial_rotary_factor": (1.0, None)}, origin)
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None and _checked(kv_heads, "int", f"{origin}: num_key_value_heads") != heads:
        raise ValueError(
            f"{origin} has num_key_value_heads={kv_heads}, but MLA has one for each of its {shown(heads)} heads"
        )
    ours = _rope(values, origin)
    for field in dataclasses.fields(ModelConfig):
        if field.name in ours:
            continue
        found = {name: values[name] for name in (field.name, _RENAMED.get(field.name, "")) if name in values}
        for name, value in found.items():
            ours[field.name] = _checked(value, str(field.type), f"{origin}: {name}")
        if len(set(found.values())) > 1:
            raise ValueError(f"{origin} contradicts itself: {_listed(found)}; keep the right one")
        if not found and field.default is dataclasses.MISSING:
            raise ValueError(f"{origin} lacks {field.name}: it is no complete configuration; fetch it again")
    try:
        return ModelConfig(**ours)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def shown(value: Any) -> str:
    """A value of a JSON file as one short line."""
    return json.dumps(value)[:100]


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in found.items())


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], origin: str) -> None:
    for name, allowed in fixed.items():
        # Without a default: null is a value too. 0 is no False, and True no 1.
        if name in values and not any(
            values[name] == one and isinstance(values[name], bool) == isinstance(one, bool) for one in allowed
        ):
            raise ValueError(
                f"{origin} has {name}={shown(values[name])}, but this model knows {shown(allowed[0])} only"
            )


def _checked(value: Any, kind: str, what: str) -> Any:
    """The value of a field whose type is written 'int', 'float', 'bool' or '... | None'."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}
    wanted = tuple(word for part in kind.split(" | ") for word in kinds[part])
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ValueError(f"{what} is {shown(value)}, not {kind}; fetch it again")
    if float in wanted and isinstance(value, int) and abs(value) < 2**53:
        return float(value)
    return value


def _rope(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of our configuration, from all places that may hold them."""
    sections = {name: values[name] for name in ("rope_scaling", "rope_parameters") if values.get(name) is not None}
    yarns = {name: _yarn(name, section, values, origin) for name, section in sections.items()}
    places = {"": values} | {f"{name}.": section for name, section in sections.items()}
    thetas = {
        name: _checked(place["rope_theta"], "float", f"{origin}: {name}rope_theta")
        for name, place in places.items()
        if "rope_theta" in place
    }
    # `transformers` takes the first section that is not empty, whole.
    chosen = next((name for name in sections if sections[name]), "")
    theta = thetas.get(f"{chosen}.", thetas.get("", 10000.0))
    if any(other != theta for other in thetas.values()):
        found = ", ".join(f"{name}rope_theta={value}" for name, value in thetas.items())
        raise ValueError(f"{origin} contradicts itself: {found} (default 10000.0); keep the right one")
    yarn = yarns.get(chosen)
    if any(other not in (None, yarn) for other in yarns.values()):
        raise ValueError(f"{origin} contradicts itself: rope_scaling and rope_parameters scale differently; keep one")
    return {"rope_theta": theta, "rope_scaling": yarn}


def _yarn(section: str, rope: Any, values: Mapping[str, Any], origin: str) -> YarnScaling | None:
    """What the `rope_scaling` or `rope_parameters` of a file ask for; None for plain RoPE."""
    if not isinstance(rope, dict):
        raise ValueError(f"{origin}: {section} is {shown(rope)}, not an object; fetch it again")
    kinds = {name: rope[name] for name in ("rope_type", "type") if name in rope}
    if len(kinds) == 2 and kinds["rope_type"] != kinds["type"]:
        raise ValueError(f"{origin} contradicts itself: {section} has {_listed(kinds)}; keep the right one")
    kind = next(iter(kinds.values()), "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"{origin} scales RoPE by {shown(kind)}, but this model knows 'yarn' only")
    fields = _YARN_KINDS if kind == "yarn" else {}
    if unknown := sorted(rope.keys() - fields.keys() - _ROPE_FIXED.keys() - {"type", "rope_type", "rope_theta"}):
        raise ValueError(f"{origin}: {section} of type {kind} has {shown(unknown[0])}, which this model does not have")
    _check_fixed(rope, _ROPE_FIXED, f"{origin}: {section}")
    if kind == "default":
        return None
    length = "original_max_position_embeddings"
    found = {
        f"{name}{length}": place[length] for name, place in (("", values), (f"{section}.", rope)) if length in place
    }
    if any(value != found.get(length, value) for value in found.values()):
        raise ValueError(f"{origin} contradicts itself: {_listed(found)}; keep the right one")
    # `transformers` takes the model's own length where the original one is not given.
    known = {length: values.get(length, values.get("max_position_embeddings")), **_YARN_OPTIONAL}
    # Of an optional value null is none at all.
    known |= {name: value for name, value in rope.items() if value is not None or name not in known}
    if "factor" not in known:
        raise ValueError(f"{origin} lacks {section}.factor: it is no complete configuration; fetch it again")
    return YarnScaling(**{name: _checked(known[name], fields[name], f"{origin}: {section}.{name}") for name in fields})


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
