"""Random layouts against one process: losses, every gradient, norm, expert counts, and the state after an update.

    python -m tests.fuzz_layouts --count 300 --seed 1                      `make fuzz`
    python -m tests.fuzz_layouts --only "pp=2 dp=2 ep=2 precision=fp8"     one case again, with every figure
    python -m tests.fuzz_layouts --defects                                 planted mistakes, each until it is caught

A case is drawn, and must be refused exactly where it is illegal (`tests/fuzz_cases.py`). A legal one is compared with
one process on gloo ranks that stay up from case to case (`tests/fuzz_ranks.py`), within the bounds of docs/numerics.md,
"Layouts". A case that fails is made simpler as long as it fails.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import NamedTuple

from tests.fuzz_cases import Case, draw, refusal, simpler, why_illegal
from tests.fuzz_defects import DEFECTS
from tests.fuzz_ranks import RankAnswer, compare_case, write_reference
from tests.parity.layout_theorem import Verdict, verdict
from tests.parity.test_layouts import GRADIENT_BOUND, LOSS_BOUND
from tests.parity.test_layouts_low_precision import REGROUPING_BOUND
from tests.ranks import RankPool

# No promise about time: ranks that take this long wait for each other.
HANG_S = 120
# Processes that prepare the truth of the next cases, while ranks are busy with one.
ALONE, AHEAD = 2, 6
# Cases that are sorted together: whoever stops early has seen every number of ranks.
PORTION = 60
PRELOAD = ("deepspeed", "tests.fuzz_ranks")
# Legal draws in which a planted defect must show.
DRAWS_OF_A_DEFECT = 8
LONGEST_SENTENCE = 1000


class Outcome(NamedTuple):
    """What was wrong with a case, each with the figure that shows it; nothing: it agrees with one process."""

    faults: tuple[str, ...]
    largest: Mapping[str, float]


@dataclass
class Pools:
    """Ranks by their number; those of one number stay up until others are asked for. Processes alone, for the truth."""

    folder: Path
    alone: list[RankPool] = field(default_factory=lambda: [RankPool(1, PRELOAD) for _ in range(ALONE)])
    several: RankPool | None = None
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(ALONE))
    _numbers: Iterator[int] = field(default_factory=count)
    _known: dict[Case, Future[Path]] = field(default_factory=dict)
    _sound: dict[Case, bool] = field(default_factory=dict)

    def prepare(self, case: Case) -> Future[Path]:
        """Begin one process's answer to a case: the folder with it."""
        if case not in self._known:
            self._known[case] = self._threads.submit(self._write, case, self.folder / str(next(self._numbers)))
        return self._known[case]

    def _write(self, case: Case, path: Path) -> Path:
        path.mkdir()
        # As many threads as processes: there is one.
        process = self.alone.pop()
        ((error, _),) = process.call(write_reference, case, path, timeout_s=HANG_S)
        self.alone.append(process)
        if error:
            raise RuntimeError(f"one process fails at {case}:\n{error}")
        return path

    def forget(self, case: Case) -> None:
        """Remove one process's answer."""
        shutil.rmtree(self._known.pop(case).result())

    def answers(self, case: Case, defect: str | None = None) -> list[tuple[str | None, RankAnswer]]:
        """Of each rank: an error, or its comparison."""
        reference = self.prepare(case).result()
        if self.several is None or self.several.world != case.world:
            if self.several is not None:
                self.several.close()
            self.several = RankPool(case.world, PRELOAD)
        return self.several.call(compare_case, case, reference, defect, timeout_s=HANG_S)

    def is_sound(self, case: Case) -> bool:
        """Whether a case agrees with one process, no defect planted."""
        if case not in self._sound:
            self._sound[case] = not judge(case, self.answers(case)).faults
        return self._sound[case]

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(cancel_futures=True)
        for pool in (*self.alone, *([self.several] if self.several else [])):
            pool.close()


@contextmanager
def pools() -> Iterator[Pools]:
    """Ranks for a while, and a folder for what one process answered."""
    with tempfile.TemporaryDirectory() as folder:
        made = Pools(Path(folder))
        try:
            yield made
        finally:
            made.close()


