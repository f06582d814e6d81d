"""A folder in the released Hugging Face layout as a source of weights under our names, read on demand.

    open: config.json -> index or the one file -> headers of all files -> every tensor that our model needs is there
    read(name, rows): the parts of that tensor, from their files, dequantised, joined

FP8 weights are read as payload x `weight_scale_inv` (it multiplies, whatever its name says), FP32; BF16, FP16 and FP32
as they are (FP16 as FP32). Nothing is held, so memory is bounded by the largest read. Whether MTP layers are there is
taken from the tensors, not from `config.json`: `transformers` drops them when it saves, and keeps saying one.

Only safetensors are opened, only by names inside the folder, and no value can execute: pickled weights (`*.bin`) are
refused. What is missing, surplus, of another shape, cut short or not finite is refused by name.

Shapes: hidden sizes of `ModelConfig`; [out, in] of matrices, scales [ceil(out / 128), ceil(in / 128)].
Not here: writing (`hf_export.py`), our own checkpoints (`reader.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.quantize import dequantize_blocks
from train.data.trained_on import TrainedOn
from train.huggingface.config import is_fp8, model_config, precision_of
from train.huggingface.names import places, shared_copies
from train.huggingface.plan import SCALE_SUFFIX, scale_shape, shapes_of
from train.huggingface.safetensors_writer import DTYPES, JOURNAL, read_json
from train.model.config import ModelConfig
from train.model.precision import Precision

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# Mapped files that stay open; a released model has 163, and a process only so many descriptors.
OPEN_FILES = 32
# Rows of a comparison of two stored tensors.
_COMPARED_ROWS = 4096
# Buffers that old files carry and every model computes anew.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


class Stored(NamedTuple):
    """What a file says of a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HfReader:
    """A Hugging Face folder as a `WeightSource`.

    Args:
        path: the folder.
    Attributes:
        stored: released name -> file, dtype, shape.
        notes: what a user should know of what was found, one sentence each.
        trained_on: how samples of its training looked, if it is an export of ours.
    Raises:
        ValueError: something in the folder is missing, damaged or beyond this model; named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        values = read_json(path / CONFIG)
        if not isinstance(values, dict):
            raise ValueError(f"{path / CONFIG} holds no object; fetch it again")
        origin = str(path / CONFIG)
        announced, fp8 = model_config(values, origin=origin), is_fp8(values, origin=origin)
        self.trained_on: TrainedOn = TrainedOn.from_json(values, origin=origin)
        self._open: OrderedDict[str, Any] = OrderedDict()
        self.stored = self._scan()
        depth = _mtp_depth(announced, self.stored)
        self.config: ModelConfig = replace(announced, num_nextn_predict_layers=depth)
        self.notes: list[str] = []
        if depth != announced.num_nextn_predict_layers:
            said = announced.num_nextn_predict_layers
            self.notes.append(f"{path} holds {depth} MTP layers, though its config.json says {said}")
        self._shapes = {name: shape for name, (shape, _) in shapes_of(self.config, Precision("bf16")).items()}
        self._parts = {name: list(places(name, shape, self.config)) for name, shape in self._shapes.items()}
        self._check_all(fp8=fp8)
        self.precision: Precision = self._precision()

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it is there."""
        file = self.path / "tokenizer.json"
        return file if file.is_file() else None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the model, layer by layer."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """The tensor, or some of its rows (of the first dim), as a new CPU tensor; FP8 as FP32 values.

        Raises:
            ValueError: a file is damaged, or a value is not finite; named.
        """
        shape = self.shape(name)
        rows = range(shape[0]) if rows is None else rows
        values = torch.cat([self.values(released, part) for released, part in self.parts(name, rows)])
        return values.view(len(rows), *shape[1:])

    def parts(self, name: str, rows: range) -> Iterator[tuple[str, range]]:
        """The released tensors behind some rows of ours, each with its own rows, in order."""
        held = self._parts[name]
        if held[0][1].expert is not None:
            # Of a stack, rows are experts: each has the same number of parts.
            count = len(held) // self.shape(name)[0]
            for released, place in held[rows.start * count : rows.stop * count]:
                yield released, range(place.stop - place.start)
            return
        for released, place in held:
            first, last = max(rows.start, place.start), min(rows.stop, place.stop)
            if first < last:
                yield released, range(first - place.start, last - place.start)

    def values(self, released: str, rows: range) -> Tensor:
        """Rows of a stored tensor: BF16 or FP32, dequantised.

        Raises:
            ValueError: a file is damaged, or a value is not finite; named.
        """
        if self.stored[released].dtype == "F8_E4M3":
            # Whole blocks are read, so that each meets its scale.
            first = rows.start // TILE * TILE
            q = self.quantised(released, range(first, min(ceil_div(rows.stop, TILE) * TILE, self._rows(released))))
            values = dequantize_blocks(q)[rows.start - first : rows.stop - first]
        else:
            values = self._slice(released, rows)
            values = values.float() if values.dtype == torch.float16 else values
        self._check_finite(released, values)
        return values

    def quantised(self, released: str, rows: range) -> Quantized:
        """Payload and scales of rows of an E4M3 weight; `rows` begins with a block and ends with one or the weight.

        Raises:
            ValueError: a file is damaged, or a scale is not finite; named.
        """
        scale_name = released + SCALE_SUFFIX
        scale = self._slice(scale_name, range(rows.start // TILE, ceil_div(rows.stop, TILE))).float()
        self._check_finite(scale_name, scale)
        if bool((scale < 0).any()):
            raise ValueError(f"{self.path} holds a negative scale in {scale_name}: it is damaged; fetch it again")
        return Quantized(self._slice(released, rows), scale)

    def fingerprint(self) -> dict[str, Any]:
        """What tells this folder from a changed one without reading its weights."""
        files = sorted({stored.file for stored in self.stored.values()})
        texts = [name for name in (CONFIG, INDEX, JOURNAL, "tokenizer.json") if (self.path / name).is_file()]
        stats = {name: os.stat(self.path / name) for name in (*files, *texts)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}

    def check_shared_copies(self) -> None:
        """Compare the MTP layers' copies of embedding and head, where stored, with the originals: we keep one.

        Raises:
            ValueError: a copy differs; named.
        """
        for released, name in shared_copies(self.config).items():
            if released not in self.stored:
                continue
            for start in range(0, self._rows(released), _COMPARED_ROWS):
                rows = range(start, min(start + _COMPARED_ROWS, self._rows(released)))
                if not torch.equal(self._slice(released, rows), self._slice(self._parts[name][0][0], rows)):
                    raise ValueError(
                        f"{self.path} holds a {released} that is not {name}, but this model shares them; "
                        "it would be lost"
                    )

    def _scan(self) -> dict[str, Stored]:
        """Released name -> where it is, from the index and the headers."""
        weight_map = self._weight_map()
        found: dict[str, Stored] = {}
        for file in sorted(set(weight_map.values())):
            if not (self.path / file).is_file():
                lost = next(name for name, where in weight_map.items() if where == file)
                raise ValueError(f"{self.path} lacks {file}, which holds {lost}: it is incomplete; fetch it again")
            shard = self._file(file)
            for name in shard.keys():  # noqa: SIM118  (no mapping, only a `keys` method)
                if weight_map.get(name) == file:
                    view = shard.get_slice(name)
                    found[name] = Stored(file, view.get_dtype(), tuple(view.get_shape()))
        for name, file in weight_map.items():
            if name not in found:
                raise ValueError(f"{self.path} lacks {name}, which its index says is in {file}; fetch it again")
        return found

    def _weight_map(self) -> dict[str, str]:
        """Released name -> file, none of them outside the folder."""
        if not (self.path / INDEX).is_file():
            if (self.path / SINGLE).is_file():
                return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
            pickled = sorted(path.name for path in self.path.glob("*.bin"))
            if pickled:
                raise ValueError(
                    f"{self.path} holds pickled weights ({pickled[0]}), and reading those runs what they contain: "
                    "convert them to safetensors where you trust them"
                )
            raise ValueError(f"{self.path} lacks {INDEX} and {SINGLE}: it is incomplete; fetch it again")
        index = read_json(self.path / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.path / INDEX} has no weight_map; fetch it again")
        for name, file in weight_map.items():
            inside = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
            if not inside:
                raise ValueError(
                    f"{self.path / INDEX} puts {name} into {json.dumps(file)}: only safetensors files of the folder "
                    "itself are read"
                )
        return weight_map

    def _check_all(self, *, fp8: bool) -> None:
        known = set(shared_copies(self.config))
        for name, shape in self._shapes.items():
            for released, place in self._parts[name]:
                known |= {released, released + SCALE_SUFFIX}
                self._check(released, place.shape(shape), fp8=fp8)
        for copy, name in shared_copies(self.config).items():
            if copy in self.stored:
                self._check(copy, self._shapes[name], fp8=fp8)
        for name in self.stored:
            if name not in known and not _COMPUTED.search(name):
                raise ValueError(
                    f"{self.path} holds {name}, which its config.json has no place for: it is of another model"
                )

    def _check(self, released: str, shape: tuple[int, ...], *, fp8: bool) -> None:
        found = self.stored.get(released)
        if found is None:
            raise ValueError(f"{self.path} lacks {released}: it is incomplete; fetch it again")
        if found.shape != shape:
            raise ValueError(f"{self.path} holds {released} as {list(found.shape)}, not {list(shape)}")
        if found.dtype not in DTYPES:
            raise ValueError(f"{self.path} holds {released} as {found.dtype}; only {', '.join(DTYPES)} can be read")
        scale = self.stored.get(released + SCALE_SUFFIX)
        if found.dtype != "F8_E4M3":
            if scale is not None:
                raise ValueError(f"{self.path} holds scales for {released}, which is {found.dtype} and needs none")
            return
        if not fp8:
            raise ValueError(f"{self.path} holds {released} in FP8, but its config.json has no quantization_config")
        if scale is None:
            raise ValueError(f"{self.path} lacks {released}{SCALE_SUFFIX}: FP8 is nothing without it; fetch it again")
        if scale.shape != scale_shape(shape) or scale.dtype == "F8_E4M3" or scale.dtype not in DTYPES:
            raise ValueError(
                f"{self.path} holds {released}{SCALE_SUFFIX} as {scale.dtype} {list(scale.shape)}, "
                f"not F32 {list(scale_shape(shape))}"
            )

    def _precision(self) -> Precision:
        """From the first attention projection of the last layer; its scales show whether they are powers of two."""
        name = f"layers.{self.config.num_hidden_layers - 1}.self_attn.o_proj.weight"
        released = self._parts[name][0][0]
        dtype, power_of_two = self.stored[released].dtype, True
        if dtype == "F8_E4M3":
            mantissa, _ = torch.frexp(self._slice(released + SCALE_SUFFIX, range(scale_shape(self.shape(name))[0])))
            power_of_two = bool((mantissa == 0.5).all())
        return precision_of(dtype, power_of_two=power_of_two)

    def _check_finite(self, released: str, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise ValueError(f"{self.path} holds NaN or infinity in {released}: it is damaged; fetch it again")

    def _rows(self, released: str) -> int:
        return self.stored[released].shape[0]

    def _slice(self, released: str, rows: range) -> Tensor:
        file = self.stored[released].file
        try:
            part: Tensor = self._file(file).get_slice(released)[rows.start : rows.stop]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path / file} cannot give {released} ({error}); fetch it again") from None
        return part

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            try:
                self._open[name] = safe_open(self.path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / name} is no whole safetensors file ({error}); fetch it again") from None
        self._open.move_to_end(name)
        return self._open[name]


def _mtp_depth(config: ModelConfig, stored: Iterable[str]) -> int:
    """How many MTP layers have any tensor, numbered on without a gap."""
    ids = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    depth = 0
    while config.num_hidden_layers + depth in ids:
        depth += 1
    return depth
