"""The bench table: entries are complete, parity comes before speed, a red parity prints none and exits 1."""

from __future__ import annotations

import ast
import csv
import dataclasses
import importlib
import math
import pkgutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kernels
from kernels.bench_entry import Bench
from launch import bench as launch_bench
from train.studies.bench import table as bench_table

CPU = torch.device("cpu")


def entry(error: float, tolerance: float = 0.01) -> Bench:
    """An operation whose result is off by the relative error given."""
    return Bench(
        name=f"off by {error}",
        make_inputs=lambda device: (torch.ones(4, device=device),),
        run=lambda x: x * (1 + error),
        peer=lambda x: x.clone(),
        peer_name="clone",
        tolerance=tolerance,
        flops=4.0,
        bytes=32.0,
    )


def test_every_autograd_or_update_kernel_file_has_an_entry() -> None:
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.ispkg:
            continue
        source = Path(kernels.__path__[0], f"{module.name}.py").read_text()
        defined = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
        if any(name.endswith("_reference") for name in defined):
            assert importlib.import_module(f"kernels.{module.name}").BENCH, module.name


@pytest.mark.parametrize("bench", bench_table.entries(), ids=lambda bench: bench.name)
def test_every_entry_agrees_with_its_peer(bench: Bench) -> None:
    error = bench_table.relative_error(bench.run(*bench.make_inputs(CPU)), bench.peer(*bench.make_inputs(CPU)))
    # The tolerance stands, with its origin, beside each entry.
    assert error <= bench.tolerance
    assert bench.flops + bench.bytes > 0


def test_relative_error_is_the_frobenius_ratio() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert bench_table.relative_error(torch.tensor([3.0, 4.5]), expected) == 0.1
    assert bench_table.relative_error(expected.bfloat16(), expected) == 0.0
    assert bench_table.relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert math.isnan(bench_table.relative_error(torch.zeros(3), expected))
    assert math.isnan(bench_table.relative_error(torch.tensor([3.0, math.nan]), expected))


def test_a_green_row_has_times_and_their_ratios() -> None:
    row = bench_table.measure(entry(0.005), CPU, rounds=3)
    assert row.green
    assert row.time_us is not None
    assert row.peer_time_us is not None
    assert row.time_us > 0
    assert row.speedup == pytest.approx(row.peer_time_us / row.time_us, rel=1e-12)
    assert row.tflop_per_s == pytest.approx(4.0 / row.time_us / 1e6, rel=1e-12)
    assert row.gbyte_per_s == pytest.approx(32.0 / row.time_us / 1e3, rel=1e-12)


@pytest.mark.parametrize("error", [0.02, math.nan])
def test_a_red_row_is_never_timed(error: float) -> None:
    row = bench_table.measure(entry(error), CPU, rounds=3)
    assert not row.green
    assert (row.time_us, row.peer_time_us, row.tflop_per_s, row.gbyte_per_s, row.speedup) == (None,) * 5
    line = bench_table.render([row], CPU).splitlines()[-1]
    assert "RED" in line
    assert line.split("RED")[1].split()[1:5] == ["-", "-", "-", "-"]


def test_parity_gets_fresh_inputs_when_an_operation_works_in_place() -> None:
    in_place = dataclasses.replace(entry(0.0), run=lambda x: x.mul_(2), peer=lambda x: x * 2)
    assert bench_table.measure(in_place, CPU, rounds=1).parity_error == 0.0


def test_two_entries_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kernels.swiglu")
    monkeypatch.setattr(module, "BENCH", (*module.BENCH, *module.BENCH))
    with pytest.raises(ValueError, match="appear twice"):
        bench_table.entries()


def test_csv_has_one_line_a_row_and_empty_cells_for_red(tmp_path: Path) -> None:
    rows = bench_table.table([entry(0.0), entry(0.5)], CPU, rounds=1)
    path = tmp_path / "bench.csv"
    bench_table.write_csv(rows, path)
    with path.open(newline="") as file:
        green, red = csv.DictReader(file)
    assert float(green["time_us"]) == rows[0].time_us
    assert float(red["parity_error"]) == 0.5
    assert red["time_us"] == ""


def test_exit_status_is_one_when_a_parity_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.py"])
    monkeypatch.setattr(bench_table, "entries", lambda: (entry(0.0),))
    assert launch_bench.main() == 0
    monkeypatch.setattr(bench_table, "entries", lambda: (entry(0.0), entry(0.5)))
    assert launch_bench.main() == 1
    assert "off by 0.5" in capsys.readouterr().err


def test_command_prints_the_table_and_writes_the_csv(
    run_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    path = tmp_path / "rope.csv"
    done = run_command("launch/bench.py", "--only", "rope", "--csv", path)
    assert "torch, elementwise" in done.stdout
    assert len(done.stdout.splitlines()) == 3
    assert path.read_text().count("\n") == 2
