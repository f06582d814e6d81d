"""Our tensors under released names and back, in memory, for comparing with `transformers`.

`to_hf` follows the product's own `places`; `from_hf` knows the released names by pattern and shares no code with it, so
that an export read back by it is proved by something else than itself. Weights and gradients alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from train.huggingface.names import places, shared_copies
from train.model.config import ModelConfig

_SHARED_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename and split our tensors into the released names.

    Args:
        tensors: our name -> tensor, e.g. `dict(model.state_dict())`.
        config: of the model.
    Returns:
        Released name -> tensor. MTP layers also carry their stored copies of embedding and head.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for released, place in places(name, tuple(tensor.shape), config):
            out[released] = place.of(tensor)
    out.update({copy: tensors[source] for copy, source in shared_copies(config).items() if source in tensors})
    return out


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_hf`; a KeyError where a part is missing (`HfReader` is what refuses a user's folder)."""
    pending = {_our_name(name, config): tensor for name, tensor in tensors.items()}
    pending = {name: tensor for name, tensor in pending.items() if not _is_shared_copy(name)}
    out: dict[str, Tensor] = {}
    for name in list(pending):
        if name not in pending:
            continue
        target, sources = _fusion_of(name, config)
        parts = [pending.pop(source) for source in sources]
        out[target] = parts[0] if len(parts) == 1 else _join(target, parts, config)
    return out


def _fusion_of(name: str, config: ModelConfig) -> tuple[str, list[str]]:
    """The fused parameter that `name` (ours, unfused) belongs to, and all its parts in order."""
    q = "q_a_proj" if config.q_lora_rank is not None else "q_proj"
    if match := re.fullmatch(rf"(.*self_attn\.)({q}|kv_a_proj_with_mqa)\.weight", name):
        stem = match[1]
        return f"{stem}q_kv_a_proj.weight", [f"{stem}{q}.weight", f"{stem}kv_a_proj_with_mqa.weight"]
    if match := re.fullmatch(r"(.*mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight", name):
        stem, experts = match[1], range(config.n_routed_experts)
        if match[2] == "down":
            return f"{stem}down_proj", [f"{stem}{e}.down_proj.weight" for e in experts]
        parts = [f"{stem}{e}.{half}_proj.weight" for e in experts for half in ("gate", "up")]
        return f"{stem}gate_up_proj", parts
    if match := re.fullmatch(r"(.*)(gate|up)_proj\.weight", name):
        return f"{match[1]}gate_up_proj.weight", [f"{match[1]}gate_proj.weight", f"{match[1]}up_proj.weight"]
    return name, [name]


def _join(target: str, parts: list[Tensor], config: ModelConfig) -> Tensor:
    if ".mlp.experts." not in target:
        return torch.cat(parts)
    if target.endswith("down_proj"):
        return torch.stack(parts)
    rows = torch.cat(parts)
    return rows.view(config.n_routed_experts, -1, rows.shape[-1])


def _our_name(name: str, config: ModelConfig) -> str:
    name = name.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if match is None or int(match[1]) not in config.mtp_layer_ids:
        return name
    layer_id, rest = match.groups()
    if rest == "shared_head.norm.weight":
        return f"mtp.{layer_id}.norm.weight"
    if rest in _SHARED_COPIES or rest.split(".")[0] in ("enorm", "hnorm", "eh_proj"):
        return f"mtp.{layer_id}.{rest}"
    return f"mtp.{layer_id}.block.{rest}"


def _is_shared_copy(name: str) -> bool:
    match = re.fullmatch(r"mtp\.\d+\.(.*)", name)
    return match is not None and match[1] in _SHARED_COPIES
