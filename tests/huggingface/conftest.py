"""One model, checkpoint and export of each kind for all tests of this folder; a test that changes files copies them."""

from __future__ import annotations

import pytest

from tests.huggingface.hf_folders import Made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))
