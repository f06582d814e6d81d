"""How wrong a plan was: what it predicted beside what the run measured, and the correction that follows for a machine.

    runs/NAME/plan.json             the plan, put there before the run starts
    `witness.py`                    measures the run's tenth step and those before it, and calls `verdict` once
    runs/NAME/run_card.json         gets the rows, under `predicted_vs_measured`
    runs/plan/corrections.json      `calibrate`: measured / predicted step time by device and precision, the newest wins

error = predicted / measured - 1, negative for the time of an optimistic plan, positive for its speed. It is given only
where both sides mean the same. A run's phases are those that `train.trainer` bounds: its gradients hold the reduction
over data ranks; its waiting holds the exchange with other ranks' experts, which a plan counts to its chunks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from train.data.whole_file import write_whole
from train.observe.metrics import OTHER_PARTS
from train.observe.sinks import PLAN_FILE, RUN_CARD_FILE, read_card
from train.studies.measured import ROOT, short_commit

KEY = "predicted_vs_measured"
CORRECTIONS = ROOT / "runs/plan/corrections.json"
# Forward and backward of a plan, as its pipeline ranks do them; "bubble" is what they wait.
CHUNKS = ("1F", "1B", "1W", "1F1B")
STATE = {
    "weights": "weights",
    "fp8_copies": "FP8 copies of weights",
    "gradients": "FP32 gradients",
    "masters": "FP32 masters, this rank's share",
    "moments": "moments, this rank's share",
}
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)

Unit = Literal["s", "tokens/s", "bytes"]


@dataclass(frozen=True)
class Measured:
    """What a run found out about itself, on rank 0.

    Args:
        run, candidate: what the run is, under the names that a plan has for it.
        where: date, commit, versions, device and precision of the figures.
        steps: the first and the last that were measured.
        batch_sequences: of each of them.
        step_s: median.
        walls_s: by phase (`metrics.PHASES`), waiting included.
        busy_s: without waiting, mean over ranks.
        memory_bytes: components of `STATE`; on a GPU also "step", what its peak has above them, and "reserved", what is
            in use there and not torch's.
    """

    run: Mapping[str, Any]
    candidate: Mapping[str, Any]
    where: Mapping[str, Any]
    steps: tuple[int, int]
    batch_sequences: int
    step_s: float
    walls_s: Mapping[str, float]
    busy_s: Mapping[str, float]
    memory_bytes: Mapping[str, int]


class Compared(NamedTuple):
    """One figure twice; None where one side has none. name: its key on the card. alike: both mean the same."""

    name: str
    what: str
    unit: Unit
    predicted: float | None
    measured: float | None
    alike: bool = True

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of what was measured; None where there is nothing to compare."""
        if self.predicted is None or not self.measured or not self.alike:
            return None
        return self.predicted / self.measured - 1


def verdict(directory: Path, measured: Measured) -> tuple[list[str], dict[str, Any] | None]:
    """Lines for the console, and what the run card gets; nothing of either where no plan lies in a run's directory.

    A plan of another run, or a damaged one, is one line and nothing for the card.
    """
    path = directory / PLAN_FILE
    if not path.exists():
        return [], None
    try:
        if not path.is_file():
            raise OSError("no file")
        document = json.loads(path.read_text(encoding="utf-8"))
        if others := differences(document, measured):
            return [f"{path} is not of this run, so nothing is compared: {'; '.join(others)}"], None
        rows = compare(document, measured)
        plan = {name: str(document[name]) for name in ("name", "date")}
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        return [f"{path} is no plan ({reason}), so nothing is compared: make it again, or delete it"], None
    figures = {row.name: {"predicted": row.predicted, "measured": row.measured, "error": row.error} for row in rows}
    where = {**measured.where, "steps": list(measured.steps), "batch_sequences": measured.batch_sequences}
    return shown(rows, plan, measured), where | {"candidate": dict(measured.candidate), "plan": plan, "rows": figures}


def differences(document: Any, measured: Measured) -> list[str]:
    """What the plan's run has otherwise, three of it at most."""
    both = ((document["run"], measured.run), (document["candidate"], measured.candidate))
    found = [
        f"{name} is {planned[name]!r} in the plan and {value!r} here"
        for planned, actual in both
        for name, value in actual.items()
        if planned[name] != value
    ]
    return found[:3]


