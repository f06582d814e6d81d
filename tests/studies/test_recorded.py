"""What recorded studies share: figures over seeds, tables, a folder of one setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.studies.recorded import claim_folder, head, spread


def test_spreads_over_seeds() -> None:
    assert (spread([0.5, 0.7, 0.9]), spread([0.5, 0.75], 1), spread([1.0, 1.0])) == (
        "70% (50% to 90%)",
        "62.5% (50.0% to 75.0%)",
        "100%",
    )
    assert head("a", "b") == ["| a | b |", "|---|---|"]


def test_a_folder_is_of_one_setting(tmp_path: Path) -> None:
    for _ in range(2):
        claim_folder(tmp_path / "study", {"steps": 3})
    with pytest.raises(ValueError, match="holds a study with other settings: give --out another folder"):
        claim_folder(tmp_path / "study", {"steps": 4})
