"""What the dashboard draws: each scalar metric's place, title, scale and number format, in the order of the page.

A metric that is recorded but not listed here, and not in `NOT_DRAWN`, gets a plain chart in the section "More", so
that nothing a trainer logs stays unseen. Tables (expert load and bias, FP8 statistics) have pictures of their own in
the page's script. Paper: arXiv:2412.19437 section 4.2 names the schedules, 3.3 the loss gap, arXiv:2408.15664 MaxVio.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from train.observe.metrics import METRICS
from train.studies.dashboard.series import Json

SECTIONS = {
    "loss": "Loss",
    "optimizer": "Optimiser and schedules",
    "speed": "Speed",
    "experts": "Experts",
    "fp8": "FP8 health",
    "more": "More",
}


@dataclass(frozen=True)
class Chart:
    """A metric drawn over the run.

    smooth: the page's smoothing applies. logarithmic: its "log y" applies. percent: the value is a ratio, shown
    as %. ticks: d3 format of the numbers. least_values: below, no curve. marks: every event stands on this curve.
    """

    metric: str
    section: str
    title: str
    hint: str = ""
    smooth: bool = False
    wide: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    percent: bool = False
    ticks: str = "~g"
    least_values: int = 1
    marks: bool = False


CHARTS = (
    Chart(
        "loss/main",
        "loss",
        "Loss",
        "next token, nats; faint as logged; ○ checkpoint, ✕ skipped, ◆ replay differs",
        smooth=True,
        wide=True,
        logarithmic=True,
        marks=True,
    ),
    Chart("loss/mtp", "loss", "MTP loss", "mean over depths, nats", smooth=True, logarithmic=True),
    Chart("eval/bits_per_byte", "loss", "Bits per byte while training", "held-out text", least_values=2),
    Chart("grad/norm", "optimizer", "Gradient norm", "global, before clipping", smooth=True, logarithmic=True),
    Chart("optim/lr", "optimizer", "Learning rate", from_zero=True),
    Chart("schedule/batch_sequences", "optimizer", "Batch", "sequences a step", from_zero=True),
    Chart("schedule/bias_speed", "optimizer", "γ", "step of the routing bias", from_zero=True),
    Chart("schedule/mtp_weight", "optimizer", "λ", "weight of the MTP loss", from_zero=True),
    Chart("speed/tokens_per_s", "speed", "Tokens per second", smooth=True, from_zero=True, ticks="~s"),
    Chart("speed/mfu_ratio", "speed", "MFU", "share of the peak FLOP/s", smooth=True, from_zero=True, percent=True),
    Chart("moe/max_violation_ratio", "experts", "MaxVio", "(max load − mean) / mean, worst layer", smooth=True),
    Chart("moe/dead_experts", "experts", "Experts without a token", "(layer, expert) pairs in a step", from_zero=True),
    Chart("loss/balance", "experts", "Balance loss", "sequence-wise, without α", smooth=True),
)
# Axes, and sums of what is drawn.
NOT_DRAWN = frozenset({"step", "tokens_seen", "time_unix_s", "loss/total", "guard/skipped_steps"})


def charts_for(metrics: set[str]) -> list[Json]:
    """The charts of the recorded metrics, in the page's order, with what METRICS says about each."""
    known = [chart for chart in CHARTS if chart.metric in metrics]
    others = sorted(metrics - {chart.metric for chart in CHARTS} - NOT_DRAWN)
    known += [Chart(name, "more", name, METRICS[name].unit if name in METRICS else "") for name in others]
    return [asdict(chart) | {"about": _about(chart.metric)} for chart in known]


def _about(metric: str) -> str:
    return f"{metric}: {METRICS[metric].description}" if metric in METRICS else metric
