"""The study as files: what was measured, tables, and one picture.

result.json             everything measured
tables.md               needles by length and depth, loss by position: what docs/post_training.md shows
context_extension.html  both, 940 x 700 pixels, with plotly.js inside; docs/numerics.md says how a page becomes PNG
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.studies.context_extension.needles import CHANCE, WITHOUT_ORDER
from train.studies.recorded import head, spread, write_files

# Of lengths; YaRN is a full line, without it a dashed one.
COLOURS = {128: "#7a7a7a", 512: "#d1662a", 2048: "#1f5fa8"}


def write(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write all files into a folder and return their paths."""
    texts = {"result.json": strict_json(result), "tables.md": tables(result)}
    texts["context_extension.html"] = picture(result).to_html(include_plotlyjs=True, config={"displayModeBar": False})
    return write_files(directory, texts)


def mean_of(seeds: Sequence[Mapping[str, Any]], *keys: str) -> float:
    """The mean over seeds of one number of each."""
    values: list[Any] = list(seeds)
    for key in keys:
        values = [value[key] for value in values]
    return statistics.fmean(values)


def tables(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown; the mean over seeds, least and most in brackets."""
    phases = result["phases"]
    first = next(iter(phases.values()))[0]
    cells = [(length, depth) for length, depths in first["needles"].items() for depth in depths]
    guesses = f"a guess is {CHANCE:.1%}, the key without the order {WITHOUT_ORDER:.0%}"
    lines = [f"Needles answered: {guesses}, depth 1 is the end", ""]
    lines += head("tokens", "depth", *phases)
    for length, depth in cells:
        found = (spread([seed["needles"][length][depth] for seed in seeds]) for seeds in phases.values())
        lines.append(f"| {length} | {depth} | {' | '.join(found)} |")
    lines += ["", "Nats a character of text, by the last position of a range", "", *head("position", *phases)]
    for position in first["loss"]:
        losses = (f"{mean_of(seeds, 'loss', position):.3f}" for seeds in phases.values())
        lines.append(f"| {position} | {' | '.join(losses)} |")
    seconds = sum(seed["core_s"] for seeds in phases.values() for seed in seeds)
    return "\n".join([*lines, "", f"{seconds / 60:.0f} core-minutes; torch {result['torch']}", ""])


def picture(result: Mapping[str, Any]) -> Any:
    """Loss by position above, needles by depth below, one field for each length."""
    from plotly.subplots import make_subplots

    phases = result["phases"]
    needles = next(iter(phases.values()))[0]["needles"]
    above = "loss of text by position in 2,048 tokens, nats a character"
    titles = (above, *(f"needles answered in {int(length):,}, by depth" for length in needles))
    top = [{"colspan": len(needles)}, *[None] * (len(needles) - 1)]
    figure = make_subplots(
        rows=2, cols=len(needles), specs=[top, [{}] * len(needles)], subplot_titles=titles, shared_yaxes=True,
        row_heights=[0.5, 0.5], vertical_spacing=0.17, horizontal_spacing=0.02,
    )  # fmt: skip
    for name, seeds in phases.items():
        length, kind = name.split()
        curve = {int(position): mean_of(seeds, "loss", position) for position in seeds[0]["loss"]}
        line = {"color": COLOURS[int(length)], "dash": "solid" if kind == "YaRN" else "dot"}
        style = {"mode": "lines+markers", "line": line}
        figure.add_scatter(x=list(curve), y=list(curve.values()), name=name, row=1, col=1, **style)
    for column, (length, depths) in enumerate(needles.items(), start=1):
        shares = [[mean_of(seeds, "needles", length, depth) for depth in depths] for seeds in phases.values()]
        figure.add_heatmap(
            z=shares, x=list(depths), y=list(phases), zmin=0, zmax=1,
            colorscale="Viridis", texttemplate="%{z:.0%}", showscale=False, row=2, col=column,
        )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=list(curve), row=1, col=1)
    figure.update_xaxes(type="category", row=2)
    figure.update_yaxes(autorange="reversed", row=2)
    figure.update_annotations(font_size=14)
    look = {"template": "plotly_white", "font": {"size": 13}, "margin": {"l": 90, "r": 20, "t": 40, "b": 30}}
    figure.update_layout(**look, legend={"x": 0.02, "y": 0.99}, width=940, height=700)
    return figure
