"""Weights come out of any layout's checkpoint as they went in: whole, by rows, in each kind, and never half of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.layout import Layout
from parallel.mesh import make_mesh, single
from tests.ranks import run_ranks
from tests.tiny_model import TINY
from train.assemble import build_engine
from train.checkpoint import publish
from train.checkpoint.dcp import save
from train.huggingface.weights import CheckpointReader, load_model, open_weights
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.step import checkpoint_tensors

SEED = 7
PRECISION = Precision("bf16")
OPTIM = OptimConfig(ema_decay=0.9)
CONFIG = replace(TINY, num_hidden_layers=5)
CPU = torch.device("cpu")


def saved_state() -> dict[str, object]:
    return {"config": {"model": asdict(CONFIG), "precision": asdict(PRECISION), "data": {"store": "stores/none"}}}


def save_on(rank: int, world: int, path: str, layout: Layout) -> None:
    """An initialised model, its optimizer and average, saved by all ranks of a layout."""
    mesh = make_mesh(layout, device=CPU, tied_embedding=True, timeout_s=60)
    engine = build_engine(CONFIG, PRECISION, OPTIM, mesh, seed=SEED)
    save(Path(path), tensors=checkpoint_tensors(engine), state=saved_state(), group=torch.distributed.group.WORLD)
    assert engine.ema is not None
    engine.ema.close()


@pytest.fixture(scope="module")
def truth() -> Transformer:
    """Initial values depend on seed and name only, so one process makes the same model."""
    return build_engine(CONFIG, PRECISION, OPTIM, single(CPU), seed=SEED).models[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoints" / publish.step_name(3)
    run_ranks(4, save_on, str(path), Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble"))
    return path


def copied(checkpoint: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    target = folder / checkpoint.name
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_every_tensor_is_bit_equal_whatever_cut_it_was_saved_in(checkpoint: Path, truth: Transformer) -> None:
    reader = CheckpointReader(checkpoint)
    expected = truth.state_dict()
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert_same(reader.read(name), tensor)


def test_rows_are_the_rows_of_the_whole(checkpoint: Path, truth: Transformer) -> None:
    reader = CheckpointReader(checkpoint)
    for name, tensor in truth.state_dict().items():
        # Across the experts' cut between ranks, at the edges, and nothing.
        for rows in (range(1), range(1, min(3, len(tensor))), range(len(tensor) - 1, len(tensor)), range(0)):
            assert_same(reader.read(name, rows), tensor[rows.start : rows.stop])


@pytest.mark.parametrize("kind", ["master", "ema"])
def test_flat_slices_of_zero_ranks_come_back_in_the_models_shape(
    kind: str, checkpoint: Path, truth: Transformer
) -> None:
    reader = CheckpointReader(checkpoint, kind)  # type: ignore[arg-type]
    for name, tensor in truth.state_dict().items():
        # Masters and averages begin as the weights: the BF16 values in FP32.
        assert_same(reader.read(name), tensor.float())
        assert_same(reader.read(name, range(1, 2)), tensor[1:2].float())


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
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        copied(checkpoint, tmp_path / "checkpoints").rename(tmp_path / "checkpoints" / publish.step_name(step))
    assert open_weights(tmp_path).path.name == publish.step_name(11)
    assert open_weights(tmp_path / "checkpoints").path.name == publish.step_name(11)


def test_few_files_are_open_at_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.huggingface.weights.OPEN_FILES", 1)
    reader = CheckpointReader(checkpoint)
    for name in reader.names():
        reader.read(name)
        assert len(reader._open) == 1


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_damaged_file_is_named(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"damaged: {shard.name} (is missing|has \d+ bytes, not \d+)"):
        open_weights(path)


def test_a_file_of_the_right_size_that_is_no_safetensors_is_named(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(ValueError, match=rf"damaged: {shard.name} \(.*take another step_"):
        open_weights(path)


def test_a_flipped_bit_is_found_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    shard = min(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        CheckpointReader(path).verify()


def test_a_part_that_no_shard_holds_is_an_error_not_old_memory(checkpoint: Path, tmp_path: Path) -> None:
    path = copied(checkpoint, tmp_path)
    name = "layers.1.mlp.experts.down_proj"
    shard = next(file for file in sorted(path.glob("*.safetensors")) if f"model.{name}" in load_file(file))
    tensors = {key: value for key, value in load_file(shard).items() if key != f"model.{name}"}
    save_file(tensors, shard, metadata=metadata_without_cuts(tensors))
    manifest = json.loads((path / publish.MANIFEST).read_text())
    (path / publish.MANIFEST).unlink()
    publish.write_manifest(path, manifest["tensors"])
    with pytest.raises(ValueError, match=rf"holds \d+ of \d+ elements asked of model\.{name}"):
        CheckpointReader(path).read(name)


def metadata_without_cuts(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {
        "DCP_SHARDING_INFO": json.dumps({key: {"saved_offsets": [0] * value.dim()} for key, value in tensors.items()})
    }


def test_a_run_without_an_average_says_how_to_get_one(tmp_path: Path) -> None:
    save(tmp_path / "step_00000001", tensors={"model.norm.weight": torch.ones(3)}, state=saved_state())
    with pytest.raises(ValueError, match=r"no moving average: train with optim\.ema_decay"):
        CheckpointReader(tmp_path / "step_00000001", "ema")


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in Transformer(CONFIG, PRECISION).state_dict().items()}
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save(tmp_path / "missing", tensors=missing, state=saved_state())
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        load_model(CheckpointReader(tmp_path / "missing"), device=CPU)
    save(tmp_path / "shape", tensors=tensors | {"model.norm.weight": torch.ones(5)}, state=saved_state())
    with pytest.raises(ValueError, match=r"holds norm\.weight as \[5\], not \[32\]"):
        load_model(CheckpointReader(tmp_path / "shape"), device=CPU)


def test_a_folder_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model: give a run's folder"):
        open_weights(tmp_path)
    with pytest.raises(ValueError, match=r"there is no folder .*: give a run"):
        open_weights(tmp_path / "nowhere")


def test_a_configuration_survives_json() -> None:
    yarn = {
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = ModelConfig.from_dict(asdict(TINY) | {"rope_scaling": yarn})
    assert ModelConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
