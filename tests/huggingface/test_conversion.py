"""A conversion stopped at any moment ends with the same bytes, and `--verify` names what is wrong under any hashes.

Below both: a safetensors file written chunk by chunk is the one that its library reads.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.huggingface.hf_folders import BF16, RAGGED, SHARD_BYTES, Made, bytes_of, flip_a_bit, lively, saved
from train.checkpoint import publish
from train.huggingface import safetensors_files
from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.names import ExportPlan, Format
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.safetensors_files import DTYPES, Journal, ShardFile, TensorSpec, header_of, write_file
from train.huggingface.verify import compare_logits, sampled_rows, verify_export, verify_import
from train.huggingface.weights import CheckpointReader

Death = Callable[[pytest.MonkeyPatch], None]
Change = Callable[[dict[str, Tensor]], None]
OPTIONS = ExportOptions(format="fp8", shard_bytes=SHARD_BYTES)
SECOND = ("model-00002", "shard-00001-model-00002")
FIRST = "model.layers.0.mlp.gate_proj.weight"
# Of the fused gate and up projection; the first of them is one of gate_proj's.
ROWS = sampled_rows("layers.0.mlp.gate_up_proj.weight", (288, 136))
assert ROWS.start < 144

ODD = ShardFile(
    "odd.safetensors",
    (
        TensorSpec("payload", "F8_E4M3", (5, 3)),
        TensorSpec("scale", "F32", (1, 1)),
        TensorSpec("norm", "BF16", (7,)),
        TensorSpec("other payload", "F8_E4M3", (129, 1)),
        TensorSpec("bias", "F32", (3,)),
    ),
)


def test_chunks_of_any_size_are_read_back_by_the_library(tmp_path: Path) -> None:
    tensors = {spec.name: torch.randn(spec.shape).to(DTYPES[spec.dtype]) for spec in ODD.tensors}
    chunks = []
    for name, tensor in tensors.items():
        rows = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        chunks += [(name, chunk.view(tensor.dtype)) for chunk in rows.split(2)]
    write_file(tmp_path / ODD.name, ODD, chunks)
    found = load_file(tmp_path / ODD.name)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_every_tensor_begins_at_a_multiple_of_its_item_size() -> None:
    header, spans = header_of(ODD)
    assert len(header) % 8 == 0
    sizes = {spec.name: DTYPES[spec.dtype].itemsize for spec in ODD.tensors}
    assert {name: first % sizes[name] for name, (first, _) in spans.items()} == dict.fromkeys(sizes, 0)
    # Without gaps, which the format forbids.
    ends = sorted(spans.values())
    assert [first for first, _ in ends] == [len(header), *(last for _, last in ends[:-1])]


def test_values_that_do_not_fill_their_bytes_are_noticed(tmp_path: Path) -> None:
    chunks = [(spec.name, torch.zeros(spec.shape, dtype=DTYPES[spec.dtype])) for spec in ODD.tensors[:-1]]
    with pytest.raises(AssertionError, match=r"values of \['bias'\] do not fill"):
        write_file(tmp_path / ODD.name, ODD, chunks)


def test_offsets_of_a_chunk_are_stored_as_dcp_stores_them(tmp_path: Path) -> None:
    file = ShardFile("chunk.safetensors", (TensorSpec("w", "BF16", (2, 3), (4, 0)),))
    write_file(tmp_path / file.name, file, [("w", torch.ones(2, 3).bfloat16())])
    with safe_open(tmp_path / file.name, framework="pt") as opened:
        assert opened.metadata()["DCP_SHARDING_INFO"] == '{"w": {"saved_offsets": [4, 0]}}'


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def source(made: Made) -> CheckpointReader:
    return made.checkpoint(BF16)


@pytest.fixture
def unbroken(made: Made) -> Path:
    out, done = made.exported(BF16, "fp8")
    assert done.written == len(list(out.glob("*.safetensors"))) >= 3
    return out


@pytest.fixture
def copy(unbroken: Path, tmp_path: Path) -> Path:
    """Of that export, to be damaged."""
    return Path(shutil.copytree(unbroken, tmp_path / "copy"))


def killed_in_values(patch: pytest.MonkeyPatch) -> None:
    """In the middle of the second file."""

    def dying(path: Path, file: ShardFile, values: Iterable[tuple[str, Tensor]]) -> None:
        def some() -> Iterable[tuple[str, Tensor]]:
            for number, chunk in enumerate(values):
                if file.name.startswith(SECOND) and number == 3:
                    raise Killed
                yield chunk

        write_file(path, file, some())

    patch.setattr(safetensors_files, "write_file", dying)


def killed_before(owner: object, function: str, names: str | tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """When a function is called with such a file."""
    replaced = getattr(owner, function)

    def dying(*arguments: Any) -> None:
        if any(Path(each).name.startswith(names) for each in arguments if isinstance(each, str | Path)):
            raise Killed
        replaced(*arguments)

    patch.setattr(owner, function, dying)


DEATHS: dict[str, Death] = {
    "in values": killed_in_values,
    "with the second file under its hidden name": partial(killed_before, Path, "replace", SECOND),
    "with the second file not in the journal": partial(killed_before, Journal, "record", SECOND),
    # Nor may config.json be there, which makes the folder a model.
    "with all weights but no index": partial(killed_before, Path, "replace", INDEX),
}


@pytest.mark.parametrize("die", DEATHS.values(), ids=DEATHS.keys())
def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(
    source: CheckpointReader, unbroken: Path, tmp_path: Path, die: Death
) -> None:
    out = tmp_path / "hf"
    with pytest.MonkeyPatch.context() as patch:
        die(patch)
        with pytest.raises(Killed):
            export(source, out, OPTIONS)
    assert not (out / "config.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*")}
    recorded = json.loads((out / "conversion.json").read_text())["files"]
    export(source, out, OPTIONS)
    assert bytes_of(out) == bytes_of(unbroken)
    kept = [path for path, time in finished.items() if path.stat().st_mtime_ns == time]
    assert {path.name for path in kept} == {name for name in recorded if name.endswith(".safetensors")}
    assert kept


@pytest.fixture(scope="module")
def whole_import(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """An import that was not interrupted: the checkpoint, and how many files were written."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = import_hf(HfReader(made.folder(BF16, "fp8")), run, shard_bytes=SHARD_BYTES)
    return done.path, done.written


