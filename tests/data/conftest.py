"""One small store for the readers, and silence from `datasets`."""

from __future__ import annotations

import datasets
import pytest

from tests.data.handmade import consecutive, write_store
from train.data.store import TokenStore


@pytest.fixture(scope="session", autouse=True)
def quiet_datasets() -> None:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)


@pytest.fixture(scope="session")
def unique_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Eleven documents of 1 to 21 tokens, 121 in all, every token different: 10, 11, ... 130."""
    documents = consecutive([11, 1, 21, 3, 19, 5, 17, 7, 15, 9, 13])
    return write_store(tmp_path_factory.mktemp("unique") / "store", documents)
