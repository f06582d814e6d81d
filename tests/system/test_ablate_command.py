"""`launch/ablate.py`: small sizes from text to pictures, and mistakes in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from launch import ablate

TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A text, a folder for its tokens, and quick sizes."""
    folder = tmp_path_factory.mktemp("ablate")
    text = "".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:12])
    (folder / "text.jsonl").write_text(text, encoding="utf-8")
    return ["--text", str(folder / "text.jsonl"), "--stores", str(folder / "store"), "--quick"]


@pytest.fixture(scope="module")
def measured(where: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished command, and what it printed."""
    out, printed = tmp_path_factory.mktemp("ablate") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert ablate.main([*where, "--out", str(out), "--variants", "fp8", "model.num_hidden_layers=1"]) == 0
    return out, printed.getvalue()


def test_quick_writes_tables_and_pictures(measured: tuple[Path, str]) -> None:
    out, printed = measured
    result = json.loads((out / "result.json").read_text())
    assert list(result["runs"]) == ["bf16", "bf16_reordered", "fp8"]
    assert len(result["runs"]["fp8"]["gaps"]) == 2
    assert result["overrides"] == ["model.num_hidden_layers=1"]
    assert "| the recipe |" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--variants", "fp9"], "variant 'fp9' does not exist"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl"),
        (["model.hidden_sise=3"], "did you mean model.hidden_size?"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    arguments: list[str], sentence: str, where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate.main([*where, "--out", str(tmp_path / "out"), *arguments]) == 2
    # Progress bars of tokenising may come before it.
    said = [line for line in capsys.readouterr().err.splitlines() if line and "examples" not in line]
    assert len(said) == 1
    assert said[0].startswith("ablate: ")
    assert sentence in said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_size_is_refused_in_one_sentence_and_kept(
    measured: tuple[Path, str], where: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = measured
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert ablate.main([*where, "--out", str(out), "--variants", "bf16"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"ablate: {out / 'bf16-0'} holds a run with model.num_hidden_layers=1, and 2 is")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
