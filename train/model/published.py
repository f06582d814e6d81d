"""The published `config.json` of a member of the family -> `ModelConfig`, and what the members fix (docs/family.md).

RoPE is spelled `rope_theta` + `rope_scaling` in released files and `rope_parameters` in those of `transformers` 5; both
are read. Of a file that has both, `rope_scaling` is read, as by `transformers`; where the other says something else the
file is refused. What our model cannot do is refused in one sentence, never dropped. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.config import YarnScaling
from train.model.config import FAMILY, ModelConfig

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
# model_type -> architecture, where it is not DeepSeek-V3's, and what is fixed otherwise.
_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "glm4_moe_lite": "Glm4MoeLiteForCausalLM"}
_FIXED_IN = {
    "deepseek_v2": {
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
        "norm_topk_prob": (False, None),
        "n_group": (1, None),
        "topk_group": (1, None),
        "mlp_bias": (False, None),
    }
}
# What other members of the wider family have and this model does not: field -> values that mean none.
_NOT_OURS: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "index_topk": (None,),
}
# Fields with a default of ours that is not the one of every library: a file has to say them.
_SAID = ("q_lora_rank", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
# Ours -> another spelling that `transformers` knows.
_RENAMED = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
_YARN_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
_YARN_KINDS = {field.name: str(field.type) for field in dataclasses.fields(YarnScaling)}
_ROPE_FIXED: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0, None),
    "attention_factor": (None,),
    "truncate": (True, None),
}


def architecture_of(model_type: str) -> str:
    """The class that `config.json` names."""
    return _ARCHITECTURES.get(model_type, "DeepseekV3ForCausalLM")


def fixed_of(model_type: str) -> dict[str, tuple[Any, ...]]:
    """Fields that a member has one value of -> (that value, values that mean the same)."""
    return _FIXED | _FIXED_IN.get(model_type, {})


def model_config(values: Mapping[str, Any], *, origin: str) -> ModelConfig:
    """Read the content of the `config.json` at `origin`.

    Its MTP depth, 0 where it says none, is a claim that only the weights can confirm.

    Raises:
        ValueError: another architecture, a field that is missing, or a value that our model does not have.
    """
    kind = _member(values, origin)
    _check_fixed(values, fixed_of(kind) | _NOT_OURS | {"partial_rotary_factor": (1.0, None)}, origin)
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if kv_heads is not None and _checked(kv_heads, "int", f"{origin}: num_key_value_heads") != heads:
        raise ValueError(
            f"{origin} has num_key_value_heads={kv_heads}, but MLA has one for each of its {shown(heads)} heads"
        )
    ours = _rope(values, origin) | {"model_type": kind}
    ours |= _layer_types(values, origin) if kind == "glm4_moe_lite" else {}
    if kind == "deepseek_v2":
        ours |= {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}
    for field in dataclasses.fields(ModelConfig):
        if field.name in ours:
            continue
        found = {name: values[name] for name in (field.name, _RENAMED.get(field.name, "")) if name in values}
        for name, value in found.items():
            ours[field.name] = _checked(value, str(field.type), f"{origin}: {name}")
        if len(set(found.values())) > 1:
            raise ValueError(f"{origin} contradicts itself: {_listed(found)}; keep the right one")
        if not found and field.name == "num_nextn_predict_layers":
            ours[field.name] = 0
        if not found and (field.default is dataclasses.MISSING or field.name in _SAID):
            raise ValueError(f"{origin} lacks {field.name}: it is no complete configuration; fetch it again")
    try:
        return ModelConfig(**ours)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None


def read_model(folder: Path) -> ModelConfig:
    """`model_config` of a folder's config.json, without its weights; ValueError as there, or where there is none."""
    file = folder / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error}); name the folder of a model") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no object; fetch it again")
    return model_config(values, origin=str(file))


def _member(values: Mapping[str, Any], origin: str) -> str:
    """The `model_type`, one of the family's and with its architecture."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILY:
        raise ValueError(
            f"{origin} has model_type={shown(kind)}, which is not one of {', '.join(FAMILY)}: models of these types "
            "were compared with this one (docs/family.md), others compute something else or are not known to be equal"
        )
    listed = values.get("architectures") or [architecture_of(kind)]
    architecture = listed[0] if isinstance(listed, list) else listed
    if architecture != architecture_of(kind):
        raise ValueError(
            f"{origin} has model_type={kind} but architectures={shown(listed)}, where models of that type have "
            f"{architecture_of(kind)}: this is another model"
        )
    return kind


def _layer_types(values: Mapping[str, Any], origin: str) -> dict[str, int]:
    """`first_k_dense_replace` from the `mlp_layer_types` that `transformers` writes; nothing where there are none."""
    kinds = values.get("mlp_layer_types")
    if kinds is None:
        return {} if "first_k_dense_replace" in values else {"first_k_dense_replace": 1}
    dense = kinds.count("dense") if isinstance(kinds, list) else 0
    layers = values.get("num_hidden_layers")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense if isinstance(layers, int) else 0):
        raise ValueError(
            f"{origin} has mlp_layer_types={shown(kinds)}, but this model has dense layers first and experts in all "
            f"that follow, one entry for each of its {shown(layers)} layers"
        )
    if values.get("first_k_dense_replace", dense) != dense:
        raise ValueError(
            f"{origin} contradicts itself: mlp_layer_types begins with {dense} dense layers, first_k_dense_replace="
            f"{shown(values['first_k_dense_replace'])}; keep the right one"
        )
    return {"first_k_dense_replace": dense}


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