def compare(document: Any, measured: Measured) -> list[Compared]:
    """The rows: times of a step, then memory of rank 0.

    Raises:
        KeyError, TypeError, ValueError: the document is no plan.
    """
    return [*_times(document, measured), *_memory(document, measured)]


def _times(document: Any, measured: Measured) -> Iterable[Compared]:
    """Of a step with as many sequences as the measured ones; in the batch ramp that is one of `ramp`."""
    full = {**document["step"], "batch_sequences": document["run"]["batch_sequences"]}
    steps = (full, *document.get("ramp", ()))
    planned = next((each for each in steps if each["batch_sequences"] == measured.batch_sequences), None)
    step_s, chunks_s, bubble_s, update_s = (None,) * 4 if planned is None else _planned_times(planned)
    tokens = measured.batch_sequences * measured.run["sequence_length"]
    walls, busy = measured.walls_s, measured.busy_s
    waited = max(walls["gradients"] - busy["gradients"], 0.0)
    work_and_bubble = None if chunks_s is None or bubble_s is None else chunks_s + bubble_s
    pp, alone = measured.candidate["pp"], measured.candidate["dp"] == 1
    yield Compared("step_s", "step", "s", step_s, measured.step_s)
    yield Compared("tokens_per_s", "tokens/s", "tokens/s", step_s and tokens / step_s, tokens / measured.step_s)
    yield Compared("gradients_s", "forward, backward, waiting", "s", work_and_bubble, walls["gradients"])
    yield Compared("work_s", "  of it work", "s", chunks_s, busy["gradients"], alone)
    yield Compared("waiting_s", "  of it waiting (plan: bubble)", "s", bubble_s, waited, alone and pp > 1)
    yield Compared("update_s", "update", "s", update_s, walls["update"])
    yield Compared("data_s", "taking the batch", "s", None, walls["data"])


def _planned_times(step: Mapping[str, Any]) -> tuple[float, float, float, float]:
    phases = step["phases_s"]
    chunks_s = sum(_figure(phases[name]) for name in CHUNKS)
    step_s = _figure(step["time_s"])
    if step_s == 0:
        raise ValueError("a step of no time")
    return step_s, chunks_s, _figure(phases["bubble"]), _figure(phases["update"])


def _memory(document: Any, measured: Measured) -> Iterable[Compared]:
    (planned,) = (each["components"] for each in document["memory"]["ranks"] if each["pp_rank"] == 0)
    found = measured.memory_bytes
    for name, what in STATE.items():
        yield Compared(f"{name}_bytes", what, "bytes", _figure(planned[name]), found[name])
    # What one peak measures together.
    step = sum(_figure(value) for name, value in planned.items() if name not in (*STATE, "reserved"))
    yield Compared("step_bytes", "above them at the peak", "bytes", step, found.get("step"))
    yield Compared("reserved_bytes", "CUDA, NCCL", "bytes", _figure(planned["reserved"]), found.get("reserved"))
    total = step + sum(_figure(planned[name]) for name in (*STATE, "reserved"))
    whole = sum(found.values()) if {"step", "reserved"} <= set(found) else None
    yield Compared("total_bytes", "total", "bytes", total, whole)


