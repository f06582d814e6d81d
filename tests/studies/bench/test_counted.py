"""The planner's bytes of every kind of layer are today's, and its rule for other widths meets another model's count."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this file")

from train.config import compose
from train.studies.bench import counted
from train.studies.plan.candidate import Candidate
from train.studies.plan.costs import PARTS, layer_parts
from train.studies.plan.dry_run import as_rank
from train.studies.plan.products import Implementation, Setup, machine
from train.studies.plan.tables import read_tables
from train.studies.smoke_runs import model_config

# Each layer, precision and way to keep things at least once; `test_ledger.py` compares h800_2048's own.
COMPARED = (
    counted.LayerVariant("moe", "bf16", recompute=True, attention_output="bf16"),
    counted.LayerVariant("moe", "fp8", recompute=False, attention_output="bf16"),
    counted.LayerVariant("dense", "bf16", recompute=False, attention_output="bf16"),
    counted.LayerVariant("dense", "fp8", recompute=True, attention_output="e5m6"),
)


@pytest.mark.long
def test_the_table_is_what_the_code_moves_today() -> None:
    """To 0.1 bytes a token, the table's rounding. If not: `python -m train.studies.bench.counted`."""
    assert set(COMPARED) < set(counted.variants())
    config, rows = compose(["+cluster=h800_2048", "layout.dispatch=direct"]), read_tables().rows
    tokens = config.data.sequence_length
    with as_rank(config, 0) as mesh:
        for variant in COMPARED:
            moved, launches = counted.by_phase(counted.entries_of(variant, config, mesh))
            for phase, count in launches.items():
                value = rows[f"{variant.name}, {phase}"].value
                assert isinstance(value, tuple), phase
                by_hidden, others, fixed, known = value
                expected = tokens * (by_hidden + others) + fixed
                assert expected == pytest.approx(moved[phase], abs=0.1 * tokens + 1), (variant.name, phase)
                assert known == count, (variant.name, phase)


@pytest.mark.long
def test_widths_of_another_model_are_scaled_as_they_are_counted() -> None:
    """v3_16b as h100_256 runs it, hidden 2048 of 7168, 16 of 128 heads, 6 experts a token of 1408: -4.5 % in all."""
    small = model_config("v3_16b")
    config = compose(["+cluster=h100_256"])
    assert config.model == small
    candidate = Candidate(1, 256, config.layout.ep, "1F1B", 1, (27,))
    setup = Setup(small, candidate, Implementation("today"), machine("H100"), config.data.sequence_length)
    variant = counted.LayerVariant("moe", "fp8", recompute=True, attention_output="bf16")
    with as_rank(config, 0) as mesh:
        moved, _ = counted.by_phase(counted.entries_of(variant, config, mesh))
    parts = layer_parts(setup, moe=True, beside_exchange=False)
    predicted = sum(parts[part].memory for part in PARTS) * setup.machine.memory
    # Counted with a copy for each of six experts; a token really goes to fewer of eight ranks.
    assert predicted == pytest.approx(sum(moved.values()), rel=0.10)
