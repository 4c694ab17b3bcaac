"""Marks in panels and planes, and the masks of the digits, from the figures of reporters."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from reporter import Column, Reporter, method_styles, save_figure

# Recall of the linear probe that is trained to convergence, less that of the same probe on the retrained classifier.
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe recall against retrain, points", "+.1f", is_gap=True)
Row = tuple[str, Reporter, str]  # how it is called, reporter, method


def draw_marks(axes: Axes, x: Sequence[float], y: Sequence[float], style: dict[str, Any], **large: Any) -> None:
    """A small mark for every seed (or where there is one seed, digit), and a large one for their mean."""
    style = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
    axes.plot(x, y, markersize=3, alpha=0.4, **style)
    axes.plot(fmean(x), fmean(y), **style | {"markersize": 7} | large)


def draw_panels(rows: Sequence[Row], columns: Sequence[Column]) -> tuple[Figure, Sequence[Axes]]:
    """A panel for every column, at most four side by side, with marks for every row."""
    styles = method_styles(method for *_, method in rows)
    high = -(-len(columns) // 4)
    wide = len(columns) // high
    size = (4 + 2.5 * wide, high * (0.6 + 0.24 * len(rows)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, column in zip(axes.flat, columns):
        for height, (_, reporter, method) in enumerate(rows):
            x = reporter.spread(column, method)
            draw_marks(panel, x, [height] * len(x), styles[method])
        panel.set_xlabel(column.name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    panel.set_yticks(range(len(rows)), [name for name, *_ in rows])
    panel.invert_yaxis()
    return figure, axes.flat


def symmetric_log(axes: Axes, which: Literal["x", "y"], linear: float) -> None:
    """Makes an axis linear up to `linear` and logarithmic beyond, where marks lie far away from 0."""
    if max(map(abs, getattr(axes, f"get_{which}lim")())) > 5 * linear:
        getattr(axes, f"set_{which}scale")("symlog", linthresh=linear)
        axis = getattr(axes, f"{which}axis")
        axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=linear, subs=(1, 3)))
        axis.set_major_formatter("{x:g}")
        axes.autoscale(axis=which)  # anew, with margins in this scale
        axes.minorticks_off()


def draw_plane(reporters: Sequence[Reporter], columns: Sequence[Column], path: Path, linear: float = math.inf) -> None:
    """Draws two figures of every method of variants against each other, with grey lines at 0.

    A method is one curve over the weight of the erasure, with larger marks for larger weights, and a dotted one over
    the fixed kappas of a variant. Variants that mask other layers than the first one are hollow marks.

    linear: where the axes become logarithmic
    """
    first = reporters[0]
    weight = {each: each.experiments[0]["config"]["erasure"]["weight"] for each in reporters}
    layers = {each: each.experiments[0]["mask_layer"] for each in reporters}
    alike = [each for each in sorted(reporters, key=weight.__getitem__) if each.has_auto == first.has_auto]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    methods = dict.fromkeys(name for each in reporters for name in each.methods)
    for method in methods:
        style = {name: method_styles(methods)[method][name] for name in ("color", "marker")}
        for each in reporters:
            over_kappa = (each.curve(column, method) for column in columns)
            axes.plot(*over_kappa, linestyle=":", linewidth=1, markersize=3, alpha=0.6, **style)
        those = [each for each in alike if method in each.methods]
        curve = [each for each in those if layers[each] == layers[first]]
        over_weight = ([each.mean(column, method) for each in curve] for column in columns)
        line, span = "none", ""
        if len(curve) > 1:
            line, span = "-", f", weight {weight[curve[0]]:g} to {weight[curve[-1]]:g}"
        axes.plot(*over_weight, linestyle=line, markersize=6, label=f"{method}{span}", **style)
        for each in those:
            x, y = (each.spread(column, method) for column in columns)
            large = {"markersize": 6 + 1.5 * curve.index(each)} if each in curve else {"fillstyle": "none"}
            draw_marks(axes, x, y, style, **large)
    symmetric_log(axes, "x", linear)
    symmetric_log(axes, "y", linear)
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=1)
    axes.set(xlabel=columns[0].name, ylabel=columns[1].name)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path, first.config.dpi)


def draw_masks(reporter: Reporter) -> None:
    """Draws which weights mimu zeroes for each digit, first seed, and the share of them (row) that others zero, too."""
    m, n = reporter.experiments[0]["mask_shapes"][0]
    requests = reporter.found[reporter.kappa].items()
    zeroed = {digit: set(each["zeroed"]) for (seed, digit), each in sorted(requests) if seed == reporter.seeds[0]}
    figure = plt.figure(figsize=(14, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    panels = left.subplots(2, -(-len(zeroed) // 2), sharex=True, sharey=True, squeeze=False).flat
    for (digit, vertices), axes in zip(zeroed.items(), panels):
        targets, sources = zip(*(divmod(vertex, n) for vertex in vertices))
        axes.plot(sources, targets, ".", color=reporter.styles["mimu"]["color"], markersize=2)
        axes.set_title(f"digit {digit}: {len(vertices)} weights", fontsize=8)
        axes.set(xlim=(-0.5, n - 0.5), ylim=(m - 0.5, -0.5))
    left.supxlabel("source neuron", fontsize=9)
    left.supylabel("target neuron", fontsize=9)
    axes = right.subplots()
    shares = [[100 * len(a & b) / len(a) for b in zeroed.values()] for a in zeroed.values()]
    draw_matrix(axes, shares, "weights in common (%)", 100.0, ".0f")
    axes.set(xlabel="digit", ylabel="digit", yticks=range(len(zeroed)), xticklabels=zeroed, yticklabels=zeroed)
    save_figure(figure, reporter.folder / "masks.png", reporter.config.dpi)


def draw_matrix(axes: Axes, rows: Sequence[Sequence[float]], label: str, highest: float, spec: str) -> None:
    """A matrix of numbers from 0 to `highest` in shades of blue, with the scale beside it."""
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for y, row in enumerate(rows):
        for x, number in enumerate(row):
            color = "w" if number > 0.6 * highest else "k"
            axes.text(x, y, f"{number:{spec}}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(rows[0])))
    axes.figure.colorbar(image, ax=axes, label=label)
