"""The released Hugging Face layout: its names, dtypes, shapes and files, and where in our parameters each tensor is.

Ours differ in three ways only: no leading `model.`; linears stored fused where one GEMM serves (`q_kv_a_proj` =
[q_a | kv_a_proj_with_mqa], `gate_up_proj` = [gate | up], experts stacked); the MTP layer grouped as `mtp.L.block.*`
and `mtp.L.norm`. Row and column order inside each tensor is the released one, `eh_proj` included.

    ModelConfig -> [ReleasedTensor: released name, shape, rows of ours] -> files by size -> ExportPlan

Dtypes by format, proven for the released one by its element counts (V3 stores 680,571,043,840 E4M3, 3,918,786,560 BF16
and 41,555,600 FP32 elements):

    fp8     linears of attention, FFN and experts, MTP block included: E4M3 and one FP32 scale per 128x128 block;
            e_score_correction_bias FP32; the rest BF16, the router (FP32 in training) and `eh_proj` included
    bf16    everything BF16, e_score_correction_bias FP32
    fp32    everything FP32, for tests and exact copies

All of it follows from a model on the meta device: nothing is allocated and no value is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.formats import TILE, ceil_div
from train.checkpoint import publish
from train.huggingface.safetensors_files import ShardFile, TensorSpec
from train.model.config import ModelConfig
from train.model.layers import HighLinear, Linear
from train.model.moe import Experts
from train.model.precision import Precision
from train.model.transformer import Transformer

Format = Literal["bf16", "fp8", "fp32"]
SCALE_SUFFIX = "_scale_inv"
BIAS = "e_score_correction_bias"
_SHARED_COPIES = {"embed_tokens.weight": "embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


class ReleasedTensor(NamedTuple):
    """A released tensor: rows `start` to `stop` of our tensor `source`, or of one expert's matrix in that stack."""

    name: str
    source: str
    expert: int | None
    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The released tensor as a view of ours."""
        return (tensor if self.expert is None else tensor[self.expert])[self.start : self.stop]

    def stored_as(self, dtype: str) -> tuple[TensorSpec, ...]:
        """The weight in a file, and its block scales where it is E4M3."""
        weight = TensorSpec(self.name, dtype, self.shape)
        scale = TensorSpec(self.name + SCALE_SUFFIX, "F32", scale_shape(self.shape))
        return (weight, scale) if dtype == "F8_E4M3" else (weight,)


def released_tensors(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[ReleasedTensor]:
    """The released tensors that our whole tensor `name` holds, in the order of its experts and rows."""
    for unfused, expert, start, stop in _split(name, shape, config):
        rest = shape[1 if expert is None else 2 :]
        yield ReleasedTensor(released_name(unfused), name, expert, start, stop, (stop - start, *rest))


def shared_copies(config: ModelConfig) -> dict[str, str]:
    """Released names of the copies of embedding and head that each MTP layer stores -> our one tensor."""
    return {f"model.layers.{i}.{copy}": source for i in config.mtp_layer_ids for copy, source in _SHARED_COPIES.items()}


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of a weight -> [row blocks, column blocks] of its scales."""
    return tuple(ceil_div(size, TILE) for size in shape)


