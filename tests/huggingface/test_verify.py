"""`--verify` passes what is right and names what is wrong, also under forged hashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.huggingface.hf_folders import RAGGED, SHARD_BYTES, lively, save_checkpoint
from train.checkpoint import publish
from train.huggingface.export import Exported, ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.plan import Format
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.verify import compare_logits, sampled_rows, verify_export, verify_import
from train.huggingface.weights import CheckpointReader
from train.model.precision import Precision

FIRST = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    path = tmp_path_factory.mktemp("source") / "checkpoints/step_00000001"
    return CheckpointReader(save_checkpoint(path, lively(RAGGED, Precision("bf16"))))


def made(source: CheckpointReader, out: Path, format: Format = "fp8") -> Exported:
    return export(source, out, ExportOptions(format, shard_bytes=SHARD_BYTES))


def forge(out: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of the file that holds `name`, and make the journal's hash fit."""
    file = out / json.loads((out / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    journal = json.loads((out / "conversion.json").read_text())
    journal["files"][file.name] = publish.entry_of(file)
    (out / "conversion.json").write_text(json.dumps(journal))


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_a_right_export_passes(source: CheckpointReader, tmp_path: Path, format: Format) -> None:
    verified = verify_export(source, tmp_path, made(source, tmp_path, format).plan)
    assert verified.files == len(list(tmp_path.iterdir())) - 1
    assert verified.tensors == len(source.names())
    # Half a step is the worst that rounding to nearest does, and among thousands of values it comes close.
    assert verified.worst_step == 0 if format != "fp8" else 0.45 < verified.worst_step <= 0.5 + 1e-4


def doubled_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}_scale_inv"].mul_(2)


def one_payload_off(tensors: dict[str, Tensor]) -> None:
    """One code further, where the rows are looked at: the next E4M3 number."""
    rows = sampled_rows("layers.0.mlp.gate_up_proj.weight", (288, 136))
    tensors[FIRST].view(torch.uint8)[rows.start, 0] ^= 1


def gate_and_up_swapped(tensors: dict[str, Tensor]) -> None:
    other = FIRST.replace("gate_proj", "up_proj")
    for suffix in ("", "_scale_inv"):
        tensors[FIRST + suffix], tensors[other + suffix] = tensors[other + suffix], tensors[FIRST + suffix]


DEFECTS = (doubled_scale, one_payload_off, gate_and_up_swapped)


@pytest.mark.parametrize("defect", DEFECTS, ids=[defect.__name__ for defect in DEFECTS])
def test_wrong_values_are_named_whatever_the_hashes_say(
    source: CheckpointReader, tmp_path: Path, defect: Callable[[dict[str, Tensor]], None]
) -> None:
    plan = made(source, tmp_path).plan
    forge(tmp_path, FIRST, defect)
    with pytest.raises(ValueError, match=r"holds model\.layers\.0\.mlp\.(gate|up)_proj\.weight with other values"):
        verify_export(source, tmp_path, plan)


def test_a_zero_is_compared_with_the_smallest_step(tmp_path: Path) -> None:
    model = lively(RAGGED, Precision("bf16"))
    weight = model.layers["0"].mlp.gate_up_proj.weight  # type: ignore[union-attr]
    rows = sampled_rows("layers.0.mlp.gate_up_proj.weight", (288, 136))
    with torch.no_grad():
        weight[rows.start, 0] = 0  # type: ignore[index]
    source = CheckpointReader(save_checkpoint(tmp_path / "checkpoints/step_00000001", model))
    plan = made(source, tmp_path / "out").plan

    def one_above_zero(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST].view(torch.uint8)[rows.start, 0] = 0x01

    assert rows.start < 144, "the planted row is one of gate_proj's"
    forge(tmp_path / "out", FIRST, one_above_zero)
    with pytest.raises(ValueError, match="with other values"):
        verify_export(source, tmp_path / "out", plan)


def test_a_flipped_bit_is_found_by_its_hash(source: CheckpointReader, tmp_path: Path) -> None:
    plan = made(source, tmp_path).plan
    file = tmp_path / "model-00003-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is missing or not as it was written"):
        verify_export(source, tmp_path, plan)


def test_an_unfinished_export_does_not_pass(source: CheckpointReader, tmp_path: Path) -> None:
    plan = made(source, tmp_path).plan
    journal = json.loads((tmp_path / "conversion.json").read_text())
    del journal["files"]["config.json"]
    (tmp_path / "conversion.json").write_text(json.dumps(journal))
    with pytest.raises(ValueError, match=r"is not finished: config\.json is not in its conversion\.json"):
        verify_export(source, tmp_path, plan)


def test_a_right_import_passes_and_a_wrong_one_is_named(source: CheckpointReader, tmp_path: Path) -> None:
    made(source, tmp_path / "hf")
    hf = HfReader(tmp_path / "hf")
    path = import_hf(hf, tmp_path / "run").path
    assert verify_import(hf, path).tensors == len(hf.names())
    forged = lively(RAGGED, Precision("bf16"))
    with torch.no_grad():
        forged.get_parameter("layers.2.mlp.experts.down_proj").mul_(-1)
    other = save_checkpoint(tmp_path / "other/step_00000001", forged)
    with pytest.raises(ValueError, match=r"other values"):
        verify_import(hf, other)


def test_logits_of_another_model_are_refused(source: CheckpointReader, tmp_path: Path) -> None:
    made(source, tmp_path)
    with pytest.raises(ValueError, match=r"differ by .* between our model and the other implementation"):
        compare_logits(source, tmp_path, lambda _, ids, given: torch.ones(*ids.shape, RAGGED.vocab_size))
