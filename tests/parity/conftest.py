"""The text that ships with the repository, tokenised once for all runs that compare precisions."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.data.ingest import Recipe, prepare

TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stores `train` and `heldout` of the demo."""
    out = tmp_path_factory.mktemp("demo") / "store"
    prepare(Recipe(source=str(TEXT), vocab_size=1024), out)
    return out
