"""What changed between a saved configuration and today's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from train.checkpoint.identity import changed_fields, check_same_identity
from train.model.precision import Precision


def test_a_field_that_the_saving_version_had_not_is_no_change() -> None:
    saved = {"run": {"seed": 1, "threads": 2}, "name": "x"}
    now = {"run": {"seed": 1, "threads": 4, "new": True}, "kernels": {"backend": "gluon"}, "name": "x"}
    assert changed_fields(saved, now) == {"run.threads": [2, 4]}


def test_how_attentions_output_is_kept_belongs_to_a_run_and_bf16_to_one_that_did_not_say() -> None:
    older = {name: value for name, value in asdict(Precision("fp8")).items() if name != "attention_output"}
    check_same_identity(Path("x"), {"precision": older}, {"precision": asdict(Precision("fp8"))})
    now = {"precision": asdict(Precision("fp8", attention_output="e5m6"))}
    with pytest.raises(ValueError, match=r"attention_output was \S*bf16\S*, now \S*e5m6"):
        check_same_identity(Path("x"), {"precision": older}, now)
