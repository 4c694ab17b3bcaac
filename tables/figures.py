"""Panels side by side with a mark for every number, and the plots of one experiment, from JSON alone."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

import reporter
from reporter import Column, Experiments, ReporterConfig, method_styles, save_figure, title


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
    panels[0].set(yticks=range(len(rows)), yticklabels=names, ylim=(len(rows) - 0.5, -0.5))
    return figure, panels[: len(columns)]


def draw_accuracies(rows: Sequence[Row]) -> Figure:
    """Draw forget accuracy, and retain accuracy against retraining."""
    figure, panels = draw_panels(rows, (reporter.FORGET_SCORE, reporter.RETAIN_GAP))
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


def draw_metrics(experiments: Experiments, heading: str, evaluation: str) -> Figure:
    """Draw a panel for every metric of an evaluation, with a mark for every method and its number at the right edge."""
    columns = [column for column in reporter.METRICS if column.keys[0] == evaluation]
    rows = [Row(method, experiments, method) for method in experiments.first[evaluation]]
    figure, panels = draw_panels(rows, columns)
    figure.suptitle(heading, fontsize=9)
    for panel, column in zip(panels, columns):
        if column.keys[1] == "loss":
            symmetric_log(panel, linear=10.0)
        for height, row in enumerate(rows):
            number = column.text([experiments.mean(column, row.method)])
            panel.text(1.03, height, number, transform=panel.get_yaxis_transform(), va="center", fontsize=7)
    return figure


def draw_class_probabilities(experiments: Experiments, heading: str) -> Figure:
    """Draw the mean predicted probability of every class on the forget set, a row per method."""
    classes, probabilities = experiments.first["class_names"], experiments.first["class_probabilities"]
    figure = Figure(figsize=(max(10, 0.65 * len(classes)), 1 + 0.25 * len(probabilities)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{heading}, forget set", fontsize=10)
    image = axes.imshow(list(probabilities.values()), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="mean probability")
    for (y, x), number in np.ndenumerate(image.get_array()):
        axes.text(x, y, f"{number:.2f}", ha="center", va="center", fontsize=8, color="w" if number > 0.6 else "k")
    axes.set_xticks(range(len(classes)), classes, fontsize=8, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set(xlabel="class", yticks=range(len(probabilities)), yticklabels=probabilities)
    return figure


def draw_weights(experiments: Experiments, heading: str) -> Figure:
    """Draw a histogram of the weights of every masked layer, and of those that the masking GCN zeroes."""
    histograms = experiments.first["weight_histograms"]
    figure = Figure(figsize=(max(6, 4 * len(histograms)), 3), layout="constrained")
    figure.suptitle(heading, fontsize=9)
    for axes, histogram in zip(figure.subplots(1, len(histograms), squeeze=False)[0], histograms):
        weights, zeroed, edges = histogram["all"], histogram["zeroed"], histogram["edges"]
        axes.stairs(weights, edges, fill=True, color="0.75", label=f"all {sum(weights)} weights")
        axes.stairs(zeroed, edges, fill=True, color=reporter.COLORS["mimu"], label=f"{sum(zeroed)} zeroed by mimu")
        axes.set(yscale="log", ylim=(0.8, 1.2 * max(weights) ** 1.3), ylabel="number of weights")  # the legend has room
        axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
        axes.legend(fontsize=8, loc="upper center")
    return figure


PLOTS = {
    "unlearning": partial(draw_metrics, evaluation=reporter.FORGET),
    "performance_degradation": partial(draw_metrics, evaluation=reporter.RETAIN),
    "class_probabilities": draw_class_probabilities,
    "weights": draw_weights,
}


def draw(metrics: Path, place: Path, config: ReporterConfig) -> None:
    """Draw the plots of an experiment, unless all of them are there and none is older than its JSON.

    Args:
        metrics: The JSON of the experiment.
        place: The folder of the plots.
    """
    paths = {place / f"{name}.png": draw_plot for name, draw_plot in PLOTS.items()}
    oldest = min(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)
    if oldest < metrics.stat().st_mtime_ns:
        experiments = Experiments([metrics])
        heading = f"{title([experiments])}, kappa = {experiments.kappa}"
        for path, draw_plot in paths.items():
            save_figure(draw_plot(experiments, heading), path, config)
