"""Which implementation `kernels.backend` chooses, with a device's capability given in its place."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kernels import backend
from kernels.config import Backend


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    backend.use_backend("gluon")


@pytest.mark.parametrize(
    ("name", "capability", "triton", "gluon"),
    [
        ("gluon", (9, 0), True, True),
        ("gluon", (10, 0), True, False),
        ("gluon", (8, 9), True, False),
        ("gluon", (8, 0), False, False),
        ("portable", (9, 0), True, False),
        ("deepgemm", (9, 0), True, True),
        ("reference", (9, 0), False, False),
    ],
)
def test_a_backend_is_a_choice_among_what_the_device_has(
    name: Backend, capability: tuple[int, int], triton: bool, gluon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_capability", lambda _: capability)
    x: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 0)
    backend.use_backend(name)
    assert (backend.use_triton(x), backend.use_gluon(x)) == (triton, gluon)
