"""The bench's clock: candidates of one case timed in turns, out of the L2 cache, launches apart from work.

A GPU under its power cap runs at whatever clock the last milliseconds allow, so two kernels may only be compared when
they take turns. Per candidate one CUDA graph holds about 4 ms of launches (the host cannot be the bound) that walk
through the sets of inputs (at least two, 200 MB together: no set is found in the L2 cache, 50 MB on an H100). Each
round visits every candidate once, in a new shuffled order, with one untimed replay before the timed one. The median
over the rounds counts, (highest - lowest) / median is its spread. On a CPU the same code times plain calls.
"""

from __future__ import annotations

import math
import random
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

# One launch, or one plain call: the tensors that hold its result.
Call = Callable[[], tuple[Tensor, ...]]

# Fewer rounds than this have no median; a spent budget waits for them.
FEWEST_ROUNDS = 3
# Passes over the input sets in the graph that finds out how long a pass takes.
TRIAL_PASSES = 4
# Between two samples of the power; some boards report its mean over the last second.
PAUSE_S = 0.02


@dataclass(frozen=True)
class Clock:
    """How a case is timed.

    Args:
        rounds: timed replays of each candidate.
        replay_s: work of one replay, seconds.
        cold_bytes: input sets of a case hold at least this much together.
        least_sets: fewest sets of inputs.
        graph: launches are replayed as one CUDA graph on a GPU; else the host launches them.
        seed: of the order of candidates.
    """

    rounds: int = 10
    replay_s: float = 4e-3
    cold_bytes: float = 200e6
    least_sets: int = 2
    graph: bool = True
    seed: int = 0

    def input_sets(self, bytes_per_set: int) -> int:
        """How many sets of inputs the launches walk through."""
        return max(self.least_sets, math.ceil(self.cold_bytes / max(1, bytes_per_set)))


@dataclass(frozen=True)
class Timing:
    """Times of one candidate."""

    time_us: float  # one launch on the device, median of the rounds
    spread_ratio: float  # (highest - lowest) / median of the rounds
    host_us: float  # one call on the host, outside any graph, until it returns
    rounds: int


@dataclass(frozen=True)
class Loop:
    """`run` makes so many `launches` without waiting; one call takes `host_us` on the host, outside any graph."""

    run: Callable[[], None]
    launches: int
    host_us: float


def wait(device: torch.device) -> None:
    """Wait until the device has done what was launched: a clock has to."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def elapsed_s(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that the device spends on `run`; on a CPU, that `run` takes."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    wait(device)
    return float(start.elapsed_time(end)) * 1e-3


def host_s(calls: Sequence[Call], device: torch.device) -> float:
    """Seconds until one call returns: the shortest of five passes, each into an empty queue."""
    shortest = math.inf
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        for call in calls:
            call()
        shortest = min(shortest, (time.perf_counter() - start) / len(calls))
    wait(device)
    return shortest


def _repeated(calls: Sequence[Call], passes: int, device: torch.device, clock: Clock) -> Callable[[], None]:
    """The calls, `passes` times over, as one CUDA graph; on a CPU as they are."""
    # Results of the last pass are kept: an operation that allocates its output then writes to as many buffers as there
    # are sets, like one that is given its output.
    kept: list[tuple[Tensor, ...]] = [() for _ in calls]

    def run() -> None:
        for _ in range(passes):
            for index, call in enumerate(calls):
                kept[index] = call()

    if device.type != "cuda" or not clock.graph:
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def build_loop(calls: Sequence[Call], device: torch.device, *, clock: Clock) -> Loop:
    """Launches of one candidate that take about `clock.replay_s`.

    Args:
        calls: one for each set of inputs, all visited equally often; all have run before, so everything is compiled.
        device: where they run.
        clock: how long a replay is.
    Raises:
        RuntimeError: a call cannot be captured.
    """
    per_call_s = host_s(calls, device)
    trial_passes = TRIAL_PASSES if clock.replay_s else 1
    trial = _repeated(calls, trial_passes, device, clock)
    trial()
    pass_s = elapsed_s(trial, device) / trial_passes
    passes = max(1, math.ceil(clock.replay_s / max(pass_s, 1e-7)))
    return Loop(_repeated(calls, passes, device, clock), passes * len(calls), per_call_s * 1e6)


def time_in_turns(
    loops: Mapping[str, Loop], device: torch.device, *, clock: Clock, deadline_s: float
) -> dict[str, Timing]:
    """Time every loop, by candidate, in every round, in shuffled order.

    After `deadline_s`, of `time.monotonic()`, no round begins but the first three.
    """
    order = random.Random(clock.seed)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for done in range(clock.rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() >= deadline_s:
            break
        names = list(loops)
        order.shuffle(names)
        for name in names:
            loops[name].run()
            seconds[name].append(elapsed_s(loops[name].run, device) / loops[name].launches)
    timings = {}
    for name, loop in loops.items():
        middle = statistics.median(seconds[name])
        spread = (max(seconds[name]) - min(seconds[name])) / max(middle, 1e-12)
        timings[name] = Timing(middle * 1e6, spread, loop.host_us, len(seconds[name]))
    return timings


@dataclass(frozen=True)
class Power:
    """Medians over some time: power drawn by the board, clock of the multiprocessors."""

    watts: float
    sm_clock_mhz: float


def sampler_command(device: torch.device) -> list[str]:
    """The `nvidia-smi` that prints "watts, MHz" once; empty without a GPU or without the program."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return []
    # Indices of torch and of nvidia-smi differ where some GPUs are hidden; the identifier does not.
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    return [program, gpu, "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"]


class PowerMonitor:
    """Samples power and clock while it is entered, at least once; without a command, or when that fails, not at all."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="power monitor", daemon=True)
        self._samples: list[Power] = []

    def __enter__(self) -> PowerMonitor:
        if self._command:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._command:
            self._thread.join()

    @property
    def power(self) -> Power | None:
        """Medians of the samples; None without any."""
        if not self._samples:
            return None
        watts = statistics.median(sample.watts for sample in self._samples)
        return Power(watts, statistics.median(sample.sm_clock_mhz for sample in self._samples))

    def _sample(self) -> None:
        while True:
            try:
                done = subprocess.run(
                    self._command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
                )
            except (OSError, subprocess.TimeoutExpired):
                return
            watts, _, clock = done.stdout.partition(",")
            # A board without a sensor prints "[N/A]".
            if _is_number(watts) and _is_number(clock):
                self._samples.append(Power(float(watts), float(clock)))
            if self._stop.wait(PAUSE_S):
                return


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()