def _split(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[tuple[str, int | None, int, int]]:
    """(our name, unfused; expert; first row; row after the last)."""
    if name.endswith("self_attn.q_kv_a_proj.weight"):
        stem, q = name.removesuffix("q_kv_a_proj.weight"), config.q_width
        yield f"{stem}{'q_proj' if config.q_lora_rank is None else 'q_a_proj'}.weight", None, 0, q
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


def released_name(name: str) -> str:
    """The released name of a tensor of ours that is stored whole."""
    if name == "lm_head.weight":
        return name
    if match := re.fullmatch(r"mtp\.(\d+)\.(.*)", name):
        layer_id, rest = match.groups()
        rest = "shared_head.norm.weight" if rest == "norm.weight" else rest.removeprefix("block.")
        return f"model.layers.{layer_id}.{rest}"
    return f"model.{name}"


def _meta_model(config: ModelConfig, precision: Precision) -> Transformer:
    with torch.device("meta"):
        return Transformer(config, precision)


def shapes_of(config: ModelConfig, precision: Precision) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Our name -> (shape, dtype) of every weight and buffer of a model, which is not allocated."""
    tensors = _meta_model(config, precision).state_dict()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export writes; weight and scales are always in one file."""

    format: Format
    dtypes: dict[str, str]  # our name -> safetensors dtype
    files: dict[str, tuple[ReleasedTensor, ...]]
    cut_blocks: tuple[str, ...]  # released E4M3 weights whose blocks are not those of training's forward

    @cached_property
    def shards(self) -> tuple[ShardFile, ...]:
        """The files as they are written."""
        return tuple(
            ShardFile(file, tuple(spec for tensor in tensors for spec in tensor.stored_as(self.dtypes[tensor.source])))
            for file, tensors in self.files.items()
        )

    def elements(self) -> dict[str, int]:
        """Stored elements by dtype, `{"F8_E4M3": 680571043840, ...}`."""
        count: Counter[str] = Counter()
        for spec in (spec for shard in self.shards for spec in shard.tensors):
            count[spec.dtype] += math.prod(spec.shape)
        return dict(count)

    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        specs = [(spec, shard.name) for shard in self.shards for spec in shard.tensors]
        return {
            "metadata": {"total_size": sum(spec.num_bytes for spec, _ in specs)},
            "weight_map": {spec.name: file for spec, file in sorted(specs)},
        }

    def summary(self) -> str:
        """One line for the user."""
        counts = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(self.elements().items()))
        return f"{counts} in {len(self.files)} files, {self.index()['metadata']['total_size']:,} bytes"

    def sha256(self) -> str:
        """Of all that is written: two plans with one hash write the same bytes from the same source."""
        return hashlib.sha256(json.dumps([self.format, self.shards]).encode()).hexdigest()


def export_plan(config: ModelConfig, *, format: Format, shard_bytes: int) -> ExportPlan:
    """Plan an export whose files are closed at `shard_bytes`; a larger weight gets a file of its own.

    Raises:
        ValueError: format or shard_bytes is out of range.
    Source: the names and dtypes of the released DeepSeek-V3 checkpoint.
    """
    if format not in get_args(Format):
        raise ValueError(f"format={format} is unknown: choose one of {', '.join(get_args(Format))}")
    model = _meta_model(config, Precision("bf16"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    fp8 = _fp8_weights(model) if format == "fp8" else frozenset()
    dtypes = {name: "F8_E4M3" if name in fp8 else "BF16" for name in shapes}
    dtypes |= {name: "F32" for name in shapes if format == "fp32" or name.endswith(BIAS)}
    tensors = [tensor for name, shape in shapes.items() for tensor in released_tensors(name, shape, config)]
    tensors += [
        ReleasedTensor(copy, name, None, 0, shapes[name][0], shapes[name])
        for copy, name in shared_copies(config).items()
    ]
    # Blocks are those of the released tensors. Training quantises fused weights: where two released tensors meet
    # inside one at no multiple of 128 rows, its blocks were others, and payloads differ. V3 has no such weight.
    cut = tuple(
        tensor.name
        for tensor in tensors
        if tensor.source in fp8
        and (tensor.start % TILE or (tensor.stop % TILE and tensor.stop != shapes[tensor.source][-2]))
    )
    groups = publish.group_into_files(
        tensors, lambda t: sum(spec.num_bytes for spec in t.stored_as(dtypes[t.source])), file_bytes=shard_bytes
    )
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}
    return ExportPlan(format, dtypes, files, cut)


def _fp8_weights(model: Transformer) -> frozenset[str]:
    """Our names of what an FP8 run multiplies in FP8: the linears that follow the recipe, and the experts."""
    return frozenset(
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if (isinstance(module, Linear) and not isinstance(module, HighLinear)) or isinstance(module, Experts)
        for weight, _ in module.named_parameters(recurse=False)
    )
