"""A folder in the released Hugging Face layout as a source of weights under our names, read on demand.

    open: config.json -> index or the one file -> headers of all files -> every tensor that our model needs is there
    read(name, rows): the released tensors that hold those rows, from their files, dequantised, joined

FP8 weights are read as payload x `weight_scale_inv` (a multiplier, whatever its name says), FP32; BF16, FP16 and FP32
as they are (FP16 as FP32). Nothing is kept, so memory is bounded by the largest read.

Only safetensors are opened, only by names inside the folder, and no value can execute: pickled weights (`*.bin`) are
refused. What is missing, surplus, of another shape, cut short or not finite is refused by name.

Experts are read one by one, as released, or stacked in one tensor per layer and projection, as `transformers` 5 stores
them with `save_original_format=False`: its order inside a stack is ours.

Shapes: hidden sizes of `ModelConfig`; [out, in] of matrices, scales [ceil(out / 128), ceil(in / 128)].
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.quantize import dequantize_blocks
from train.data.trained_on import TrainedOn
from train.huggingface.config import is_fp8
from train.huggingface.names import (
    SCALE_SUFFIX,
    ReleasedTensor,
    released_name,
    released_tensors,
    scale_shape,
    shapes_of,
    shared_copies,
)
from train.huggingface.safetensors_files import DTYPES, JOURNAL, READ_ERRORS, OpenFiles, pointer_or, read_json
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.published import model_config, shown

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# Rows of a comparison of two stored tensors.
_COMPARED_ROWS = 4096
# Buffers that old files carry and every model computes itself.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
_STACKED = re.compile(r"\.experts\.(gate_up|down)_proj$")


class StoredTensor(NamedTuple):
    """File, safetensors dtype and shape of a released tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class HfReader:
    """A Hugging Face folder as a `WeightSource`.

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
        self.state: dict[str, Any] = {}
        self._files = OpenFiles(
            path,
            lambda file, error: ValueError(
                f"{file} is no whole safetensors file ({pointer_or(error, file)}); fetch it again"
            ),
        )
        self.stored = self._scan()
        # From the tensors, not from config.json: `transformers` drops the MTP layers when it saves, and still says 1.
        depth, said = _mtp_depth(announced, self.stored), announced.num_nextn_predict_layers
        self.config: ModelConfig = replace(announced, num_nextn_predict_layers=depth)
        note = f"{path} holds {depth} MTP layers, though its config.json says {said}"
        self.notes: list[str] = [note] if depth != said else []
        self._check_counts()
        try:
            shapes = shapes_of(self.config, Precision("bf16"))
        except RuntimeError as error:
            raise ValueError(f"{origin} describes tensors too large for any memory ({error}); fetch it again") from None
        self._shapes = {name: shape for name, (shape, _) in shapes.items()}
        self._released = {name: self._released_of(name, shape) for name, shape in self._shapes.items()}
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
        """See `WeightSource.read`; FP8 as FP32 values."""
        shape = self.shape(name)
        rows = range(shape[0]) if rows is None else rows
        values = torch.cat([self.values(released, its_rows) for released, its_rows in self.released_rows(name, rows)])
        return values.view(len(rows), *shape[1:])

    def released_rows(self, name: str, rows: range) -> Iterator[tuple[str, range]]:
        """The released tensors that hold some rows of ours, each with its own rows, in order."""
        tensors = self._released[name]
        if tensors[0].expert is not None:
            # Of a stack, rows are experts: each has the same number of released tensors.
            per_expert = len(tensors) // self.shape(name)[0]
            for tensor in tensors[rows.start * per_expert : rows.stop * per_expert]:
                yield tensor.name, range(tensor.shape[0])
            return
        for tensor in tensors:
            first, last = max(rows.start, tensor.start), min(rows.stop, tensor.stop)
            if first < last:
                yield tensor.name, range(first - tensor.start, last - tensor.start)

    def values(self, released: str, rows: range) -> Tensor:
        """Rows of a stored tensor: BF16 or FP32, dequantised.

        Raises:
            ValueError: a file is damaged, or a value is not finite; named.
        """
        if self.stored[released].dtype == "F8_E4M3":
            q, inside = self.blocks(released, rows)
            values = dequantize_blocks(q)[inside]
        else:
            values = self._slice(released, rows)
            values = values.float() if values.dtype == torch.float16 else values
        self._check_finite(released, values)
        return values

    def blocks(self, released: str, rows: range) -> tuple[Quantized, slice]:
        """Payload and scales of the whole blocks that hold some rows of an E4M3 weight, and where in them the rows are.

        Raises:
            ValueError: a file is damaged, or a scale is not finite; named.
        """
        first = rows.start // TILE * TILE
        last = min(ceil_div(rows.stop, TILE) * TILE, self.stored[released].shape[0])
        scale_name = released + SCALE_SUFFIX
        scale = self._slice(scale_name, range(first // TILE, ceil_div(last, TILE))).float()
        self._check_finite(scale_name, scale)
        if bool((scale < 0).any()):
            raise ValueError(f"{self.path} holds a negative scale in {scale_name}: it is damaged; fetch it again")
        return Quantized(self._slice(released, range(first, last)), scale), slice(rows.start - first, rows.stop - first)

    def close(self) -> None:
        """Let go of open files."""
        self._files.close()

    def fingerprint(self) -> dict[str, Any]:
        """Size and time of every file: what tells this folder from a changed one without reading its weights."""
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
            num_rows = self.stored[released].shape[0]
            for start in range(0, num_rows, _COMPARED_ROWS):
                rows = range(start, min(start + _COMPARED_ROWS, num_rows))
                if not torch.equal(self._slice(released, rows), self._slice(self._released[name][0].name, rows)):
                    raise ValueError(
                        f"{self.path} holds a {released} that is not {name}, but this model shares them; "
                        "it would be lost"
                    )

    def _scan(self) -> dict[str, StoredTensor]:
        """From the index and the headers."""
        weight_map = self._weight_map()
        found: dict[str, StoredTensor] = {}
        for file in sorted(set(weight_map.values())):
            if not (self.path / file).is_file():
                lost = next(name for name, where in weight_map.items() if where == file)
                raise ValueError(f"{self.path} lacks {file}, which holds {lost}: it is incomplete; fetch it again")
            shard = self._files[file]
            for name in shard.keys():  # noqa: SIM118  (no mapping, only a `keys` method)
                if weight_map.get(name) == file:
                    view = shard.get_slice(name)
                    found[name] = StoredTensor(file, view.get_dtype(), tuple(view.get_shape()))
        for name, file in weight_map.items():
            if name not in found:
                raise ValueError(f"{self.path} lacks {name}, which its index says is in {file}; fetch it again")
        return found

    def _weight_map(self) -> dict[str, str]:
        """Released name -> file, none of them outside the folder."""
        if (self.path / INDEX).is_file():
            origin, index = self.path / INDEX, read_json(self.path / INDEX)
            weight_map = index.get("weight_map") if isinstance(index, dict) else None
        elif (self.path / SINGLE).is_file():
            origin, weight_map = self.path / SINGLE, dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        elif pickled := sorted(path.name for path in self.path.glob("*.bin")):
            raise ValueError(
                f"{self.path} holds pickled weights ({pickled[0]}), and reading those runs what they contain: "
                "convert them to safetensors where you trust them"
            )
        else:
            raise ValueError(f"{self.path} lacks {INDEX} and {SINGLE}: it is incomplete; fetch it again")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{origin} has no weight_map; fetch it again")
        for name, file in weight_map.items():
            is_inside = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
            if not (is_inside and len(file) < 256 and (name + file).isprintable()):
                raise ValueError(
                    f"{origin} puts {shown(name)} into {shown(file)}: only safetensors files of the folder itself are "
                    "read"
                )
        return weight_map

    def _check_counts(self) -> None:
        """Refuse, before a list is made of them, more layers and experts than there are tensors."""
        if not any(name.startswith("model.layers.") for name in self.stored):
            raise ValueError(
                f"{self.path} holds {next(iter(self.stored), 'no tensors')} and no model.layers.*: its names are not "
                "those of the Hugging Face layout; convert it to that first"
            )
        config = self.config
        # A stack counts as the matrices that it holds.
        held = sum(
            sum(stored.shape[:1]) * (2 if stack[1] == "gate_up" else 1) if (stack := _STACKED.search(name)) else 1
            for name, stored in self.stored.items()
        )
        experts = 3 * config.n_routed_experts * (config.num_hidden_layers - config.first_k_dense_replace)
        for name, least in (("num_hidden_layers", config.num_hidden_layers), ("n_routed_experts", experts)):
            if least > held:
                raise ValueError(
                    f"{self.path / CONFIG} says {name}={getattr(config, name)}, which is at least {least} tensors, but "
                    f"the files hold {held}: it is incomplete, or of another model; fetch it again"
                )

    def _released_of(self, name: str, shape: tuple[int, ...]) -> list[ReleasedTensor]:
        """The stored tensors that hold ours: as released, or the stack of all experts where there is one."""
        stack = released_name(name)
        if len(shape) == 3 and stack in self.stored:
            return [ReleasedTensor(stack, name, None, 0, shape[0], shape)]
        return [*released_tensors(name, shape, self.config)]

    def _check_all(self, *, fp8: bool) -> None:
        copies = shared_copies(self.config)
        known = set(copies)
        for tensors in self._released.values():
            for tensor in tensors:
                known |= {tensor.name, tensor.name + SCALE_SUFFIX}
                self._check(tensor.name, tensor.shape, fp8=fp8)
        for copy, name in copies.items():
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
            raise ValueError(
                f"{self.path} lacks {released}: it is incomplete, or config.json another model's; fetch it again"
            )
        if found.shape != shape:
            raise ValueError(
                f"{self.path} holds {released} as {list(found.shape)}, not {list(shape)} as its config.json has it"
            )
        if found.dtype not in DTYPES:
            raise ValueError(f"{self.path} holds {released} as {found.dtype}; only {', '.join(DTYPES)} can be read")
        if found.dtype == "F8_E4M3" and len(shape) == 3:
            raise ValueError(
                f"{self.path} holds {released} in FP8, but stacked experts can be read in BF16, FP16 and FP32 only"
            )
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
        released = self._released[name][0].name
        dtype = self.stored[released].dtype
        if dtype != "F8_E4M3":
            return Precision("fp32" if dtype == "F32" else "bf16")
        mantissa, _ = torch.frexp(self._slice(released + SCALE_SUFFIX, range(scale_shape(self.shape(name))[0])))
        return Precision("fp8", power_of_two_scales=bool((mantissa == 0.5).all()))

    def _check_finite(self, released: str, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise ValueError(f"{self.path} holds NaN or infinity in {released}: it is damaged; fetch it again")

    def _slice(self, released: str, rows: range) -> Tensor:
        file = self.stored[released].file
        try:
            values: Tensor = self._files[file].get_slice(released)[rows.start : rows.stop]
        except READ_ERRORS as error:
            raise ValueError(f"{self.path / file} cannot give {released} ({error}); fetch it again") from None
        return values


def _mtp_depth(config: ModelConfig, stored: Iterable[str]) -> int:
    """How many MTP layers have any tensor, numbered on without a gap."""
    ids = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return next(depth for depth in count() if config.num_hidden_layers + depth not in ids)
