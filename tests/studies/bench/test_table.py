"""The bench table: rows are complete, parity comes before speed, a red parity prints none and exits 1."""

from __future__ import annotations

import csv
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import backend
from launch import bench as launch_bench
from train.studies.bench import rows as bench_rows
from train.studies.bench import table as bench_table
from train.studies.bench.table import Case

CPU = torch.device("cpu")


def case(error: float, run: Callable[[Tensor], Tensor] | None = None) -> Case:
    """An operation whose result is off by the relative error given."""
    return bench_rows.pair(
        f"off_by_{error}".replace(".", "_"),
        lambda device: (torch.ones(4, device=device),),
        run or (lambda x: x * (1 + error)),
        lambda x: x * 2 if run else x.clone(),
        "clone",
        tolerance=0.01,
        flops=4.0,
        bytes=32.0,
    )


def measured(*cases: Case) -> list[bench_table.Row]:
    return bench_table.run(cases, CPU, clock=bench_rows.clock_of(CPU, rounds=1))


@pytest.mark.parametrize("case", bench_rows.cases(), ids=lambda case: case.name)
def test_every_entry_agrees_with_its_peer(case: Case) -> None:
    ours, inputs = case.candidates[0], case.make(CPU)
    row = bench_table.Row(case.name, case.kind, ours.name, "measured")
    # The tolerance stands, with its origin, beside each entry.
    row = bench_table.check(row, ours, inputs, inputs.expected())
    assert row.status == "measured", row
    assert row.parity_error is not None
    assert case.flops + case.bytes > 0
    assert inputs.nbytes > 0


def test_relative_error_is_the_frobenius_ratio() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert bench_table.relative_error(torch.tensor([3.0, 4.5]), expected) == 0.1
    assert bench_table.relative_error(expected.bfloat16(), expected) == 0.0
    assert bench_table.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert math.isnan(bench_table.relative_error(torch.zeros(3), expected))
    assert math.isnan(bench_table.relative_error(torch.tensor([3.0, math.nan]), expected))


def test_a_green_row_has_times_and_their_ratios() -> None:
    (row,) = bench_table.summaries(measured(case(0.005)))
    assert row["time_us"] > 0
    assert row["speedup"] == pytest.approx(row["peer_time_us"] / row["time_us"], rel=1e-12)
    assert row["tflop_per_s"] == pytest.approx(4.0 / row["time_us"] / 1e6, rel=1e-12)
    assert row["gbyte_per_s"] == pytest.approx(32.0 / row["time_us"] / 1e3, rel=1e-12)


@pytest.mark.parametrize("error", [0.02, math.nan])
def test_a_red_row_is_never_timed(error: float) -> None:
    rows = measured(case(error))
    assert [row.case for row in bench_table.red(rows)] == [rows[0].case]
    (row,) = bench_table.summaries(rows)
    assert [row[key] for key in bench_table.SUMMARY[4:]] == [None] * 5
    line = bench_table.render(rows, CPU).splitlines()[2]
    assert line.split("RED")[1].split()[1:6] == ["1.0e-02", "-", "-", "-", "-"]


def test_parity_gets_fresh_inputs_when_an_operation_works_in_place() -> None:
    (row,) = bench_table.summaries(measured(case(0.0, lambda x: x.mul_(2))))
    assert row["parity_error"] == 0.0


def test_two_entries_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_rows.ROWS, "swiglu", bench_rows.ROWS["swiglu"] * 2)
    with pytest.raises(ValueError, match="appear twice"):
        bench_rows.cases()


def test_csv_has_one_line_a_row_and_empty_cells_for_red(tmp_path: Path) -> None:
    rows, path = measured(case(0.0), case(0.5)), tmp_path / "bench.csv"
    bench_table.write_csv(rows, path)
    with path.open(newline="") as file:
        green, red = csv.DictReader(file)
    assert float(green["time_us"]) == rows[0].time_us
    assert float(red["parity_error"]) == 0.5
    assert red["time_us"] == red["peer_time_us"] == ""


def test_exit_status_is_one_when_a_parity_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py", "--kernels", "portable"])
    monkeypatch.setattr(backend, "_OF_PROCESS", {"backend": "gluon"})
    monkeypatch.setattr(bench_rows, "ROWS", {"a": (case(0.0),)})
    assert launch_bench.main() == 0
    assert backend._OF_PROCESS == {"backend": "portable"}
    monkeypatch.setattr(bench_rows, "ROWS", {"a": (case(0.0), case(0.5))})
    assert launch_bench.main() == 1
    assert "off_by_0_5" in capsys.readouterr().err


def test_the_legend_says_what_each_column_means_and_which_way_is_better() -> None:
    heading, _, blank, *legend = bench_table.render(measured(case(0.0)), CPU).splitlines()[1:]
    named = {name for line in legend for name in line.partition(": ")[0].split(", ")} | {"case", "bound", "peer"}
    assert (blank, set(heading.split())) == ("", named)
    assert all("better" in line or "faster" in line for line in legend)
    assert all(line in bench_table.markdown(measured(case(0.0))) for line in legend)


def test_a_printed_name_can_be_given_back_and_a_mistyped_one_is_told_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = bench_rows.cases()
    assert [bench_rows.chosen(case.name) for case in every] == [[case] for case in every]
    for file, cases in bench_rows.ROWS.items():
        assert bench_rows.chosen(file) == cases
    for typed, near in {
        "rmsnrom": "rmsnorm",
        "Quantize_tile": "quantize_tiles",
        "route forward+backward": "route_forward",
    }.items():
        monkeypatch.setattr("sys.argv", ["bench.py", "--only", typed])
        assert launch_bench.main() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"bench: --only {typed} is no case and no kernel file: did you mean {near}")
    for name, cure in {
        "deepgem": "did you mean deepgemm?",
        "deepgemm": "give it to `layer`; rows have it as a peer",
    }.items():
        monkeypatch.setattr("sys.argv", ["bench.py", "--kernels", name])
        assert launch_bench.main() == 2
        assert capsys.readouterr().err.endswith(f"{cure}\n")
    monkeypatch.setattr(bench_rows, "ROWS", {"a": [bench_rows.pair("a b", *[None] * 4, tolerance=0, bytes=0)]})
    with pytest.raises(ValueError, match=r"'a b'.*letters, digits and underscores"):
        bench_rows.cases()


def test_command_prints_the_table_and_writes_the_csv(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    path = tmp_path / "rope.csv"
    done = run_command("launch/bench.py", "--only", "rope", "--csv", path)
    assert "torch, elementwise" in done.stdout
    assert len(done.stdout.splitlines()) == 3 + 1 + len(bench_table.LEGEND)
    assert path.read_text().count("\n") == 2
