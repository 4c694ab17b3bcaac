"""Marks in panels and planes, and the masks of the classes, from the figures of reporters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from reporter import FORGET_SCORE, RETAIN_GAP, Column, Reporter, ReporterConfig, method_styles, save_figure, title

# Recall of the linear probe that is trained to convergence, less that of the same probe on the retrained classifier.
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe recall against retrain, points", "+.1f", is_gap=True)
INDEX = Column(("audit_metrics", "usable_bits", "representation"), "IDI", "+.2f", is_gap=True, is_index=True)


class Row(NamedTuple):
    """A method of a reporter, and how tables and panels call it."""

    name: str
    reporter: Reporter
    method: str


def draw_panels(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Figure, Sequence[Axes]]:
    """A panel for every column, at most four side by side: small marks are seeds (if one: digits), large ones means."""
    styles = method_styles(row.method for row in rows)
    names = [row.name for row in rows]
    high = -(-len(columns) // 4)
    wide = len(columns) // high
    size = (0.5 + 0.07 * max(map(len, names)) + (2.2 if high > 1 else 3) * wide, 0.5 + high * (0.7 + 0.2 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title(dict.fromkeys(row.reporter for row in rows)), fontsize=9)
    panels = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for panel, column in zip(panels, columns):
        for height, row in enumerate(rows):
            x = row.reporter.spread(column, row.method)
            style = styles[row.method] | {"linestyle": "none", "clip_on": False}  # whole at the ends of the axis, too
            panel.plot(x, [height] * len(x), markersize=3, alpha=0.4, **style)
            panel.plot(fmean(x), height, markersize=7, **style)
        panel.set_xlabel(column.name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panel.set_yticks(range(len(rows)), names)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    return figure, panels


def draw_scores(rows: Sequence[Row], path: Path, config: ReporterConfig) -> None:
    """Draws forget score and distance to retraining, in a row for each method or variant."""
    figure, axes = draw_panels(rows, (FORGET_SCORE, RETAIN_GAP))
    for panel in axes:
        panel.axvline(0, color="0.5", linewidth=0.8)
        symmetric_log(panel, linear=1.0)
    save_figure(figure, path, config)


def symmetric_log(axes: Axes, linear: float) -> None:
    """Makes the x axis linear up to `linear` and logarithmic beyond, where marks lie far away from 0."""
    if max(map(abs, axes.get_xlim())) > 5 * linear:
        axes.set_xscale("symlog", linthresh=linear)
        axes.autoscale(axis="x")  # anew, with margins in this scale
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(f"{axes.get_xlabel()}\n(symmetric log scale)", fontsize=9)


def draw_frontier(reporters: Sequence[Reporter], path: Path, config: ReporterConfig) -> None:
    """Draws the retain score of variants against IDI, or if none is given the probe: a method is a curve over them.

    Of more than ten, those that any variant brings nearest to retraining; hollow: other layers than the first's masked.
    """
    mask_layers = [reporter.experiments[0]["mask_layer"] for reporter in reporters]
    given = [reporter.mean(INDEX, method) for reporter in reporters for method in reporter.methods]
    left = INDEX if np.isfinite(given).any() else PROBE
    marks: dict[str, list[tuple[float, float, bool]]] = {}
    for reporter, mask_layer in zip(reporters, mask_layers):
        for method in reporter.methods:
            mark = (reporter.mean(left, method), reporter.mean(RETAIN_GAP, method), mask_layer != mask_layers[0])
            if np.isfinite(mark).all():
                marks.setdefault(method, []).append(mark)
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for method in sorted(marks, key=lambda name: min(abs(x) + abs(y) for x, y, _ in marks[name]))[:10]:
        style = method_styles(marks)[method]
        x, y, is_elsewhere = np.transpose(sorted(marks[method]))
        axes.plot(x[is_elsewhere == 0], y[is_elsewhere == 0], label=method, **style)
        axes.plot(x[is_elsewhere == 1], y[is_elsewhere == 1], **style | {"linestyle": "none", "fillstyle": "none"})
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    other = " (hollow: masks of other layers)" if any(each != mask_layers[0] for each in mask_layers) else ""
    axes.set(xlabel=f"{left.name}{other}", ylabel=RETAIN_GAP.name)
    axes.set_title(title(reporters), fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    save_figure(figure, path, config)


def draw_masks(reporter: Reporter) -> None:
    """Draws which weights mimu zeroes for each class, first seed, and the share of them (row) that others zero, too."""
    m, *kernels = reporter.experiments[0]["mask_shapes"][0]
    n = math.prod(kernels)
    requests = sorted(reporter.found[reporter.kappa].items())
    zeroed = {digit: set(each["zeroed"]) for (seed, digit), each in requests if seed == reporter.seeds[0]}
    dataset, _, _, classifier = reporter.subject
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(f"{dataset}, {classifier}", fontsize=10)
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    wide = min(5, len(zeroed))
    shares = []
    for place, (digit, vertices) in enumerate(zeroed.items(), start=1):
        axes = left.add_subplot(-(-len(zeroed) // wide), wide, place)
        targets, sources = np.divmod(list(vertices), n)
        axes.plot(sources, targets, ".", color=reporter.styles["mimu"]["color"], markersize=2)
        axes.set_title(textwrap.fill(f"class {reporter.titles[digit]}: {len(vertices)} weights", 32), fontsize=8)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(m - 0.5, -0.5))
        shares.append([100 * len(vertices & others) / len(vertices) for others in zeroed.values()])
    left.supxlabel("source neuron", fontsize=9)
    left.supylabel("target neuron", fontsize=9)
    axes = right.subplots()
    draw_matrix(axes, shares, "weights in common (%)", 100.0, ".0f")
    axes.set(xlabel="class", ylabel="class", yticks=range(len(zeroed)), xticklabels=zeroed, yticklabels=zeroed)
    save_figure(figure, reporter.folder / "masks.png", reporter.config)


def draw_matrix(axes: Axes, rows: Sequence[Sequence[float]], label: str, highest: float, spec: str) -> None:
    """A matrix of numbers from 0 to `highest` in shades of blue, with the scale beside it."""
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for y, row in enumerate(rows):
        for x, number in enumerate(row):
            color = "w" if number > 0.6 * highest else "k"
            axes.text(x, y, f"{number:{spec}}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(rows[0])))
    axes.figure.colorbar(image, ax=axes, label=label)
