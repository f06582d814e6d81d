"""Ablations of the FP8 recipe: each variant changes one piece, and is measured in one step and in short runs.

    reference  BF16; and BF16 adding in another order (two micro-batches instead of one), whose distance is the floor
    recipe     FP8 as shipped (arXiv:2412.19437 §3.3)
    variants   FP8 with one change: scales, format or tile of gradients, accumulation (§3.3.2), moments (§3.3.3)
    defects    FP8 with a mistake, to see which mistakes a gap of losses shows: only where named, or in the gate

Runs of one seed see the same tokens and the same initial weights, so gaps are taken in pairs: mean relative gap of the
EMA-0.9 losses over the second half (`train/studies/compare.py`). Each run has its own directory. A finished or diverged
one is read and not run again; one begun with other settings is refused.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from train.assemble import build_alone
from train.checkpoint.identity import changed_fields
from train.config import PretrainConfig, compose
from train.model.precision import Precision
from train.observe.guards import SavesFailed, TrainingStopped, check_consecutive_skips
from train.observe.sinks import read_events, read_run
from train.run_directory import locked, run_directory
from train.studies.ablation import errors
from train.studies.ablation.linear import AblatedLinears, Ablation
from train.studies.ablation.precision import AblatedPrecision
from train.studies.compare import common_steps, mean_smoothed_gap
from train.studies.smoke_runs import smoke_run
from train.trainer import Trainer

# With two layers even Hopper's accumulation, some fifty times slower than FP32 sums, takes minutes only.
SMALL_MODEL = [
    "model.num_hidden_layers=2",
    "model.n_routed_experts=4",
    "model.n_group=2",
    "model.topk_group=1",
    "model.num_nextn_predict_layers=0",
]
# What may differ between the runs of a table: where they are stored (a checkpoint has the hash of its text) and what
# they log.
REPORTING = ("run.directory", "data.store", "observe.", "checkpoint.")
# Of `product_errors`: the cost of the accumulation alone.
SUMS = ("sum", "sum_largest")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    # Terms of the products in the table of errors, and in the curve of sums; spreads in the curve of outliers.
    length: int = 4096
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    octaves: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    # Of the runs.
    steps: int = 60
    sequences: int = 4
    tokens: int = 128
    seeds: tuple[int, ...] = (0, 1, 2)
    # Whether the runs train all of `tiny`, or its two layers of SMALL_MODEL; whether errors of one step are measured.
    whole_model: bool = False
    one_step: bool = True


QUICK = Size(length=512, lengths=(128, 512), octaves=(0.0, 5.0), steps=4, sequences=2, tokens=64, seeds=(0, 1))
# FP8 against BF16 with an interval, and which mistakes a gate of this length finds.
GATE = Size(seeds=(0, 1, 2, 3, 4), whole_model=True, one_step=False)
# Hopper's sums would take 17 s a step: `--variants hopper_none` adds them.
GATE_ROWS = ("fp8", "gradients_128x128", "stale_scale", "dropped_tile")
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom, tables as in any text book.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Variant:
    """One row: what is changed, in words and settings; one that is not `trained` is measured in one step only."""

    name: str
    change: str
    precision: Precision
    moments: str = "bf16"
    micro_batches: int = 1
    trained: bool = True

    @property
    def linears(self) -> AblatedLinears | None:
        """Its linears, if they are in FP8."""
        return self.precision.linears if isinstance(self.precision, AblatedPrecision) else None

    @property
    def is_defect(self) -> bool:
        """Whether it is a mistake on purpose."""
        return self.linears is not None and self.linears.ablation.defect != "none"


def variants() -> dict[str, Variant]:
    """All rows by name; the first is the reference of every gap, the second its floor, the third the recipe."""
    bf16 = Precision("bf16")

    def fp8(name: str, change: str, ablation: Ablation | None = None, *, power_of_two: bool = True) -> Variant:
        return Variant(name, change, AblatedPrecision("fp8", power_of_two, ablation=ablation or Ablation()))

    def hopper(interval: int | None) -> Ablation:
        return Ablation(accumulation="hopper", promotion_interval=interval)

    recipe_row = fp8("fp8", "the recipe")
    rows = (
        Variant("bf16", "no FP8", bf16),
        Variant("bf16_reordered", "no FP8, sums in another order", bf16, micro_batches=2),
        recipe_row,
        fp8("fp32_scales", "FP32 scales", power_of_two=False),
        fp8("gradients_e5m2", "gradients in E5M2", Ablation(gradient_format="e5m2")),
        fp8("gradients_128x128", "gradients in 128x128 blocks", Ablation(gradient_tile="128x128")),
        fp8("hopper_128", "Hopper's sums, promotion every 128", hopper(128)),
        # Intervals between are measured in one step: a run costs minutes and its contractions are short.
        replace(fp8("hopper_256", "Hopper's sums, promotion every 256", hopper(256)), trained=False),
        replace(fp8("hopper_512", "Hopper's sums, promotion every 512", hopper(512)), trained=False),
        fp8("hopper_none", "Hopper's sums, no promotion", hopper(None)),
        replace(recipe_row, name="moments_fp8", change="moments in FP8", moments="fp8"),
        fp8("stale_scale", "defect: weights keep their first scales", Ablation(defect="stale_scale")),
        fp8("dropped_tile", "defect: wgrad drops 128 tokens", Ablation(defect="dropped_tile")),
    )
    return {row.name: row for row in rows}


def choose(names: Sequence[str]) -> list[Variant]:
    """The named variants, all but the defects if none is named, in the table's order.

    Raises:
        ValueError: an unknown name.
    """
    known = variants()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"variant {unknown[0]!r} does not exist: choose among {', '.join(known)}")
    return [row for name, row in known.items() if name in names or not (names or row.is_defect)]


def base_config(store: Path, directory: Path, size: Size, overrides: Sequence[str] = ()) -> PretrainConfig:
    """The configuration that all runs share: text tokenised in `store`, runs in `directory`, Hydra's overrides."""
    shared = [
        "experiment=tiny",
        *([] if size.whole_model else SMALL_MODEL),
        f"data.store={store}",
        "data.heldout=null",
        f"data.sequence_length={size.tokens}",
        f"schedule.total_tokens={size.steps * size.sequences * size.tokens}",
        f"schedule.batch_start_sequences={size.sequences}",
        f"schedule.batch_full_sequences={size.sequences}",
        f"run.micro_batch_sequences={size.sequences}",
        f"run.directory={directory}",
        "run.threads=1",
        "run.device=cpu",
        "observe.wandb=off",
        "observe.console_every_steps=1000000",
        # It would sample the recipe's own linears, not a variant's.
        "observe.fp8_health_every_steps=0",
        "checkpoint.every_steps=1000000",
        # A variant that diverges is a result; without its worst steps, or on other data, it could not be compared.
        "spikes.window_steps=0",
    ]
    # The caller's overrides win.
    given = {override.partition("=")[0] for override in overrides}
    return compose([*(line for line in shared if line.partition("=")[0] not in given), *overrides])