def bounds(case: Case) -> dict[str, float]:
    """Of docs/numerics.md, "Layouts"."""
    regroups = case.precision == "fp8" and case.ep > 1
    return {
        "losses": LOSS_BOUND if case.dp > 1 else 0.0,
        "norm": LOSS_BOUND,
        "gradient": REGROUPING_BOUND if regroups else GRADIENT_BOUND,
        "scores": GRADIENT_BOUND,
    }


def judge(case: Case, answers: Sequence[tuple[str | None, RankAnswer]]) -> Outcome:
    """Every figure of a case beside its bound."""
    errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
    if errors:
        return Outcome(tuple(sorted(errors, key=lambda error: "\n" not in error)), {})
    found = [answer for _, answer in answers]
    try:
        result: Verdict = verdict([answer.steps for answer in found])
    except AssertionError as error:
        return Outcome((str(error),), {})
    largest = {
        "losses": max(result.losses),
        "norm": result.norm,
        "gradient": result.gradient[0],
        "scores": result.score_error,
    }
    limits = bounds(case)
    faults = [f"{name} differ by {value:.2g}, bound {limits[name]:.2g}" for name, value in largest.items()
              if not value <= limits[name]]  # fmt: skip
    if faults and not result.gradient[0] <= limits["gradient"]:
        faults.append(f"the worst gradient is that of {result.gradient[1]}")
    if not result.counts_equal:
        faults.append("expert counts differ")
    if far := [margin for margin in result.flips if not margin <= 2 * result.score_error]:
        faults.append(f"{len(far)} choices differ that were no ties, by {max(far):.2g} of a score")
    if changed := sorted({name for answer in found for name in answer.state}):
        faults.append(f"after the update {len(changed)} tensors differ, the first {changed[0]}")
    return Outcome(tuple(faults), largest)


def check_refusal(case: Case) -> tuple[str | None, str | None]:
    """(why a case is illegal, what is wrong with how the product sees it); None and None for a case that must run."""
    why, sentence = why_illegal(case), refusal(case)
    if why is None:
        return None, None if sentence is None else f"legal, but refused: {sentence}"
    if sentence is None:
        return why, f"accepted, although illegal: {why}"
    names = any(f"{group}." in sentence for group in ("layout", "model", "schedule", "optim", "precision", "run"))
    is_sentence = "\n" not in sentence and len(sentence) <= LONGEST_SENTENCE and names
    return why, None if is_sentence else f"refused, but in no sentence that names a field: {sentence}"


def simplest(case: Case, at: Pools) -> Case:
    """Settings are put back one by one as long as the case fails."""
    for easier in simpler(case):
        if judge(easier, at.answers(easier)).faults:
            return simplest(easier, at)
    return case


def report_of(case: Case, faults: Sequence[str]) -> str:
    """What was found, and the command that repeats it."""
    return "\n  ".join((f'python -m tests.fuzz_layouts --only "{case}"', *faults))


@dataclass
class Record:
    """What a run of the fuzzer has seen."""

    run: list[Case] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    largest: dict[tuple[str, str], float] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, case: Case, outcome: Outcome) -> None:
        """One case that was run."""
        self.run.append(case)
        for name, value in outcome.largest.items():
            key = (case.precision, name)
            self.largest[key] = max(self.largest.get(key, 0.0), value)

    def lines(self) -> list[str]:
        """The record as text."""
        lines = [f"{len(self.run)} layouts run, {len(self.failures)} unexplained, {self.seconds:.0f} s"]
        lines += [f"{sum(self.refused.values())} illegal draws refused in one sentence each:"]
        lines += [f"  {count:4} {why}" for why, count in self.refused.most_common()]
        for name in (f.name for f in fields(Case) if f.name not in ("seed", "stages", "tokens", "sequences")):
            seen = Counter(getattr(case, name) for case in self.run)
            lines.append(f"  {name:13}" + ", ".join(f"{value} {count}" for value, count in sorted(seen.items())))
        lines.append(f"  {'stages given':13}{sum(bool(case.stages) for case in self.run)}")
        seen = Counter(case.micro_batches for case in self.run)
        lines.append(f"  {'micro-batches':13}" + ", ".join(f"{value} {count}" for value, count in sorted(seen.items())))
        lines += [f"  {precision:5}{name:9}{value:.2g}" for (precision, name), value in sorted(self.largest.items())]
        return lines + self.failures


