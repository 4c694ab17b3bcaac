"""The five plots of one experiment, from its JSON alone."""

import io
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mimu.reporter import FORGET, RETAIN, class_title, method_styles
from mimu.runs.files import written_whole
from mimu.tables.pictures import draw_matrix

Styles = dict[str, dict[str, Any]]
DRAWN_BY = (Path(__file__), Path(__file__).with_name("pictures.py"), Path(__file__).parents[1] / "reporter.py")
AXIS_LABELS = {"loss": "cross entropy (nats)", "score": "score (%)", "probability": "probability of the forget class"}


def missing(experiment: str, folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """The plots of an experiment (its id) that are not there, or older than its JSON or the code that draws them."""
    metrics = folder / "Metrics and Plots" / "metrics" / f"{experiment}.json"
    latest = max(path.stat().st_mtime_ns for path in (metrics, *DRAWN_BY) if path.is_file())
    place = folder / "Metrics and Plots" / "plots" / experiment
    paths = [place / ".".join(parts) for parts in product(PLOTS, formats)]
    return [path for path in paths if not path.is_file() or path.stat().st_mtime_ns < latest]


def draw(results: dict[str, Any], folder: Path, shared: dict[Any, Any], formats: Sequence[str] = ("png",)) -> None:
    """Draws the plots of an experiment that are missing, from its JSON, into the folder of an evaluation.

    shared: kept from one kappa of a request to the next: the picture of the mask efficacy, and the room that plots need
    """
    styles = method_styles([*results["methods"], *results[FORGET], *results[RETAIN]])
    size = (max(10, 0.65 * len(results[FORGET])), max(3, 0.2 * len(results[FORGET])))  # room for the names
    kappa = "auto" if results["kappa_choice"] == "auto" else results["kappa"]
    counts = {name: f"{name} ({n})" for name, n in results["num_zeroed"].items() if n not in (None, kappa)}
    styles |= {counts[name]: styles[name] for name in counts}
    about = {"class": class_title(results, results["forget_digit"]), "kappa": kappa}
    about["counts"] = " (weights zeroed in brackets)" if counts else ""
    for path in missing(results["id"], folder, formats):
        template, key, draw_content = PLOTS[path.stem]
        title = template.format_map(results | about)
        content = results[key]
        if key == "class_probabilities":
            content = {name: dict(zip(results["class_names"], of_method)) for name, of_method in content.items()}
        if "{counts}" in template:
            content = {counts.get(name, name): of_method for name, of_method in content.items()}
        source = json.dumps([title, content, path.suffix])
        room = (path.stem, *map(len, content))
        if source not in shared:
            figure = Figure(figsize=size)
            figure.subplots_adjust(wspace=0.35)
            figure.suptitle(title, fontsize=10)
            draw_content(figure, content, styles)
            # To find the room that all needs takes as long as to draw it: the other kappas have that of the first.
            if room not in shared:
                shared[room] = figure.get_tightbbox().padded(0.15)
            image = io.BytesIO()
            figure.savefig(image, format=path.suffix[1:], dpi=100, bbox_inches=shared[room])
            shared[source] = image.getvalue()
        with written_whole(path) as file:
            file.write(shared[source])


def draw_bars(figure: Figure, metrics: dict[str, dict[str, float | None]], styles: Styles) -> None:
    """A panel for every metric, a bar for every method."""
    colors = [styles[name]["color"] for name in metrics]
    names = next(iter(metrics.values()))
    for axes, metric in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        values = [of_method[metric] for of_method in metrics.values()]
        bars = axes.bar(list(metrics), [value or 0.0 for value in values], color=colors)
        # Upright, since side by side they would touch.
        labels = ["inf" if value is None else "<0.001" if 0 < value < 0.001 else f"{value:.3g}" for value in values]
        axes.bar_label(bars, labels, fontsize=7, rotation=90, padding=2)
        axes.set_ylabel(AXIS_LABELS[metric], fontsize=9)
        axes.set_ylim(0, 1.35 * (max(value or 0.0 for value in values) or 1.0))
        axes.tick_params(axis="x", rotation=90, labelsize=8)


def draw_class_probabilities(figure: Figure, probabilities: dict[str, dict[str, float]], styles: Styles) -> None:
    """Mean predicted probability of every class on the forget set, a row per method."""
    axes = figure.subplots()
    classes = next(iter(probabilities.values()))
    draw_matrix(axes, [list(each.values()) for each in probabilities.values()], "mean probability", 1.0, ".2f")
    axes.set_xticks(range(len(classes)), classes, fontsize=8, rotation=90 if max(map(len, classes)) > 2 else 0)
    axes.set_yticks(range(len(probabilities)), probabilities)
    axes.set_xlabel("class")


def draw_weights(figure: Figure, histograms: list[dict[str, Any]], styles: Styles) -> None:
    """Histogram of the weights of every masked layer, and of those that the masking GCN zeroes."""
    blue = styles["mimu"]["color"]
    for axes, histogram in zip(figure.subplots(1, len(histograms), squeeze=False)[0], histograms):
        for part, color, text in (("all", "0.75", "all {} weights"), ("zeroed", blue, "{} zeroed by mimu")):
            # One outline, where `hist` draws a rectangle for every bin.
            label = text.format(sum(histogram[part]))
            axes.stairs(histogram[part], histogram["edges"], fill=True, color=color, label=label)
        axes.set_yscale("log")
        axes.set_xlabel(f"weight of layer {histogram['layer']}, {' x '.join(map(str, histogram['shape']))}")
        axes.set_ylabel("number of weights")
        axes.set_ylim(0.8, 1.2 * max(histogram["all"]) ** 1.3)  # room for the legend
        axes.legend(fontsize=8, loc="upper center")


FORGETTING = "{dataset}, class {class}, kappa = {kappa}"
KEPT = "{dataset}, class {class}, K = {top_k} weights kept (original: all)"
FORGET_SET, RETAIN_SET = (f"{part} set of {{split}}, {{classifier}}" for part in ("forget", "retain"))
# Name of every plot: its title, what it shows of the JSON, and how.
PLOTS: dict[str, tuple[str, str, Callable[[Figure, Any, Styles], None]]] = {
    "unlearning": (f"{FORGETTING}{{counts}}, {FORGET_SET}", FORGET, draw_bars),
    "performance_degradation": (f"{FORGETTING}{{counts}}, {RETAIN_SET}", RETAIN, draw_bars),
    "mask_efficacy": (f"{KEPT}, {FORGET_SET}", "mask_efficacy_metrics", draw_bars),
    "class_probabilities": (f"{FORGETTING}{{counts}}, {FORGET_SET}", "class_probabilities", draw_class_probabilities),
    "weights": (f"{FORGETTING}, {{classifier}}", "weight_histograms", draw_weights),
}
