"""What an export to the released Hugging Face layout will write, before a byte is read: names, dtypes, shapes, files.

    ModelConfig -> [Item: released name, dtype, shape, place in ours] -> shards by size -> ExportPlan

Dtypes by format, proven for the released one by its element counts (fact: V3 stores 680,571,043,840 E4M3,
3,918,786,560 BF16 and 41,555,600 FP32 elements):

    fp8     linears of attention, FFN and experts, MTP block included: E4M3 and one FP32 scale per 128x128 block;
            e_score_correction_bias FP32; the rest BF16, the router (FP32 in training) and `eh_proj` included
    bf16    everything BF16, e_score_correction_bias FP32
    fp32    everything FP32, for tests and exact copies

Blocks are those of the released tensors. Where a border between two of them inside one of our fused ones is no multiple
of 128 rows, training quantised across it, so payloads differ there: `ExportPlan.cut_blocks` names them; V3 has none.

Pure: a shape comes from the model built on the meta device, nothing is allocated. Not here: values (`hf_export.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from kernels.formats import TILE, ceil_div
from train.huggingface.names import Place, places, shared_copies
from train.huggingface.safetensors_writer import Entry, Shard, num_bytes
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer

Format = Literal["bf16", "fp8", "fp32"]
FORMATS: tuple[Format, ...] = get_args(Format)
SCALE_SUFFIX = "_scale_inv"
BIAS = "e_score_correction_bias"
# Ends of our names of what training multiplies in FP8 (`train/model/precision.py`).
_FP8_LINEARS = (
    "self_attn.q_kv_a_proj.weight",
    "self_attn.q_b_proj.weight",
    "self_attn.kv_b_proj.weight",
    "self_attn.o_proj.weight",
    "gate_up_proj.weight",
    "down_proj.weight",
    "experts.gate_up_proj",
    "experts.down_proj",
)


class Item(NamedTuple):
    """One released weight: what it is called, how it is stored and where it lies in ours."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: Place

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The weight, and its block scales where it is E4M3."""
        weight = Entry(self.name, self.dtype, self.shape)
        if self.dtype != "F8_E4M3":
            return (weight,)
        return weight, Entry(self.name + SCALE_SUFFIX, "F32", scale_shape(self.shape))


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out, in] of a weight -> [row blocks, column blocks] of its scales."""
    return tuple(ceil_div(size, TILE) for size in shape)


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export writes.

    Args:
        format: 'bf16', 'fp8' or 'fp32'.
        files: name of a shard -> its weights, in order; weight and scales are never apart.
        cut_blocks: released E4M3 weights whose blocks are not those of training's forward.
    """

    format: Format
    files: dict[str, tuple[Item, ...]]
    cut_blocks: tuple[str, ...]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files as the writer takes them."""
        return tuple(
            Shard(file, tuple(entry for item in items for entry in item.entries)) for file, items in self.files.items()
        )

    def elements(self) -> dict[str, int]:
        """Stored elements by dtype, `{"F8_E4M3": 680571043840, ...}`."""
        count: Counter[str] = Counter()
        for shard in self.shards:
            for entry in shard.entries:
                count[entry.dtype] += math.prod(entry.shape)
        return dict(count)

    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        entries = [(shard.file, entry) for shard in self.shards for entry in shard.entries]
        return {
            "metadata": {"total_size": sum(num_bytes(entry) for _, entry in entries)},
            "weight_map": {entry.name: file for file, entry in sorted(entries, key=lambda pair: pair[1].name)},
        }

    def sha256(self) -> str:
        """Of all that it says: two plans with one hash write the same bytes from the same source."""
        body = [self.format, [(shard.file, shard.entries) for shard in self.shards]]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def shapes_of(config: ModelConfig, precision: Precision) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Our name -> (shape, dtype) of every weight and buffer of a model, which is not allocated."""
    with torch.device("meta"):
        model = Transformer(config, precision)
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def export_plan(config: ModelConfig, *, format: Format, shard_bytes: int) -> ExportPlan:
    """Plan an export.

    Args:
        config: of the model.
        format: 'bf16', 'fp8' or 'fp32'.
        shard_bytes: size at which a file is closed; a larger weight gets a file of its own.
    Returns:
        The plan.
    Raises:
        ValueError: format or shard_bytes is out of range.
    Source: the names and dtypes of the released DeepSeek-V3 checkpoint.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} is unknown: choose one of {', '.join(FORMATS)}")
    if shard_bytes < 1:
        raise ValueError(f"shard size {shard_bytes} must be at least 1 byte; 5GB is usual")
    shapes = {name: shape for name, (shape, _) in shapes_of(config, Precision("bf16")).items()}
    items, cut = [], []
    for name, shape in shapes.items():
        rows = shape[1] if len(shape) == 3 else shape[0]
        for released, place in places(name, shape, config):
            item = Item(released, _dtype(name, format), place.shape(shape), place)
            items.append(item)
            if item.dtype == "F8_E4M3" and (place.start % TILE or (place.stop % TILE and place.stop != rows)):
                cut.append(released)
    for released, name in shared_copies(config).items():
        place = Place(name, None, 0, shapes[name][0])
        items.append(Item(released, _dtype(name, format), shapes[name], place))
    return ExportPlan(format, _into_files(items, shard_bytes), tuple(cut))


def _dtype(name: str, format: Format) -> str:
    if format == "fp32" or name.endswith(BIAS):
        return "F32"
    return "F8_E4M3" if format == "fp8" and name.endswith(_FP8_LINEARS) else "BF16"


def _into_files(items: Iterable[Item], shard_bytes: int) -> dict[str, tuple[Item, ...]]:
    """Fill one file after the other."""
    groups: list[list[Item]] = [[]]
    filled_bytes = 0
    for item in items:
        item_bytes = sum(num_bytes(entry) for entry in item.entries)
        if groups[-1] and filled_bytes + item_bytes > shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(item)
        filled_bytes += item_bytes
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": tuple(g) for i, g in enumerate(groups, start=1)}
