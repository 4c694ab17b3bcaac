"""The four plots of one experiment, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reporter import EFFICACY, FORGET, METRICS, RETAIN, Reporter, ReporterConfig, save_figure, title
from tables.pictures import Row, draw_matrix, draw_panels, symmetric_log

PLOTS = ("unlearning", "performance_degradation", "class_probabilities", "weights")
DRAWN_BY = (Path(__file__), Path(__file__).with_name("pictures.py"), Path(__file__).parents[1] / "reporter.py")


def draw(results: Mapping[str, Any], folder: Path, config: ReporterConfig) -> None:
    """Draws the plots of an experiment, but where all are there and none is older than its JSON or this code."""
    metrics = folder / "Metrics and Plots" / "metrics" / f"{results['id']}.json"
    place = folder / "Metrics and Plots" / "plots" / results["id"]
    paths = [place / ".".join(parts) for parts in product(PLOTS, config.format)]
    latest = max(path.stat().st_mtime_ns for path in (metrics, *DRAWN_BY))
    if all(path.is_file() and path.stat().st_mtime_ns >= latest for path in paths):
        return
    reporter = Reporter(config, [metrics], place)
    heading = f"{title([reporter])}, kappa = {reporter.kappa}"
    draw_metrics(reporter, "unlearning", heading, FORGET)
    draw_metrics(reporter, "performance_degradation", heading, RETAIN)
    draw_class_probabilities(reporter, heading)
    draw_weights(reporter, heading)


def draw_metrics(reporter: Reporter, name: str, heading: str, evaluation: str) -> None:
    """A panel for every metric of an evaluation, a mark for every method, its number at the right edge."""
    columns = [column for column in (*METRICS, *EFFICACY) if column.keys[0] == evaluation]
    methods = reporter.experiments[0][evaluation]
    figure, panels = draw_panels([Row(method, reporter, method) for method in methods], columns)
    figure.suptitle(heading, fontsize=9)
    for panel, column in zip(panels, columns):
        if column.keys[1] == "loss":
            symmetric_log(panel, linear=10.0)
        low, high = panel.get_xlim()
        highest = {"score": 100.0, "probability": 1.0}.get(column.keys[1], high)
        panel.set_xlim(max(low, 0.0), min(high, highest))
        panel.axvline(reporter.mean(column, "retrain"), color="0.5", linewidth=0.8)
        for height, method in enumerate(methods):
            number = column.text([reporter.mean(column, method)])
            place = {"xycoords": panel.get_yaxis_transform(), "xytext": (7, 0), "textcoords": "offset points"}
            panel.annotate(number, (1, height), va="center", fontsize=7, **place)
    save_figure(figure, reporter.folder / name, reporter.config)


def draw_class_probabilities(reporter: Reporter, heading: str) -> None:
    """Mean predicted probability of every class on the forget set, a row per method."""
    probabilities = reporter.experiments[0]["class_probabilities"]
    classes = reporter.experiments[0]["class_names"]
    figure = Figure(figsize=(max(10, 0.65 * len(classes)), 1 + 0.25 * len(probabilities)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{heading}, forget set", fontsize=10)
    draw_matrix(axes, list(probabilities.values()), "mean probability", 1.0, ".2f")
    axes.set_xticks(range(len(classes)), classes, fontsize=8, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(len(probabilities)), probabilities)
    axes.set_xlabel("class")
    save_figure(figure, reporter.folder / "class_probabilities", reporter.config)


def draw_weights(reporter: Reporter, heading: str) -> None:
    """Histogram of the weights of every masked layer, and of those that the masking GCN zeroes."""
    histograms = reporter.experiments[0]["weight_histograms"]
    figure = Figure(figsize=(max(6, 4 * len(histograms)), 3), layout="constrained")
    figure.suptitle(heading, fontsize=9)
    blue = reporter.styles["mimu"]["color"]
    for axes, histogram in zip(figure.subplots(1, len(histograms), squeeze=False)[0], histograms):
        every, zeroed, edges = histogram["all"], histogram["zeroed"], histogram["edges"]
        axes.stairs(every, edges, fill=True, color="0.75", label=f"all {sum(every)} weights")
        axes.stairs(zeroed, edges, fill=True, color=blue, label=f"{sum(zeroed)} zeroed by mimu")
        axes.set_yscale("log")
        axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
        axes.set_ylabel("number of weights")
        axes.set_ylim(0.8, 1.2 * max(every) ** 1.3)  # room for the legend
        axes.legend(fontsize=8, loc="upper center")
    save_figure(figure, reporter.folder / "weights", reporter.config)
