"""The plots of one experiment, from its JSON alone."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from reporter import COLORS, EFFICACY, FORGET, METRICS, RETAIN, Experiments, ReporterConfig, save_figure, title
from tables.panels import Row, draw_panels, symmetric_log


def draw_metrics(experiments: Experiments, heading: str, evaluation: str) -> Figure:
    """Draw a panel for every metric of an evaluation, with a mark for every method and its number at the right edge."""
    columns = [column for column in (*METRICS, *EFFICACY) if column.keys[0] == evaluation]
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
        axes.stairs(zeroed, edges, fill=True, color=COLORS["mimu"], label=f"{sum(zeroed)} zeroed by mimu")
        axes.set(yscale="log", ylim=(0.8, 1.2 * max(weights) ** 1.3), ylabel="number of weights")  # the legend has room
        axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
        axes.legend(fontsize=8, loc="upper center")
    return figure


PLOTS = {
    "unlearning": partial(draw_metrics, evaluation=FORGET),
    "performance_degradation": partial(draw_metrics, evaluation=RETAIN),
    "class_probabilities": draw_class_probabilities,
    "weights": draw_weights,
}


def draw(metrics: Path, place: Path, config: ReporterConfig) -> None:
    """Draw the plots of an experiment, unless all of them are there and none is older than its JSON.

    Args:
        metrics: The JSON of the experiment.
        place: The folder of the plots.
    """
    paths = [place / f"{name}.{suffix}" for name, suffix in product(PLOTS, config.format)]
    oldest = min(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)
    if oldest >= metrics.stat().st_mtime_ns:
        return
    experiments = Experiments([metrics])
    heading = f"{title([experiments])}, kappa = {experiments.kappa}"
    for name, draw_plot in PLOTS.items():
        save_figure(draw_plot(experiments, heading), place / f"{name}.png", config)