def legal_cases(count: int, seed: int, record: Record, *, world: int | None = None) -> list[Case]:
    """So many legal cases; illegal draws on the way are counted, wrong refusals are failures."""
    chance, cases = random.Random(seed), list[Case]()
    while len(cases) < count:
        case = draw(chance, world=world)
        why, fault = check_refusal(case)
        if fault:
            record.failures.append(report_of(case, [fault]))
        elif why:
            record.refused[why] += 1
        else:
            cases.append(case)
    return cases


def fuzz(number: int, seed: int, *, world: int | None = None, minimise: bool = True) -> Record:
    """Run so many legal layouts, or those until Ctrl-C."""
    record, start = Record(), time.monotonic()
    drawn = enumerate(legal_cases(number, seed, record, world=world))
    # By the number of ranks, so that each number is started once for PORTION cases.
    cases = [case for _, case in sorted(drawn, key=lambda each: (each[0] // PORTION, each[1].world))]
    with pools() as at, suppress(KeyboardInterrupt):
        for index, case in enumerate(cases):
            for coming in cases[index : index + AHEAD]:
                at.prepare(coming)
            outcome = judge(case, at.answers(case))
            record.add(case, outcome)
            if outcome.faults:
                record.failures.append(report_of(case, outcome.faults))
                if minimise and (easier := simplest(case, at)) != case:
                    record.failures[-1] += f"\n  simplest: {easier}"
                print(record.failures[-1], file=sys.stderr, flush=True)
            at.forget(case)
            record.seconds = time.monotonic() - start
            if index % 10 == 9:
                print(f"{index + 1} layouts, {record.seconds:.0f} s", file=sys.stderr, flush=True)
    return record


def caught(defect: str, at: Pools, seed: int = 1) -> tuple[int, Case, str] | None:
    """(tries, case, figure) of the first case that shows a planted defect; None if none of a few draws does."""
    chance, cases = random.Random(seed), list[Case]()
    while len(cases) < DRAWS_OF_A_DEFECT:
        case = draw(chance, world=4)
        if why_illegal(case) is None and DEFECTS[defect].shows_in(case):
            cases.append(case)
    # The cheapest first.
    cases.sort(key=lambda case: case.steps * case.sequences * case.layers * (4 if case.precision == "fp8" else 1))
    for tries, case in enumerate(cases, start=1):
        outcome = judge(case, at.answers(case, defect))
        misfit = next((fault for fault in outcome.faults if "TypeError" in fault), None)
        assert misfit is None, f"{defect} is planted with other arguments than the code takes today: {misfit}"
        # The same ranks and case without the defect must agree, or it is not the defect that was seen.
        if outcome.faults and at.is_sound(case):
            return tries, case, figure_of(case, outcome)
    return None


def figure_of(case: Case, outcome: Outcome) -> str:
    """The figure that exceeds its bound most; else the first fault, of an error its last line."""
    limits = bounds(case)
    excess = {name: value / max(limits[name], GRADIENT_BOUND) for name, value in outcome.largest.items()}
    excess = {name: times for name, times in excess.items() if not times <= 1}
    if not excess:
        return outcome.faults[0].strip().splitlines()[-1]
    worst = max(excess, key=lambda name: excess[name])
    return f"{worst} off by {outcome.largest[worst]:.2g}"


def main(arguments: Sequence[str]) -> int:
    """Print the record; 1 if a case fails or a defect is not caught."""
    parser = argparse.ArgumentParser(description="Random layouts against one process.")
    parser.add_argument("--count", type=int, default=300, help="layouts to run (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--only", help="this case alone")
    parser.add_argument("--defects", nargs="*", help="planted mistakes, these or all")
    options = parser.parse_args(arguments)
    if options.only is not None:
        with pools() as at:
            case = Case.parse(options.only)
            outcome = judge(case, at.answers(case))
        print(outcome.largest, *outcome.faults, sep="\n")
        return 1 if outcome.faults else 0
    if options.defects is not None:
        missed = 0
        with pools() as at:
            for name in options.defects or DEFECTS:
                found = caught(name, at)
                missed += found is None
                print(
                    f"| {name} | "
                    + ("NOT CAUGHT | |" if found is None else f"{found[2]} | `{found[1]}` | {found[0]} |")
                )
        return 1 if missed else 0
    record = fuzz(options.count, options.seed)
    print("\n".join(record.lines()))
    return 1 if record.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
