"""Every number that the planner is given, as a row: value, unit, label, source and date.

    gemm.json        TFLOP/s of V3's products on an H100: DeepGEMM, the best prototype of this project, BF16
    rates.json       attention, memory, links, exchanges; bytes of layers that do not exist today
    profile.json     DeepSeek's published profile of an overlapped pair on H800, by phase and kind of kernel
    published.json   DeepSeek's step, and what other trainers publish
    counted.json     bytes of this project's layers by phase, from the ledger (`train/studies/bench/counted.py`)

`measured` is a time on a GPU that we had, `published` somebody else's, `counted` follows from code or shapes without a
choice, and `modelled` is everything that somebody had to assume. Files hold groups of rows with one label and source.
A green report of `make gpu` (`train/studies/measured.py`) replaces the rows that it has measured, and names itself.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from train.studies.measured import read_report

FOLDER = Path(__file__).parent / "tables"
Label = Literal["measured", "published", "modelled", "counted"]
LABELS: tuple[Label, ...] = get_args(Label)
# Columns of products: whose kernel.
Column = Literal["deepgemm", "deepgemm 2025-02", "ours", "bf16"]
# A product [m, k] x [n, k] of `groups` together; of grouped wgrad, k is the rows of all groups.
Kind = Literal["fprop", "dgrad", "wgrad", "grouped fprop", "grouped dgrad", "grouped wgrad"]


@dataclass(frozen=True)
class Figure:
    """One number, or a few that belong together."""

    what: str
    value: float | tuple[float, ...]
    unit: str
    label: Label
    source: str
    date: str


class KnownProduct(NamedTuple):
    """A GEMM whose speed is known, FLOP/s."""

    kind: str
    groups: int
    m: int
    n: int
    k: int
    flop_per_s: float


@dataclass(frozen=True)
class Tables:
    """The rows by name; hashable by identity, for what is derived from them is cached."""

    rows: Mapping[str, Figure]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def value(self, what: str) -> float:
        """The number of a row."""
        value = self.rows[what].value
        assert not isinstance(value, tuple), what
        return value

    def values(self, what: str) -> tuple[float, ...]:
        """The numbers of a row that has several."""
        value = self.rows[what].value
        assert isinstance(value, tuple), what
        return value

    @functools.cache  # noqa: B019  one Tables a process, and one for each report
    def products(self, column: Column) -> tuple[KnownProduct, ...]:
        """All products of a column; what DeepGEMM's first release did not publish is that of today's."""
        columns = ("deepgemm", column) if column == "deepgemm 2025-02" else (column,)
        found = {each[:5]: each for name in columns for each in _products(self.rows, name)}
        return tuple(found.values())


_PRODUCT = re.compile(
    r"(deepgemm(?: 2025-02)?|ours|bf16) ((?:grouped )?(?:fprop|dgrad|wgrad)) G(\d+) M(\d+) N(\d+) K(\d+)"
)


def _products(rows: Mapping[str, Figure], column: str) -> Iterator[KnownProduct]:
    for what, row in rows.items():
        found = _PRODUCT.fullmatch(what)
        if found and found[1] == column:
            groups, m, n, k = map(int, found.groups()[2:])
            assert not isinstance(row.value, tuple), what
            yield KnownProduct(found[2], groups, m, n, k, row.value * 1e12)


@functools.cache
def read_tables(report: Path | None = None) -> Tables:
    """The committed rows, those that a report of `make gpu` has measured in its place.

    Raises:
        ValueError: the file is no report.
    """
    rows: dict[str, Figure] = {}
    for path in sorted(FOLDER.glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8"))["groups"]:
            values = group.pop("rows")
            for what, value in values.items():
                assert what not in rows, f"{path.name} has {what} twice"
                rows[what] = Figure(what, tuple(value) if isinstance(value, list) else value, **group)
    return Tables(rows | (_of_report(report) if report else {}))


# The bench's names of a case (`train/studies/bench/cases.py`) and of who computes it. "overwrite" is left out: a step's
# first micro-batch only writes weight gradients, all others add.
_CASE = re.compile(r"((?:grouped_)?(?:fprop|dgrad|wgrad))_(?:G(\d+)_)?M(\d+)_N(\d+)_K(\d+)(?:_accumulate)?")
_COLUMNS = {"ours": "ours", "DeepGEMM": "deepgemm", "torch.mm BF16": "bf16", "F.grouped_mm BF16": "bf16"}


def _of_report(path: Path) -> dict[str, Figure]:
    """Rows that a report has measured; none where its speeds may not be used."""
    report = read_report(path)
    if report is None or report.refusal:
        return {}
    date = report.where.split(", ")[1]
    source = f"make gpu on {report.where}"
    found = {}
    for (case, candidate), speed in report.speeds.items():
        column = _COLUMNS.get(candidate.partition(",")[0])
        shape = _CASE.fullmatch(case)
        if column and shape:
            groups, m, n, k = (int(digits or 1) for digits in shape.groups()[1:])
            what = f"{column} {shape[1].replace('_', ' ')} G{groups} M{m} N{n} K{k}"
            found[what] = Figure(what, speed, "TFLOP/s", "measured", source, date)
    for layer in report.layers:
        what = f"layer {layer.precision}{' deterministic' if layer.deterministic else ''}"
        found[what] = Figure(what, layer.time_ms, "ms", "measured", source, date)
    if report.memory_gb_per_s:
        rate = statistics.median(report.memory_gb_per_s)
        found["memory"] = Figure("memory", rate, "GB/s", "measured", source, date)
    return found
