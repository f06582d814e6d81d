"""What the files of this folder share: the text of the repository, tokenised once, and ranks that stay up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from train.data.ingest import Recipe, prepare

if TYPE_CHECKING:
    from tests.fuzz_layouts import Pools

TEXT = Path(__file__).resolve().parents[2] / "data/king_james_bible/text.jsonl"


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stores `train` and `heldout` of the demo."""
    out = tmp_path_factory.mktemp("demo") / "store"
    prepare(Recipe(source=str(TEXT), vocab_size=1024), out)
    return out


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pools]:
    """Ranks that answer cases of the fuzzer; they stay up for a file."""
    from tests.fuzz_layouts import pools

    with pools() as at:
        yield at
