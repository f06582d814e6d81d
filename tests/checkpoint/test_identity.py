"""What changed between a saved configuration and today's."""

from __future__ import annotations

from train.checkpoint.identity import changed_fields


def test_a_field_that_the_saving_version_had_not_is_no_change() -> None:
    saved = {"run": {"seed": 1, "threads": 2}, "name": "x"}
    now = {"run": {"seed": 1, "threads": 4, "new": True}, "kernels": {"backend": "gluon"}, "name": "x"}
    assert changed_fields(saved, now) == {"run.threads": [2, 4]}
