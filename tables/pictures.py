"""Marks in panels and planes, and the masks of the digits, from the figures of reporters."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporter import FORGET_SCORE, RETAIN_GAP, Column, Reporter, method_styles, save_figure

# Recall of the linear probe that is trained to convergence, less that of the same probe on the retrained classifier.
PROBE = Column(("audit_metrics", "probe_recall", "linear"), "probe recall against retrain, points", "+.1f", is_gap=True)
Row = tuple[str, Reporter, str]  # how it is called, reporter, method


def draw_marks(axes: Axes, x: Sequence[float], y: Sequence[float], style: dict[str, Any], **large: Any) -> None:
    """A small mark for every seed (or where there is one seed, digit), and a large one for their mean."""
    style = {"color": style["color"], "marker": style["marker"], "linestyle": "none"}
    axes.plot(x, y, markersize=3, alpha=0.4, **style)
    axes.plot(fmean(x), fmean(y), **style | {"markersize": 7} | large)


def draw_panels(rows: Sequence[Row], columns: Sequence[Column], high: int) -> tuple[Figure, Sequence[Axes]]:
    """A panel for every column, so many above one another, with marks for every row."""
    styles = method_styles(method for *_, method in rows)
    wide = len(columns) // high
    size = (4 + 2.5 * wide, high * (0.6 + 0.24 * len(rows)))
    figure, axes = plt.subplots(high, wide, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, column in zip(axes.flat, columns):
        for height, (_, reporter, method) in enumerate(rows):
            x = reporter.spread(column, method, reporter.headline_kappa()).per_seed
            draw_marks(panel, x, [height] * len(x), styles[method])
        panel.set_xlabel(column.name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes[0, 0].invert_yaxis()
    return figure, axes.flat


def symmetric_log(axes: Axes, which: Literal["x", "y"], linear: float) -> None:
    """Makes an axis linear up to `linear` and logarithmic beyond, where marks lie far away from 0."""
    marked = [0.0, *(x for line in axes.lines for x in getattr(line, f"get_{which}data")() if math.isfinite(x))]
    if max(map(abs, marked)) <= 4 * linear:
        return
    low, high = 1.4 * min(marked) - linear / 5, 1.4 * max(marked) + linear / 5
    ticks = [0.0, *(sign * linear * far for sign in (-1, 1) for far in (1, 3, 10, 30, 100))]
    getattr(axes, f"set_{which}scale")("symlog", linthresh=linear)
    getattr(axes, f"set_{which}ticks")(sorted(tick for tick in ticks if low <= tick <= high))
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, f"{which}axis").set_major_formatter("{x:g}")
    axes.minorticks_off()


@contextmanager
def plane(columns: Sequence[Column], path: Path, dpi: int) -> Iterator[Axes]:
    """A figure of two columns: what is plotted while the context is open is in it."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.set(xlabel=columns[0].name, ylabel=columns[1].name)
    axes.grid(alpha=0.3)
    yield axes
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save_figure(figure, path, dpi)


def draw_trade_off(reporter: Reporter) -> None:
    """Draws `trade_off.png`: forget score and retain score against retraining, a place for every method."""
    columns = (FORGET_SCORE, RETAIN_GAP)
    with plane(columns, reporter.folder / "trade_off.png", reporter.config.dpi) as axes:
        for name in reporter.methods:
            x, y = (reporter.spread(column, name, reporter.headline_kappa()).per_seed for column in columns)
            draw_marks(axes, x, y, reporter.styles[name], label=name, markersize=13 if name == "retrain" else 7)
        symmetric_log(axes, "x", linear=1.0)
        symmetric_log(axes, "y", linear=1.0)


def draw_frontier(reporters: Sequence[Reporter], path: Path) -> None:
    """Draws what forgetting in the representation costs: retain score against recall of a probe, of audited variants.

    A method is one curve over the weight of the erasure, kappa auto, with larger marks for larger weights, and a dotted
    one over the fixed kappas of a variant. Variants that mask other layers than the first one are hollow marks.
    """
    columns = (PROBE, RETAIN_GAP)
    weight = {each: each.experiments[0]["config"]["erasure"]["weight"] for each in reporters}
    layers = {each: each.experiments[0]["mask_layer"] for each in reporters}
    methods = list(dict.fromkeys(name for each in reporters for name in each.methods))
    with plane(columns, path, reporters[0].config.dpi) as axes:
        for method in methods:
            style = {name: method_styles(methods)[method][name] for name in ("color", "marker")}
            those = sorted((each for each in reporters if method in each.methods), key=weight.__getitem__)
            for each in those:
                over_kappa = ([each.figure(column, method, kappa).mean for kappa in each.kappas] for column in columns)
                axes.plot(*over_kappa, linestyle=":", linewidth=1, markersize=3, alpha=0.6, **style)
            chosen = [each for each in those if each.has_auto]
            curve = [each for each in chosen if layers[each] == layers[reporters[0]]]
            weights = sorted({weight[each] for each in curve})
            line, span = ("-", f", weight {weights[0]:g} to {weights[-1]:g}") if len(weights) > 1 else ("none", "")
            over_weight = ([each.figure(column, method, "auto").mean for each in curve] for column in columns)
            axes.plot(*over_weight, linestyle=line, markersize=5, label=f"{method}{span}", **style)
            for each in chosen:
                x, y = (each.spread(column, method, "auto").per_seed for column in columns)
                full = {"markersize": 5 + 1.5 * weights.index(weight[each])} if each in curve else {}
                draw_marks(axes, x, y, style, **full or {"fillstyle": "none"})


def draw_masks(reporter: Reporter) -> None:
    """Draws which weights mimu zeroes for each digit, first seed, and the share of them (row) that others zero, too."""
    m, n = reporter.experiments[0]["mask_shapes"][0]
    requests = reporter.found[reporter.headline_kappa()].items()
    zeroed = {digit: set(each["zeroed"]) for (seed, digit), each in sorted(requests) if seed == reporter.seeds[0]}
    figure = plt.figure(figsize=(14, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
    panels = left.subplots(2, -(-len(zeroed) // 2), sharex=True, sharey=True, squeeze=False).flat
    for (digit, vertices), axes in zip(zeroed.items(), panels):
        style = {"color": reporter.styles["mimu"]["color"], "marker": ".", "markersize": 2, "linestyle": "none"}
        axes.plot([vertex % n for vertex in vertices], [vertex // n for vertex in vertices], **style)
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
