"""The five plots of one experiment, from its JSON alone."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mimu.reporter import FORGET, RETAIN, ReporterConfig, class_title, method_styles, save_figure
from mimu.tables.pictures import Styles, draw_matrix, draw_panels

AXIS_LABELS = {"loss": "cross entropy (nats)", "score": "score (%)", "probability": "probability of the forget class"}
DRAWN_BY = (Path(__file__), Path(__file__).with_name("pictures.py"), Path(__file__).parents[1] / "reporter.py")


def draw(results: Mapping[str, Any], folder: Path, config: ReporterConfig) -> None:
    """Draws the plots of an experiment, from its JSON, into the folder of an evaluation.

    Those that are there stay, unless they are older than the JSON or the code that draws them.
    """
    folder = folder / "Metrics and Plots"
    metrics = folder / "metrics" / f"{results['id']}.json"
    latest = max(path.stat().st_mtime_ns for path in (metrics, *DRAWN_BY))
    styles = method_styles(results[FORGET] | results[RETAIN])
    kappa = "auto" if results["kappa_choice"] == "auto" else results["kappa"]
    about = results | {"class": class_title(results, results["forget_digit"]), "kappa": kappa}
    for name, (heading, draw_figure) in PLOTS.items():
        paths = [folder / "plots" / results["id"] / f"{name}.{suffix}" for suffix in config.format]
        if not all(path.is_file() and path.stat().st_mtime_ns >= latest for path in paths):
            save_figure(draw_figure(heading.format_map(about), results, styles), paths[0], config)


def draw_metrics(heading: str, results: Mapping[str, Any], styles: Styles, key: str) -> Figure:
    """A panel for every metric, a mark for every method and its number beside it."""
    metrics: Mapping[str, Mapping[str, float | None]] = results[key]
    panels: dict[str, list[list[float]]] = {}
    for of_method in metrics.values():
        for metric, number in of_method.items():
            panels.setdefault(AXIS_LABELS[metric], []).append([math.nan if number is None else number])
    figure, axes = draw_panels(heading, {name: styles[name] for name in metrics}, panels)
    for panel, rows in zip(axes, panels.values()):
        panel.margins(x=0.25)  # room for the numbers
        for height, (number,) in enumerate(rows):
            place = {"textcoords": "offset points", "va": "center", "fontsize": 7}
            panel.annotate(f"{round(number, 4):.3g}", (number, height), (8, 0), **place)
    return figure


def draw_class_probabilities(heading: str, results: Mapping[str, Any], styles: Styles) -> Figure:
    """Mean predicted probability of every class on the forget set, a row per method."""
    probabilities, classes = results["class_probabilities"], results["class_names"]
    size = (max(10, 0.65 * len(classes)), 1 + 0.25 * len(probabilities))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(heading, fontsize=10)
    axes = figure.subplots()
    draw_matrix(axes, list(probabilities.values()), "mean probability", 1.0, ".2f")
    axes.set_xticks(range(len(classes)), classes, fontsize=8, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(len(probabilities)), probabilities)
    axes.set_xlabel("class")
    return figure


def draw_weights(heading: str, results: Mapping[str, Any], styles: Styles) -> Figure:
    """Histogram of the weights of every masked layer, and of those that the masking GCN zeroes."""
    histograms = results["weight_histograms"]
    figure = Figure(figsize=(max(6, 4 * len(histograms)), 3), layout="constrained")
    figure.suptitle(heading, fontsize=9)
    parts = (("all", "0.75", "all {} weights"), ("zeroed", styles["mimu"]["color"], "{} zeroed by mimu"))
    for axes, histogram in zip(figure.subplots(1, len(histograms), squeeze=False)[0], histograms):
        for part, color, text in parts:
            # One outline, where `hist` draws a rectangle for every bin.
            label = text.format(sum(histogram[part]))
            axes.stairs(histogram[part], histogram["edges"], fill=True, color=color, label=label)
        axes.set_yscale("log")
        axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
        axes.set_ylabel("number of weights")
        axes.set_ylim(0.8, 1.2 * max(histogram["all"]) ** 1.3)  # room for the legend
        axes.legend(fontsize=8, loc="upper center")
    return figure


FORGETTING = "{dataset}, class {class}, kappa = {kappa}"
KEPT = "{dataset}, class {class}, K = {top_k} weights kept (original: all)"
FORGET_SET = "forget set of {split}, {classifier}"
RETAIN_SET = "retain set of {split}, {classifier}"
# Name of every plot: its heading, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[str, Mapping[str, Any], Styles], Figure]]] = {
    "unlearning": (f"{FORGETTING}, {FORGET_SET}", partial(draw_metrics, key=FORGET)),
    "performance_degradation": (f"{FORGETTING}, {RETAIN_SET}", partial(draw_metrics, key=RETAIN)),
    "mask_efficacy": (f"{KEPT}, {FORGET_SET}", partial(draw_metrics, key="mask_efficacy_metrics")),
    "class_probabilities": (f"{FORGETTING}, {FORGET_SET}", draw_class_probabilities),
    "weights": (f"{FORGETTING}, {{classifier}}", draw_weights),
}
