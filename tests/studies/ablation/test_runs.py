"""The ablations: what each variant's one-step errors are, that runs are paired and taken up again, and the report."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train.studies.ablation.runs
import train.trainer
from train.data.ingest import Recipe, prepare
from train.observe.guards import TrainingStopped
from train.step import compute_gradients
from train.studies.ablation.errors import linear_case, moment_errors, operand_errors, outlier_error, product_errors
from train.studies.ablation.linear import AblatedLinears, Ablation
from train.studies.ablation.runs import (
    QUICK,
    STUDENT,
    Variant,
    ablate,
    base_config,
    choose,
    floor,
    interval,
    measure_runs,
    run,
    variants,
)
from train.studies.ablation.tables import tables, write

TEXT = Path(__file__).resolve().parents[3] / "data/king_james_bible/text.jsonl"
OVERRIDES = [f"model.{width}=128" for width in ("hidden_size", "moe_intermediate_size", "intermediate_size")]
OVERRIDES += ["run.max_consecutive_nonfinite=2"]
# One seed, short products.
SMALL = replace(QUICK, seeds=(0,), length=256, lengths=(128, 256))
BF16, MOMENTS = variants()["bf16"], variants()["moments_fp8"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("".join(TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:12]), encoding="utf-8")
    return prepare(Recipe(source=str(text), vocab_size=1024), text.parent / "store").train.path


def linears(ablation: Ablation) -> AblatedLinears:
    return AblatedLinears(ablation, power_of_two=True)


RECIPE = linears(Ablation())
GRADIENTS, SUMS = {"dx", "dx_token", "dw"}, {"y", "sum", "sum_largest"}
# Operands and products that a change may touch; every other number must be that of the recipe, to the last bit.
TOUCHES = {
    "fp32_scales": {"x", "w", "dy_dgrad", "dy_wgrad"} | GRADIENTS | SUMS,
    "gradients_e5m2": {"dy_dgrad", "dy_wgrad"} | GRADIENTS,
    "gradients_128x128": {"dy_dgrad", "dy_wgrad"} | GRADIENTS,
    "hopper_128": GRADIENTS | SUMS,
    "hopper_none": GRADIENTS | SUMS,
}


def all_errors(measured: AblatedLinears) -> dict[str, float]:
    return operand_errors(measured, linear_case(256, 256, 256)) | product_errors(measured, length=512)


@pytest.fixture(scope="module")
def of_recipe() -> dict[str, float]:
    return all_errors(RECIPE)


@pytest.mark.parametrize("name", sorted(TOUCHES))
def test_a_variant_changes_what_it_names_and_nothing_else(name: str, of_recipe: dict[str, float]) -> None:
    errors = all_errors(variants()[name].linears)
    assert errors.keys() == of_recipe.keys()
    assert {key for key in errors if errors[key] != of_recipe[key]} == TOUCHES[name]


def test_errors_are_those_that_the_formats_allow(of_recipe: dict[str, float]) -> None:
    # docs/numerics.md: 0.0265 for one rounding to E4M3, sqrt(2) of it for a product, whatever the tile's scale is.
    # Tokens differ in size here, so few of them carry dW and the norms scatter: 3 % of the prediction.
    for name in ("x", "w", "dy_dgrad", "dy_wgrad"):
        assert of_recipe[name] == pytest.approx(0.0265, rel=0.03), name
    for name in ("y", "dx", "dx_token", "dw"):
        assert of_recipe[name] == pytest.approx(0.0375, rel=0.04), name
    # E5M2 has one bit less: twice the error of one rounding.
    e5m2 = all_errors(linears(Ablation("e5m2")))
    assert e5m2["dy_dgrad"] == pytest.approx(2 * 0.0265, rel=0.03)
    assert e5m2["dx"] == pytest.approx((1 + 4) ** 0.5 * 0.0265, rel=0.06)


def test_one_scale_for_128_tokens_fails_where_tokens_differ_much() -> None:
    blocks = linears(Ablation(gradient_tile="128x128"))
    # E4M3 is floating: under a scale of its own or not, a token loses no bit until it falls below the normal range.
    assert outlier_error(blocks, octaves=0.0) == pytest.approx(outlier_error(RECIPE, octaves=0.0), rel=0.02)
    assert outlier_error(RECIPE, octaves=5.0) == pytest.approx(0.0375, rel=0.04)
    assert outlier_error(blocks, octaves=5.0) > 0.15


def test_moments_in_fp8_lose_the_second_one() -> None:
    bf16, fp8 = moment_errors("bf16", steps=20, numel=2048), moment_errors("fp8", steps=20, numel=2048)
    assert moment_errors("fp32", steps=20, numel=2048)["update"] < 1e-5
    # One rounding to BF16 is at most 2^-9; beta2 = 0.95 remembers twenty of them.
    assert bf16["update"] < 0.01
    assert fp8["zero_share"] > 0.01
    assert fp8["update"] > 1.0


def test_each_planted_defect_is_the_mistake_that_it_names() -> None:
    case = linear_case(256, 256, 256)
    x, dy = case.x.requires_grad_(), case.dy

    def products(linears: AblatedLinears, weight: torch.Tensor) -> list[torch.Tensor]:
        y = linears.linear(x, weight)
        return [y.detach(), *torch.autograd.grad(y, x, dy), wgrad_of(weight)]

    def wgrad_of(weight: torch.Tensor) -> torch.Tensor:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        return gradient

    healthy, dropped = (
        products(linears(Ablation(defect=defect)), torch.nn.Parameter(case.weight.clone()))
        for defect in ("none", "dropped_tile")
    )
    assert torch.equal(dropped[0], healthy[0])
    assert torch.equal(dropped[1], healthy[1])
    x = case.x[128:].detach().requires_grad_()
    dy = case.dy[128:]
    assert torch.equal(dropped[2], products(RECIPE, torch.nn.Parameter(case.weight.clone()))[2])
    # Of a weight that doubled, the first scales are half of what they should be; powers of two are exact.
    x, dy, weight = case.x, case.dy, torch.nn.Parameter(case.weight.clone())
    stale = linears(Ablation(defect="stale_scale"))
    first = products(stale, weight)
    assert torch.equal(first[0], healthy[0])
    with torch.no_grad():
        weight.mul_(2.0)
    assert torch.equal(products(stale, weight)[0], healthy[0])


def test_the_interval_of_a_mean_is_students() -> None:
    for seeds, factor in enumerate(STUDENT, start=2):
        freedom = seeds - 1
        # Density of Student's t over [-factor, factor], by the trapezoidal rule.
        t = torch.linspace(-factor, factor, 200_001, dtype=torch.float64)
        norm = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        inside = torch.trapezoid(norm * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t)
        assert float(inside) == pytest.approx(0.95, abs=1e-4)
    # Mean 3, standard deviation sqrt(2.5) over sqrt(5) seeds.
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5))


def test_the_table_of_power_counts_the_seeds_beyond_the_gate() -> None:
    def row(gaps: list[float]) -> dict[str, Any]:
        mean = statistics.fmean(gaps)
        return {"gaps": gaps, "mean": mean, "against_fp8": None, "stopped": [None] * len(gaps)}

    rows = {"bf16": row([0.0, 0.0]), "fp8": row([0.001, 0.0]), "stale_scale": row([0.001, 0.02])}
    rows["dropped_tile"] = row([0.001, math.nan])
    result = {
        "changes": {name: name for name in rows},
        "errors": {"linears": {}, "moments": {}, "sums": {}, "outliers": {}},
        "runs": rows, "size": {"seeds": (0, 1)}, "floor": 0.0005,
    }  # fmt: skip
    text = tables(result)
    assert "| seeds beyond 0.300% |" in text
    assert "| fp8 | +0.050% | -0.585% to +0.685% | 0 of 2 | green |" in text
    assert "| stale_scale | +1.050% | -11.021% to +13.121% | 1 of 2 | RED |" in text
    assert "| dropped_tile |  |  | 1 of 2 | RED |" in text


def test_unknown_variants_are_refused_with_all_names() -> None:
    with pytest.raises(ValueError, match="variant 'fp9' does not exist: choose among bf16, bf16_reordered, fp8"):
        choose(["fp8", "fp9"])
    assert [row.name for row in choose(["fp8", "bf16"])] == ["bf16", "fp8"]
    # Mistakes only where they are asked for.
    assert {"stale_scale", "dropped_tile"} == {*variants()} - {row.name for row in choose([])}


def test_every_variant_changes_one_thing() -> None:
    rows = variants()
    recipe = rows["fp8"]
    for row in rows.values():
        if row.linears is not None and row.name != "fp8":
            assert (row.linears == recipe.linears) == (row.moments != recipe.moments), row.name


@pytest.fixture(scope="module")
def base(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return base_config(store, tmp_path_factory.mktemp("runs"), QUICK, OVERRIDES)


@pytest.fixture
def config(base: Any, tmp_path: Path) -> Any:
    """The runs' settings, in a folder without runs."""
    return replace(base, run=replace(base.run, directory=str(tmp_path / "runs")))