@pytest.mark.parametrize("die", [*DEATHS.values()][:3], ids=[*DEATHS][:3])
def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(
    unbroken: Path, whole_import: tuple[Path, int], tmp_path: Path, die: Death
) -> None:
    whole, written = whole_import
    hf = HfReader(unbroken)
    with pytest.MonkeyPatch.context() as patch:
        die(patch)
        with pytest.raises(Killed):
            import_hf(hf, tmp_path / "run", shard_bytes=SHARD_BYTES)
    assert publish.published(tmp_path / "run/checkpoints") == []
    again = import_hf(HfReader(unbroken), tmp_path / "run", shard_bytes=SHARD_BYTES)
    assert 0 < again.written < written
    assert bytes_of(again.path) == bytes_of(whole)
    publish.verify(again.path)
    assert import_hf(HfReader(unbroken), tmp_path / "run", shard_bytes=SHARD_BYTES).written == 0


def test_a_finished_file_that_was_damaged_is_written_again(
    source: CheckpointReader, unbroken: Path, copy: Path
) -> None:
    flip_a_bit(copy / "model-00002-of-00004.safetensors")
    assert export(source, copy, OPTIONS).written == 1
    assert bytes_of(copy) == bytes_of(unbroken)


def test_another_source_plan_or_choice_of_weights_is_refused(
    source: CheckpointReader, unbroken: Path, tmp_path: Path
) -> None:
    before = bytes_of(unbroken)
    model = lively(RAGGED, BF16)
    model.norm.weight[0] += 1.0
    other = saved(model, tmp_path)
    for message, reader, options in (
        ("another source", other, OPTIONS),
        ("another plan", source, ExportOptions(format="bf16", shard_bytes=SHARD_BYTES)),
        (r"another weights \(model, now ema\)", source, ExportOptions("fp8", "ema", SHARD_BYTES)),
    ):
        with pytest.raises(ValueError, match=f"holds a conversion with {message}.*; name another folder"):
            export(reader, unbroken, options)
    assert bytes_of(unbroken) == before