def run(base: PretrainConfig, variant: Variant, seed: int) -> dict[str, Any]:
    """`train_or_read` of one variant with one seed."""
    return train_or_read(run_config(base, variant, seed))


def train_or_read(config: PretrainConfig) -> dict[str, Any]:
    """Train a run, or read a finished one.

    Returns:
        records: the run's log; stopped: why it ended early (non-finite steps), or None; seconds: of this call.
    Raises:
        ValueError: it was asked to stop before its end; or its folder holds a run with other settings or other losses.
    """
    start = time.monotonic()
    # First, since a checkpoint of another model is refused for its tensors, and a killed run has no checkpoint.
    refuse_another(config)
    with locked(run_directory(config.run)):
        return _run_locked(config, start)


def _run_locked(config: PretrainConfig, start: float) -> dict[str, Any]:
    """The rest of `train_or_read`, in a directory that no other trainer uses."""
    trainer = Trainer(config, build_alone(config))
    trainer.resume()
    _refuse_changed(trainer.directory, trainer.changed)
    stopped = None
    try:
        # The last checkpoint of a diverged run has as many skips as the limit.
        skips, limit = trainer.state.consecutive_skips, config.run.max_consecutive_nonfinite
        check_consecutive_skips(skips, limit=limit, step=trainer.state.step)
        trainer.fit()
    except SavesFailed as error:
        raise ValueError(str(error)) from error
    except TrainingStopped as error:
        # A variant that diverges is a result.
        stopped = str(error)
    if stopped is None and (trainer.stop_agreed or not trainer.budget_is_spent()):
        raise ValueError(f"stopped in {config.run.name} at step {trainer.state.step}; the same command goes on")
    if any(event["event"] == "replay_differs" for event in read_events(trainer.directory)):
        raise ValueError(
            f"{trainer.directory} was killed, and its steps, taken again, are not those of its log: the text or the "
            "version changed; delete that run"
        )
    return {"records": read_run(trainer.directory), "stopped": stopped, "seconds": time.monotonic() - start}


