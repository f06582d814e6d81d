"""`launch/ablate.py`: small sizes from text to pictures, and mistakes in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import ablate

TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


def test_quick_writes_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    where = ["--text", str(text), "--stores", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    assert ablate.main(["--quick", "--variants", "fp8", *where, "model.num_hidden_layers=1"]) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert list(result["runs"]) == ["bf16", "bf16_reordered", "fp8"]
    assert len(result["runs"]["fp8"]["gaps"]) == 2
    assert result["overrides"] == ["model.num_hidden_layers=1"]
    assert "| the recipe |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "fp9"], "variant 'fp9' does not exist"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["model.hidden_sise=3"], "did you mean model.hidden_size?"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    where = ["--text", str(text), "--stores", str(tmp_path / "store"), "--out", str(tmp_path / "out"), "--quick"]
    assert ablate.main([*where, *arguments]) == 2
    # Progress bars of tokenising may stand before it.
    said = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert len(said) == 1
    assert said[0].startswith("ablate: ")
    assert sentence in said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_size_is_refused_in_one_sentence_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    where = ["--text", str(text), "--stores", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    arguments = ["--quick", "--variants", "bf16", *where]
    assert ablate.main([*arguments, "model.num_hidden_layers=1"]) == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert ablate.main(arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ablate: {tmp_path / 'out/bf16-0'} holds a run with model.num_hidden_layers=1, and 2 is")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == kept
