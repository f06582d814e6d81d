"""Our parameter names <-> those of the released Hugging Face checkpoint, in memory.

Ours differ in three ways only: no leading `model.`; linears stored fused where one GEMM serves (`q_kv_a_proj` =
[q_a | kv_a_proj_with_mqa], `gate_up_proj` = [gate | up], experts stacked); the MTP layer's parts grouped as
`mtp.L.block.*` and `mtp.L.norm`. Row and column order inside each tensor is the released one, `eh_proj` included.

`places` says where each released tensor lies in ours, from shapes alone; the plan of an export, its reader and `to_hf`
all follow it. Over dicts of tensors, weights and gradients alike, splitting returns views and joining copies.
Not here: files, dtypes, FP8 scales, streaming (`train/checkpoint/hf_plan.py` and its neighbours).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from train.model.config import ModelConfig

_SHARED_COPIES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


class Place(NamedTuple):
    """Where a released tensor lies in one of ours.

    Args:
        name: ours.
        expert: which matrix of a stack; None where ours is no stack.
        start: first row, of ours or of the expert's matrix.
        stop: row after the last.
    """

    name: str
    expert: int | None
    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the released tensor, from that of ours."""
        return (self.stop - self.start, *whole[1 if self.expert is None else 2 :])

    def of(self, tensor: Tensor) -> Tensor:
        """The released tensor as a view of ours."""
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]


def places(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, Place]]:
    """The released tensors that one of ours holds, in the order of its experts and rows.

    Args:
        name: ours.
        shape: of the whole tensor.
        config: of the model.
    Returns:
        Pairs of released name and place.
    """
    for released, expert, start, stop in _split(name, shape, config):
        yield _released_name(released), Place(name, expert, start, stop)


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Released names of the copies of embedding and head that each MTP layer stores -> our one tensor."""
    return {
        f"model.layers.{layer_id}.{copy}": source
        for layer_id in config.mtp_layer_ids
        for copy, source in _SHARED_COPIES.items()
    }


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
    """Inverse of `to_hf`.

    Raises:
        ValueError: a tensor that a fused parameter needs is missing (names it), or belongs to an expert that the
            configuration does not have.
    """
    _refuse_surplus_experts(tensors, config)
    pending = {_our_name(name, config): tensor for name, tensor in tensors.items()}
    pending = {name: tensor for name, tensor in pending.items() if not _is_shared_copy(name)}
    out: dict[str, Tensor] = {}
    for name in list(pending):
        if name not in pending:
            continue
        target, sources = _fusion_of(name, config)
        missing = [source for source in sources if source not in pending]
        if missing:
            lacking = _released_name(missing[0])
            raise ValueError(f"checkpoint lacks {lacking}, a part of {target}: it is incomplete; fetch it again")
        parts = [pending.pop(source) for source in sources]
        out[target] = parts[0] if len(parts) == 1 else _join(target, parts, config)
    return out


def _refuse_surplus_experts(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    for name in tensors:
        match = re.search(r"\.mlp\.experts\.(\d+)\.", name)
        if match and int(match[1]) >= config.n_routed_experts:
            raise ValueError(
                f"checkpoint holds {name}, but model.n_routed_experts={config.n_routed_experts}; "
                "use the checkpoint's own configuration"
            )


def _split(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, int | None, int, int]]:
    """(name of the part, ours but unfused; expert; first row; row after the last)."""
    if name.endswith("self_attn.q_kv_a_proj.weight"):
        stem, q = name.removesuffix("q_kv_a_proj.weight"), config.q_width
        yield f"{stem}{_q_name(config)}.weight", None, 0, q
        yield f"{stem}kv_a_proj_with_mqa.weight", None, q, shape[0]
    elif name.endswith("mlp.experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), shape[1] // 2
        for expert in range(shape[0]):
            yield f"{stem}{expert}.gate_proj.weight", expert, 0, half
            yield f"{stem}{expert}.up_proj.weight", expert, half, shape[1]
    elif name.endswith("mlp.experts.down_proj"):
        stem = name.removesuffix("down_proj")
        for expert in range(shape[0]):
            yield f"{stem}{expert}.down_proj.weight", expert, 0, shape[1]
    elif name.endswith("gate_up_proj.weight"):
        stem, half = name.removesuffix("gate_up_proj.weight"), shape[0] // 2
        yield f"{stem}gate_proj.weight", None, 0, half
        yield f"{stem}up_proj.weight", None, half, shape[0]
    else:
        yield name, None, 0, shape[0]


def _fusion_of(name: str, config: ModelConfig) -> tuple[str, list[str]]:
    """The fused parameter that `name` (ours, unfused) belongs to, and all its parts in order."""
    q = _q_name(config)
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


def _q_name(config: ModelConfig) -> str:
    return "q_a_proj" if config.q_lora_rank is not None else "q_proj"


def _released_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    if match := re.fullmatch(r"mtp\.(\d+)\.(.*)", name):
        layer_id, rest = match.groups()
        rest = rest.removeprefix("block.") if rest.startswith("block.") else rest
        rest = "shared_head.norm.weight" if rest == "norm.weight" else rest
        return f"model.layers.{layer_id}.{rest}"
    return f"model.{name}"


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