def run_config(base: PretrainConfig, variant: Variant, seed: int) -> PretrainConfig:
    """The configuration of one run; its name is that of its folder."""
    micro = base.run.micro_batch_sequences // variant.micro_batches
    optim = replace(base.optim, moments_dtype=variant.moments)
    run = replace(base.run, name=f"{variant.name}-{seed}", seed=seed, micro_batch_sequences=micro)
    return replace(base, precision=variant.precision, optim=optim, run=run)


def refuse_another(config: PretrainConfig) -> None:
    """Raise ValueError where the folder of a run holds one that was begun with other settings, finished or killed."""
    directory = Path(config.run.directory) / config.run.name
    try:
        saved = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        # Not begun, or torn by a kill: the checkpoint and the log decide.
        return
    sections = [name for name, fields in asdict(config).items() if isinstance(fields, dict)]
    if isinstance(saved, dict) and all(isinstance(saved.get(name), dict) for name in sections):
        _refuse_changed(directory, changed_fields(saved, asdict(config)))


def _refuse_changed(directory: Path, changed: Mapping[str, Sequence[object]]) -> None:
    for name, (old, new) in changed.items():
        if not name.startswith(REPORTING):
            raise ValueError(
                f"{directory} holds a run with {name}={old}, and {new} is asked for; give --out another folder, or "
                "delete that run"
            )


def _runs_of(chosen: Sequence[Variant]) -> dict[str, Variant]:
    """The chosen ones that are trained, after both BF16 rows, which every gap needs."""
    known = variants()
    wanted = (known["bf16"], known["bf16_reordered"], *chosen)
    return {row.name: row for row in wanted if row.trained}


