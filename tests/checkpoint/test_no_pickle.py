"""Nothing that a checkpoint holds can execute: malicious pickles are planted in and beside every file."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from train.checkpoint import publish
from train.checkpoint.dcp import latest, load, save

FILES = ("shard-00001-model-00001-of-00001.safetensors", "state.json", "manifest.json")
# Names that DCP, torch and transformers read pickles from.
BESIDE = (
    ".metadata",
    "__0.metadata",
    "__0_0.distcp",
    "pytorch_model.bin",
    "checkpoint.pt",
    "model.safetensors.index.json",
    *(f"{file}.pkl" for file in FILES),
)


class Malicious:
    """Its unpickling creates the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(params=["pickle", "torch.save"])
def payload(request: pytest.FixtureRequest, marker: Path) -> bytes:
    zipped = io.BytesIO()
    torch.save(Malicious(marker), zipped)
    return pickle.dumps(Malicious(marker)) if request.param == "pickle" else zipped.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step_00000001"
    save(path, tensors={"w": torch.arange(6.0)}, state={"step": 1})
    return path


def forge_manifest(path: Path) -> None:
    """What an author of malicious checkpoints would do: make every hash fit."""
    publish.write_manifest(path, {"w": {"shape": [6], "dtype": "torch.float32"}})


def assert_loads(checkpoint: Path) -> None:
    tensors = {"w": torch.zeros(6)}
    assert load(checkpoint, tensors) == {"step": 1}
    assert torch.equal(tensors["w"], torch.arange(6.0))


def test_the_planted_payloads_do_execute_when_unpickled(marker: Path, payload: bytes) -> None:
    if payload.startswith(b"PK"):
        torch.load(io.BytesIO(payload), weights_only=False)
    else:
        pickle.loads(payload)
    assert marker.exists()


@pytest.mark.parametrize("forged", [False, True], ids=["as it is", "hashes forged"])
@pytest.mark.parametrize("file", [*FILES, "every file"])
def test_pickle_in_place_of_a_file_is_refused(
    checkpoint: Path, marker: Path, file: str, forged: bool, payload: bytes
) -> None:
    for name in FILES if file == "every file" else (file,):
        (checkpoint / name).write_bytes(payload)
    if forged and file != "manifest.json":
        forge_manifest(checkpoint)
    # The first file that cannot be what it should be; with forged hashes the manifest is whole again.
    named = file if file in FILES else ("state.json" if forged else "manifest.json")
    with pytest.raises(ValueError, match=f"{checkpoint.name} is damaged: .*{named}"):
        load(checkpoint, {"w": torch.zeros(6)})
    if named == "manifest.json" or not forged:
        with pytest.raises(ValueError, match=f"no checkpoint in {checkpoint.parent} is whole"):
            latest(checkpoint.parent)
    else:
        latest(checkpoint.parent)
    assert not marker.exists()


@pytest.mark.parametrize("forged", [False, True], ids=["as it is", "hashes forged"])
def test_pickles_beside_the_files_are_never_opened(
    checkpoint: Path, marker: Path, forged: bool, payload: bytes
) -> None:
    for name in BESIDE:
        (checkpoint / name).write_bytes(payload)
        (checkpoint.parent / name).write_bytes(payload)
    if forged:
        forge_manifest(checkpoint)
    assert latest(checkpoint.parent) == checkpoint
    assert_loads(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("forged", [False, True], ids=["as it is", "hashes forged"])
def test_pickle_named_like_one_more_shard_is_refused(
    checkpoint: Path, marker: Path, forged: bool, payload: bytes
) -> None:
    (checkpoint / "shard-00002.safetensors").write_bytes(payload)
    if forged:
        forge_manifest(checkpoint)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors"):
        load(checkpoint, {"w": torch.zeros(6)})
    assert not marker.exists()


def test_pickle_inside_the_safetensors_metadata_stays_text(checkpoint: Path, marker: Path) -> None:
    """A well-formed shard whose free-text metadata carries a payload loads without reading it."""
    sharding = json.dumps({"w": {"saved_offsets": [0]}})
    poison = pickle.dumps(Malicious(marker)).decode("latin1")
    save_file({"w": torch.arange(6.0)}, checkpoint / FILES[0], metadata={"DCP_SHARDING_INFO": sharding, "x": poison})
    forge_manifest(checkpoint)
    assert_loads(checkpoint)
    assert not marker.exists()


def test_loading_calls_no_unpickler(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler")
    for owner, name in ((torch, "load"), *((pickle, name) for name in names)):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("an unpickler was called"))
    assert latest(checkpoint.parent) == checkpoint
    assert_loads(checkpoint)
