"""Weights come out of any layout's checkpoint as they went in: whole, by rows, in each kind, exported, never half."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.config import YarnScaling
from parallel.layout import Layout
from parallel.mesh import Mesh, make_mesh, single
from tests.huggingface.hf_folders import CPU, FP8, bytes_of, flip_a_bit
from tests.ranks import run_ranks
from tests.tiny_model import TINY
from train.assemble import build_engine
from train.checkpoint import publish
from train.checkpoint.dcp import save
from train.huggingface import export as hf_export
from train.huggingface.export import ExportOptions, export
from train.huggingface.weights import CheckpointReader, Kind, load_model, open_weights
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.step import Engine, checkpoint_tensors

# Most rows of a matrix, the embedding's: many times the 128 that an export reads at once.
CONFIG = replace(TINY, num_hidden_layers=5, vocab_size=1000)
STATE = {"config": {"model": asdict(CONFIG), "precision": asdict(FP8), "data": {"store": "stores/none"}}}


def engine_on(mesh: Mesh) -> Engine:
    """An initialised model, its optimizer and average: values depend on seed and name only."""
    return build_engine(CONFIG, FP8, OptimConfig(ema_decay=0.9), mesh, seed=7)


def save_on(rank: int, world: int, path: str, layout: Layout) -> None:
    engine = engine_on(make_mesh(layout, device=CPU, tied_embedding=True, timeout_s=60))
    save(Path(path), tensors=checkpoint_tensors(engine), state=STATE, group=torch.distributed.group.WORLD)
    assert engine.ema is not None
    engine.ema.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = engine_on(single(CPU))
    yield engine
    assert engine.ema is not None
    engine.ema.close()


@pytest.fixture(scope="module")
def truth(engine: Engine) -> Transformer:
    """What one process has."""
    return engine.models[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks saved."""
    path = tmp_path_factory.mktemp("run") / "checkpoints" / publish.step_name(3)
    run_ranks(4, save_on, str(path), Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble"))
    return path


def copied(checkpoint: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["model", "master", "ema"])
def test_every_tensor_and_its_rows_are_bit_equal_in_each_kind(kind: Kind, checkpoint: Path, truth: Transformer) -> None:
    """Whatever chunks it was saved in: experts by rank, masters and averages as flat slices of ZeRO ranks."""
    reader, expected = CheckpointReader(checkpoint, kind), truth.state_dict()
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape)
        # Masters and averages begin as the weights: the BF16 values in FP32.
        values = tensor if kind == "model" else tensor.float()
        assert_same(reader.read(name), values)
        # Across the border of experts between ranks, at the edges, and nothing.
        for rows in (range(1), range(1, min(3, len(tensor))), range(len(tensor) - 1, len(tensor)), range(0)):
            assert_same(reader.read(name, rows), values[rows.start : rows.stop])


