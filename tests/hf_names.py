"""Our tensors under released names and back, in memory, for comparing with `transformers`.

`to_hf` follows the product's own `released_tensors`; `from_hf` knows the released names by pattern and shares no code
with it: an export read back by it is proved by something else than itself. Weights and gradients alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from train.huggingface.names import released_tensors, shared_copies
from train.model.config import ModelConfig

_SHARED_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our name -> tensor, split, as released name -> tensor, with the MTP layers' copies of embedding and head."""
    out = {
        released.name: released.of(tensor)
        for name, tensor in tensors.items()
        for released in released_tensors(name, tuple(tensor.shape), config)
    }
    return out | {copy: tensors[source] for copy, source in shared_copies(config).items() if source in tensors}


def from_hf(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_hf`; a KeyError where a tensor is missing (`HfReader` is what refuses a user's folder)."""
    pending = {ours: tensor for name, tensor in tensors.items() if (ours := _our_name(name, config)) is not None}
    out: dict[str, Tensor] = {}
    while pending:
        target, sources = _fusion_of(next(iter(pending)), config)
        rows = torch.cat([pending.pop(source) for source in sources])
        out[target] = rows.view(config.n_routed_experts, -1, rows.shape[-1]) if ".mlp.experts." in target else rows
    return out


def _fusion_of(name: str, config: ModelConfig) -> tuple[str, list[str]]:
    """The fused parameter that `name` (ours, unfused) belongs to, and all that it joins, in order."""
    q = "q_a_proj" if config.q_lora_rank is not None else "q_proj"
    if match := re.fullmatch(rf"(.*self_attn\.)({q}|kv_a_proj_with_mqa)\.weight", name):
        stem = match[1]
        return f"{stem}q_kv_a_proj.weight", [f"{stem}{q}.weight", f"{stem}kv_a_proj_with_mqa.weight"]
    if match := re.fullmatch(r"(.*mlp\.experts\.)\d+\.(gate|up|down)_proj\.weight", name):
        stem, experts = match[1], range(config.n_routed_experts)
        if match[2] == "down":
            return f"{stem}down_proj", [f"{stem}{e}.down_proj.weight" for e in experts]
        return f"{stem}gate_up_proj", [f"{stem}{e}.{half}_proj.weight" for e in experts for half in ("gate", "up")]
    if match := re.fullmatch(r"(.*)(gate|up)_proj\.weight", name):
        return f"{match[1]}gate_up_proj.weight", [f"{match[1]}gate_proj.weight", f"{match[1]}up_proj.weight"]
    return name, [name]


def _our_name(name: str, config: ModelConfig) -> str | None:
    """Unfused; None for an MTP layer's copy of embedding or head."""
    name = name.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if match is None or int(match[1]) not in config.mtp_layer_ids:
        return name
    layer_id, rest = match.groups()
    if rest == "shared_head.norm.weight":
        return f"mtp.{layer_id}.norm.weight"
    if rest in _SHARED_COPIES:
        return None
    if rest.split(".")[0] in ("enorm", "hnorm", "eh_proj"):
        return f"mtp.{layer_id}.{rest}"
    return f"mtp.{layer_id}.block.{rest}"
