"""The study as files: what was measured, tables, and one picture.

result.json             everything measured
tables.md               needles by length and depth, loss by position: what docs/post_training.md shows
context_extension.html  both, 960 x 760 pixels, with plotly.js inside; docs/numerics.md says how a page becomes PNG
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.studies.context_extension.needles import CHANCE

COLOURS = ("#7a7a7a", "#c0a030", "#d1662a", "#2f8f5b", "#8a2f2f", "#1f5fa8")


def write(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write all files into a folder and return their paths."""
    texts = {"result.json": strict_json(result), "tables.md": tables(result)}
    texts["context_extension.html"] = picture(result).to_html(include_plotlyjs=True, config={"displayModeBar": False})
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def mean_of(seeds: Sequence[Mapping[str, Any]], *keys: str) -> float:
    """The mean over seeds of one number of each."""
    values: list[Any] = list(seeds)
    for key in keys:
        values = [value[key] for value in values]
    return statistics.fmean(values)


def spread_of(seeds: Sequence[Mapping[str, Any]], *keys: str) -> str:
    """The mean over seeds in percent, with the least and the most where there are several."""
    each = [mean_of([seed], *keys) for seed in seeds]
    whole = f"{statistics.fmean(each):.0%}"
    return f"{whole} ({min(each):.0%} to {max(each):.0%})" if len(each) > 1 else whole


def tables(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown; the mean over seeds, least and most in brackets."""
    phases = result["phases"]
    first = next(iter(phases.values()))[0]
    cells = [(length, depth) for length, depths in first["needles"].items() for depth in depths]
    lines = [f"Needles answered, a guess is {CHANCE:.1%}, depth 0 is the beginning", ""]
    lines += _head("tokens", "depth", *phases)
    for length, depth in cells:
        found = (spread_of(seeds, "needles", length, depth) for seeds in phases.values())
        lines.append(f"| {length} | {depth} | {' | '.join(found)} |")
    lines += ["", "Nats a character of text, by the last position of a range", "", *_head("position", *phases)]
    for position in first["loss"]:
        losses = (f"{mean_of(seeds, 'loss', position):.3f}" for seeds in phases.values())
        lines.append(f"| {position} | {' | '.join(losses)} |")
    seconds = sum(seed["core_s"] for seeds in phases.values() for seed in seeds)
    return "\n".join([*lines, "", f"{seconds / 60:.0f} core-minutes; torch {result['torch']}", ""])


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def picture(result: Mapping[str, Any]) -> Any:
    """Loss by position above, needles by length and depth below."""
    from plotly.subplots import make_subplots

    phases = result["phases"]
    titles = ("loss of text, nats a character, by position", "needles answered, by length and depth")
    figure = make_subplots(rows=2, cols=1, subplot_titles=titles, row_heights=[0.5, 0.5], vertical_spacing=0.16)
    for (name, seeds), colour in zip(phases.items(), COLOURS, strict=True):
        curve = {int(position): mean_of(seeds, "loss", position) for position in seeds[0]["loss"]}
        style = {"mode": "lines+markers", "line": {"color": colour}}
        figure.add_scatter(x=list(curve), y=list(curve.values()), name=name, row=1, col=1, **style)
    cells = [(length, depth) for length, depths in seeds[0]["needles"].items() for depth in depths]
    shares = [[mean_of(seeds, "needles", *cell) for cell in cells] for seeds in phases.values()]
    labels = [f"{length} at {float(depth):.2f}" for length, depth in cells]
    figure.add_heatmap(
        z=shares, x=labels, y=list(phases), zmin=0, zmax=1, colorscale="Viridis", texttemplate="%{z:.0%}",
        colorbar={"len": 0.45, "y": 0.2, "tickformat": ".0%"}, row=2, col=1,
    )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=[32, 128, 512, 2048], row=1, col=1)
    figure.update_yaxes(autorange="reversed", row=2, col=1)
    margin = {"l": 90, "r": 20, "t": 50, "b": 60}
    figure.update_layout(template="plotly_white", font={"size": 13}, margin=margin, width=960, height=760)
    return figure
