"""Weights of a trained model, read one tensor at a time from a checkpoint of any layout.

    open_weights(path) -> WeightSource      a run's folder, one checkpoint, or a Hugging Face folder
    load_model(source) -> Transformer       the whole model in one process, for evaluation and generation

A tensor, or a range of its rows, is joined from the shards that the ranks saved (the files' headers have their
offsets); memory is bounded by the largest read. Weights are of one of three kinds:

    model    the parameters as the forward pass uses them
    master   the FP32 values that the optimizer updates
    ema      their moving average, where the run kept one (`optim.ema_decay`)

Sizes of files are compared with the manifest when a checkpoint is opened, hashes when `verify` is called.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from parallel.shards import Shard
from train.checkpoint import publish
from train.config import convert
from train.data.store import MANIFEST_NAME, read_manifest
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.data.trained_on import FirstToken, TrainedOn
from train.huggingface.reader import CONFIG, HfReader
from train.huggingface.safetensors_files import READ_ERRORS, OpenFiles
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer

Kind = Literal["model", "master", "ema"]
_KEY_PREFIXES = {"model": "model.", "master": "optim.master.", "ema": "ema."}


class WeightSource(Protocol):
    """Where weights come from. Names are those of `Transformer.state_dict()`."""

    @property
    def path(self) -> Path:
        """The folder, for messages."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    @property
    def precision(self) -> Precision:
        """What the model was trained, or saved, in."""

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it is known and there."""

    @property
    def trained_on(self) -> TrainedOn:
        """How samples of its training looked."""

    @property
    def state(self) -> Mapping[str, Any]:
        """What a run saved with them; empty where no run of ours did."""

    def names(self) -> tuple[str, ...]:
        """Every tensor, in the order they are best read."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """The tensor, or some of its rows (of the first dim), as a new CPU tensor.

        Raises:
            ValueError: the files do not hold it; named.
        """

    def close(self) -> None:
        """Let go of open files; a later `read` opens them again."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of what was found, one sentence each."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells a source from a changed one, as JSON, without reading its weights."""


class CheckpointReader:
    """A published checkpoint as a `WeightSource`.

    Of any kind, buffers and FP32 parameters, which are their own masters, are the model's. `state` is the JSON saved
    with it: `config`, `identity`, `train_state`.

    Raises:
        ValueError: a file is missing or has another size than the manifest says, or the run kept no moving average.
    """

    def __init__(self, path: Path, kind: Kind = "model") -> None:
        self.path, self.notes = path, list[str]()
        self._manifest = manifest = publish.read_manifest(path)
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                found = f"has {file.stat().st_size} bytes, not {entry['bytes']}" if file.is_file() else "is missing"
                raise ValueError(f"checkpoint {path} is damaged: {name} {found}; take another step_* beside it")
        # Files whose hash was compared: each before the first of its values is used.
        self._whole: set[str] = set()
        self._check(publish.STATE)
        self.state: dict[str, Any] = publish.read_json(path / publish.STATE)
        try:
            self._read_state()
        except ValueError as error:
            raise publish.damage(path / publish.STATE, f"cannot be used ({publish.one_line(error)})") from None
        self._tensors: dict[str, dict[str, Any]] = manifest["tensors"]
        self._files = OpenFiles(path, _damaged)
        self._shards = self._scan()
        prefix = _KEY_PREFIXES[kind]
        self._keys = {
            name: prefix + name if prefix + name in self._tensors else f"model.{name}"
            for name in (key.removeprefix("model.") for key in self._tensors if key.startswith("model."))
        }
        if kind == "ema" and not any(key.startswith("ema.") for key in self._tensors):
            raise ValueError(f"{path} holds no moving average: train with optim.ema_decay, or take the model's weights")

    def _read_state(self) -> None:
        """Model, precision, and how samples of its training looked: of a run as configured, of an import as it came."""
        section = dict[str, Any]
        config = convert(section, convert(section, self.state, "all").get("config"), "config")
        self.config: ModelConfig = convert(ModelConfig, config.get("model"), "config.model")
        # A run of `launch/ablate.py` names more, one on Transformer Engine needs it: the plain recipe reads both.
        saved = convert(section, config.get("precision"), "config.precision")
        known = {each.name: saved[each.name] for each in fields(Precision) if each.name in saved}
        trained_in: Precision = convert(Precision, known, "config.precision")
        self.precision = trained_in.on_our_kernels()
        self._store: str | None = None
        if config.get("data") is None:
            self.trained_on = TrainedOn.from_json(self.state, origin=str(self.path / publish.STATE))
            return
        data = convert(section, config["data"], "config.data")
        self._store = convert(str, data.get("store"), "config.data.store")
        identity = convert(section, self.state.get("identity", {}), "identity")
        store = convert(section, identity.get("store", {}), "identity.store")
        self.trained_on = TrainedOn(
            convert(FirstToken, identity.get("first_token", "eos"), "identity.first_token"),
            convert(int | None, data.get("sequence_length"), "config.data.sequence_length"),
            convert(bool, data.get("mask_documents", False), "config.data.mask_documents"),
            convert(str | None, store.get("tokenizer"), "identity.store.tokenizer"),
        )

    @property
    def tokenizer(self) -> Path | None:
        """The checkpoint's own (imports bring one), or that of the run's store, relative to the working directory."""
        found = self.path / "tokenizer.json"
        if not found.is_file() and self._store is not None:
            store = Path(self._store)
            # Not `Path.is_file`, which raises for a name that is too long.
            if os.path.isfile(store / MANIFEST_NAME):
                found = store / read_manifest(store).tokenizer_file
        return found if os.path.isfile(found) else None

    def names(self) -> tuple[str, ...]:
        """Every tensor of the model, in the checkpoint's order."""
        return tuple(self._keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor; masters and averages are stored flat but read in the model's shape."""
        return tuple(self._tensors[f"model.{name}"]["shape"])

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """See `WeightSource.read`."""
        shape, key = self.shape(name), self._keys[name]
        rows = range(shape[0]) if rows is None else rows
        is_flat = tuple(self._tensors[key]["shape"]) != shape
        per_row = math.prod(shape[1:]) if is_flat else 1
        return self._read(key, rows.start * per_row, rows.stop * per_row).view(len(rows), *shape[1:])

    def close(self) -> None:
        """Let go of open files."""
        self._files.close()

    def fingerprint(self) -> dict[str, Any]:
        """The manifest's hash: it has the hashes of all files."""
        return {"manifest": self._manifest["sha256"]}

    def verify(self) -> None:
        """Compare the hash of every file with the manifest, which reads them all; a ValueError names a damaged one.

        A file that values are read from is compared in any case.
        """
        publish.verify(self.path)

    def _check(self, file: str) -> None:
        if file not in self._whole:
            publish.check_files(self.path, {file: self._manifest["files"][file]})
            self._whole.add(file)

    def _scan(self) -> dict[str, list[tuple[str, Shard]]]:
        """File and shard of all that the ranks saved of each tensor, from the headers."""
        shards: dict[str, list[tuple[str, Shard]]] = {key: [] for key in self._tensors}
        for name in (name for name in self._manifest["files"] if name.endswith(publish.SHARD_SUFFIX)):
            file = self._files[name]
            try:
                found = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                saved = convert(dict[str, dict[str, tuple[int, ...]]], found, "DCP_SHARDING_INFO")
            except (ValueError, RecursionError) as error:
                raise _damaged(self.path / name, error) from None
            for key in shards.keys() & set(file.keys()):
                sizes = tuple(file.get_slice(key).get_shape())
                shape, offsets = tuple(self._tensors[key]["shape"]), saved.get(key, {}).get("saved_offsets")
                shard = Shard(shape, (0,) * len(sizes) if offsets is None else offsets, sizes)
                if not shard.is_inside():
                    raise _damaged(self.path / name, f"{key} {list(sizes)} is no part of {list(shape)}")
                shards[key].append((name, shard))
        return shards

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a saved tensor, from every shard that meets them."""
        shape, name = self._tensors[key]["shape"], self._tensors[key]["dtype"]
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not shape:
            raise publish.damage(self.path / publish.MANIFEST, f"says that {key} is {name} {shape}")
        parts = [
            (file, shard, max(start, shard.offsets[0]), min(stop, shard.offsets[0] + shard.sizes[0]))
            for file, shard in self._shards[key]
        ]
        # Before memory is taken: the size is what a file says.
        found = sum((last - first) * math.prod(shard.sizes[1:]) for _, shard, first, last in parts if first < last)
        if found != (asked := (stop - start) * math.prod(shape[1:])):
            raise ValueError(f"{self.path} holds {found} of {asked} elements asked of {key}: it is incomplete")
        out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        for file, (_, offsets, sizes), first, last in parts:
            if first >= last:
                continue
            self._check(file)
            view = out[first - start : last - start]
            for dim in range(1, out.dim()):
                view = view.narrow(dim, offsets[dim], sizes[dim])
            try:
                values = self._files[file].get_slice(key)[first - offsets[0] : last - offsets[0]]
            except READ_ERRORS as error:
                raise _damaged(self.path / file, error) from None
            if values.dtype != dtype:
                raise _damaged(self.path / file, f"{key} is {values.dtype}, not {dtype}")
            view.copy_(values)
        return out


def open_weights(path: Path, kind: Kind = "model") -> WeightSource:
    """The weights in a run's folder (its newest checkpoint), one checkpoint, or a Hugging Face folder.

    `kind` chooses values of our own checkpoints; a Hugging Face folder has one kind.

    Raises:
        ValueError: nothing to read there, or it is damaged; says what.
    """
    if (path / publish.MANIFEST).is_file():
        return CheckpointReader(path, kind)
    for directory in (path / "checkpoints", path):
        if published := publish.published(directory):
            return CheckpointReader(published[0], kind)
    if (path / CONFIG).is_file():
        return HfReader(path)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: give a run, such as runs/tiny_bf16, or one of its checkpoints")
    raise ValueError(
        f"{path} holds no model: give a run's folder with checkpoints, one checkpoint (step_*), or a Hugging Face "
        f"folder with its {CONFIG}"
    )


def tokenizer_of(source: WeightSource, given: Path | None = None) -> TextTokenizer:
    """The model's tokeniser, its own or the `given` file, compared with what the source records of it.

    Raises:
        ValueError: none is known, it is another one, or it has ids that the model lacks.
    """
    path = given or source.tokenizer
    if path is None:
        raise ValueError(
            f"{source.path} has no tokenizer.json, nor has the store of its run: give --tokenizer tokenizer.json"
        )
    tokenizer, known = load_tokenizer(path), source.trained_on.tokenizer_sha256
    if known is not None and known != tokenizer.sha256:
        raise ValueError(
            f"{path} has sha256 {tokenizer.sha256[:12]}, but {source.path} was trained with tokeniser {known[:12]}; "
            "give that one with --tokenizer"
        )
    if tokenizer.vocab_size > source.config.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} ids, the model of {source.path} only {source.config.vocab_size}; give "
            "the file that it was trained with (--tokenizer)"
        )
    return tokenizer


@torch.no_grad()
def load_model(source: WeightSource, *, precision: Precision | None = None, device: torch.device) -> Transformer:
    """The whole model in one process, in evaluation mode, its weights rounded to `precision` (None: the source's own).

    Raises:
        ValueError: the source lacks a tensor, or holds it in another shape; names it.
    """
    with device:
        model = Transformer(source.config, precision or source.precision)
    held = set(source.names())
    for name, target in model.state_dict().items():
        if name not in held:
            raise ValueError(f"{source.path} lacks {name}: it is incomplete, or of another model")
        if source.shape(name) != tuple(target.shape):
            raise ValueError(f"{source.path} holds {name} as {list(source.shape(name))}, not {list(target.shape)}")
        target.copy_(source.read(name))
    return model.requires_grad_(requires_grad=False).eval()


def _damaged(file: Path, error: Exception | str) -> ValueError:
    return ValueError(
        f"checkpoint {file.parent} is damaged: {file.name} ({publish.one_line(error)}); take another step_* beside it"
    )