def measure_runs(
    base: PretrainConfig, chosen: Sequence[Variant], size: Size, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Train the chosen variants and both BF16 rows.

    Returns:
        variant -> gaps: to BF16 by seed; mean; against_fp8: mean gap to the recipe of the same seeds, where it was run;
        last_losses by seed; stopped: why a run ended early, by seed; seconds of all seeds, in this call. A gap is NaN
        where a run diverged before it had a finite loss.
    """
    done: dict[str, dict[int, dict[str, Any]]] = {}
    for name, row in _runs_of(chosen).items():
        done[name] = {seed: run(base, row, seed) for seed in size.seeds}
        log(f"{name}: {sum(one['seconds'] for one in done[name].values()):.0f} s")
    return {name: _gaps(done, name) for name in done}


def _gaps(done: Mapping[str, Mapping[int, Mapping[str, Any]]], name: str) -> dict[str, Any]:
    mine = done[name]

    def against(other: str) -> list[float]:
        pairs = [(one["records"], done[other][seed]["records"]) for seed, one in mine.items()]
        return [mean_smoothed_gap(*pair) if common_steps(*pair) else math.nan for pair in pairs]

    gaps = against("bf16")
    return {
        "gaps": gaps,
        "mean": statistics.fmean(gaps),
        "against_fp8": statistics.fmean(against("fp8")) if "fp8" in done else None,
        "last_losses": [one["records"][-1]["loss/main"] for one in mine.values()],
        "stopped": [one["stopped"] for one in mine.values()],
        "seconds": sum(one["seconds"] for one in mine.values()),
    }


def floor(runs: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean absolute gap of two equally good BF16 runs: smaller gaps say nothing."""
    return statistics.fmean(map(abs, runs["bf16_reordered"]["gaps"]))


def interval(gaps: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of 2 to 10 gaps, by Student's t; (NaN, NaN) where a gap is."""
    mean = statistics.fmean(gaps)
    # `statistics.stdev` takes no NaN.
    half = STUDENT[len(gaps) - 2] * math.hypot(*(gap - mean for gap in gaps)) / math.sqrt(len(gaps) * (len(gaps) - 1))
    return mean - half, mean + half


def measure_errors(chosen: Sequence[Variant], size: Size, base: PretrainConfig) -> dict[str, Any]:
    """One-step errors of the chosen FP8 variants, of BF16 on the whole model, and of the moments.

    Returns:
        linears: variant -> operand, product and model errors; sums: variant of Hopper's -> length -> error of the sum
        alone; outliers: tile of gradients -> spread in octaves -> error of dx; moments: dtype -> errors.
    """
    smoke = smoke_run("tiny", sequences=size.sequences, tokens=size.tokens, model=base.model)
    reference, case = errors.reference_gradients(smoke), errors.linear_case(512, 512, 512)
    table: dict[str, dict[str, float]] = {}
    sums: dict[str, dict[int, dict[str, float]]] = {}
    outliers: dict[str, dict[float, float]] = {}
    for row in chosen:
        name, linears = row.name, row.linears
        # A row with other moments shares the recipe's linears.
        if linears is None or row.moments != "bf16":
            continue
        table[name] = errors.operand_errors(linears, case) | errors.product_errors(linears, length=size.length)
        table[name] |= errors.model_errors(row.precision, reference)
        if name == "fp8" or name.startswith("hopper"):
            products = {length: errors.product_errors(linears, length=length) for length in size.lengths}
            sums[name] = {length: {key: each[key] for key in SUMS} for length, each in products.items()}
        if name in ("fp8", "gradients_128x128"):
            outliers[name] = {octaves: errors.outlier_error(linears, octaves=octaves) for octaves in size.octaves}
    table["bf16"] = errors.model_errors(Precision("bf16"), reference)
    moments = {dtype: errors.moment_errors(dtype) for dtype in ("fp32", "bf16", "fp8")}
    return {"linears": table, "sums": sums, "outliers": outliers, "moments": moments}


def ablate(
    store: Path,
    directory: Path,
    size: Size,
    *,
    names: Sequence[str] = (),
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure errors and runs of the named variants (none: all), with arguments as for `base_config`.

    Raises:
        ValueError: an unknown variant, a bad override, or a run begun with other settings, before anything is measured.
    """
    chosen = choose(names)
    base = base_config(store, directory, size, overrides)
    for row in _runs_of(chosen).values():
        for seed in size.seeds:
            refuse_another(run_config(base, row, seed))
    measured: dict[str, Any] = {"linears": {}, "sums": {}, "outliers": {}, "moments": {}}
    if size.one_step:
        measured = measure_errors(chosen, size, base)
        log("one-step errors: done")
    runs = measure_runs(base, chosen, size, log)
    return {
        "changes": {row.name: row.change for row in variants().values()},
        "size": asdict(size),
        "overrides": list(overrides),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "errors": measured,
        "runs": runs,
        "floor": floor(runs),
    }