@pytest.fixture(scope="module")
def bf16_run(base: Any) -> dict[str, Any]:
    """A finished BF16 run of four steps, with its folder."""
    return run(base, BF16, 0) | {"folder": Path(base.run.directory)}


@pytest.fixture
def finished(bf16_run: dict[str, Any], config: Any) -> Any:
    """The settings again, in a folder with a copy of that run."""
    shutil.copytree(bf16_run["folder"], config.run.directory)
    return config


def with_weight_decay(config: Any) -> Any:
    return replace(config, optim=replace(config.optim, weight_decay=0.7))


REFUSED = r"bf16-0 holds a run with optim\.weight_decay=0\.1, and 0\.7 is asked for; give --out another"


def never(*_: object, **__: object) -> None:
    raise AssertionError("something was measured again")


def test_a_finished_run_is_read_and_not_run_again(
    bf16_run: dict[str, Any], finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [record["step"] for record in bf16_run["records"]] == [1, 2, 3, 4]
    monkeypatch.setattr(train.trainer.Trainer, "take_step", never)
    assert run(finished, BF16, 0)["records"] == bf16_run["records"]


def test_reporting_and_the_folder_of_a_run_may_change(bf16_run: dict[str, Any], finished: Any) -> None:
    assert finished.run.directory != str(bf16_run["folder"])
    logged = replace(finished, observe=replace(finished.observe, console_every_steps=7))
    assert run(logged, BF16, 0)["records"] == bf16_run["records"]


@pytest.mark.parametrize(
    ("field", "before", "now"),
    [
        ("schedule.lr_peak", "0.002", "0.5"),
        ("optim.weight_decay", "0.1", "0.7"),
        ("run.threads", "1", "2"),
        # Its tensors do not fit either; the field says more.
        ("model.num_hidden_layers", "2", "1"),
        ("data.fim_rate", "0.1", "0.5"),
    ],
)
def test_a_run_made_with_other_settings_is_refused_by_its_field(
    field: str, before: str, now: str, finished: Any, store: Path
) -> None:
    other = base_config(store, Path(finished.run.directory), QUICK, [*OVERRIDES, f"{field}={now}"])
    message = f"bf16-0 holds a run with {field}={before}, and {now} is asked for; give --out another"
    with pytest.raises(ValueError, match=message):
        run(other, BF16, 0)


def kill_after_three_steps(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = train.trainer.Trainer.take_step

    def killed(self: Any, *arguments: Any, **options: Any) -> None:
        if self.state.step == 3:
            raise KeyboardInterrupt
        take_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.trainer.Trainer, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config, BF16, 0)


def test_a_killed_run_goes_on_as_it_was_begun_or_not_at_all(
    bf16_run: dict[str, Any], config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after_three_steps(config, monkeypatch)
    assert not list(Path(config.run.directory).glob("bf16-0/checkpoints/step_*"))
    with pytest.raises(ValueError, match=REFUSED):
        run(with_weight_decay(config), BF16, 0)
    # Bit for bit, as the log's own promise is.
    losses = [[each["loss/main"] for each in result["records"]] for result in (run(config, BF16, 0), bf16_run)]
    assert losses[0] == losses[1]


def test_a_killed_run_whose_log_is_of_another_text_is_no_result(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_after_three_steps(config, monkeypatch)
    log = Path(config.run.directory) / "bf16-0/metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace('"loss/main":', '"loss/main":1'), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ValueError, match="bf16-0 was killed, and its steps, taken again, are not those of its log"):
            run(config, BF16, 0)


@pytest.mark.parametrize("text", [b"", b"run: [", b"\xff", b"model:\n  vocab_size: 1024\n", b"model: 5\n"])
def test_a_finished_run_whose_configuration_is_torn_is_judged_by_its_checkpoint(
    text: bytes, bf16_run: dict[str, Any], finished: Any
) -> None:
    (Path(finished.run.directory) / "bf16-0/config.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=REFUSED):
        run(with_weight_decay(finished), BF16, 0)
    assert run(finished, BF16, 0)["records"] == bf16_run["records"]


def test_runs_with_other_settings_are_refused_before_anything_is_measured(
    finished: Any, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.studies.ablation.runs, "measure_errors", never)
    monkeypatch.setattr(train.studies.ablation.runs, "run", never)
    overrides = [*OVERRIDES, "optim.weight_decay=0.7"]
    with pytest.raises(ValueError, match=REFUSED):
        ablate(store, Path(finished.run.directory), QUICK, names=["moments_fp8"], overrides=overrides)


def test_a_run_that_diverged_is_not_trained_on(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_finite(*arguments: Any, **options: Any) -> Any:
        gradients = compute_gradients(*arguments, **options)
        return replace(gradients, finite=torch.zeros_like(gradients.finite))

    with monkeypatch.context() as patch:
        patch.setattr(train.trainer, "compute_gradients", not_finite)
        first = run(config, BF16, 0)
    assert "2 steps in a row" in first["stopped"]
    again = run(config, BF16, 0)
    assert again["stopped"] == first["stopped"]
    assert again["records"] == first["records"]
    assert len(again["records"]) == 2


def test_runs_log_no_health_of_linears_they_do_not_have(config: Any) -> None:
    records = run(config, variants()["gradients_e5m2"], 0)["records"]
    assert not [name for record in records for name in record if name.startswith("fp8/")]


def test_a_run_that_was_asked_to_stop_is_no_result(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train.studies.ablation.runs.Trainer, "fit", lambda self: self.state)
        with pytest.raises(ValueError, match="stopped in fp8-0 at step 0; the same command goes on"):
            run(config, variants()["fp8"], 0)
    assert len(run(config, variants()["fp8"], 0)["records"]) == 4


def test_a_run_that_diverges_is_reported_and_does_not_end_the_table(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = train.studies.ablation.runs.Trainer.fit

    def stop(self: Any) -> Any:
        state = fit(self)
        if "moments_fp8" in str(self.directory):
            raise TrainingStopped("20 steps in a row were not finite")
        return state

    monkeypatch.setattr(train.studies.ablation.runs.Trainer, "fit", stop)
    logged: list[str] = []
    rows = measure_runs(finished, [MOMENTS], SMALL, logged.append)
    assert rows["moments_fp8"]["stopped"] == ["20 steps in a row were not finite"]
    assert rows["bf16"]["stopped"] == [None]
    assert len(logged) == 3


def test_a_run_without_a_finite_loss_is_a_row_of_the_table_again_and_again(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan_for_fp8_moments(engine: Any, *arguments: Any, **options: Any) -> Any:
        gradients = compute_gradients(engine, *arguments, **options)
        if engine.optimizer.config.moments_dtype != "fp8":
            return gradients
        nan = torch.full_like(gradients.loss_main, torch.nan)
        return replace(gradients, loss_main=nan, finite=torch.zeros_like(gradients.finite))

    monkeypatch.setattr(train.trainer, "compute_gradients", nan_for_fp8_moments)
    first, again = (measure_runs(finished, [MOMENTS], SMALL, lambda _: None) for _ in range(2))
    assert "2 steps in a row" in first["moments_fp8"]["stopped"][0]
    assert again["moments_fp8"]["stopped"] == first["moments_fp8"]["stopped"]
    assert again["bf16_reordered"]["gaps"] == first["bf16_reordered"]["gaps"]
    result = {
        "changes": {name: row.change for name, row in variants().items()},
        "errors": {"linears": {}, "moments": {}, "sums": {}, "outliers": {}},
        "runs": again,
        "size": {"seeds": (0,)},
        "floor": floor(again),
    }
    assert "| moments in FP8 |  (stopped) |  |  |" in tables(result)
    assert "nan" not in tables(result)
    write(result, tmp_path / "out")
    text = (tmp_path / "out/result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["runs"]["moments_fp8"]["mean"] is None


def test_gaps_are_paired_by_seed_and_the_floor_is_the_mean_size(monkeypatch: pytest.MonkeyPatch) -> None:
    # Constant losses: the smoothed gap is the ratio itself. Seeds differ by far more than precisions.
    level = {0: 2.0, 1: 5.0}
    factor = {"bf16": (1.0, 1.0), "bf16_reordered": (1.01, 0.97), "fp8": (1.02, 1.04), "moments_fp8": (1.02, 1.14)}

    def constant(base: object, variant: Variant, seed: int) -> dict[str, Any]:
        loss = level[seed] * factor[variant.name][seed]
        return {"records": [{"step": i, "loss/main": loss} for i in range(6)], "stopped": None, "seconds": 1.0}

    monkeypatch.setattr(train.studies.ablation.runs, "run", constant)
    config: Any = None
    rows = measure_runs(config, choose(["fp8", "moments_fp8", "hopper_256"]), QUICK, lambda _: None)
    assert rows["fp8"]["gaps"] == pytest.approx([0.02, 0.04])
    assert rows["moments_fp8"]["against_fp8"] == pytest.approx((0.0 + 0.10 / 1.04) / 2)
    assert floor(rows) == pytest.approx((0.01 + 0.03) / 2)
    assert "hopper_256" not in rows


def test_everything_is_measured_and_written(store: Path, base: Any, tmp_path: Path) -> None:
    names = ("fp8", "gradients_128x128", "hopper_none")
    folder = Path(base.run.directory)
    result = ablate(store, folder, SMALL, names=names, overrides=OVERRIDES, log=lambda _: None)
    assert set(result["runs"]) == {"bf16", "bf16_reordered", *names}
    assert result["runs"]["bf16"]["gaps"] == [0.0]
    assert all(result["runs"][name]["gaps"][0] != 0 for name in ("bf16_reordered", *names))
    model = {name: row["gradient"] for name, row in result["errors"]["linears"].items()}
    # BF16 against FP8: 2^-9 against 2^-4 a rounding; measured 0.5 % and 5.7 %.
    assert model["bf16"] < 0.02 < model["fp8"] < 0.1
    paths = write(result, tmp_path / "out")
    assert sorted(path.name for path in paths) == [
        "outliers.html", "result.json", "runs.html", "sums.html", "tables.md",
    ]  # fmt: skip
    text = (tmp_path / "out/tables.md").read_text()
    assert "| gradients in 128x128 blocks |" in text
    assert f"{result['errors']['linears']['hopper_none']['sum']:.3g}" in text
    assert f"{result['floor']:.3%}" in tables(result)
    assert "promotion" in (tmp_path / "out/sums.html").read_text()


def test_nothing_measured_leaves_no_picture(store: Path, base: Any, tmp_path: Path) -> None:
    # Neither sums nor spread gradients are measured for rows that share the recipe's linears, or have none.
    folder = Path(base.run.directory)
    result = ablate(store, folder, SMALL, names=["moments_fp8"], overrides=OVERRIDES, log=lambda _: None)
    paths = write(result, tmp_path / "out")
    assert [path.name for path in paths] == ["result.json", "tables.md", "runs.html"]


def test_what_is_measured_repeats_bit_for_bit() -> None:
    first = product_errors(linears(Ablation("e5m2")), length=256)
    torch.manual_seed(99)
    assert product_errors(linears(Ablation("e5m2")), length=256) == first
