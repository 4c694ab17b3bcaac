"""Panels side by side, in which a method or a variant has a line and every number a mark."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from reporter import FORGET_SCORE, RETAIN_GAP, Column, Experiments, method_styles, title


class Row(NamedTuple):
    """A method of some experiments, and its name in tables and panels."""

    name: str
    experiments: Experiments
    method: str


def draw_panels(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Figure, Sequence[Axes]]:
    """Draw a panel for every column, at most four side by side.

    Large marks are means, small ones the numbers of the seeds, or if there is only one seed, of the digits. A grey line
    stands at the retrained classifier.
    """
    styles = method_styles(row.method for row in rows)
    names = [row.name for row in rows]
    high = -(-len(columns) // 4)
    wide = -(-len(columns) // high)
    size = (0.5 + 0.07 * max(map(len, names)) + (2.2 if high > 1 else 3) * wide, 0.5 + high * (0.7 + 0.2 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title(dict.fromkeys(row.experiments for row in rows)), fontsize=9)
    panels = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for panel in panels[len(columns) :]:
        panel.set_visible(False)
    panels = panels[: len(columns)]
    for panel, column in zip(panels, columns):
        for height, row in enumerate(rows):
            x = row.experiments.spread(column, row.method)
            style = styles[row.method] | {"linestyle": "none", "clip_on": False}  # whole at the ends of the axis, too
            panel.plot(x, [height] * len(x), markersize=3, alpha=0.4, **style)
            panel.plot(fmean(x), height, markersize=7, **style)
        panel.axvline(rows[0].experiments.mean(column, "retrain"), color="0.5", linewidth=0.8)
        panel.set_xlabel(column.name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panel.set_yticks(range(len(rows)), names)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    return figure, panels


def draw_accuracies(rows: Sequence[Row]) -> Figure:
    """Draw forget accuracy, and retain accuracy against retraining."""
    figure, panels = draw_panels(rows, (FORGET_SCORE, RETAIN_GAP))
    for panel in panels:
        symmetric_log(panel, linear=1.0)
    return figure


def symmetric_log(axes: Axes, linear: float) -> None:
    """Make the x axis linear up to `linear` and logarithmic beyond, if there are marks far away from 0."""
    if max(map(abs, axes.get_xlim())) > 5 * linear:
        axes.set_xscale("symlog", linthresh=linear)
        axes.autoscale(axis="x")  # anew, with margins in this scale
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(f"{axes.get_xlabel()}\n(symmetric log scale)", fontsize=9)