def test_the_model_is_whole_and_computes_what_the_saved_one_does(checkpoint: Path, truth: Transformer) -> None:
    model = load_model(open_weights(checkpoint.parent.parent), device=CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert_same(model.logits(model(ids).hidden), truth.logits(truth(ids).hidden))


def test_a_precision_of_choice_gets_the_values_in_its_type(checkpoint: Path, truth: Transformer) -> None:
    model = load_model(CheckpointReader(checkpoint, "master"), precision=Precision("fp32"), device=CPU)
    assert_same(model.lm_head.weight.detach(), truth.lm_head.weight.detach().float())


def test_the_newest_checkpoint_of_a_run_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    for step in (11, 3):
        shutil.copytree(checkpoint, tmp_path / "checkpoints" / publish.step_name(step))
    assert open_weights(tmp_path).path.name == publish.step_name(11)
    assert open_weights(tmp_path / "checkpoints").path.name == publish.step_name(11)


def test_few_files_are_open_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.huggingface.safetensors_files.OPEN_FILES", 1)
    reader = CheckpointReader(checkpoint)
    for name in reader.names():
        reader.read(name)
        assert len(reader._files) == 1


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "short": (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"has \d+ bytes, not \d+"),
    "no safetensors": (lambda file: file.write_bytes(b"\xff" * file.stat().st_size), r"\(.*take another step_"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named(
    damage: Callable[[Path], object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = copied(checkpoint, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    damage(shard)
    with pytest.raises(ValueError, match=rf"damaged: {shard.name} {message}"):
        open_weights(path)


def test_a_damaged_shard_is_refused_when_it_is_read(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing is exported, scored or prompted from it; a state whose hash does not match is not even opened."""
    path = copied(checkpoint, tmp_path)
    shard = flip_a_bit(min(path.glob("*.safetensors")))
    with pytest.raises(ValueError, match=f"{shard.name} does not have the sha256"):
        load_model(open_weights(path), precision=Precision("fp32"), device=CPU)
    with pytest.raises(ValueError, match=f"{shard.name} does not have the sha256"):
        export(open_weights(path), tmp_path / "out", ExportOptions())
    flip_a_bit(path / publish.STATE)
    with pytest.raises(ValueError, match=r"state\.json does not have the sha256"):
        open_weights(path)


def test_a_flipped_bit_is_found_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    shard = flip_a_bit(min(path.glob("*.safetensors")))
    with pytest.raises(ValueError, match=shard.name):
        CheckpointReader(path).verify()


def test_a_chunk_that_no_shard_holds_is_an_error_not_old_memory(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    name = "layers.1.mlp.experts.down_proj"
    shard = next(file for file in sorted(path.glob("*.safetensors")) if f"model.{name}" in load_file(file))
    save_file({key: value for key, value in load_file(shard).items() if key != f"model.{name}"}, shard)
    manifest = json.loads((path / publish.MANIFEST).read_text())
    (path / publish.MANIFEST).unlink()
    publish.write_manifest(path, manifest["tensors"])
    with pytest.raises(ValueError, match=rf"holds \d+ of \d+ elements asked of model\.{name}"):
        CheckpointReader(path).read(name)


class Watched:
    """A source that records its largest read, and how much of its reads is alive at once, in elements."""

    def __init__(self, source: CheckpointReader) -> None:
        self.source, self.largest, self.peak = source, 0, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, rows: range | None = None) -> Tensor:
        assert rows is not None, f"{name} was read whole"
        tensor = self.source.read(name, rows)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(held.numel() for ref in self.alive if (held := ref()) is not None))
        return tensor


@pytest.mark.parametrize("kind", ["model", "master"])
def test_any_layouts_checkpoint_exports_to_the_same_bytes(
    kind: Kind, checkpoint: Path, engine: Engine, tmp_path: Path
) -> None:
    save(tmp_path / "one", tensors=checkpoint_tensors(engine), state=STATE)
    found = []
    for path in (checkpoint, tmp_path / "one"):
        out = tmp_path / f"hf_{path.name}"
        export(CheckpointReader(path, kind), out, ExportOptions("fp8", kind, shard_bytes=40_000))
        files = bytes_of(out)
        # The journal names its source.
        found.append((json.loads(files.pop("conversion.json"))["files"], files))
    assert found[0] == found[1]
    assert len(found[0][1]) > 5


def test_no_more_than_a_few_rows_or_one_expert_is_ever_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the model: of what was read, one chunk is kept while the next is read."""
    monkeypatch.setattr(hf_export, "ROWS_ELEMENTS", 1)
    source = Watched(CheckpointReader(checkpoint))
    export(source, tmp_path / "hf", ExportOptions("fp8", shard_bytes=400_000))  # type: ignore[arg-type]
    # 128 rows of the widest matrix, or one expert's gate and up. The embedding alone is four times that.
    rows = 128 * max(shape[-1] for shape in map(source.shape, source.names()) if len(shape) == 2)
    expert = 2 * CONFIG.moe_intermediate_size * CONFIG.hidden_size
    assert source.largest <= max(rows, expert)
    assert source.peak <= 2 * max(rows, expert)


def test_a_run_without_an_average_says_how_to_get_one(tmp_path: Path) -> None:
    save(tmp_path / "step_00000001", tensors={"model.norm.weight": torch.ones(3)}, state=STATE)
    with pytest.raises(ValueError, match=r"no moving average: train with optim\.ema_decay"):
        CheckpointReader(tmp_path / "step_00000001", "ema")


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in Transformer(CONFIG, FP8).state_dict().items()}
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save(tmp_path / "missing", tensors=missing, state=STATE)
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        load_model(CheckpointReader(tmp_path / "missing"), device=CPU)
    save(tmp_path / "shape", tensors=tensors | {"model.norm.weight": torch.ones(5)}, state=STATE)
    with pytest.raises(ValueError, match=r"holds norm\.weight as \[5\], not \[32\]"):
        load_model(CheckpointReader(tmp_path / "shape"), device=CPU)


def test_a_folder_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model: give a run's folder"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*: give a run"):
        open_weights(tmp_path / "nowhere")


def test_a_configuration_survives_json() -> None:
    yarn = YarnScaling(40.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
    config = replace(TINY, rope_scaling=yarn)
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
