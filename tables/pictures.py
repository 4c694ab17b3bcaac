"""Marks in panels and planes, and the masks of the classes, from the figures of reporters."""

import math
import textwrap
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from mimu.reporter import FORGET_SCORE, RETAIN_GAP, Column, Reporter, ReporterConfig, method_styles, save_figure, title

# Recall of the linear probe that is trained to convergence, less that of the same probe on the retrained classifier.
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe recall against retrain, points", "+.1f", is_gap=True)
NAMED = 10  # methods, at most, whose names stand beside their marks


class Row(NamedTuple):
    """A method of a reporter, and how tables and panels call it."""

    name: str
    reporter: Reporter
    method: str


def draw_panels(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Figure, Sequence[Axes]]:
    """A panel for every column, at most four side by side, with marks for every row."""
    styles = method_styles(row.method for row in rows)
    names = [row.name for row in rows]
    high = -(-len(columns) // 4)
    wide = len(columns) // high
    size = (0.5 + 0.07 * max(map(len, names)) + (2.2 if high > 1 else 3) * wide, 0.5 + high * (0.7 + 0.2 * len(rows)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharey=True, squeeze=False, layout="constrained")
    figure.suptitle(title(dict.fromkeys(row.reporter for row in rows)), fontsize=9)
    for panel, column in zip(axes.flat, columns):
        for height, row in enumerate(rows):
            # A small mark for every seed (or where there is one seed, digit), and a large one for their mean.
            x = row.reporter.spread(column, row.method)
            style = {"color": styles[row.method]["color"], "marker": styles[row.method]["marker"], "linestyle": "none"}
            panel.plot(x, [height] * len(x), markersize=3, alpha=0.4, **style)
            panel.plot(fmean(x), height, markersize=7, **style)
        panel.set_xlabel(column.name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
        panel.grid(alpha=0.3)
    panel.set_yticks(range(len(rows)), names)
    panel.invert_yaxis()
    return figure, axes.flat


def draw_scores(rows: Sequence[Row], path: Path, config: ReporterConfig) -> None:
    """Draws forget score and distance to retraining, in a row for each method or variant."""
    figure, axes = draw_panels(rows, (FORGET_SCORE, RETAIN_GAP))
    for panel in axes:
        panel.axvline(0, color="0.5", linewidth=0.8)
        symmetric_log(panel, linear=1.0)
    save_figure(figure, path, config)


def symmetric_log(axes: Axes, linear: float) -> None:
    """Makes the x axis linear up to `linear` and logarithmic beyond, where marks lie far away from 0."""
    if max(map(abs, axes.get_xlim())) <= 5 * linear:
        return
    axes.set_xscale("symlog", linthresh=linear)
    axes.autoscale(axis="x")  # anew, with margins in this scale
    low, high = axes.get_xlim()
    least, most = axes.dataLim.intervalx
    # The ticks next to 0 are at `linear`: a side with marks that are not rounding reaches that far.
    low = min(low, -1.2 * linear) if least < -0.01 * linear else low
    axes.set_xlim(low, max(high, 1.2 * linear) if most > 0.01 * linear else high)
    axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_frontier(reporters: Sequence[Reporter], path: Path, config: ReporterConfig) -> None:
    """Draws the retain score of variants against what a probe finds of the class, with grey lines at 0.

    A method is one curve over the variants, with larger marks for later ones; of more than ten, those that any variant
    brings nearest to retraining. Variants that mask other layers than the first one are hollow marks.
    """
    points: dict[str, dict[Reporter, tuple[float, float]]] = {}
    for reporter in reporters:
        for method in reporter.methods:
            of_method = points.setdefault(method, {})
            of_method[reporter] = reporter.mean(PROBE, method), reporter.mean(RETAIN_GAP, method)

    def distance(method: str) -> float:
        distances = [abs(x) + abs(y) for x, y in points[method].values()]
        return min(filter(math.isfinite, distances), default=math.inf)

    mask_layer = reporters[0].experiments[0]["mask_layer"]
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    styles = method_styles(points)
    for method in sorted(points, key=distance)[:NAMED]:
        style = {name: styles[method][name] for name in ("color", "marker")}
        in_curve = [each for each in points[method] if each.experiments[0]["mask_layer"] == mask_layer]
        curve = np.array(sorted(points[method][each] for each in in_curve)).reshape(-1, 2)
        curve = curve[np.isfinite(curve).all(1)]  # others would break the line
        line = "-" if len(curve) > 1 else "none"
        axes.plot(curve[:, 0], curve[:, 1], linestyle=line, markersize=6, label=method, **style)
        for reporter, (x, y) in points[method].items():
            is_in_curve = reporter in in_curve
            mark = {"markersize": 6 + 1.5 * in_curve.index(reporter)} if is_in_curve else {"fillstyle": "none"}
            axes.plot(x, y, linestyle="none", **style, **mark)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.set(xlabel=PROBE.name, ylabel=RETAIN_GAP.name)
    axes.set_title(title(reporters), fontsize=9)
    axes.grid(alpha=0.3)
    axes.margins(0.2, 0.1)  # room for the names
    name_curves(axes)
    save_figure(figure, path, config)


def name_curves(axes: Axes) -> None:
    """Writes the label of every line beside its mark nearest to 0, where no large mark and no other label is."""
    axes.figure.draw_without_rendering()  # the layout decides where the marks are
    large = [line.get_xydata() for line in axes.lines if line.get_markersize() > 5]
    marks = axes.transData.transform(np.concatenate(large))
    taken = []
    for line in axes.lines:
        points = line.get_xydata()
        if line.get_label().startswith("_") or not len(points):
            continue
        frame = {"boxstyle": "round,pad=0.15", "facecolor": "w", "edgecolor": line.get_color(), "alpha": 0.85}
        style = {"textcoords": "offset points", "fontsize": 8, "va": "center", "bbox": frame}
        text = axes.annotate(line.get_label(), points[abs(points).sum(1).argmin()], (0, 0), **style)
        for y, x in product(sorted(range(-72, 73, 9), key=abs), (9, -9)):
            text.set(position=(x, y), ha="left" if x > 0 else "right")
            box = text.get_window_extent().padded(4)
            is_inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if is_inside and not box.count_contains(marks) and not box.count_overlaps(taken):
                break
        taken.append(box)


def draw_masks(reporter: Reporter) -> None:
    """Draws which weights mimu zeroes for each class, first seed, and the share of them (row) that others zero, too."""
    m, *kernels = reporter.experiments[0]["mask_shapes"][0]
    n = math.prod(kernels)
    requests = sorted(reporter.found[reporter.kappa].items())
    zeroed = {digit: set(each["zeroed"]) for (seed, digit), each in requests if seed == reporter.seeds[0]}
    titles = dict(zip(reporter.digits, reporter.titles))
    dataset, _, _, classifier = reporter.subject
    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    figure.suptitle(f"{dataset}, {classifier}", fontsize=10)
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    panels = left.subplots(2, -(-len(zeroed) // 2), sharex=True, sharey=True, squeeze=False).flat
    shares = []
    for (digit, vertices), axes in zip(zeroed.items(), panels):
        targets, sources = np.divmod(list(vertices), n)
        axes.plot(sources, targets, ".", color=reporter.styles["mimu"]["color"], markersize=2)
        axes.set_title(textwrap.fill(f"class {titles[digit]}: {len(vertices)} weights", 32), fontsize=8)
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
