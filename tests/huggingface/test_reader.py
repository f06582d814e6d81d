"""A Hugging Face folder that is wrong, partial or hostile is refused with one sentence that names what is wrong."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.huggingface.hf_folders import (
    RAGGED,
    SHARD_BYTES,
    changed,
    edit_config,
    lively,
    save_checkpoint,
    tensors_of,
    write_index,
)
from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.weights import CheckpointReader, open_weights
from train.model.precision import Precision

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    path = save_checkpoint(root / "checkpoints/step_00000001", lively(RAGGED, Precision("bf16")))
    export(CheckpointReader(path), root / "hf", ExportOptions("fp8", shard_bytes=SHARD_BYTES))
    return root / "hf"


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def refused(folder: Path, message: str) -> None:
    """Opening it says so."""
    with pytest.raises(ValueError, match=message):
        open_weights(folder)


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = make(tensors[name])

    return change


def removed(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def test_the_folder_is_opened_as_any_other_source(good: Path) -> None:
    source = open_weights(good, "master")
    assert isinstance(source, HfReader)
    assert (source.config, source.notes) == (RAGGED, [])


def test_one_file_without_an_index_is_read(good: Path, tmp_path: Path) -> None:
    folder = changed(good, tmp_path / "one", lambda tensors: None)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    several, one = HfReader(good), HfReader(folder)
    assert all(torch.equal(several.read(name), one.read(name)) for name in several.names())


def test_fp16_is_read_as_fp32(good: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    folder = changed(good, tmp_path / "half", replaced(name, lambda t: t.half()))
    assert torch.equal(HfReader(folder).read("norm.weight"), tensors_of(good)[name].half().float())


CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing tensor": (removed(EXPERT), rf"lacks {EXPERT}: it is incomplete"),
    "missing MTP tensor": (removed("model.layers.3.eh_proj.weight"), r"lacks model\.layers\.3\.eh_proj\.weight"),
    "missing scale": (removed(f"{EXPERT}_scale_inv"), rf"lacks {EXPERT}_scale_inv"),
    "wrong shape": (replaced(EXPERT, lambda t: t[:-1]), rf"holds {EXPERT} as \[135, 136\], not \[136, 136\]"),
    "transposed": (
        replaced("model.layers.3.eh_proj.weight", lambda t: t.t()),
        r"eh_proj\.weight as \[272, 136\], not \[136, 272\]",
    ),
    "wrong scale shape": (
        replaced(f"{EXPERT}_scale_inv", lambda t: t[:1]),
        rf"holds {EXPERT}_scale_inv as F32 \[1, 2\], not F32 \[2, 2\]",
    ),
    "integers": (replaced("model.norm.weight", lambda t: t.int()), r"holds model\.norm\.weight as I32"),
    "scales of a BF16 weight": (
        replaced(EXPERT, lambda t: t.bfloat16()),
        rf"holds scales for {EXPERT}, which is BF16",
    ),
    "surplus tensor": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(3)}),
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which its config\.json has no place for",
    ),
    "surplus expert": (
        lambda tensors: tensors.update({EXPERT.replace(".2.", ".9."): torch.zeros(136, 136)}),
        r"experts\.9\.up_proj\.weight, which its config\.json has no place for",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_tensor_is_named_when_the_folder_is_opened(
    good: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    refused(changed(good, tmp_path / "hf", change), message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_bad_scale_is_named_when_it_is_read(good: Path, tmp_path: Path, value: float) -> None:
    folder = changed(good, tmp_path / "hf", replaced(f"{EXPERT}_scale_inv", lambda t: t.clone().fill_(value)))
    word = "a negative scale" if value == -1.0 else "NaN or infinity"
    with pytest.raises(ValueError, match=rf"holds {word} in {EXPERT}_scale_inv"):
        HfReader(folder).read("layers.1.mlp.experts.gate_up_proj", range(2, 3))
    with pytest.raises(ValueError, match=rf"holds {word} in {EXPERT}_scale_inv"):
        import_hf(HfReader(folder), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/step_00000000").exists()


def test_a_nan_payload_is_named_when_it_is_read(good: Path, tmp_path: Path) -> None:
    def poison(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[3, 5] = 0x7F
        return tensor

    folder = changed(good, tmp_path / "hf", replaced(EXPERT, poison))
    with pytest.raises(ValueError, match=rf"NaN or infinity in {EXPERT}: it is damaged"):
        HfReader(folder).read("layers.1.mlp.experts.gate_up_proj")


def test_a_copy_of_the_embedding_that_differs_is_not_dropped_silently(good: Path, tmp_path: Path) -> None:
    name = "model.layers.3.embed_tokens.weight"
    folder = changed(good, tmp_path / "hf", replaced(name, lambda t: t * 2))
    with pytest.raises(ValueError, match=rf"holds a {re.escape(name)} that is not embed_tokens\.weight"):
        import_hf(HfReader(folder), tmp_path / "run")


def test_a_missing_file_is_named_with_a_tensor_in_it(folder: Path) -> None:
    lost = file_of(folder, EXPERT)
    lost.unlink()
    refused(folder, rf"lacks {lost.name}, which holds model\..*: it is incomplete")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(folder: Path, keep: int) -> None:
    file = file_of(folder, EXPERT)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, rf"{file.name} is no whole safetensors file")


def test_an_index_that_promises_what_a_file_lacks_is_refused(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    tensors = load_file(file)
    del tensors[EXPERT]
    save_file(tensors, file)
    refused(folder, rf"lacks {EXPERT}, which its index says is in {file.name}")


@pytest.mark.parametrize(
    "place", ["../stolen.safetensors", "a/b.safetensors", "/tmp/x.safetensors", "..", "weights.bin", 7, None]
)
def test_an_index_cannot_point_outside_the_folder(folder: Path, place: object) -> None:
    shutil.copy(file_of(folder, EXPERT), folder.parent / "stolen.safetensors")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**weight_map, EXPERT: place})  # type: ignore[dict-item]
    refused(folder, rf"puts {EXPERT} into .*: only safetensors files of the folder itself are read")


def test_pickled_weights_are_refused_and_not_read(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(folder, r"holds pickled weights \(pytorch_model\.bin\)")


def test_fp8_without_quantization_config_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config=None)
    refused(folder, r"in FP8, but its config\.json has no quantization_config")


@pytest.mark.parametrize("text", ["", "[1", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, rf"{INDEX} (is not JSON|has no weight_map)")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json (is not JSON|holds no object)")


def test_an_unfinished_export_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"holds no model: .*or a Hugging Face folder with its config\.json")
