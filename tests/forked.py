"""Done once in the server from which ranks are forked (`tests/ranks.py`): every rank has it then, at no cost.

The first configuration that a process composes takes a second, for Hydra's imports and the tables of its grammars.
"""

from __future__ import annotations

from contextlib import suppress

import tests.ranks  # noqa: F401  (with pytest, which each rank would import for itself)
from train.config import compose

# Files that cannot be composed are the matter of the tests that read them.
with suppress(ValueError):
    compose([])