def test_a_changed_hugging_face_folder_is_another_source(copy: Path, tmp_path: Path) -> None:
    import_hf(HfReader(copy), tmp_path / "run")
    stat = (copy / "config.json").stat()
    os.utime(copy / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another source"):
        import_hf(HfReader(copy), tmp_path / "run")


def test_a_folder_with_other_files_is_left_alone(source: CheckpointReader, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="already holds something else; name a new or empty folder"):
        export(source, tmp_path, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def plan(made: Made) -> ExportPlan:
    return made.exported(BF16, "fp8")[1].plan


def forge(out: Path, name: str, change: Change) -> None:
    """Change tensors of the file that holds `name`, and make the journal's hash fit."""
    file = out / json.loads((out / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    journal = json.loads((out / "conversion.json").read_text())
    journal["files"][file.name] = publish.entry_of(file)
    (out / "conversion.json").write_text(json.dumps(journal))


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8"])
def test_a_right_export_passes(made: Made, source: CheckpointReader, format: Format) -> None:
    out, done = made.exported(BF16, format)
    verified = verify_export(source, out, done.plan)
    assert verified.files == len(list(out.iterdir())) - 1
    assert verified.tensors == len(source.names())
    # Half a step is the worst that rounding to nearest does, and among thousands of values it comes close.
    assert verified.worst_step == 0 if format != "fp8" else 0.45 < verified.worst_step <= 0.5 + 1e-4


def doubled_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}_scale_inv"].mul_(2)


def one_payload_off(tensors: dict[str, Tensor]) -> None:
    """One code further, where the rows are looked at: the next E4M3 number."""
    tensors[FIRST].view(torch.uint8)[ROWS.start, 0] ^= 1


def gate_and_up_swapped(tensors: dict[str, Tensor]) -> None:
    other = FIRST.replace("gate_proj", "up_proj")
    for suffix in ("", "_scale_inv"):
        tensors[FIRST + suffix], tensors[other + suffix] = tensors[other + suffix], tensors[FIRST + suffix]


@pytest.mark.parametrize("defect", [doubled_scale, one_payload_off, gate_and_up_swapped], ids=lambda f: f.__name__)
def test_wrong_values_are_named_whatever_the_hashes_say(
    source: CheckpointReader, plan: ExportPlan, copy: Path, defect: Change
) -> None:
    forge(copy, FIRST, defect)
    with pytest.raises(ValueError, match=r"holds model\.layers\.0\.mlp\.(gate|up)_proj\.weight with other values"):
        verify_export(source, copy, plan)


def test_a_zero_is_compared_with_the_smallest_step(tmp_path: Path) -> None:
    model = lively(RAGGED, BF16)
    model.get_parameter("layers.0.mlp.gate_up_proj.weight")[ROWS.start, 0] = 0
    source = saved(model, tmp_path)
    plan = export(source, tmp_path / "out", ExportOptions("fp8", shard_bytes=SHARD_BYTES)).plan

    def one_above_zero(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST].view(torch.uint8)[ROWS.start, 0] = 0x01

    forge(tmp_path / "out", FIRST, one_above_zero)
    with pytest.raises(ValueError, match="with other values"):
        verify_export(source, tmp_path / "out", plan)


def test_a_flipped_bit_is_found_by_its_hash(source: CheckpointReader, plan: ExportPlan, copy: Path) -> None:
    file = flip_a_bit(copy / "model-00003-of-00004.safetensors")
    with pytest.raises(ValueError, match=f"{file.name} is missing or not as it was written"):
        verify_export(source, copy, plan)


def test_an_unfinished_export_does_not_pass(source: CheckpointReader, plan: ExportPlan, copy: Path) -> None:
    journal = json.loads((copy / "conversion.json").read_text())
    del journal["files"]["config.json"]
    (copy / "conversion.json").write_text(json.dumps(journal))
    with pytest.raises(ValueError, match=r"is not finished: config\.json is not in its conversion\.json"):
        verify_export(source, copy, plan)


def test_a_right_import_passes_and_a_wrong_one_is_named(made: Made, tmp_path: Path) -> None:
    hf = HfReader(made.folder(BF16, "fp8"))
    path = import_hf(hf, tmp_path / "run").path
    assert verify_import(hf, path).tensors == len(hf.names())
    forged = lively(RAGGED, BF16)
    forged.get_parameter("layers.2.mlp.experts.down_proj").mul_(-1)
    with pytest.raises(ValueError, match=r"other values"):
        verify_import(hf, saved(forged, tmp_path / "other").path)


def test_logits_of_another_model_are_refused(made: Made, source: CheckpointReader) -> None:
    with pytest.raises(ValueError, match=r"differ by .* between our model and the other implementation"):
        compare_logits(
            source, made.folder(BF16, "fp8"), lambda _, ids, given: torch.ones(*ids.shape, RAGGED.vocab_size)
        )