def _figure(value: Any) -> float:
    """A number of a plan.

    Raises:
        TypeError, ValueError: it is none, or negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    if not 0 <= value < math.inf:
        raise ValueError(f"{value} is no figure")
    return float(value)


def shown(rows: Sequence[Compared], plan: Mapping[str, str], measured: Measured) -> list[str]:
    """The rows as a table, with what it leaves open."""
    first, last = measured.steps
    lines = [
        f"predicted vs measured: plan {plan['name']} of {plan['date']}, medians of steps {first} to {last}, rank 0",
        f"{'':<34}{'predicted':>12}{'measured':>12}{'error':>9}",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:+.0%}"
        figures = f"{_text(row.predicted, row.unit):>12}{_text(row.measured, row.unit):>12}{error:>9}"
        lines.append(f"{row.what:<34}{figures}")
    if rows[0].predicted is None:
        lines.append(f"the plan has no step of {measured.batch_sequences:,} sequences, so times stand alone")
    if "step" not in measured.memory_bytes:
        lines.append("a CPU's process has no peak that could be told apart by component: state is counted, no more")
    return lines


def _text(value: float | None, unit: Unit) -> str:
    if value is None:
        return "–"
    if unit != "bytes":
        return f"{value:,.0f}" if unit == "tokens/s" else f"{value:.3g} s"
    power, letter = next(((power, name) for power, name in ((1e9, "GB"), (1e6, "MB")) if value >= power), (1e3, "kB"))
    return f"{value / power:.3g} {letter}"


@dataclass(frozen=True)
class Correction:
    """What the time of a plan's step is to be multiplied by on a machine, and where that was measured."""

    device: str
    precision: str
    predicted_s: float
    measured_s: float
    run: str
    layout: str
    date: str
    commit: str
    versions: dict[str, str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Correction:
        """From a file; KeyError, TypeError or ValueError where it is none."""
        texts = {name: str(values[name]) for name in ("device", "precision", "run", "layout", "date", "commit")}
        predicted_s, measured_s = (_figure(values[name]) for name in ("predicted_s", "measured_s"))
        if not predicted_s or not measured_s:
            raise ValueError("a step of no time")
        versions = {str(name): str(value) for name, value in values["versions"].items()}
        return cls(**texts, predicted_s=predicted_s, measured_s=measured_s, versions=versions)

    @property
    def ratio(self) -> float:
        """Measured over predicted time."""
        return self.measured_s / self.predicted_s

    def __str__(self) -> str:
        where = f"{self.device}, {self.precision}, {self.layout}, {self.date}, commit {short_commit(self.commit)}"
        times = f"{self.measured_s:.3g} s where {self.predicted_s:.3g} s were predicted"
        return f"x {self.ratio:.3f}, measured: a step of {self.run} took {times} ({where})"


def calibrate(run_directory: Path, store: Path = CORRECTIONS) -> str:
    """Store what a judged run says about its machine, in place of what was known; returns a sentence.

    Raises:
        ValueError: the run was not judged, or the store is damaged or cannot be written.
    """
    known = corrections(store)
    found = _found(run_directory)
    replaced = [each for each in known if (each.device, each.precision) == (found.device, found.precision)]
    kept = [each for each in known if each not in replaced]
    text = json.dumps({"version": 1, "corrections": [asdict(each) for each in (*kept, found)]}, indent=2)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_whole(store, text + "\n")
    except OSError as error:
        raise ValueError(f"{store} cannot be written ({error.strerror}): make room, or name another file") from error
    instead = f", in place of x {replaced[-1].ratio:.3f} of {replaced[-1].date}" if replaced else ""
    return f"stored in {store}: {found}{instead}"


def _found(run_directory: Path) -> Correction:
    judged = read_card(run_directory).get(KEY)
    if judged is None:
        raise ValueError(
            f"{run_directory / RUN_CARD_FILE} has no {KEY}: put the plan there as {PLAN_FILE} and let the run take ten "
            "steps, then calibrate"
        )
    try:
        times, layout = judged["rows"]["step_s"], judged["candidate"]
        if times["predicted"] is None:
            raise ValueError("the plan has no step of the measured batch")
        axes = f"pp {layout['pp']}, dp {layout['dp']}, ep {layout['ep']}"
        figures = {"predicted_s": times["predicted"], "measured_s": times["measured"]}
        return Correction.of({**judged, **figures, "run": run_directory.name, "layout": axes})
    except _DAMAGE as error:
        raise ValueError(f"{KEY} of {run_directory / RUN_CARD_FILE} gives no correction: {error}") from error


def corrections(store: Path = CORRECTIONS) -> list[Correction]:
    """All that are stored, the newest last; none where there is no file.

    Raises:
        ValueError: the file is something else.
    """
    if not store.exists():
        return []
    try:
        return [Correction.of(each) for each in json.loads(store.read_text(encoding="utf-8"))["corrections"]]
    except _DAMAGE as error:
        raise ValueError(f"{store} is no list of corrections ({error}): delete it and calibrate again") from error


def correction_for(device: str, precision: str, store: Path = CORRECTIONS) -> Correction | None:
    """The newest one of a device, by CUDA's name of it or a plan's ('H800' is 'NVIDIA H800', and no PCIe part).

    Raises:
        ValueError: as `corrections`.
    """
    for each in reversed(corrections(store)):
        is_other = any(part in each.device and part not in device for part in OTHER_PARTS)
        if each.precision == precision and (each.device == device or (device in each.device.split() and not is_other)):
            return each
    return None
