"""How long OpenMP's threads spin at a barrier before they sleep: it must be set before torch is loaded.

libgomp, which torch's wheels bring, spins 300,000 turns: quickest on a quiet machine, and far the slowest beside other
work, where a thread spins for one that has no core. docs/reliability.md, "A busy machine", has the figures.
"""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS_OF_A_USER = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
# 2026-11-29, two cores of a Xeon, torch 2.13.0.
SPIN_TURNS = 3_000


def spin_default(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment; nothing where its user chose."""
    return {} if SETTINGS_OF_A_USER & given.keys() else {"GOMP_SPINCOUNT": str(SPIN_TURNS)}
