"""Our parameter names <-> those of the released Hugging Face checkpoint.

Ours differ in three ways only: no leading `model.`; linears stored fused where one GEMM serves (`q_kv_a_proj` =
[q_a | kv_a_proj_with_mqa], `gate_up_proj` = [gate | up], experts stacked); the MTP layer's parts grouped as
`mtp.L.block.*` and `mtp.L.norm`. Row and column order inside each tensor is the released one, `eh_proj` included.

`places` says where each released tensor lies in ours, from names and shapes alone; the plan of an export and the reader
of a folder both follow it. No tensor is touched here.
Not here: files, dtypes, FP8 scales, streaming (`train/huggingface/plan.py` and its neighbours).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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
