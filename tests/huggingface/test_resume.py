"""A conversion stopped at any moment goes on and ends with the same bytes; another one is not mixed with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.huggingface.hf_folders import RAGGED, SHARD_BYTES, bytes_of, lively, save_checkpoint
from train.checkpoint import publish
from train.huggingface import safetensors_writer as hf_writer
from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.safetensors_writer import Shard
from train.huggingface.weights import CheckpointReader
from train.model.precision import Precision

OPTIONS = ExportOptions(format="fp8", shard_bytes=SHARD_BYTES)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    path = tmp_path_factory.mktemp("source") / "checkpoints/step_00000001"
    return CheckpointReader(save_checkpoint(path, lively(RAGGED, Precision("bf16"))))


@pytest.fixture(scope="module")
def unbroken(source: CheckpointReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "hf"
    assert export(source, out, OPTIONS).written == len(list(out.glob("*.safetensors"))) >= 3
    return out


def killed_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the second file."""
    write_shard, files = hf_writer.write_shard, []

    def dying(path: Path, shard: Shard, values: Iterable[tuple[str, Tensor]]) -> None:
        files.append(path)

        def pieces() -> Iterable[tuple[str, Tensor]]:
            for number, piece in enumerate(values):
                if len(files) == 2 and number == 3:
                    raise Killed
                yield piece

        write_shard(path, shard, pieces())

    monkeypatch.setattr(hf_writer, "write_shard", dying)


def killed_before_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file is whole, but under its hidden name."""
    rename = hf_writer._rename

    def dying(hidden: Path, path: Path) -> None:
        if path.name.startswith(("model-00002", "shard-00001-model-00002")):
            raise Killed
        rename(hidden, path)

    monkeypatch.setattr(hf_writer, "_rename", dying)


def killed_before_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file has its name, but the journal does not know it."""
    note = hf_writer.Journal.note

    def dying(journal: hf_writer.Journal, name: str, entry: dict[str, object]) -> None:
        if name.startswith(("model-00002", "shard-00001-model-00002")):
            raise Killed
        note(journal, name, entry)

    monkeypatch.setattr(hf_writer.Journal, "note", dying)


def killed_before_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights are there, the index is not; nor may config.json be, which makes the folder a model."""
    rename = hf_writer._rename

    def dying(hidden: Path, path: Path) -> None:
        if path.name == INDEX:
            raise Killed
        rename(hidden, path)

    monkeypatch.setattr(hf_writer, "_rename", dying)


DEATHS = (killed_in_values, killed_before_rename, killed_before_note, killed_before_index)


@pytest.mark.parametrize("die", DEATHS, ids=[die.__name__ for die in DEATHS])
def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(
    source: CheckpointReader, unbroken: Path, tmp_path: Path, die: Callable[[pytest.MonkeyPatch], None]
) -> None:
    out = tmp_path / "hf"
    with pytest.MonkeyPatch.context() as patch:
        die(patch)
        with pytest.raises(Killed):
            export(source, out, OPTIONS)
    assert not (out / "config.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*")}
    noted = json.loads((out / "conversion.json").read_text())["files"]
    export(source, out, OPTIONS)
    assert bytes_of(out) == bytes_of(unbroken)
    kept = [path for path, time in finished.items() if path.stat().st_mtime_ns == time]
    assert {path.name for path in kept} == {name for name in noted if name.endswith(".safetensors")}
    assert kept


@pytest.mark.parametrize("die", DEATHS[:3], ids=[die.__name__ for die in DEATHS[:3]])
def test_a_killed_import_goes_on_and_ends_with_the_same_bytes(
    unbroken: Path, tmp_path: Path, die: Callable[[pytest.MonkeyPatch], None]
) -> None:
    whole = import_hf(HfReader(unbroken), tmp_path / "whole", shard_bytes=SHARD_BYTES)
    hf = HfReader(unbroken)
    with pytest.MonkeyPatch.context() as patch:
        die(patch)
        with pytest.raises(Killed):
            import_hf(hf, tmp_path / "run", shard_bytes=SHARD_BYTES)
    assert publish.published(tmp_path / "run/checkpoints") == []
    again = import_hf(HfReader(unbroken), tmp_path / "run", shard_bytes=SHARD_BYTES)
    assert 0 < again.written < whole.written
    assert bytes_of(again.path) == bytes_of(whole.path)
    publish.verify(again.path)
    assert import_hf(HfReader(unbroken), tmp_path / "run", shard_bytes=SHARD_BYTES).written == 0


def test_a_finished_file_that_was_damaged_is_written_anew(
    source: CheckpointReader, unbroken: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    export(source, out, OPTIONS)
    damaged = out / "model-00002-of-00004.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert export(source, out, OPTIONS).written == 1
    assert bytes_of(out) == bytes_of(unbroken)


def test_another_source_plan_or_choice_of_weights_is_refused(
    source: CheckpointReader, unbroken: Path, tmp_path: Path
) -> None:
    before = bytes_of(unbroken)
    model = lively(RAGGED, Precision("bf16"))
    with torch.no_grad():
        model.norm.weight[0] += 1.0
    other = CheckpointReader(save_checkpoint(tmp_path / "checkpoints/step_00000001", model))
    for message, reader, options in (
        ("another source", other, OPTIONS),
        ("another plan", source, ExportOptions(format="bf16", shard_bytes=SHARD_BYTES)),
        (r"another weights \(model, now ema\)", source, ExportOptions("fp8", "ema", SHARD_BYTES)),
    ):
        with pytest.raises(ValueError, match=f"holds a conversion with {message}.*; name another folder"):
            export(reader, unbroken, options)
    assert bytes_of(unbroken) == before


def test_a_changed_hugging_face_folder_is_another_source(unbroken: Path, tmp_path: Path) -> None:
    import_hf(HfReader(unbroken), tmp_path / "run")
    stat = (unbroken / "config.json").stat()
    os.utime(unbroken / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="another source"):
        import_hf(HfReader(unbroken), tmp_path / "run")


def test_a_folder_of_somebody_else_is_left_alone(source: CheckpointReader, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="already holds something else; name a new or empty folder"):
        export(source, tmp_path, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
