"""A small V3 with ragged blocks, its checkpoint, its Hugging Face folders, and small changes to their files.

Hidden and expert widths are one block and eight, so every FP8 weight has a ragged last block in both directions. Norm
gains and router biases are at no value that would hide a mistake.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_model import DISTINCT
from train.checkpoint.dcp import save
from train.huggingface.export import Exported, ExportOptions, export
from train.huggingface.names import Format
from train.huggingface.reader import INDEX
from train.huggingface.weights import CheckpointReader
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer

CPU = torch.device("cpu")
FP32, BF16, FP8 = Precision("fp32"), Precision("bf16"), Precision("fp8", power_of_two_scales=True)
FP8_ANY_SCALE = Precision("fp8", power_of_two_scales=False)
RAGGED = replace(
    DISTINCT, vocab_size=300, hidden_size=136, intermediate_size=144, moe_intermediate_size=136, q_lora_rank=128
)
# Small enough for several files.
SHARD_BYTES = 400_000


def lively(config: ModelConfig, precision: Precision) -> Transformer:
    """A model with random weights, without gradients."""
    model = Transformer(config, precision).requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(11)
    for name, tensor in model.state_dict().items():
        random = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1.0 + 0.3 * random.tanh() if "norm" in name else 0.15 * random)
    return model


def save_checkpoint(
    path: Path, model: Transformer, *, store: Path = Path("stores/none"), tokenizer_sha256: str | None = None
) -> Path:
    """What a run on some store saves of its model, as one process."""
    config = {"model": asdict(model.config), "precision": asdict(model.precision), "data": {"store": str(store)}}
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(path, tensors=tensors, state={"config": config, "identity": {"store": {"tokenizer": tokenizer_sha256}}})
    return path


def saved(model: Transformer, root: Path) -> CheckpointReader:
    """A checkpoint of a model, opened."""
    return CheckpointReader(save_checkpoint(root / "checkpoints/step_00000003", model))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Everything that the shards of a folder hold."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert not found.keys() & held.keys()
        found |= held
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def flip_a_bit(file: Path) -> Path:
    """Damage a file that keeps its size; returns its path."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return file


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a folder, in one file with an index, after a change to its tensors."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX, "conversion.json"))
    tensors = tensors_of(folder)
    change(tensors)
    file = target / "model-00001-of-00001.safetensors"
    write_index(target, dict.fromkeys(tensors, file.name))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return target


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def name_of(precision: Precision) -> str:
    return f"{precision.name}-{precision.power_of_two_scales}"


class Made:
    """What is made of `RAGGED`, at first use: models by precision, checkpoints of them, exports of those by format."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(lambda precision: lively(RAGGED, precision))
        self.checkpoint = cache(lambda precision: saved(self.model(precision), root / name_of(precision)))
        self.exported = cache(self._exported)

    def _exported(self, precision: Precision, format: Format) -> tuple[Path, Exported]:
        out = self.root / name_of(precision) / format
        return out, export(self.checkpoint(precision), out, ExportOptions(format, shard_bytes=SHARD_BYTES))

    def folder(self, precision: Precision, format: Format) -> Path:
        """An export."""
        return self.exported(precision, format)[0]
